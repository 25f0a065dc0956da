"""What is read of a sub-network while it runs: outputs of its relevant units, averaged over positions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rnf.anatomy import UnitLayer
from lightning_rnf.memory import Space

FEATURES = 512
"""The last layers are read, as many as have so many relevant units together, and at least one."""

DIMENSIONS = 128
"""More features are projected to so many: a class then takes 33 kB in a space."""


def readable_layers(layers: Sequence[UnitLayer], relevant: Mapping[str, Tensor]) -> tuple[UnitLayer, ...]:
    """The last layers of a sub-network that have relevant units and whose output is theirs: of no fused kernel."""
    found: list[UnitLayer] = []
    features = 0
    for layer in reversed(layers):
        units = int(relevant[layer.name].sum())
        if layer.recurrent is not None or layer.packed or not units:
            continue
        if found and features + units > FEATURES:
            break
        found.insert(0, layer)
        features += units
    return tuple(found)


class Read:
    """Features of one forward, ``(N, features)``."""

    def __init__(self, layers: Sequence[UnitLayer]) -> None:
        self.layers = layers
        self.by_layer: dict[str, list[Tensor]] = {}
        self.head: Tensor | None = None

    def features(self, samples: int) -> Tensor:
        """Of all layers, side by side; of one that runs several times its mean.

        Raises:
            ValueError: if a layer did not run, or its output is not of so many samples.
        """
        parts = []
        for layer in self.layers:
            runs = self.by_layer.get(layer.name)
            if not runs or any(len(run) != samples for run in runs):
                said = "did not run" if not runs else f"gave outputs of {[len(run) for run in runs]} samples"
                raise ValueError(f"{layer.name!r} {said}, for a batch of {samples}")
            parts.append(runs[0] if len(runs) == 1 else torch.stack(runs).mean(0))
        return torch.cat(parts, dim=1)


@contextmanager
def reading(
    module: nn.Module, layers: Sequence[UnitLayer], relevant: Mapping[str, Tensor], head: str
) -> Iterator[Read]:
    """Inside the context a forward of the model, recalled, is read.

    Args:
        module: the model.
        layers: of which.
        relevant: bool ``(units,)`` by layer.
        head: name of the module whose output is read, too.
    """
    read = Read(layers)
    with ExitStack() as hooks:
        for layer in layers:
            chosen = relevant[layer.name].nonzero().view(-1)
            for part in map(module.get_submodule, (layer.norm or layer.name, *layer.tied)):
                hooks.callback(part.register_forward_hook(_Note(read, layer, chosen)).remove)

        def note_head(part: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            read.head = output if isinstance(output, Tensor) else None

        hooks.callback(module.get_submodule(head).register_forward_hook(note_head).remove)
        yield read


class _Note:
    def __init__(self, read: Read, layer: UnitLayer, chosen: Tensor) -> None:
        self.read, self.layer, self.chosen = read, layer, chosen

    def __call__(self, part: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not isinstance(output, Tensor) or output.ndim < 2:
            return
        self.chosen = self.chosen.to(output.device)
        some = output.detach().index_select(self.layer.axis, self.chosen).float()
        positions = [one for one in range(1, some.ndim) if one != self.layer.axis % some.ndim]
        self.read.by_layer.setdefault(self.layer.name, []).append(some.mean(positions) if positions else some)


def space_of(layers: Sequence[UnitLayer], sizes: Sequence[int], count: int, sums: Tensor, squares: Tensor) -> Space:
    """The space of a task's own sub-network.

    Args:
        layers: that are read.
        sizes: how many features each has.
        count: of samples.
        sums: float64 ``(features,)``, of features of the task's own samples.
        squares: the same of their squares.
    """
    means = sums / max(count, 1)
    variances = (squares / max(count, 1) - means.square()).clamp(min=0)
    scale = torch.cat([part.mean().sqrt().clamp(min=1e-12).expand(len(part)) for part in variances.split(list(sizes))])
    features = len(means)
    projection = torch.empty(features, 0)
    if features > DIMENSIONS:
        drawn = torch.randn(features, DIMENSIONS, generator=torch.Generator().manual_seed(features))
        projection = drawn / math.sqrt(features)
    return Space(tuple(layer.name for layer in layers), means.float(), scale.float(), projection)
