"""Any chain of the known modules: every parameter has one owner, and recall is exact whatever becomes of the free."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from networks import CLASSES, Built, labelled
from records import bare_record
from torch import Tensor, nn

from lightning_rnf.anatomy.units import UnitMap
from lightning_rnf.freezing.freezer import Freezer, elasticities
from lightning_rnf.memory.state import FreezeState, TaskRecord
from lightning_rnf.recall.subnetwork import recall, statistics

CHANNELS = 4


def sized(kind: str, dimensions: int) -> Any:
    return getattr(nn, f"{kind}{dimensions}d")


def convolution(dimensions: int, groups: int = 1, inputs: int = CHANNELS, **options: Any) -> nn.Module:
    return sized("Conv", dimensions)(inputs, CHANNELS, 3, padding=1, groups=groups, **options)


def transposed(dimensions: int, groups: int = 1, **options: Any) -> nn.Module:
    return sized("ConvTranspose", dimensions)(CHANNELS, CHANNELS, 3, padding=1, groups=groups, **options)


def per_position(dimensions: int) -> nn.Module:
    """A linear layer on the channels, which stand last for it."""
    return Built(lambda net, x: net.layer(x.movedim(1, -1)).movedim(-1, 1), layer=nn.Linear(CHANNELS, CHANNELS))


def computed(dimensions: int, *over: int) -> nn.Module:
    """A convolution whose weight is divided by its largest entry over some dimensions: by row, or over all."""

    class Computed(sized("Conv", dimensions)):
        def forward(self, x: Tensor) -> Tensor:
            return self._conv_forward(x, self.weight / self.weight.abs().amax(over, keepdim=True), self.bias)

    return Computed(CHANNELS, CHANNELS, 3, padding=1)


LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "convolution": convolution,
    "without bias": lambda d: convolution(d, bias=False),
    "grouped": lambda d: convolution(d, groups=2),
    "depthwise": lambda d: convolution(d, groups=CHANNELS),
    "transposed": transposed,
    "transposed, without bias": lambda d: transposed(d, bias=False),
    "transposed, grouped": lambda d: transposed(d, groups=2),
    "transposed, depthwise": lambda d: transposed(d, groups=CHANNELS),
    "per position": per_position,
    "scaled by row": lambda d: computed(d, *range(1, d + 2)),
    "one scale": lambda d: computed(d, *range(d + 2)),
}
FOLLOWERS: dict[str, Callable[[int], nn.Module]] = {
    "batch norm": lambda d: sized("BatchNorm", d)(CHANNELS),
    "synchronised": lambda d: nn.SyncBatchNorm(CHANNELS),
    "instance norm": lambda d: sized("InstanceNorm", d)(CHANNELS, affine=True, track_running_stats=True),
    "bare instance norm": lambda d: sized("InstanceNorm", d)(CHANNELS),
    "group norm": lambda d: nn.GroupNorm(2, CHANNELS),
    "a group each": lambda d: nn.GroupNorm(CHANNELS, CHANNELS),
    "layer norm": lambda d: nn.LayerNorm([CHANNELS] + [3] * d),
    "slopes": lambda d: nn.PReLU(CHANNELS),
    "one slope": lambda d: nn.PReLU(),
    "activation": lambda d: nn.ReLU(inplace=True),
    "scaled": lambda d: Built(lambda net, x: x * net.scale + 1, scale=nn.Parameter(torch.randn(CHANNELS, *[1] * d))),
}


@dataclass(frozen=True)
class Block:
    """A layer and what follows it, by itself, around a skip connection, or beside it."""

    layer: str
    followers: tuple[str, ...]
    shape: str

    def build(self, dimensions: int) -> nn.Module:
        inner = nn.Sequential(LAYERS[self.layer](dimensions), *(FOLLOWERS[name](dimensions) for name in self.followers))
        if self.shape == "residual":
            return Built(lambda net, x: x + net.inner(x), inner=inner)
        if self.shape == "concatenation":  # as a DenseNet has it: a norm over what two layers say
            return Built(
                lambda net, x: net.joint(net.norm(torch.cat([x, net.inner(x)], dim=1)).relu()),
                inner=inner,
                norm=sized("BatchNorm", dimensions)(2 * CHANNELS),
                joint=convolution(dimensions, inputs=2 * CHANNELS),
            )
        return inner


def blocks() -> st.SearchStrategy[Block]:
    return st.builds(
        Block,
        st.sampled_from(sorted(LAYERS)),
        st.lists(st.sampled_from(sorted(FOLLOWERS)), max_size=3).map(tuple),
        st.sampled_from(["chain", "residual", "concatenation"]),
    )


def network(plan: list[Block], dimensions: int) -> nn.Module:
    """Its head reads the mean over positions; a second head waits. Its norms have seen data."""
    body = nn.Sequential(*(block.build(dimensions) for block in plan))
    net = Built(
        lambda net, x: net.heads["a"](net.body(x).flatten(2).mean(2)),
        body=body,
        heads=nn.ModuleDict({task: nn.Linear(CHANNELS, CLASSES) for task in "ab"}),
    )
    with torch.no_grad():
        net(labelled(4, CHANNELS, *[3] * dimensions, seed=1)[0])
    return net


def record_of(net: nn.Module, units: UnitMap, relevant: dict[str, Tensor]) -> TaskRecord:
    return bare_record(units, relevant, statistics(net, units))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    plan=st.lists(blocks(), min_size=1, max_size=4),
    dimensions=st.sampled_from([1, 2, 3]),
    damage=st.sampled_from([math.nan, math.inf, 7.0]),
    seed=st.integers(0, 1000),
)
def test_every_parameter_has_one_owner_and_recall_needs_only_the_frozen(plan, dimensions, damage, seed):
    assume(any(block.layer != "one scale" or block.shape == "concatenation" for block in plan))
    torch.manual_seed(seed)
    net = network(plan, dimensions)
    x, y = labelled(2, CHANNELS, *[3] * dimensions)
    own = dict(net.named_parameters())

    units = UnitMap.of(net, (x, y))

    of_units = [name for layer in units.layers for name in layer.parameters]
    assert Counter([*of_units, *units.head_parameters, *units.shared, *units.idle]) == Counter(list(own))
    assert set(units.idle) == {"heads.b.weight", "heads.b.bias"}
    assert set(units.reasons) == set(units.shared)
    for layer in units.layers:
        for name in layer.parameters:
            owner = layer.spread(name, torch.arange(layer.units))
            assert owner.shape == own[name].shape[: owner.ndim]
            assert owner.unique().tolist() == list(range(layer.units))
            assert layer.by_unit(name, own[name]).shape[0] == layer.units
            assert layer.by_unit(name, own[name]).numel() == own[name].numel()

    relevant = {layer.name: torch.rand(layer.units) < 0.6 for layer in units.layers}
    state = FreezeState()
    state.add(record_of(net, units, relevant), units)
    with recall(net, units.layers, state.tasks["task"]), torch.no_grad():
        logits = net(x)

    # An optimizer that writes everywhere, and norms that have seen what it wrote.
    freezer = Freezer(net, elasticities(state))
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    freezer.attach([optimizer])
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, -damage)
    before = {name: parameter.detach().clone() for name, parameter in own.items()}
    optimizer.step()
    with torch.no_grad():
        for buffer in net.buffers():
            buffer.fill_(damage if buffer.is_floating_point() else 7)

    for layer in units.layers:
        for name in layer.parameters:
            moved = layer.by_unit(name, own[name] != before[name]).reshape(layer.units, -1)
            assert torch.equal(moved.all(dim=1), ~relevant[layer.name])
            assert torch.equal(moved.any(dim=1), ~relevant[layer.name])
    assert all(torch.equal(own[name], before[name]) for name in (*units.shared, *units.head_parameters))
    with recall(net, units.layers, state.tasks["task"]), torch.no_grad():
        assert torch.equal(net(x), logits)
