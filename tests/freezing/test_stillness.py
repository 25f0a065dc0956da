"""What steps provably leave alone is not put back, everything else is, and second moments are no zeros meanwhile."""

from __future__ import annotations

import copy
import math
import random
import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lightning_rnf.freezing import Freezer
from lightning_rnf.freezing.held import HeldRows
from lightning_rnf.freezing.slices import Slice
from lightning_rnf.freezing.stillness import SecondMoments

ADAM, ADAMW, SGD = torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD

STILL = {
    "sgd": lambda p: SGD(p, lr=0.1),
    "sgd, momentum": lambda p: SGD(p, lr=0.1, momentum=0.9),
    "sgd, nesterov": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "sgd, fused": lambda p: SGD(p, lr=0.1, momentum=0.9, fused=True),
    "adam": lambda p: ADAM(p, lr=0.01),
    "adam, foreach": lambda p: ADAM(p, lr=0.01, foreach=True),
    "adam, fused": lambda p: ADAM(p, lr=0.01, fused=True),
    "adam, amsgrad": lambda p: ADAM(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: ADAMW(p, lr=0.01, weight_decay=0.0),
}


class Restless(ADAM):
    """A user's: moves what has no gradient, uncounted."""

    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(0.01)
        return loss


OTHERS = {
    "adamw, decay": lambda p: ADAMW(p, lr=0.01),
    "adam, decay": lambda p: ADAM(p, lr=0.01, weight_decay=0.1),
    "sgd, decay": lambda p: SGD(p, lr=0.1, weight_decay=0.1),
    "sgd, nesterov, foreach": lambda p: SGD(
        p, lr=0.1, momentum=0.9, nesterov=True, foreach=True
    ),  # writes to gradients
    "adam, maximize": lambda p: ADAM(p, lr=0.01, maximize=True),
    "adam, no eps": lambda p: ADAM(p, lr=0.01, eps=0.0),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=2),
    "a subclass": lambda p: Restless(p, lr=0.01),
}


def build(optimizer, seed=0):
    """A network of which rows, a block, all but a block and entries anywhere are frozen: net, masks, optimizer."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 3))
    half, most = torch.arange(8) % 2 == 0, torch.arange(8) > 1
    factors = {
        "0.weight": torch.where(half, 0.0, 1.0),
        "0.bias": torch.where(half, 0.0, 1.0),
        "2.weight": torch.where(half[:, None] & half, 0.0, 1.0),
        "4.weight": torch.where(most[:, None] & most, 0.0, 1.0),
        "5.weight": torch.where(torch.rand(3, 8) < 0.5, 0.0, 1.0),
    }
    freezer, made = Freezer(net, factors), optimizer(list(net.parameters()))
    frozen = {
        name: (factor == 0).view(*factor.shape, *[1] * (net.get_parameter(name).ndim - factor.ndim))
        for name, factor in factors.items()
    }
    frozen = {name: mask.expand(net.get_parameter(name).shape) for name, mask in frozen.items()}
    return net, frozen, freezer, made


def closure_of(net, optimizer, number, between=lambda: None):
    generator = torch.Generator().manual_seed(number)
    x, y = torch.randn(16, 6, generator=generator), torch.randint(3, (16,), generator=generator)

    def closure():
        optimizer.zero_grad()
        loss = cross_entropy(net(x), y)
        loss.backward()
        between()
        return loss

    return closure


def held(net, frozen):
    return {name: net.get_parameter(name).detach()[mask].clone() for name, mask in frozen.items()}


def assert_held(net, frozen, before):
    for name, values in held(net, frozen).items():
        assert torch.equal(values.view(torch.int32), before[name].view(torch.int32)), name


@pytest.fixture
def pins(monkeypatch):
    """How often each parameter was put back."""
    counted = {}
    pin = HeldRows.pin

    def counting(self):
        counted[self.parameter] = counted.get(self.parameter, 0) + 1
        pin(self)

    monkeypatch.setattr(HeldRows, "pin", counting)
    return counted


# -- where it is known ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", STILL)
def test_what_these_optimizers_leave_alone_stays_to_the_bit_and_nothing_is_put_back(kind, pins):
    net, frozen, freezer, optimizer = build(STILL[kind])
    with torch.no_grad():
        net[2].weight[0, :6:2] = torch.tensor([-0.0, 0.0, 1e-40])
    before, all_before = held(net, frozen), copy.deepcopy(net)
    freezer.attach([optimizer])
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append(held(net, frozen)))
    for number in range(20):
        optimizer.step(closure_of(net, optimizer, number))
        freezer.pin(written_only=True)
        assert_held(net, frozen, before)
    assert pins == {}
    assert len(seen) == 20
    for values in seen:
        assert all(torch.equal(values[name], before[name]) for name in before)
    for name, parameter in net.named_parameters():
        mask = frozen.get(name, torch.zeros_like(parameter, dtype=torch.bool))
        assert (parameter != all_before.get_parameter(name))[~mask].all()


def test_a_first_moment_is_looked_at_in_the_first_step_and_not_in_each(monkeypatch):
    net, frozen, freezer, optimizer = build(STILL["adam, fused"])  # whose second moments are left alone
    looked, chosen = [], Slice.chosen
    monkeypatch.setattr(Slice, "chosen", lambda self, *given: looked.append(self) or chosen(self, *given))
    freezer.attach([optimizer])
    for number in range(6):
        optimizer.step(closure_of(net, optimizer, number))
        assert len(looked) == len(frozen)


@pytest.mark.parametrize("kind", OTHERS)
def test_with_all_others_it_is_put_back_after_every_step(kind, pins):
    net, frozen, freezer, optimizer = build(OTHERS[kind])
    before = held(net, frozen)
    freezer.attach([optimizer])
    for number in range(10):
        optimizer.step(closure_of(net, optimizer, number))
        assert_held(net, frozen, before)
    assert set(pins) == {net.get_parameter(name) for name in frozen}
    assert min(pins.values()) >= 10


@pytest.mark.parametrize("kind", STILL)
def test_a_warm_optimizer_is_known_only_if_what_it_remembers_of_frozen_entries_is_zero(kind, pins):
    net, frozen, freezer, optimizer = build(STILL[kind])
    for number in range(3):
        optimizer.step(closure_of(net, optimizer, number))
    before = held(net, frozen)
    freezer.attach([optimizer])
    for number in range(5):
        optimizer.step(closure_of(net, optimizer, number))
        assert_held(net, frozen, before)
    is_warm = kind != "sgd"
    assert bool(pins) == is_warm


def test_a_loaded_state_is_looked_at(pins):
    net, frozen, freezer, optimizer = build(STILL["adam"])
    twin = build(STILL["adam"])
    for number in range(3):
        twin[3].step(closure_of(twin[0], twin[3], number))
    warm = copy.deepcopy(twin[3].state_dict())
    before = held(net, frozen)
    freezer.attach([optimizer])
    optimizer.step(closure_of(net, optimizer, 0))
    cold = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(cold)
    optimizer.step(closure_of(net, optimizer, 1))
    assert pins == {}
    optimizer.load_state_dict(warm)
    for number in range(3):
        optimizer.step(closure_of(net, optimizer, number))
        assert_held(net, frozen, before)
    assert min(pins.values()) >= 3


# -- where somebody else has a hand in it -----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_frozen_entries_are_bit_equal_after_every_step_whoever_does_what(seed):
    chosen = random.Random(seed)
    kinds = {**STILL, **OTHERS}
    kind = chosen.choice(sorted(set(kinds) - {"lbfgs"}))
    net, frozen, freezer, optimizer = build(kinds[kind], seed)
    if chosen.random() < 0.5:
        added = {"params": [nn.Parameter(torch.zeros(2))], "weight_decay": 0.1}
        optimizer.add_param_group(added)
    before = held(net, frozen)
    freezer.attach([optimizer])

    def clipped_by_norm():
        nn.utils.clip_grad_norm_(net.parameters(), 0.1)

    def clipped_by_value():
        nn.utils.clip_grad_value_(net.parameters(), 0.01)

    def broken():  # a loss of NaN in one layer, which clipping spreads
        net[5].bias.grad[0] = math.nan
        clipped_by_norm()

    def noisy():
        for parameter in net.parameters():
            parameter.grad.add_(torch.randn_like(parameter))

    def replaced():
        net[0].weight.grad = torch.ones_like(net[0].weight)

    def written():
        with torch.no_grad():
            net[0].weight.add_(1.0)

    deeds = [lambda: None] * 3 + [clipped_by_norm, clipped_by_value, broken, noisy, replaced, written]
    with warnings.catch_warnings():
        if kind != "a subclass":
            warnings.simplefilter("error")
        for number in range(12):
            optimizer.step(closure_of(net, optimizer, number, chosen.choice(deeds)))
            assert_held(net, frozen, before)
            if chosen.random() < 0.2:
                written()
                freezer.pin(written_only=True)
                assert_held(net, frozen, before)
            if chosen.random() < 0.2:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            if chosen.random() < 0.1:
                optimizer.param_groups[0]["weight_decay"] = 0.1
    freezer.detach()
    assert_held(net, frozen, before)


def test_gradients_that_are_accumulated_or_stay_are_known(pins):
    net, frozen, freezer, optimizer = build(STILL["adam"])
    before = held(net, frozen)
    freezer.attach([optimizer])
    x = torch.randn(16, 6)
    for number in range(6):
        for _ in range(number % 3):  # of none, the gradient of before is still there
            net(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=number < 4)
        assert_held(net, frozen, before)
    assert pins == {}


def test_a_gradient_in_the_place_of_the_masked_one_is_not_known_however_often_it_was_written_to(pins):
    net, frozen, freezer, optimizer = build(STILL["adam"])
    before = held(net, frozen)
    freezer.attach([optimizer])

    def replaced():
        other = torch.ones_like(net[0].weight)
        while other._version < net[0].weight.grad._version:
            other.mul_(2.0)
        net[0].weight.grad = other

    for number in range(3):  # the third step is not looked at, and the first moment was zero before
        assert pins == {}
        optimizer.step(closure_of(net, optimizer, number, replaced if number == 2 else lambda: None))
        assert_held(net, frozen, before)
    assert set(pins) == {net[0].weight}


def test_two_optimizers_of_which_one_is_not_known(pins):
    net, frozen, freezer, known = build(lambda p: ADAM(p[:2]))
    unknown = torch.optim.RMSprop(list(net.parameters())[2:])
    before = held(net, frozen)
    freezer.attach([known, unknown])
    for number in range(4):
        for optimizer in (known, unknown):
            optimizer.step(closure_of(net, optimizer, number))
            assert_held(net, frozen, before)
    # Its own are put back after each of its steps and of the other's, the others only after its own.
    assert pins[net[0].weight] == 4
    assert pins[net[2].weight] >= 8


@pytest.mark.filterwarnings("error")
def test_what_was_written_uncounted_is_found_soon_warned_of_once_and_put_back_after_every_step(pins):
    net, frozen, freezer, optimizer = build(STILL["adam"])
    before = held(net, frozen)
    freezer.attach([optimizer])
    optimizer.step(closure_of(net, optimizer, 0))
    net[2].weight.data.clamp_(-0.01, 0.01)
    with pytest.warns(UserWarning, match=r"^2\.weight: frozen rows were moved"):
        optimizer.step(closure_of(net, optimizer, 1))  # the second step is looked at
    assert_held(net, frozen, before)
    assert set(pins) == {net[2].weight}
    for number in range(2, 10):
        net[2].weight.data.clamp_(-0.01, 0.01)
        optimizer.step(closure_of(net, optimizer, number))
        assert_held(net, frozen, before)
    net[4].weight.data.zero_()
    with pytest.warns(UserWarning, match=r"^4\.weight: "):
        freezer.audit()
    assert_held(net, frozen, before)


def test_an_audit_puts_back_what_was_written_and_says_nothing(recwarn):
    net, frozen, freezer, optimizer = build(STILL["adam"])
    before = held(net, frozen)
    freezer.attach([optimizer])
    optimizer.step(closure_of(net, optimizer, 0))
    with torch.no_grad():
        net[2].weight.zero_()
    freezer.audit()
    assert_held(net, frozen, before)
    assert not recwarn.list


def test_bits_are_compared():
    parameter = nn.Parameter(torch.tensor([0.0, math.nan, 1.0]))
    two = Slice((torch.tensor([0, 1]),))
    value = two.read(parameter.detach())
    assert two.is_at(parameter.detach(), value)
    assert two.is_at(torch.tensor([0.0, math.nan, 2.0]), value)
    assert not two.is_at(torch.tensor([-0.0, math.nan, 1.0]), value)


# -- second moments ---------------------------------------------------------------------------------------------------

FILLED = {
    "adam": STILL["adam"],
    "adam, foreach": STILL["adam, foreach"],
    "adam, amsgrad": STILL["adam, amsgrad"],
    "adamw, decay": OTHERS["adamw, decay"],
}
SECONDS = ("exp_avg_sq", "max_exp_avg_sq")


def seconds(net, optimizer, frozen, *, of_frozen=True):
    return [
        optimizer.state[net.get_parameter(name)][moment][mask if of_frozen else ~mask]
        for name, mask in frozen.items()
        for moment in SECONDS
        if moment in optimizer.state[net.get_parameter(name)]
    ]


@pytest.mark.parametrize("kind", FILLED)
def test_second_moments_of_frozen_entries_are_no_zeros_and_nothing_else_is_changed_by_that(kind, monkeypatch):
    def train():
        net, frozen, freezer, optimizer = build(FILLED[kind])
        freezer.attach([optimizer])
        states = []
        for number in range(8):
            optimizer.step(closure_of(net, optimizer, number))
            if number == 4:
                states.append(copy.deepcopy(optimizer.state_dict()["state"]))
        filled = [moment.clone() for moment in seconds(net, optimizer, frozen)]
        freezer.detach()
        return net, filled, [*states, optimizer.state_dict()["state"]]

    net, filled, states = train()
    assert all((moment > 0.9).all() for moment in filled)
    monkeypatch.setattr(SecondMoments, "fill", lambda *_: None)
    twin, zeros, expected = train()
    assert not any(moment.any() for moment in zeros)
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter, twin.get_parameter(name))
    for state, other in zip(states, expected, strict=True):
        assert state.keys() == other.keys()
        for number, moments in state.items():
            for moment, value in moments.items():
                assert torch.equal(value, other[number][moment]), moment


@pytest.mark.parametrize("betas", [(0.9, 0.5), (0.9, 0.0), (0.0, 0.999)])
def test_they_are_filled_again_before_they_are_no_normal_numbers(betas):
    net, frozen, freezer, optimizer = build(lambda p: ADAM(p, betas=betas))
    freezer.attach([optimizer])
    for number in range(40):
        optimizer.step(closure_of(net, optimizer, number))
        assert all((moment >= torch.finfo(torch.float32).tiny).all() for moment in seconds(net, optimizer, frozen))


def test_of_what_is_let_go_in_the_same_fit_they_are_zero_and_it_learns():
    net, frozen, freezer, optimizer = build(STILL["adam"])
    freezer.attach([optimizer])
    for number in range(3):
        optimizer.step(closure_of(net, optimizer, number))
    assert all(moment.all() for moment in seconds(net, optimizer, frozen))
    freezer.change({"0.bias": torch.zeros(8)})
    assert not any(moment.any() for moment in seconds(net, optimizer, frozen))
    before = held(net, frozen)
    optimizer.step(closure_of(net, optimizer, 4))
    moved = (net[2].weight.detach()[frozen["2.weight"]] - before["2.weight"]).abs()
    assert (moved > 1e-3).all()  # the size of Adam's step, however small the gradient


def test_warm_ones_stay_what_they_are():
    net, frozen, freezer, optimizer = build(OTHERS["adamw, decay"])
    optimizer.step(closure_of(net, optimizer, 0))
    twin = copy.deepcopy((net, optimizer.state_dict()))
    freezer.attach([optimizer])
    other = build(OTHERS["adamw, decay"])
    other[0].load_state_dict(twin[0].state_dict())
    other[3].load_state_dict(twin[1])
    for number in range(1, 4):
        optimizer.step(closure_of(net, optimizer, number))
    for name, mask in frozen.items():
        moments = optimizer.state[net.get_parameter(name)]
        start = other[3].state[other[0].get_parameter(name)]["exp_avg_sq"][mask]
        torch.testing.assert_close(moments["exp_avg_sq"][mask], start * 0.999**3)


def test_where_a_gradient_came_after_all_no_zero_is_given_back():
    net, _, freezer, optimizer = build(STILL["adam"])
    freezer.attach([optimizer])
    optimizer.step(closure_of(net, optimizer, 0))

    def noisy():
        net[0].weight.grad[0, 0] = 1.0

    optimizer.step(closure_of(net, optimizer, 1, noisy))
    moments = optimizer.state[net[0].weight]
    assert moments["exp_avg"][0, 0] != 0
    freezer.detach()
    assert moments["exp_avg_sq"][0, 0] > 0
    assert not moments["exp_avg_sq"][0, 1:].any()
