"""Layers with a forward of their own: rows that stand for themselves are units, coupled ones are frozen whole."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from networks import CLASSES, Built, labelled
from records import bare_record
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from lightning_rnf.anatomy import coupling
from lightning_rnf.anatomy.units import UnitMap
from lightning_rnf.freezing.freezer import Freezer, elasticities
from lightning_rnf.memory.state import FreezeState
from lightning_rnf.recall.subnetwork import recall, statistics

Weight = Callable[[Tensor], Tensor]
"""``(weight with its rows first, bias) -> the weight that is used``."""


def ternary(w: Tensor) -> Tensor:
    scale = w.detach().abs().mean()
    return w + ((w / scale).round().clamp(-1, 1) * scale - w).detach()


def fake_quantised(w: Tensor) -> Tensor:
    step = w.detach().abs().max() / 7
    return w + ((w / step).round() * step - w).detach()


def asymmetric(w: Tensor) -> Tensor:
    low, step = w.detach().min(), (w.detach().max() - w.detach().min()) / 15
    return w + (((w - low) / step).round() * step + low - w).detach()


def half_kept(w: Tensor) -> Tensor:
    """Magnitude pruning as it trains: the larger half of all weights."""
    return w * (w.abs() >= w.detach().abs().median())


def pairs(w: Tensor) -> Tensor:
    """One scale for two neighbours, wherever they are."""
    joined = w.flatten(1).repeat_interleave(1, 0)
    scale = torch.stack([joined[i - i % 2 : i - i % 2 + 2].abs().amax() for i in range(len(w))])
    return w / scale.view(-1, *[1] * (w.ndim - 1))


def per_row(w: Tensor) -> tuple[Tensor, Tensor]:
    by_row = w.flatten(1)
    shape = -1, *[1] * (w.ndim - 1)
    return by_row.mean(1).view(shape), by_row.std(1, correction=0).view(shape) + 1e-5


COUPLED: dict[str, Weight] = {
    "one scale (BitNet)": ternary,
    "one step (largest)": fake_quantised,
    "one range": asymmetric,
    "spectral norm": lambda w: w / torch.linalg.matrix_norm(w.flatten(1), 2),
    "standardised over all": lambda w: (w - w.mean()) / (w.std() + 1e-5),
    "softmax over rows": lambda w: w.softmax(0),
    "centred over rows": lambda w: w - w.mean(0),
    "larger half": half_kept,
    "pairs": pairs,
    "sorted": lambda w: w.flip(0),
    "through a list": lambda w: w * float(w.detach().sum().tanh()),
}
INDEPENDENT: dict[str, Weight] = {
    "standardised by row (timm)": lambda w: (w - per_row(w)[0]) / per_row(w)[1],
    "one scale a row": lambda w: w / w.flatten(1).abs().amax(1).view(-1, *[1] * (w.ndim - 1)).clamp(min=1e-8),
    "rounded": lambda w: w + ((w * 16).round() / 16 - w).detach(),
    "signs": lambda w: w + (w.sign() * per_row(w)[1] - w).detach(),
    "as it is": lambda w: w,
}


def layer(kind: str, how: Weight, **options: Any) -> nn.Module:
    """A layer of 4 to 6 channels of that kind that computes its weight first."""
    base: Any = getattr(nn, kind)
    if kind == "Linear":

        class Own(base):
            def forward(self, x: Tensor) -> Tensor:
                return F.linear(x, how(self.weight), self.bias)

        return Own(4, 6, **options)
    if "Transpose" in kind:

        class Own(base):
            def forward(self, x: Tensor) -> Tensor:
                groups, inputs = self.groups, self.in_channels // self.groups
                by_unit = self.weight.unflatten(0, (groups, inputs)).transpose(1, 2).flatten(0, 1)
                weight = how(by_unit).unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
                function = getattr(F, f"conv_transpose{kind[-2]}d")
                return function(x, weight, self.bias, groups=self.groups, padding=1)
    else:

        class Own(base):
            def forward(self, x: Tensor) -> Tensor:
                return self._conv_forward(x, how(self.weight), self.bias)

    return Own(4, 6, 3, padding=1, **options)


KINDS = ("Linear", "Conv1d", "Conv2d", "ConvTranspose2d")


def shape(kind: str) -> tuple[int, ...]:
    return (4,) if kind == "Linear" else (4, *[5] * int(kind[-2]))


def network(kind: str, tried: nn.Module, *after: nn.Module) -> nn.Module:
    """The layer between two of torch's own, with two heads, of which "a" runs."""

    def pooled(x: Tensor) -> Tensor:
        return x if x.ndim == 2 else x.flatten(2).mean(2)

    first = nn.Linear(4, 4) if kind == "Linear" else getattr(nn, f"Conv{kind[-2]}d")(4, 4, 1)
    return Built(
        lambda net, x: net.heads["a"](pooled(net.after(net.tried(net.first(x).relu())).relu())),
        first=first,
        tried=tried,
        after=nn.Sequential(*after),
        heads=nn.ModuleDict({task: nn.Linear(6, CLASSES) for task in "ab"}),
    )


def names(units: UnitMap) -> list[str]:
    return [layer.name for layer in units.layers]


def assert_recall_is_exact(net: nn.Module, *shape: int, seed: int = 0, damage: float = 7.0) -> None:
    """After a step of an optimizer that writes everywhere, in a task that needs half of the units."""
    batch = labelled(4, *shape)
    units = UnitMap.of(net, batch)
    generator = torch.Generator().manual_seed(seed)
    relevant = {one.name: torch.rand(one.units, generator=generator) < 0.5 for one in units.layers}
    state = FreezeState()
    state.add(bare_record(units, relevant, statistics(net, units)), units)
    with recall(net, units.layers, state.tasks["task"]), torch.no_grad():
        before = net(batch[0])
    freezer = Freezer(net, elasticities(state))
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    freezer.attach([optimizer])
    for parameter in net.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator) * damage
    optimizer.step()
    assert UnitMap.of(net, batch).layers == units.layers  # what is found does not depend on the weights
    with recall(net, units.layers, state.tasks["task"]), torch.no_grad():
        assert torch.equal(net(batch[0]), before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", COUPLED)
def test_coupled_rows_are_frozen_whole_with_the_reason_and_recall_is_exact(kind, how):
    torch.manual_seed(0)
    net = network(kind, layer(kind, COUPLED[how]))
    units = UnitMap.of(net, labelled(4, *shape(kind)))
    assert names(units) == ["first"]
    assert set(units.shared) == {"tried.weight", "tried.bias"}
    assert re.fullmatch(r"Own is not made of rows, output \d changes with .*", units.reasons["tried.weight"])
    assert "weight, bias  Own is not made of rows, output" in str(units)
    assert_recall_is_exact(net, *shape(kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", INDEPENDENT)
@pytest.mark.parametrize("bias", [True, False])
def test_rows_that_stand_for_themselves_are_units_and_recall_is_exact(kind, how, bias):
    torch.manual_seed(0)
    net = network(kind, layer(kind, INDEPENDENT[how], bias=bias))
    assert names(UnitMap.of(net, labelled(4, *shape(kind)))) == ["first", "tried"]
    assert_recall_is_exact(net, *shape(kind))


@pytest.mark.parametrize("kind", ["Conv1d", "Conv2d", "ConvTranspose1d", "ConvTranspose2d"])
@pytest.mark.parametrize("groups", [2, 4])
def test_rows_of_grouped_convolutions_are_tried_as_their_outputs_count_them(kind, groups):
    options = {"groups": groups} if groups == 2 else {"groups": 1}

    def of_kind(how: Weight) -> nn.Module:
        return network(kind, layer(kind, how, **options))

    assert names(UnitMap.of(of_kind(INDEPENDENT["one scale a row"]), labelled(4, *shape(kind)))) == ["first", "tried"]
    assert names(UnitMap.of(of_kind(ternary), labelled(4, *shape(kind)))) == ["first"]
    assert_recall_is_exact(of_kind(INDEPENDENT["one scale a row"]), *shape(kind))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(KINDS),
    hows=st.lists(st.sampled_from(sorted({**COUPLED, **INDEPENDENT})), min_size=1, max_size=3),
    scale=st.sampled_from([1e-6, 1.0, 100.0]),
    seed=st.integers(0, 1000),
)
def test_whatever_a_weight_is_computed_by_recall_is_exact(kind, hows, scale, seed):
    """One after the other, with weights that are tiny or large: what is found is the same for all."""
    torch.manual_seed(seed)
    both = {**COUPLED, **INDEPENDENT}

    def how(w: Tensor) -> Tensor:
        for one in hows:
            w = both[one](w)
        return w

    net = network(kind, layer(kind, how))
    with torch.no_grad():
        net.tried.weight *= scale
        assume(net(labelled(4, *shape(kind))[0]).isfinite().all())
    assert_recall_is_exact(net, *shape(kind), seed=seed)


# -- other ways for an output not to be its row's ---------------------------------------------------------------------


def own(forward: Callable[[Any, Tensor], Any], base: type[Any] = nn.Linear, **options: Any) -> nn.Module:
    return type("Own", (base,), {"forward": forward})(4, 6, **options)


class Cached(nn.Linear):
    """It keeps what it has computed of its weight."""

    def __init__(self) -> None:
        super().__init__(4, 6)
        self.kept = self.weight.detach() * 2

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.kept, None)


class Stateful(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 6)
        self.runs = [0]
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.runs.append(0)
        return super().forward(x) * self.count


CLOCK = iter(range(10**9))

OTHERS = {
    "outputs in another order": (lambda m, x: F.linear(x, m.weight, m.bias).flip(-1), "output [05] changes with row"),
    "outputs normalised": (lambda m, x: F.normalize(F.linear(x, m.weight, m.bias), dim=-1), "changes with row"),
    "bias summed": (lambda m, x: F.linear(x, m.weight, m.bias.sum().expand(6)), "changes with row"),
    "several outputs a row": (
        lambda m, x: F.linear(x, m.weight, m.bias).repeat_interleave(2, -1)[..., :6],
        "changes with row",
    ),
    "something else each time": (
        lambda m, x: F.linear(x, m.weight, m.bias) + next(CLOCK),
        "it says something else when it runs again",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_an_output_that_is_not_its_rows_is_found(case):
    forward, reason = OTHERS[case]
    units = UnitMap.of(network("Linear", own(forward)), labelled(4, 4))
    assert names(units) == ["first"]
    assert re.search(reason, units.reasons["tried.weight"])


def test_rows_without_an_effect_are_none():
    units = UnitMap.of(network("Linear", Cached()), labelled(4, 4))
    assert names(units) == ["first"]


def test_a_hook_of_the_users_is_a_part_of_the_layer():
    net = network("Linear", nn.Linear(4, 6))
    net.tried.register_forward_hook(lambda module, args, output: output - output.mean(-1, keepdim=True))
    units = UnitMap.of(net, labelled(4, 4))
    assert "Linear is not made of rows, output" in units.reasons["tried.weight"]
    net = network("Linear", nn.Linear(4, 6))
    net.tried.register_forward_hook(lambda module, args, output: output * 2)
    assert names(UnitMap.of(net, labelled(4, 4))) == ["first", "tried"]


def test_randomness_and_state_of_a_layer_are_not_taken_for_coupling_and_stay():
    net = network("Linear", Stateful())
    assert names(UnitMap.of(net, labelled(4, 4))) == ["first", "tried"]
    assert (net.tried.count, net.tried.runs) == (0, [0])
    noisy = own(lambda m, x: F.linear(x, m.weight, m.bias) + torch.rand(6))
    assert names(UnitMap.of(network("Linear", noisy), labelled(4, 4))) == ["first", "tried"]


def test_a_dead_input_or_a_zero_weight_hides_nothing():
    net = network("Linear", layer("Linear", INDEPENDENT["rounded"]))
    with torch.no_grad():
        net.first.weight.zero_()
        net.first.bias.fill_(-1)
        net.tried.weight.zero_()
    assert names(UnitMap.of(net, labelled(4, 4))) == ["first", "tried"]


def test_in_autocast_and_half_precision():
    def forward(net: Built, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            x = net.tried(net.first(x).relu())
        return net.head(x.float())

    for how, expected in ((ternary, ["first"]), (INDEPENDENT["one scale a row"], ["first", "tried"])):
        parts = {"first": nn.Linear(4, 4), "tried": layer("Linear", how), "head": nn.Linear(6, CLASSES)}
        assert names(UnitMap.of(Built(forward, **parts), labelled(4, 4))) == expected
        x, y = labelled(4, 4)
        assert names(UnitMap.of(network("Linear", layer("Linear", how)).bfloat16(), (x.bfloat16(), y))) == expected


# -- what follows a layer ---------------------------------------------------------------------------------------------


class ActivatedNorm(nn.BatchNorm2d):
    """As timm has it: a norm and an activation in one."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class LoudNorm(nn.BatchNorm2d):
    """One scale for all of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight / self.weight.norm(), self.bias)


class MixingNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.softmax(1))


@pytest.mark.parametrize("norm", [ActivatedNorm, LoudNorm, MixingNorm])
def test_a_norm_with_a_forward_of_its_own_is_tried_too(norm):
    torch.manual_seed(0)
    net = network("Conv2d", nn.Conv2d(4, 6, 3), norm(6))
    units = UnitMap.of(net, labelled(4, *shape("Conv2d")))
    assert units.layers[1].norm == ("after.0" if norm is ActivatedNorm else None)
    assert_recall_is_exact(net, *shape("Conv2d"))
    if norm is not ActivatedNorm:
        assert f"{norm.__name__} is not made of rows, output" in units.reasons["after.0.weight"]


# -- weights that reach something else --------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["as it is", "standardised by row (timm)"])
@pytest.mark.parametrize("detached", [True, False])
def test_a_weight_that_reaches_the_logits_past_its_layer_is_frozen_whole_with_what_is_true(how, detached):
    net = network("Linear", layer("Linear", INDEPENDENT[how]) if how != "as it is" else nn.Linear(4, 6))
    inner = net.compute

    def forward(net: Built, x: Tensor) -> Tensor:
        weight = net.tried.weight.detach() if detached else net.tried.weight
        return inner(net, x) + F.linear(x, weight)[:, :CLASSES]

    net.compute = forward
    units = UnitMap.of(net, labelled(4, 4), heads="heads.a")
    assert names(units) == ["first"]
    assert units.whole == {"tried": "has its 'tried.weight' used a second time outside the layer"}
    assert {"tried.weight", "tried.bias"} <= set(units.shared)


def test_a_weight_that_is_only_looked_at_is_made_of_units():
    net = network("Linear", nn.Linear(4, 6))
    inner = net.compute

    def forward(net: Built, x: Tensor) -> Tensor:
        net.penalty = net.tried.weight.detach().norm() + net.tried.weight.norm()
        return inner(net, x.to(net.tried.weight.dtype).to(net.tried.weight.device))

    net.compute = forward
    before = net.tried.weight.detach().clone()
    assert names(UnitMap.of(net, labelled(4, 4))) == ["first", "tried"]
    assert torch.equal(net.tried.weight, before)


# -- what is said, and what it costs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("glob", ["tried", "tri*", ["first", "tried"]])
def test_a_coupled_layer_that_units_names_is_refused_with_what_was_found(glob):
    net = network("Linear", layer("Linear", ternary))
    with pytest.raises(ValueError, match=r"'tri.*names 'tried', and Own is not made of rows, output \d changes with"):
        UnitMap.of(net, labelled(4, 4), units=glob)
    assert names(UnitMap.of(net, labelled(4, 4), units="*")) == ["first"]


def test_a_network_of_coupled_layers_alone_is_refused_by_name():
    net = network("Linear", layer("Linear", ternary))
    net.first = type(net.tried)(4, 4)
    with pytest.raises(ValueError, match=r"no unit layers: 'first': Own is not made of rows, .*; 'tried'"):
        UnitMap.of(net, labelled(4, 4))


def test_layers_of_torchs_own_are_not_tried(monkeypatch):
    runs = []
    monkeypatch.setattr(coupling._Trial, "_run", lambda *_: runs.append(1))
    net = network("Conv2d", nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.PReLU(6))
    forward = nn.Conv2d.forward
    monkeypatch.setattr(nn.Conv2d, "forward", lambda module, x: (runs.append(0), forward(module, x))[1])
    assert names(UnitMap.of(net, labelled(4, *shape("Conv2d")))) == ["first", "tried"]
    assert runs == [0, 0]


def test_the_model_comes_back_as_it_was():
    net = network("Conv2d", layer("Conv2d", ternary), ActivatedNorm(6))
    before = {name: (value, value.clone()) for name, value in net.state_dict(keep_vars=True).items()}
    state = torch.get_rng_state()
    UnitMap.of(net, labelled(4, *shape("Conv2d")))
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in net.state_dict(keep_vars=True).items():
        assert value is before[name][0]
        assert torch.equal(value, before[name][1])
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in net.modules())
