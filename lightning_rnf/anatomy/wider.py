"""How a model can be made wider: which channels come with which, and where new ones stand in what every module holds.

The graph of the forward says it. Each layer's units are a block, and new ones stand at its end: behind a concatenation
that is in the middle, behind a flattening each brings its positions. Blocks that meet in a sum or product grow as one,
so do a grouped convolution's inputs and outputs, by whole groups. What reads a size of its own can't grow.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_rnf.anatomy.channels import Effect
from lightning_rnf.anatomy.flow import Flow, described
from lightning_rnf.anatomy.graph import torch_class
from lightning_rnf.anatomy.grouped import LAYERS, layer_form
from lightning_rnf.anatomy.kinds import TRANSPOSED
from lightning_rnf.anatomy.layers import UnitLayer

_MOST_ROUNDS = 1000
_Segment = tuple[str, int]
"""A block, and how many neighbours belong to each of its units: positions behind a flattening, say."""


@dataclass(frozen=True)
class Places:
    """Where the entries of one dimension stand after it has grown.

    Attributes:
        size: of the dimension, then.
        runs: first place and number of neighbours that were there before, in order.
    """

    size: int
    runs: tuple[tuple[int, int], ...]

    @property
    def before(self) -> int:
        """How many entries there were."""
        return sum(count for _, count in self.runs)

    def index(self) -> Tensor:
        """The place of each entry that was there: int64 ``(before,)``."""
        return torch.cat([torch.arange(first, first + count) for first, count in self.runs])

    def spread(self, values: Tensor, fill: float, dimension: int = 0) -> Tensor:
        """Entries along a dimension at their places, and another value at the new ones."""
        shape = [*values.shape[:dimension], self.size, *values.shape[dimension + 1 :]]
        return values.new_full(shape, fill).index_copy_(dimension, self.index().to(values.device), values)


@dataclass(frozen=True)
class Wider:
    """What a model is to have, or has come to have.

    Attributes:
        units: by unit layer, where the units stand that it had.
        tensors: by parameter or buffer, by dimension that grows.
        sizes: by module, by attribute that counts channels, what it was and what it is then.
    """

    units: Mapping[str, Places]
    tensors: Mapping[str, Mapping[int, Places]]
    sizes: Mapping[str, Mapping[str, tuple[int, int]]]

    def added(self) -> dict[str, int]:
        """How many units each layer gets."""
        return {name: places.size - places.before for name, places in self.units.items()}


def widened(flows: Sequence[Flow], layers: Sequence[UnitLayer], chosen: Iterable[str], share: float) -> Wider:
    """Find out what has to grow for some layers to get more units; the model stays as it is.

    Args:
        flows: of the model, one for each of its heads that is to read what is new.
        layers: its unit layers.
        chosen: names of those that get more units, and with them all that they are tied to.
        share: of the units of each, so many come, rounded up.

    Raises:
        ValueError: naming a layer that can't get more, and the operation that is why.
    """
    unit_layers = {layer.name for layer in layers}
    blocks = _Blocks(unit_layers)
    walks = [_Walk(flow, blocks, number) for number, flow in enumerate(flows)]
    tied = {layer.name: f"it has one weight with {', '.join(layer.tied)}" for layer in layers if layer.tied}
    for name in chosen:
        if name in tied:
            raise ValueError(_refusal(name, tied[name]))
        owners = next((owned for walk in walks if (owned := walk.blocks_of(name))), None)
        if owners is None:
            raise ValueError(_refusal(name, _why_unknown(name, walks)))
        for block in owners:
            blocks.grow(block, max(1, math.ceil(share * blocks.sizes[block])), name)
    blocks.settle()
    units: dict[str, Places] = {}
    found: dict[str, tuple[dict[str, dict[int, Places]], dict[str, tuple[int, int]]]] = {}
    for walk in walks:
        for name, module, inputs, outputs in walk.modules():
            grown = _tensors(module, inputs, outputs), _sizes(module, inputs, outputs)
            if found.setdefault(name, grown) != grown:
                raise ValueError(_refusal(name, "with one head it reads other channels than with another"))
            if outputs is not None and name in unit_layers:
                units[name] = outputs
    for layer in layers:
        if layer.tied and not found.keys().isdisjoint(layer.modules):  # one of them runs alone, and reads what grows
            raise ValueError(_refusal(layer.name, tied[layer.name]))
    return Wider(
        units,
        {f"{name}.{key}": dims for name, (tensors, _) in found.items() for key, dims in tensors.items()},
        {name: sizes for name, (_, sizes) in found.items() if sizes},
    )


def content(flows: Sequence[Flow], layers: Iterable[UnitLayer]) -> dict[str, list[tuple[str, int]]]:
    """Of every feature that a layer or norm reads, whose unit it is: by module, ``(layer, unit)`` in order.

    What a widening has to leave as it was: entries that were there read after it what they read before.
    """
    blocks = _Blocks({layer.name for layer in layers})
    return {
        str(node.target): [blocks.names[walk.number, index] for index in effect.inputs.ids.tolist()]
        for walk in [_Walk(flow, blocks, number) for number, flow in enumerate(flows)]
        for node, effect in walk.flow.effects.items()
        if node.op == "call_module" and effect.inputs is not None
    }


class _Blocks:
    """Units of one layer that have come into being together, and which blocks have to have the same number."""

    def __init__(self, unit_layers: Collection[str]) -> None:
        self.unit_layers = unit_layers
        self.sizes: dict[str, int] = {}
        self.names: dict[tuple[int, int], tuple[str, int]] = {}  # by walk and id
        self.more: dict[str, int] = {}
        self.asked: dict[str, str] = {}
        self._parents: dict[str, str] = {}
        self._fixed: dict[str, str] = {}
        self._groups: list[_Groups] = []

    def add(self, walk: int, layer: str, ids: Tensor) -> None:
        self.sizes[layer] = len(ids)
        self._parents.setdefault(layer, layer)
        self.names.update(((walk, index), (layer, unit)) for unit, index in enumerate(ids.tolist()))
        if layer not in self.unit_layers:
            self.fix(layer, f"{layer!r} is no unit layer of the finished tasks, so nothing can be added to it")

    def tie(self, one: str, other: str) -> None:
        self._parents[self._root(one)] = self._root(other)

    def tie_groups(self, groups: _Groups) -> None:
        self._groups.append(groups)

    def fix(self, block: str, reason: str) -> None:
        """No unit can be added to it."""
        self._fixed.setdefault(block, reason)

    def grow(self, block: str, more: int, asked: str) -> None:
        root = self._root(block)
        self.more[root] = max(more, self.more.get(root, 0))
        self.asked.setdefault(root, asked)

    def growth(self, block: str) -> int:
        return self.more.get(self._root(block), 0)

    def settle(self) -> None:
        """Let all that are tied grow as much as the one that grows most.

        Raises:
            ValueError: if one of them can't.
        """
        for _ in range(_MOST_ROUNDS):
            if not any([self._settle(groups) for groups in self._groups]):  # noqa: C419, each of them has to run
                break
        for block, reason in self._fixed.items():
            if self.growth(block):
                asked = self.asked[self._root(block)]
                tied = "" if block == asked else f"it grows together with {block!r}, and "
                raise ValueError(_refusal(asked, f"{tied}{reason}"))

    def _settle(self, groups: _Groups) -> bool:
        read, said = self.growth(groups.read), self.growth(groups.said)
        more = max(math.ceil(read * groups.copies / groups.features), math.ceil(said / groups.units))
        while more * groups.features % groups.copies:
            more += 1
        wanted = more * groups.features // groups.copies, more * groups.units
        if (read, said) == wanted:
            return False
        asked = next(self.asked[self._root(one)] for one in (groups.read, groups.said) if self.growth(one))
        self.grow(groups.read, wanted[0], asked)
        self.grow(groups.said, wanted[1], asked)
        return True

    def _root(self, block: str) -> str:
        while self._parents[block] != block:
            block = self._parents[block]
        return block


@dataclass(frozen=True)
class _Groups:
    """A grouped convolution: blocks that it reads and puts out, and how many channels of each belong to a group.

    Attributes:
        read: the block.
        said: the block.
        features: channels of a group that are read.
        units: channels of a group that are put out.
        copies: channels that are read of each unit of the block.
    """

    read: str
    said: str
    features: int
    units: int
    copies: int


class _Walk:
    """What one flow says of blocks."""

    def __init__(self, flow: Flow, blocks: _Blocks, number: int) -> None:
        self.flow = flow
        self.blocks = blocks
        self.number = number
        for node, effect in flow.effects.items():
            self._meet(node, effect)
        for stop in flow.pinned:
            self._fix(stop.ids, stop.reason)

    def blocks_of(self, layer: str) -> list[str] | None:
        """Blocks whose units a layer's are; None: the layer is not followed."""
        for node, effect in self.flow.effects.items():
            if node.op == "call_module" and node.target == layer:
                return list(dict.fromkeys(self._owners(effect.channels.ids)))
        return None

    def modules(self) -> Iterator[tuple[str, Any, Places | None, Places | None]]:
        """Modules with entries by channel, and where those stand that they read and put out; None: as they did."""
        for node, effect in self.flow.effects.items():
            if node.op == "call_module":
                module = self.flow.traced.modules[str(node.target)]
                inputs = None if effect.inputs is None else self._places(effect.inputs.ids)
                outputs = self._places(effect.channels.ids) if torch_class(module) in LAYERS else None
                if inputs is not None or outputs is not None:
                    yield str(node.target), module, inputs, outputs

    def _meet(self, node: fx.Node, effect: Effect) -> None:
        module = self.flow.traced.modules[str(node.target)] if node.op == "call_module" else None
        if module is not None and torch_class(module) in LAYERS:
            self._meet_layer(node, effect, module)
        for ids, others in effect.ties:
            one, other = self._segments(ids), self._segments(others)
            if (
                one is None
                or other is None
                or [(self.blocks.sizes[block], copies) for block, copies in one]
                != [(self.blocks.sizes[block], copies) for block, copies in other]
            ):
                for each in (ids, others):
                    self._fix(each, f"{described(node, self.flow.traced)} puts parts together that differ in size")
            else:
                for (first, _), (second, _) in zip(one, other, strict=True):
                    self.blocks.tie(first, second)
        if effect.literal is not None:
            sizes: Any = node.args[1] if effect.literal.nested else node.args
            size = sizes[effect.literal.position]
            self._fix(effect.channels.ids, f"{described(node, self.flow.traced)} has the size {size} written into it")
        for read in (effect.inputs, effect.channels):
            if read is not None and self._segments(read.ids) is None:
                self._fix(read.ids, f"{described(node, self.flow.traced)} has channels in another order than layers do")

    def _meet_layer(self, node: fx.Node, effect: Effect, module: Any) -> None:
        name, ids = str(node.target), effect.channels.ids
        features, units, groups, _ = layer_form(module)
        if (self.number, int(ids[0])) not in self.blocks.names:
            self.blocks.add(self.number, name, ids)
        if groups == 1:
            return
        read = None if effect.inputs is None else self._segments(effect.inputs.ids)
        what = f"{name} ({type(module).__name__}) has groups"
        if read is None:
            self._fix(ids, f"{what} of channels that don't come from a layer")
        elif features != groups and len(read) > 1:
            for each in (ids, effect.inputs.ids if effect.inputs is not None else ids):
                self._fix(each, f"{what} of channels that come from several layers")
        elif features != groups:
            ((block, copies),) = read
            self.blocks.tie_groups(_Groups(block, name, features // groups, units // groups, copies))

    def _segments(self, ids: Tensor) -> list[_Segment] | None:
        """Blocks in the order in which their channels stand; None: they stand otherwise than one behind the other."""
        runs: list[list[tuple[str, int]]] = []
        for index in ids.tolist():
            block, unit = self.blocks.names[self.number, index]
            if not runs or runs[-1][-1][0] != block or runs[-1][-1][1] > unit:
                runs.append([])
            runs[-1].append((block, unit))
        found = []
        for run in runs:
            block, size = run[0][0], self.blocks.sizes[run[0][0]]
            copies, rest = divmod(len(run), size)
            if rest or [unit for _, unit in run] != [unit for unit in range(size) for _ in range(copies)]:
                return None
            found.append((block, copies))
        return found

    def _places(self, ids: Tensor) -> Places | None:
        """Where channels stand behind which new ones come; None: none do."""
        segments = self._segments(ids)
        if segments is None or not any(self.blocks.growth(block) for block, _ in segments):
            return None
        runs: list[tuple[int, int]] = []
        end = 0
        for block, copies in segments:
            count = self.blocks.sizes[block] * copies
            if runs and sum(runs[-1]) == end:
                runs[-1] = (runs[-1][0], runs[-1][1] + count)
            else:
                runs.append((end, count))
            end += count + self.blocks.growth(block) * copies
        return Places(end, tuple(runs))

    def _owners(self, ids: Tensor) -> list[str]:
        return [self.blocks.names[self.number, index][0] for index in ids.tolist()]

    def _fix(self, ids: Tensor, reason: str) -> None:
        for block in dict.fromkeys(self._owners(ids)):
            self.blocks.fix(block, reason)


def _tensors(module: Any, inputs: Places | None, outputs: Places | None) -> dict[str, dict[int, Places]]:
    """What of a module's own grows, by dimension."""
    if torch_class(module) not in LAYERS:
        own = (*module._parameters.items(), *module._buffers.items())
        return {key: {0: inputs} for key, value in own if value is not None and value.ndim == 1 and inputs is not None}
    groups = layer_form(module)[2]
    first, second = (inputs, outputs) if isinstance(module, TRANSPOSED) else (outputs, inputs)
    found = {0: first, 1: second if groups == 1 else None}  # of groups there are more
    weight = {dimension: places for dimension, places in found.items() if places is not None}
    bias = {0: outputs} if outputs is not None and module.bias is not None else {}
    return {key: places for key, places in (("weight", weight), ("bias", bias)) if places}


def _sizes(module: Any, inputs: Places | None, outputs: Places | None) -> dict[str, tuple[int, int]]:
    """Attributes of a module that count channels, and what they are to be."""
    if torch_class(module) not in LAYERS:
        given = {"num_parameters" if isinstance(module, nn.PReLU) else "num_features": inputs}
    elif isinstance(module, nn.Linear):
        given = {"in_features": inputs, "out_features": outputs}
    else:
        given = {"in_channels": inputs, "out_channels": outputs}
    sizes = {name: (places.before, places.size) for name, places in given.items() if places is not None}
    if getattr(module, "groups", 1) > 1 and inputs is not None:
        sizes["groups"] = module.groups, module.groups * inputs.size // inputs.before
    return sizes


def _refusal(name: str, why: str) -> str:
    return f"layer {name!r} can't be widened: {why}. Widen others, naming them in layers=, or build the network wider"


def _why_unknown(name: str, walks: Iterable[_Walk]) -> str:
    for walk in walks:
        for node, why in walk.flow.whole.items():
            if node.op == "call_module" and node.target == name:
                return why
            if node.op == "call_module" and name.startswith(f"{node.target}."):
                return f"{described(node, walk.flow.traced)} is not taken apart"
        if name in walk.flow.traced.called:
            return "it has a forward of its own, so what grows with it is not known"
    return "it did not run when the forward was traced"
