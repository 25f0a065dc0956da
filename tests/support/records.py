"""Two small networks whose units are written down by hand, and records and states of finished tasks on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rnf.anatomy.units import UnitLayer, UnitMap
from lightning_rnf.heads import MultiHead
from lightning_rnf.memory.state import FreezeState, TaskRecord
from lightning_rnf.relevance.conservation import INPUT
from lightning_rnf.report import RetentionReport
from lightning_rnf.search.criteria import SubnetworkScore
from lightning_rnf.search.cutoff import Evaluation

CLASSES = 3
TASKS = ("first", "second")


class Network(nn.Module):
    """Unit layers, shared parameters and buffers by name; one head per task. Smooth, so that no unit is ever dead."""

    layers: tuple[UnitLayer, ...]
    shared: tuple[str, ...] = ()
    buffer_names: tuple[str, ...] = ()
    shape: tuple[int, ...]
    heads: MultiHead

    def units(self, task: str = "first") -> UnitMap:
        idle = tuple(name for other in TASKS if other != task for name in head_parameters(other))
        return UnitMap(self.layers, f"heads.tasks.{task}", head_parameters(task), self.shared, idle, self.buffer_names)


class Mlp(Network):
    layers = (
        UnitLayer("fc1", 6, -1, ("fc1.weight", "fc1.bias")),
        UnitLayer("fc2", 5, -1, ("fc2.weight", "fc2.bias")),
    )
    shared = ("norm.weight", "norm.bias")
    shape = (4,)

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(4, 6)
        self.norm = nn.LayerNorm(6)
        self.fc2 = nn.Linear(6, 5)
        self.heads = MultiHead(5, dict.fromkeys(TASKS, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.heads(self.fc2(self.norm(self.fc1(x).tanh())).tanh())


class ConvNet(Network):
    layers = (
        UnitLayer("conv1", 4, -3, ("conv1.weight", "bn1.weight", "bn1.bias"), norm="bn1"),
        UnitLayer("conv2", 5, -3, ("conv2.weight", "conv2.bias")),
    )
    buffer_names = ("bn1.running_mean", "bn1.running_var", "bn1.num_batches_tracked")
    shape = (1, 5, 5)

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 5, 3)
        self.heads = MultiHead(5, dict.fromkeys(TASKS, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.heads(self.conv2(self.bn1(self.conv1(x)).tanh()).tanh().mean(dim=(2, 3)))


def make(kind: Callable[[], Network], seed: int = 0) -> Network:
    """A network with weights of its own, in training mode, whose buffers have seen data."""
    torch.manual_seed(seed)
    net = kind()
    with torch.no_grad():
        for _ in range(3):
            net(batch(net)[0])
    return net


def batch(net: Network, samples: int = 6) -> tuple[Tensor, Tensor]:
    """Random inputs and labels, of the network's dtype."""
    dtype = next(net.parameters()).dtype
    return torch.randn(samples, *net.shape, dtype=dtype), torch.randint(CLASSES, (samples,))


def head_parameters(task: str) -> tuple[str, ...]:
    return (f"heads.tasks.{task}.weight", f"heads.tasks.{task}.bias")


def every_second(layers: tuple[UnitLayer, ...], start: int = 0) -> dict[str, Tensor]:
    """Masks that hold every other unit, from ``start`` on."""
    return {layer.name: torch.arange(layer.units) % 2 == start for layer in layers}


def record_of(
    net: Network, task: str = "first", relevant: Mapping[str, Tensor] | None = None, **changes: Any
) -> TaskRecord:
    """The record of a task that has ended with the network as it is now."""
    units = net.units(task)
    buffers = dict(net.named_buffers())
    values: dict[str, Any] = {
        "name": task,
        "head": units.head,
        "head_parameters": units.head_parameters,
        "relevant": dict(relevant or every_second(net.layers)),
        "relevance": {layer.name: torch.linspace(-0.5, 1.0, layer.units) for layer in net.layers},
        "norm_statistics": {name: buffers[name].clone() for name in units.buffers},
        "cutoff": 4,
        "accuracy": 0.75,
        "subnetwork_accuracy": 0.5,
        "samples": 8,
        "evaluations": (
            Evaluation(
                SubnetworkScore(cutoff=0, accuracy=0.75, baseline=0.75, units=9, relevant=9, free=0, free_before=0),
                True,
            ),
            Evaluation(
                SubnetworkScore(cutoff=4, accuracy=0.5, baseline=0.75, units=9, relevant=5, free=4, free_before=3),
                False,
            ),
        ),
        "seconds": {"attribution": 0.5, "search": 1.25},
        "accepted": True,
        "capacity": {layer.name: 0.5 for layer in net.layers},
        "conservation": {INPUT: 0.75, **{layer.name: 0.875 for layer in net.layers}},
        "cuts": (*(layer.name for layer in reversed(net.layers)), INPUT),
        "notes": ("no rule for LayerNorm (norm): relevance is a plain gradient there",),
    }
    return TaskRecord(**values | changes)


def bare_record(units: UnitMap, relevant: dict[str, Tensor], buffers: dict[str, Tensor]) -> TaskRecord:
    """What recall and export read of a record, and nothing else."""
    return TaskRecord(
        name="task",
        head=units.head,
        head_parameters=units.head_parameters,
        relevant=relevant,
        relevance={},
        norm_statistics=buffers,
        cutoff=0,
        accuracy=1.0,
        subnetwork_accuracy=1.0,
        accepted=True,
        samples=1,
        evaluations=(),
        capacity={},
        seconds={},
    )


def state_of(net: Network, *records: TaskRecord) -> FreezeState:
    """The state after these tasks (none given: after the first)."""
    state = FreezeState()
    for record in records or (record_of(net),):
        state.add(record, net.units(record.head.rpartition(".")[2]))
    return state


def many(names, net=None):
    """A report of tasks with these names, of which every earlier one was tested after each."""
    net = net or make(ConvNet)
    state = FreezeState()
    for index, name in enumerate(names):
        tests = {seen: {"acc": 0.9 - 0.0123 * place} for place, seen in enumerate(names[: index + 1])}
        record = record_of(net, relevant=every_second(net.layers, index % 2))
        state.add(replace(record, name=name, head=f"heads.{index}", tests=tests), net.units())
    return RetentionReport.of(state)
