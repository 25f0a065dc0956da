from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable

import pytest
import torch
from records import ConvNet, Mlp, Network, batch, every_second, head_parameters, make, record_of, state_of
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_rnf.anatomy.units import UnitLayer, UnitMap
from lightning_rnf.freezing import rows
from lightning_rnf.freezing.freezer import Freezer, check_elasticity, elasticities
from lightning_rnf.memory.state import FreezeState

Parameters = list[nn.Parameter]


@pytest.fixture(params=["all gradients", "gradients of free rows"], autouse=True)
def spared(request, monkeypatch):
    """Everything holds too where gradients of frozen rows are not even worked out: small layers, too, in half of it."""
    if request.param == "gradients of free rows":
        monkeypatch.setattr(rows, "LARGEST_LEARNING_SHARE", {"linear": 1.0, "convolution": 1.0})
        monkeypatch.setattr(rows, "FEWEST_PRODUCTS", 0)
        monkeypatch.setattr(rows, "FEWEST_WEIGHTS", 0)


class Noise(torch.optim.Optimizer):
    """Moves every parameter, whatever its gradient."""

    def __init__(self, parameters: Iterable[nn.Parameter], *, through_data: bool) -> None:
        super().__init__(parameters, {})
        self.through_data = through_data

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        with torch.enable_grad():
            loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                target = parameter.data if self.through_data else parameter
                target.add_(torch.randn_like(target), alpha=0.1)
        return loss


class DescribedSgd(torch.optim.SGD):
    """A user's subclass: torch runs the step hooks around its step *and* around the step that it calls."""

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        return super().step(closure)


class Hookless:
    """An optimizer of no known make."""

    def step(self, closure: Callable[[], Tensor]) -> None:
        closure()


def adamw(**options: bool) -> Callable[[Parameters], list[torch.optim.Optimizer]]:
    return lambda parameters: [torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1, **options)]


def muon(parameters: Parameters) -> list[torch.optim.Optimizer]:
    matrices = [parameter for parameter in parameters if parameter.ndim == 2]
    rest = [parameter for parameter in parameters if parameter.ndim != 2]
    return [torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1), torch.optim.AdamW(rest, lr=0.01, weight_decay=0.1)]


OPTIMIZERS: dict[str, Callable[[Parameters], list[torch.optim.Optimizer]]] = {
    "sgd": lambda parameters: [torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01)],
    "adam-l2": lambda parameters: [torch.optim.Adam(parameters, lr=0.01, weight_decay=0.01)],
    "adamw": adamw(foreach=False),
    "adamw-foreach": adamw(foreach=True),
    "adamw-fused": adamw(fused=True),
    "rmsprop": lambda parameters: [torch.optim.RMSprop(parameters, lr=1e-3, momentum=0.9, weight_decay=0.01)],
    "nadam": lambda parameters: [torch.optim.NAdam(parameters, lr=0.01, weight_decay=0.01)],
    "adagrad": lambda parameters: [torch.optim.Adagrad(parameters, lr=0.05)],
    "lbfgs": lambda parameters: [torch.optim.LBFGS(parameters, lr=0.1, max_iter=3, history_size=5)],
    "adafactor": lambda parameters: [torch.optim.Adafactor(parameters, lr=0.01, weight_decay=0.01)],
    "muon": muon,
    "noise": lambda parameters: [Noise(parameters, through_data=False)],
    "noise-data": lambda parameters: [Noise(parameters, through_data=True)],
}
MOMENTS = {  # where an optimizer keeps what it remembers of past gradients
    "sgd": "momentum_buffer",
    "adam-l2": "exp_avg",
    "adamw": "exp_avg",
    "adamw-foreach": "exp_avg",
    "adamw-fused": "exp_avg",
    "rmsprop": "momentum_buffer",
    "nadam": "exp_avg",
    "muon": "exp_avg",
}

each_optimizer = pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param(
            name, marks=pytest.mark.skipif(name == "muon" and not hasattr(torch.optim, "Muon"), reason="no Muon yet")
        )
        for name in OPTIMIZERS
    ],
)
each_net = pytest.mark.parametrize("kind", [Mlp, ConvNet])


def frozen_rows(net: Network, state: FreezeState) -> dict[str, Tensor]:
    """By parameter name, which rows must stay: the promise in plain words, without the code that keeps it."""
    relevant = {
        layer.name: torch.stack([record.relevant[layer.name] for record in state.tasks.values()]).any(dim=0)
        for layer in net.layers
    }
    rows = {name: relevant[layer.name] for layer in net.layers for name in layer.parameters}
    whole = [*net.shared, *(name for task in state.tasks for name in head_parameters(task))]
    parameters = dict(net.named_parameters())
    return {name: torch.zeros(len(parameters[name]), dtype=torch.bool) for name in parameters} | {
        **rows,
        **{name: torch.ones(len(parameters[name]), dtype=torch.bool) for name in whole},
    }


def values(net: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in net.named_parameters()}


def gradients(net: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in net.named_parameters() if parameter.grad is not None}


def train(net: Network, optimizers: list[torch.optim.Optimizer], steps: int) -> None:
    """As Lightning does it: every step gets a closure."""
    for _ in range(steps):
        for optimizer in optimizers:
            x, y = batch(net)

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                net.zero_grad()
                loss = cross_entropy(net(x), y)
                loss.backward()
                return loss

            optimizer.step(closure)


def backward(net: Network, data: tuple[Tensor, Tensor]) -> None:
    x, y = data
    cross_entropy(net(x), y).backward()


def freeze(net: Network, optimizers: list[torch.optim.Optimizer], **factors: float) -> Freezer:
    freezer = Freezer(net, elasticities(state_of(net), **factors))
    freezer.stop_gradients()
    freezer.attach(optimizers)
    return freezer


def assert_frozen(net: Network, before: dict[str, Tensor], frozen: dict[str, Tensor]) -> None:
    for name, value in values(net).items():
        assert torch.equal(value[frozen[name]], before[name][frozen[name]]), f"frozen rows of {name} moved"


def assert_free_moved(net: Network, before: dict[str, Tensor], frozen: dict[str, Tensor]) -> None:
    for name, value in values(net).items():
        moved = (value != before[name]).flatten(1).any(dim=1) if value.ndim > 1 else value != before[name]
        assert moved[~frozen[name]].all(), f"free rows of {name} did not move"


def hooks(net: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> int:
    return sum(len(parameter._post_accumulate_grad_hooks or ()) for parameter in net.parameters()) + sum(
        len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks) for optimizer in optimizers
    )


# -- frozen is frozen -------------------------------------------------------------------------------------------------


@each_net
@each_optimizer
def test_frozen_rows_are_bit_equal_after_any_optimizer_and_free_rows_move(kind, optimizer):
    net = make(kind)
    net.heads.activate("second")
    optimizers = OPTIMIZERS[optimizer](list(net.parameters()))
    before, frozen = values(net), frozen_rows(net, state_of(net))
    freeze(net, optimizers)
    train(net, optimizers, 50)
    assert_frozen(net, before, frozen)
    assert_free_moved(net, before, frozen)


@each_net
@each_optimizer
def test_frozen_rows_are_bit_equal_with_an_optimizer_that_was_warm_before(kind, optimizer):
    net = make(kind)
    net.heads.activate("second")
    optimizers = OPTIMIZERS[optimizer](list(net.parameters()))
    train(net, optimizers, 5)
    before, frozen = values(net), frozen_rows(net, state_of(net))
    if optimizer in MOMENTS:
        moments = [
            one.state[parameter][MOMENTS[optimizer]][frozen[name]]
            for one in optimizers
            for name, parameter in net.named_parameters()
            if MOMENTS[optimizer] in one.state[parameter]
        ]
        assert sum(int(moment.count_nonzero()) for moment in moments) > 0
    freeze(net, optimizers)
    train(net, optimizers, 50)
    assert_frozen(net, before, frozen)
    assert_free_moved(net, before, frozen)


@each_net
def test_rows_of_two_tasks_are_frozen_and_both_heads(kind):
    net = make(kind)
    one_unit = {layer.name: torch.arange(layer.units) == 1 for layer in net.layers}
    state = state_of(net, record_of(net), record_of(net, "second", relevant=one_unit))
    optimizers = [Noise(net.parameters(), through_data=False)]
    before, frozen = values(net), frozen_rows(net, state)
    Freezer(net, elasticities(state)).attach(optimizers)
    train(net, optimizers, 5)
    assert_frozen(net, before, frozen)
    assert_free_moved(net, before, frozen)
    assert all(frozen[name].all() for task in ("first", "second") for name in head_parameters(task))


def test_rows_are_held_at_the_values_they_have_when_hooks_are_attached():
    net = make(Mlp)
    net.heads.activate("second")
    optimizers = OPTIMIZERS["sgd"](list(net.parameters()))
    freezer = Freezer(net, elasticities(state_of(net)))
    with torch.no_grad():  # a checkpoint is loaded
        for parameter in net.parameters():
            parameter.add_(1.0)
    before, frozen = values(net), frozen_rows(net, state_of(net))
    freezer.attach(optimizers)
    train(net, optimizers, 3)
    assert_frozen(net, before, frozen)


@each_net
def test_frozen_rows_are_bit_equal_in_bfloat16(kind):
    net = make(kind).bfloat16()
    net.heads.activate("second")
    optimizers = adamw()(list(net.parameters()))
    before, frozen = values(net), frozen_rows(net, state_of(net))
    freeze(net, optimizers)
    train(net, optimizers, 20)
    assert_frozen(net, before, frozen)


@each_net
def test_accumulated_gradients_are_zero_in_frozen_rows_and_the_sum_elsewhere(kind):
    net = make(kind)
    net.heads.activate("second")
    twin = copy.deepcopy(net)
    frozen = frozen_rows(net, state_of(net))
    optimizers = adamw()(list(net.parameters()))
    before = values(net)
    freeze(net, optimizers)
    for _ in range(3):
        micro_batches = [batch(net) for _ in range(4)]
        net.zero_grad()
        twin.zero_grad()
        twin.load_state_dict(net.state_dict())
        for data in micro_batches:
            backward(net, data)
            backward(twin, data)
        for name, gradient in gradients(net).items():
            expected = gradients(twin)[name].clone()
            expected[frozen[name]] = 0.0
            assert torch.equal(gradient, expected), name
        optimizers[0].step()
    assert_frozen(net, before, frozen)


@each_net
def test_clipping_by_norm_sees_only_the_free_gradients(kind):
    net = make(kind)
    net.heads.activate("second")
    twin = copy.deepcopy(net)
    frozen = frozen_rows(net, state_of(net))
    optimizers = OPTIMIZERS["sgd"](list(net.parameters()))
    before = values(net)
    freeze(net, optimizers)
    data = batch(net)
    backward(net, data)
    backward(twin, data)
    free = [gradient[~frozen[name]] for name, gradient in gradients(twin).items()]
    expected = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in free))
    everything = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients(twin).values()))
    assert everything > 1.05 * expected
    assert float(nn.utils.clip_grad_norm_(net.parameters(), 1e-3)) == pytest.approx(expected, rel=1e-5)
    optimizers[0].step()
    assert_frozen(net, before, frozen)


@each_net
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "adamw-fused"])
def test_a_loss_of_nan_leaves_frozen_rows_alone_and_their_gradients_zero(kind, optimizer):
    net = make(kind)
    net.heads.activate("second")
    frozen = frozen_rows(net, state_of(net))
    optimizers = OPTIMIZERS[optimizer](list(net.parameters()))
    before = values(net)
    freeze(net, optimizers)
    x, y = batch(net)
    for _ in range(3):
        net.zero_grad()
        (cross_entropy(net(x), y) * math.nan).backward()
        for name, gradient in gradients(net).items():
            assert not gradient[frozen[name]].count_nonzero(), name
            assert gradient[~frozen[name]].isnan().any(), name
        optimizers[0].step()
    assert_frozen(net, before, frozen)


# -- what is frozen whole leaves training -----------------------------------------------------------------------------


def test_parameters_that_are_frozen_whole_get_no_gradient_and_their_flags_back():
    net = make(Mlp)
    net.heads.activate("second")
    net.fc2.weight.requires_grad_(False)  # by the user, for good
    flags = {name: parameter.requires_grad for name, parameter in net.named_parameters()}
    all_of_fc1 = every_second(net.layers) | {"fc1": torch.ones(6, dtype=torch.bool)}
    state = state_of(net, record_of(net, relevant=all_of_fc1))
    whole = {"fc1.weight", "fc1.bias", *net.shared, *head_parameters("first")}

    freezer = Freezer(net, elasticities(state))
    freezer.stop_gradients()
    assert {name for name, parameter in net.named_parameters() if not parameter.requires_grad} == whole | {"fc2.weight"}

    optimizers = OPTIMIZERS["adam-l2"](list(net.parameters()))
    freezer.attach(optimizers)
    train(net, optimizers, 2)
    assert whole.isdisjoint(gradients(net))
    assert "fc2.bias" in gradients(net)

    freezer.detach()
    assert {name: parameter.requires_grad for name, parameter in net.named_parameters()} == flags


def test_shared_parameters_and_the_finished_head_are_frozen_whole_even_if_they_run():
    net = make(Mlp)
    assert net.heads.active == "first"
    net.requires_grad_(True)
    before, frozen = values(net), frozen_rows(net, state_of(net))
    optimizers = [Noise(net.parameters(), through_data=False)]
    Freezer(net, elasticities(state_of(net))).attach(optimizers)
    train(net, optimizers, 3)
    for name in (*net.shared, *head_parameters("first")):
        assert frozen[name].all()
        assert torch.equal(net.get_parameter(name), before[name])
        assert not net.get_parameter(name).grad.count_nonzero()


# -- hooks ------------------------------------------------------------------------------------------------------------


@each_net
def test_detach_removes_every_hook_and_twice_is_safe(kind):
    net = make(kind)
    net.heads.activate("second")
    optimizers = [
        torch.optim.SGD(net.heads.parameters(), lr=0.1),
        torch.optim.SGD([p for name, p in net.named_parameters() if not name.startswith("heads")], lr=0.1),
    ]
    optimizers[0].register_step_post_hook(lambda *_: None)  # the user's own stay
    net.heads.tasks["second"].bias.register_post_accumulate_grad_hook(lambda _: None)
    own = hooks(net, optimizers)
    assert own == 2
    freezer = freeze(net, optimizers)
    assert freezer.attached
    assert hooks(net, optimizers) > own
    for _ in range(2):
        freezer.detach()
        assert not freezer.attached
        assert hooks(net, optimizers) == own
    before = values(net)
    train(net, optimizers, 1)
    for layer in net.layers:
        assert not torch.equal(net.get_parameter(layer.parameters[0]), before[layer.parameters[0]])


def test_detach_before_attach_is_safe():
    net = make(Mlp)
    freezer = Freezer(net, elasticities(state_of(net)))
    freezer.detach()
    assert not freezer.attached


def test_a_freezer_can_be_attached_again_after_detach():
    net = make(Mlp)
    net.heads.activate("second")
    optimizers = OPTIMIZERS["sgd"](list(net.parameters()))
    freezer = freeze(net, optimizers)
    attached = hooks(net, optimizers)
    freezer.detach()
    train(net, optimizers, 2)
    before, frozen = values(net), frozen_rows(net, state_of(net))
    freezer.stop_gradients()
    freezer.attach(optimizers)
    assert hooks(net, optimizers) == attached
    train(net, optimizers, 2)
    assert_frozen(net, before, frozen)


def test_an_optimizer_without_step_hooks_is_refused_and_nothing_stays_attached():
    net = make(Mlp)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    freezer = Freezer(net, elasticities(state_of(net)))
    with pytest.raises(TypeError, match="Hookless"):
        freezer.attach([optimizer, Hookless()])
    assert not freezer.attached
    assert hooks(net, [optimizer]) == 0


# -- elasticity is a learning rate ------------------------------------------------------------------------------------


def movement(net: Network, make_optimizers: Callable[[Parameters], list], data: tuple[Tensor, Tensor], **factors):
    """How far each parameter goes in one step of each optimizer, on one batch."""
    optimizers = make_optimizers(list(net.parameters()))
    if factors:
        freezer = Freezer(net, elasticities(state_of(net), **factors))
        freezer.stop_gradients()
        freezer.attach(optimizers)
    before = values(net)
    backward(net, data)
    for optimizer in optimizers:
        optimizer.step()
    return {name: value - before[name] for name, value in values(net).items()}


ONE_STEP: dict[str, Callable[[Parameters], list[torch.optim.Optimizer]]] = {
    "sgd": lambda parameters: [torch.optim.SGD(parameters, lr=0.1)],
    "adam": lambda parameters: [torch.optim.Adam(parameters, lr=0.01)],
    "adamw": lambda parameters: [torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)],
    "two-optimizers": lambda parameters: [
        torch.optim.SGD(parameters[0::2], lr=0.1),
        torch.optim.Adam(parameters[1::2], lr=0.01),
    ],
}


@each_net
@pytest.mark.parametrize("optimizer", ONE_STEP)
@pytest.mark.parametrize(("elasticity", "irrelevant_elasticity"), [(0.1, 1.0), (0.0, 0.1), (0.1, 0.5), (1.0, 0.25)])
def test_a_factor_scales_how_far_rows_move(kind, optimizer, elasticity, irrelevant_elasticity):
    net = make(kind).double()
    net.heads.activate("second")
    twin = copy.deepcopy(net)
    data = batch(net)
    full = movement(twin, ONE_STEP[optimizer], data)
    slowed = movement(
        net, ONE_STEP[optimizer], data, elasticity=elasticity, irrelevant_elasticity=irrelevant_elasticity
    )
    relevant = every_second(net.layers)
    for layer in net.layers:
        for name in layer.parameters:
            rows = relevant[layer.name]
            assert full[name].abs().max() > 1e-4
            torch.testing.assert_close(slowed[name][rows], elasticity * full[name][rows], rtol=1e-3, atol=1e-10)
            torch.testing.assert_close(
                slowed[name][~rows], irrelevant_elasticity * full[name][~rows], rtol=1e-3, atol=1e-10
            )
    for name in net.shared:
        torch.testing.assert_close(slowed[name], elasticity * full[name], rtol=1e-3, atol=1e-10)
    for name in head_parameters("second"):
        torch.testing.assert_close(slowed[name], full[name])


def test_a_factor_counts_once_when_an_optimizer_calls_the_step_of_its_base():
    torch.optim.SGD([nn.Parameter(torch.zeros(1))])  # torch gives a class its step hooks with the first of its kind
    net = make(Mlp).double()
    net.heads.activate("second")
    twin = copy.deepcopy(net)
    data = batch(net)
    full = movement(twin, lambda parameters: [DescribedSgd(parameters, lr=0.1)], data)
    slowed = movement(net, lambda parameters: [DescribedSgd(parameters, lr=0.1)], data, elasticity=0.1)
    rows = every_second(net.layers)["fc1"]
    torch.testing.assert_close(slowed["fc1.weight"][rows], 0.1 * full["fc1.weight"][rows], rtol=1e-3, atol=1e-10)


def test_after_a_step_that_failed_and_was_caught_rows_are_still_held_and_slowed_down():
    net = make(Mlp).double()
    net.heads.activate("second")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    freezer = freeze(net, [optimizer], elasticity=0.0, irrelevant_elasticity=0.1)

    def fail():
        raise MemoryError

    with pytest.raises(MemoryError):
        optimizer.step(fail)
    rows = every_second(net.layers)["fc1"]
    before = net.fc1.weight.detach().clone()
    freezer.forget_failed_step()
    net.fc1.weight.grad = torch.ones_like(net.fc1.weight)
    optimizer.step()
    assert torch.equal(net.fc1.weight[rows], before[rows])
    torch.testing.assert_close(net.fc1.weight[~rows], before[~rows] - 0.01)


def test_a_layer_may_have_its_own_factor_by_glob_of_its_name():
    net = make(ConvNet).double()
    net.heads.activate("second")
    twin = copy.deepcopy(net)
    data = batch(net)
    full = movement(twin, ONE_STEP["adam"], data)
    slowed = movement(net, ONE_STEP["adam"], data, elasticity={"*2": 0.1}, irrelevant_elasticity={"conv1": 0.5})
    relevant = every_second(net.layers)
    for layer, on_relevant, on_irrelevant in zip(net.layers, (0.0, 0.1), (0.5, 1.0), strict=True):
        for name in layer.parameters:
            rows = relevant[layer.name]
            torch.testing.assert_close(slowed[name][rows], on_relevant * full[name][rows], rtol=1e-3, atol=1e-10)
            torch.testing.assert_close(slowed[name][~rows], on_irrelevant * full[name][~rows], rtol=1e-3, atol=1e-10)


@pytest.mark.parametrize(("factor", "expected"), [(0.0, 2.0), (0.1, 1.9), (0.5, 1.5)])
def test_a_shared_parameter_may_be_a_scalar(factor, expected):
    net = nn.Module()
    net.temperature = nn.Parameter(torch.tensor(2.0))
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    Freezer(net, {"temperature": torch.tensor(factor)}).attach([optimizer])
    net.temperature.backward()
    optimizer.step()
    assert net.temperature.item() == pytest.approx(expected)


def test_elasticities_are_one_factor_per_unit_one_per_shared_parameter_and_zero_for_finished_heads():
    layers = (
        UnitLayer("features.conv", 4, -3, ("features.conv.weight", "features.bn.bias"), norm="features.bn"),
        UnitLayer("fc", 3, -1, ("fc.weight",)),
    )
    net = make(Mlp)
    state = FreezeState()
    for name, conv, fc in (("a", [1, 0, 0, 0], [0, 0, 1]), ("b", [1, 1, 0, 0], [0, 0, 0])):
        relevant = {"features.conv": torch.tensor(conv, dtype=torch.bool), "fc": torch.tensor(fc, dtype=torch.bool)}
        units = UnitMap(layers, f"head.{name}", (f"head.{name}.weight",), ("attention.in_proj", "token"), (), ())
        record = record_of(net, relevant=relevant, name=name, head=units.head, head_parameters=units.head_parameters)
        state.add(record, units)

    def factors(**options):
        return {name: factor.tolist() for name, factor in elasticities(state, **options).items()}

    assert factors() == {
        "features.conv.weight": [0, 0, 1, 1],
        "features.bn.bias": [0, 0, 1, 1],
        "fc.weight": [1, 1, 0],
        "attention.in_proj": 0,
        "token": 0,
        "head.a.weight": 0,
        "head.b.weight": 0,
    }
    assert factors(elasticity=0.25, irrelevant_elasticity=0.5) == {
        "features.conv.weight": [0.25, 0.25, 0.5, 0.5],
        "features.bn.bias": [0.25, 0.25, 0.5, 0.5],
        "fc.weight": [0.5, 0.5, 0.25],
        "attention.in_proj": 0.25,
        "token": 0.25,
        "head.a.weight": 0,
        "head.b.weight": 0,
    }
    # The first glob that matches counts; a norm goes with its layer; without a match: 0 and 1.
    assert factors(elasticity={"features.*": 0.25, "*": 0.75}, irrelevant_elasticity={"f?": 0.5}) == {
        "features.conv.weight": [0.25, 0.25, 1, 1],
        "features.bn.bias": [0.25, 0.25, 1, 1],
        "fc.weight": [0.5, 0.5, 0.75],
        "attention.in_proj": 0.75,
        "token": 0.75,
        "head.a.weight": 0,
        "head.b.weight": 0,
    }
    assert factors(elasticity={"nothing": 0.5})["features.conv.weight"] == [0, 0, 1, 1]


def test_before_the_first_task_nothing_is_held():
    assert elasticities(FreezeState()) == {}


@pytest.mark.parametrize("factor", [-0.1, math.nan, math.inf, -math.inf])
def test_factors_that_are_no_learning_rate_are_refused_by_name(factor):
    with pytest.raises(ValueError, match="irrelevant_elasticity is"):
        check_elasticity("irrelevant_elasticity", factor)
    with pytest.raises(ValueError, match=r"elasticity\['conv\*'\] is"):
        check_elasticity("elasticity", {"fc*": 0.5, "conv*": factor})


@pytest.mark.parametrize("option", [0, 0.0, 0.1, 1, 2.5, {}, {"conv*": 0.0, "fc": 1.0}])
def test_factors_of_at_least_zero_are_taken_as_they_are(option):
    assert check_elasticity("elasticity", option) is option


# -- units that are no rows -------------------------------------------------------------------------------------------

UP = UnitLayer("0", 6, -3, ("0.weight", "0.bias"), transposed=(2, 2))


def upsampled(memory_format: torch.memory_format = torch.contiguous_format) -> tuple[nn.Module, dict[str, Tensor]]:
    """A transposed convolution with two groups of two inputs and three units, and which unit owns what, by hand."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2)).to(memory_format=memory_format)
    return net, {
        "0.weight": torch.tensor([[0, 1, 2], [0, 1, 2], [3, 4, 5], [3, 4, 5]]),
        "0.bias": torch.arange(6),
    }


def steps(net: nn.Module, optimizer: torch.optim.Optimizer, number: int = 3) -> None:
    for _ in range(number):
        x = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(1))

        def closure(x: Tensor = x) -> Tensor:
            net.zero_grad()
            loss = net(x).square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)


def factors_of(units: list[float]) -> dict[str, Tensor]:
    return {name: UP.spread(name, torch.tensor(units)) for name in UP.parameters}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "noise", "noise-data"])
@pytest.mark.parametrize("frozen", [[0, 4], [0, 1, 2], list(range(6))])
def test_frozen_units_of_a_transposed_convolution_stay(optimizer, frozen, memory_format):
    net, owner = upsampled(memory_format)
    before = values(net)
    freezer = Freezer(net, factors_of([0.0 if unit in frozen else 1.0 for unit in range(6)]))
    (made,) = OPTIMIZERS[optimizer](list(net.parameters()))
    freezer.attach([made])
    steps(net, made)
    for name, parameter in net.named_parameters():
        is_frozen = torch.isin(owner[name], torch.tensor(frozen))
        assert torch.equal(parameter[is_frozen], before[name][is_frozen])
        assert (parameter.grad[is_frozen] == 0).all()
        assert (parameter[~is_frozen] != before[name][~is_frozen]).all()


@pytest.mark.parametrize("factors", [[0.0, 1.0, 0.25, 0.5, 1.0, 0.25], [0.5] * 6, [0.25, 0.5] * 3])
def test_factors_of_a_transposed_convolution_scale_how_far_its_units_move(factors):
    def moved(units: list[float]) -> dict[str, Tensor]:
        net, _ = upsampled()
        before = values(net)
        made = torch.optim.Adam(net.parameters(), lr=0.01)
        Freezer(net, factors_of(units)).attach([made])
        steps(net, made, 1)
        return {name: parameter.detach() - before[name] for name, parameter in net.named_parameters()}

    full, slowed = moved([1.0] * 6), moved(factors)
    _, owner = upsampled()
    for name, unit in owner.items():
        scale = torch.tensor(factors)[unit]
        expected = full[name] * scale.view(*scale.shape, *[1] * (full[name].ndim - scale.ndim))
        torch.testing.assert_close(slowed[name], expected, rtol=1e-3, atol=1e-7)


def test_elasticities_of_a_transposed_convolution_have_its_leading_shape():
    state = FreezeState(layers=(UP,))
    relevant = {"0": torch.tensor([True, False, False, False, True, False])}
    state.tasks["first"] = record_of(make(Mlp), relevant=relevant)
    found = elasticities(state)
    assert found["0.weight"].tolist() == [[0, 1, 1], [0, 1, 1], [1, 0, 1], [1, 0, 1]]
    assert found["0.bias"].tolist() == [0, 1, 1, 1, 0, 1]
