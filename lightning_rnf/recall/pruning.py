"""Which channels of every tensor in a model's graph a sub-network can do without.

Whoever reads a known constant can do without it: a linear layer or convolution takes it into its bias. What only
silenced units read is not needed either. Channels that are one go if none of them is missed. What an unknown operation
reads stays.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_rnf.anatomy import (
    LAYERS,
    Channels,
    Effect,
    Known,
    LiteralArgument,
    Read,
    Traced,
    absorbs,
    constant_output,
    effect_of_function,
    effect_of_module,
    function_name,
    layer_form,
    node_argument,
    silenced,
    torch_class,
)


@dataclass(frozen=True)
class Stop:
    """Why channels stay that carry nothing.

    Attributes:
        reason: which operation keeps them, and why, in words.
        ids: of the channels.
    """

    reason: str
    ids: Tensor


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
    return _Analysis(traced, silent).plan()


class _Analysis:
    """One walk along the graph for what is constant, one back for what is needed, then who has to stay with whom."""

    def __init__(self, traced: Traced, silent: Mapping[str, Tensor]) -> None:
        self.traced = traced
        self.silent = silent
        self.known = Known()
        self.effects: dict[fx.Node, Effect] = {}
        self.reads: dict[fx.Node, list[Read]] = defaultdict(list)
        self.parents: list[int] = []
        self.pinned: list[Stop] = []
        self.whole: dict[fx.Node, str] = {}
        self.shared: list[Stop] = []

    def plan(self) -> Plan:
        for node in self.traced.graph.nodes:
            self._follow(node)
        missed, in_use = self._missed()
        roots = torch.tensor([self._root(index) for index in range(len(self.parents))], dtype=torch.int64)
        return Plan(
            {node: effect.inputs for node, effect in self.effects.items() if effect.inputs is not None},
            self.known.channels,
            self._keep(missed, roots),
            {node: effect.literal for node, effect in self.effects.items() if effect.literal is not None},
            roots,
            (*self.pinned, *in_use, *self.shared),
            self.whole,
        )

    # -- forward: constants -------------------------------------------------------------------------------------------

    def _follow(self, node: fx.Node) -> None:
        if self._asks_for_size(node):
            return
        effect = self._effect(node)
        if effect is None:
            self._pin(node)
        else:
            self.effects[node] = effect
            self.known.channels[node] = effect.channels
            self.reads[node].extend(effect.reads)
            for ids, others in effect.ties:
                self._tie(ids, others)
                self.shared.append(Stop(f"{described(node, self.traced)} makes them one with what has to stay", ids))

    def _effect(self, node: fx.Node) -> Effect | None:
        if node in self.traced.aliased:
            return None
        if node.op in {"call_function", "call_method"}:
            if node.target is silenced:
                return self._silenced(node)
            return effect_of_function(node, self.known) if _is_of_torch(node) else None
        if node.op != "call_module" or node.target in self.traced.bound or len(node.all_input_nodes) != 1:
            return None
        module = self.traced.modules[str(node.target)]
        if torch_class(module) in LAYERS:
            return self._layer(node, module)
        return effect_of_module(node, module, self.known) if node.all_input_nodes[0] in self.known.channels else None

    def _pin(self, node: fx.Node) -> None:
        """Nothing is known about this operation: it gets what it gets today."""
        self.whole[node] = why = _why_whole(node, self.traced)
        for source in node.all_input_nodes:
            for known in (self.known.channels, self.known.sizes, self.known.counts):
                if source in known:
                    self.pinned.append(Stop(why, known[source].ids))
            if source in self.known.channels:
                self.reads[node].append(Read(source, _everything(len(self.known[source].ids))))

    def _layer(self, node: fx.Node, module: Any) -> Effect | None:
        """A linear layer or convolution: new channels, except where each unit reads one feature only."""
        source = node.all_input_nodes[0]
        features, units, groups, axis = layer_form(module)
        known = self.known.channels.get(source)
        read = known.spread(features) if known is not None and known.axis == axis else None
        if known is None or read is None:
            self._pin(node)
            unknown = torch.full((units,), torch.nan, dtype=torch.float64)
            return Effect(Channels(self._new(units), unknown, axis, None if axis == -1 else 1 - axis), ())

        def wanted(live: Tensor) -> Tensor:
            return known.gather(live.view(groups, -1).any(dim=1).repeat_interleave(features // groups))

        ids = read.ids.repeat_interleave(units // groups) if 1 < features == groups else self._new(units)
        channels = Channels(
            ids,
            constant_output(module, read.constant),
            axis,
            read.ndim if axis == -1 else 1 - axis,
            single=read.single and absorbs(module),
        )
        return Effect(channels, (Read(source, wanted, absorbs(module)),), inputs=read)

    def _silenced(self, node: fx.Node) -> Effect | None:
        source, silent = node.all_input_nodes[0], self.silent[str(node.args[1])]
        known = self.known.channels.get(source)
        said = None if known is None else known.spread(len(silent))
        if known is None or said is None:
            return None
        return Effect(replace(said, constant=said.constant.masked_fill(silent, 0.0)), (Read(source, known.gather),))

    def _asks_for_size(self, node: fx.Node) -> bool:
        """Whether a node asks a tensor for its form; then what it is told is noted, and nothing has to stay for it."""
        name, source = function_name(node), node.args[0] if node.args else None
        if node.op not in {"call_function", "call_method"} or not isinstance(source, fx.Node):
            return False
        if name == "getitem" and (source in self.known.sizes or _is_shape(source)):
            return self._count(node, self.known.sizes.get(source), node.args[1])
        if name == "size" and node_argument(node, 1, "dim") is not None:
            return self._count(node, self.known.channels.get(source), node_argument(node, 1, "dim"))
        if _is_shape(node):
            if source in self.known.channels:
                self.known.sizes[node] = self.known[source]
            return True
        return name in {"dim", "ndimension"} or (name == "getattr" and node.args[1] in {"ndim", "dtype", "device"})

    def _count(self, node: fx.Node, channels: Channels | None, index: Any) -> bool:
        if index == 0:  # the samples come first, whatever else there is
            self.known.samples.add(node)
        elif channels is not None and channels.ndim is not None and isinstance(index, int):
            if index % channels.ndim - channels.ndim == channels.axis:
                self.known.counts[node] = channels
        elif channels is not None:
            self.pinned.append(Stop(f"{described(node, self.traced)} asks how many there are", channels.ids))
        return True

    # -- backward: needs ----------------------------------------------------------------------------------------------

    def _keep(self, missed: Tensor, roots: Tensor) -> Tensor:
        """Bool by id."""
        by_root = torch.zeros_like(missed)
        by_root[roots[missed]] = True
        layers = [
            self._grouped(node, roots)
            for node in self.effects
            if node.op == "call_module" and torch_class(self.traced.modules[str(node.target)]) in LAYERS
        ]
        while any([_complete(by_root, read, said) for read, said in layers]):  # noqa: C419, each of them has to run
            pass
        return by_root[roots]

    def _missed(self) -> tuple[Tensor, list[Stop]]:
        """Bool by id: what is not constant and needed, and constants that are in use; and the uses."""
        missed = torch.zeros(len(self.parents), dtype=torch.bool)
        for stop in self.pinned:
            missed[stop.ids] = True
        in_use = []
        needed = {node: torch.zeros(len(value.ids), dtype=torch.bool) for node, value in self.known.channels.items()}
        for node in reversed(self.traced.graph.nodes):
            live = torch.empty(0, dtype=torch.bool)
            if node in needed:
                channels = self.known[node]
                live = needed[node] & channels.constant.isnan()
                missed[channels.ids[live]] = True
            for read in self.reads[node]:
                wanted, channels = read.wanted(live), self.known[read.source]
                needed[read.source] |= wanted
                used = channels.ids[wanted & ~channels.constant.isnan() & (channels.constant != 0)]
                if not read.absorbs and len(used):
                    missed[used] = True
                    in_use.append(Stop(f"{described(node, self.traced)} reads constants of them that are not 0", used))
        return missed, in_use

    # -- channels that are one ----------------------------------------------------------------------------------------

    def _grouped(self, node: fx.Node, roots: Tensor) -> tuple[Tensor | None, Tensor]:
        """Ids that a layer reads and puts out, ``(groups, channels of a group)``."""
        effect, groups = self.effects[node], layer_form(self.traced.modules[str(node.target)])[2]
        read = None if effect.inputs is None else roots[effect.inputs.ids].view(groups, -1)
        return read, roots[effect.channels.ids].view(groups, -1)

    def _new(self, count: int) -> Tensor:
        start = len(self.parents)
        self.parents.extend(range(start, start + count))
        return torch.arange(start, start + count)

    def _root(self, index: int) -> int:
        while self.parents[index] != index:
            self.parents[index] = self.parents[self.parents[index]]
            index = self.parents[index]
        return index

    def _tie(self, ids: Tensor, others: Tensor) -> None:
        for one, other in zip(ids.tolist(), others.tolist(), strict=True):
            self.parents[self._root(one)] = self._root(other)


_MIXING_MODULES = (
    *(nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm, nn.MultiheadAttention, nn.Softmax, nn.Softmax2d),
    *(nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.TransformerDecoder, nn.TransformerDecoderLayer, nn.RNNBase),
)
_MIXING = frozenset(
    (
        *("layer_norm", "group_norm", "rms_norm", "local_response_norm", "normalize", "softmax", "log_softmax", "norm"),
        *("scaled_dot_product_attention", "multi_head_attention_forward", "matmul", "bmm", "einsum", "channel_shuffle"),
    )
)
_LAYER_FUNCTIONS = frozenset(("linear", *(f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3))))
_UNKNOWN = "it is not followed"
_LAST = "a layer keeps one unit at least, and groups an equal number"


def described(node: fx.Node, traced: Traced) -> str:
    """An operation by name: a module's own, or a function's and that of the module whose forward calls it."""
    if node.op == "call_module":
        return f"{node.target} ({type(traced.modules[str(node.target)]).__name__})"
    inside = next(reversed(node.meta.get("nn_module_stack") or {"": None})).partition("@")[0]
    return f"{function_name(node)} in {inside}" if inside else f"{function_name(node)} in the forward"


def _why_whole(node: fx.Node, traced: Traced) -> str:
    """Why an operation is left as it is, with all that it reads."""
    if node.op == "output":
        return "the forward returns them"
    name = described(node, traced)
    if node in traced.aliased:
        return f"{name}: its output is written to in place, and read again"
    if node.op == "call_module" and node.target in traced.bound:
        return f"{name} runs twice, or shares a parameter"
    if node.op == "call_module":
        mixes = isinstance(traced.modules[str(node.target)], _MIXING_MODULES)
    elif function_name(node) in _LAYER_FUNCTIONS:
        return f"{name} uses a weight as a function does"
    else:
        mixes = function_name(node) in _MIXING
    return f"{name} {'mixes channels' if mixes else 'is not known, or not in this form'}"


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


def _everything(count: int) -> Any:
    return lambda live: torch.ones(count, dtype=torch.bool)


def _is_shape(node: fx.Node) -> bool:
    name = function_name(node)
    return (name == "getattr" and str(node.args[1]) == "shape") or (name == "size" and len(node.args) == 1)


def _is_of_torch(node: fx.Node) -> bool:
    """Whether a name means what it means in torch."""
    origin = getattr(node.target, "__module__", None) or "torch"
    return node.op == "call_method" or origin.partition(".")[0] in {"torch", "_operator"}
