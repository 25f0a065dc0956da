"""Which channels of every tensor in a model's graph a sub-network can do without.

Whoever reads a known constant can do without it: a linear layer or convolution takes it into its bias. What only
silenced units read is not needed either. Channels that are one go if none of them is missed. What an unknown operation
reads stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from lightning_rnf.anatomy import (
    LAYERS,
    Channels,
    Flow,
    LiteralArgument,
    Stop,
    Traced,
    described,
    layer_form,
    torch_class,
)


@dataclass(frozen=True)
class Plan:
    """What stays of every tensor.

    Attributes:
        inputs: channels of what a layer or norm reads, one per feature; absent if all of it stays.
        outputs: channels of what each node puts out; absent if all of it stays.
        keep: bool by id of a channel.
        literals: sizes to change.
        roots: int64 by id: the id that stands for all that are one with it.
        stops: why ids stay, those that count first in front.
        whole: why nothing of a node goes, by node.
    """

    inputs: Mapping[fx.Node, Channels]
    outputs: Mapping[fx.Node, Channels]
    keep: Tensor
    literals: Mapping[fx.Node, LiteralArgument]
    roots: Tensor
    stops: tuple[Stop, ...]
    whole: Mapping[fx.Node, str]

    def reasons(self, node: fx.Node, units: int) -> list[str]:
        """Why each unit of a layer would stay although nothing needs it."""
        if node not in self.outputs:
            return [self.whole.get(node, _UNKNOWN)] * units
        roots = self.roots[self.outputs[node].ids]
        found = [_LAST] * units
        for stop in reversed(self.stops):
            for unit in torch.isin(roots, self.roots[stop.ids]).nonzero().flatten().tolist():
                found[unit] = stop.reason
        return found

    def kept(self, channels: Channels) -> Tensor:
        """Bool ``(channels,)``."""
        return self.keep[channels.ids]

    def kept_inputs(self, node: fx.Node, features: int) -> Tensor:
        """Bool ``(features,)``: which features of its input a module is left with."""
        return self.kept(self.inputs[node]) if node in self.inputs else torch.ones(features, dtype=torch.bool)

    def kept_outputs(self, node: fx.Node, units: int) -> Tensor:
        """Bool ``(units,)``: which units a layer is left with."""
        return self.kept(self.outputs[node]) if node in self.outputs else torch.ones(units, dtype=torch.bool)


def plan(traced: Traced, silent: Mapping[str, Tensor]) -> Plan:
    """Find out what can go.

    Args:
        traced: the model.
        silent: bool ``(units,)`` by layer: the units that put out zero.
    """
    return _Analysis(Flow.of(traced, silent)).plan()


class _Analysis:
    """After the walk along the graph, one back for what is needed; then who has to stay with whom."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow

    def plan(self) -> Plan:
        missed, in_use = self._missed()
        effects = self.flow.effects
        return Plan(
            {node: effect.inputs for node, effect in effects.items() if effect.inputs is not None},
            self.flow.channels,
            self._keep(missed),
            {node: effect.literal for node, effect in effects.items() if effect.literal is not None},
            self.flow.roots,
            (*self.flow.pinned, *in_use, *self.flow.shared),
            self.flow.whole,
        )

    def _keep(self, missed: Tensor) -> Tensor:
        """Bool by id."""
        roots, traced = self.flow.roots, self.flow.traced
        by_root = torch.zeros_like(missed)
        by_root[roots[missed]] = True
        layers = [
            self._grouped(node, roots)
            for node in self.flow.effects
            if node.op == "call_module" and torch_class(traced.modules[str(node.target)]) in LAYERS
        ]
        while any([_complete(by_root, read, said) for read, said in layers]):  # noqa: C419, each of them has to run
            pass
        return by_root[roots]

    def _missed(self) -> tuple[Tensor, list[Stop]]:
        """Bool by id: what is not constant and needed, and constants that are in use; and the uses."""
        missed = torch.zeros(len(self.flow.roots), dtype=torch.bool)
        for stop in self.flow.pinned:
            missed[stop.ids] = True
        in_use = []
        needed = {node: torch.zeros(len(value.ids), dtype=torch.bool) for node, value in self.flow.channels.items()}
        for node in reversed(self.flow.traced.graph.nodes):
            live = torch.empty(0, dtype=torch.bool)
            if node in needed:
                channels = self.flow.channels[node]
                live = needed[node] & channels.constant.isnan()
                missed[channels.ids[live]] = True
            for read in self.flow.reads.get(node, ()):
                wanted, channels = read.wanted(live), self.flow.channels[read.source]
                needed[read.source] |= wanted
                used = channels.ids[wanted & ~channels.constant.isnan() & (channels.constant != 0)]
                if not read.absorbs and len(used):
                    missed[used] = True
                    name = described(node, self.flow.traced)
                    in_use.append(Stop(f"{name} reads constants of them that are not 0", used))
        return missed, in_use

    def _grouped(self, node: fx.Node, roots: Tensor) -> tuple[Tensor | None, Tensor]:
        """Ids that a layer reads and puts out, ``(groups, channels of a group)``."""
        effect, groups = self.flow.effects[node], layer_form(self.flow.traced.modules[str(node.target)])[2]
        read = None if effect.inputs is None else roots[effect.inputs.ids].view(groups, -1)
        return read, roots[effect.channels.ids].view(groups, -1)


_UNKNOWN = "it is not followed"
_LAST = "a layer keeps one unit at least, and groups an equal number"


def _complete(keep: Tensor, read: Tensor | None, said: Tensor) -> bool:
    """Let all groups of a layer have the same number of channels, and at least one. True if more stay now."""
    present = keep[said].any(dim=1) if read is None else keep[read].any(dim=1) | keep[said].any(dim=1)
    if read is None and len(said) > 1:
        present = torch.ones_like(present)  # what is read stays, and with it all groups
    if not present.any():
        present = torch.arange(len(present)) == 0
    before = int(keep.sum())
    for ids in [said] if read is None else [read, said]:
        counts = keep[ids].sum(dim=1)
        most = max(1, int(counts.max()))
        for group in (present & (counts < most)).nonzero().flatten().tolist():
            spare = ids[group][~keep[ids[group]]]
            keep[spare[: most - int(counts[group])]] = True
    return int(keep.sum()) > before
