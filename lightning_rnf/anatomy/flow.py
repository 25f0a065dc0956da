"""What is known of every tensor in a model's graph, before any is needed: constants, and channels that are one.

One walk along the graph, from the inputs to the logits. A silenced unit puts out zero; what is computed of zeros alone
is a known constant. What becomes of it depends on parameters, so there are two readings: a constant as it is now, which
may be cut out of the network, and a zero that stays one whatever parameters and buffers become, which nobody hears.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_rnf.anatomy.calls import function_name, node_argument
from lightning_rnf.anatomy.channels import Channels, Effect, Known, Read, effect_of_function, effect_of_module
from lightning_rnf.anatomy.graph import Traced, silenced, torch_class
from lightning_rnf.anatomy.grouped import LAYERS, absorbs, constant_output, layer_form
from lightning_rnf.anatomy.layers import CHANNEL_NORMS, UnitLayer


@dataclass(frozen=True)
class Stop:
    """Why channels stay that carry nothing.

    Attributes:
        reason: which operation keeps them, and why, in words.
        ids: of the channels.
    """

    reason: str
    ids: Tensor


@dataclass(frozen=True, eq=False)
class Flow:
    """What is known of every tensor.

    Attributes:
        traced: the model.
        channels: of what each node puts out; absent if nothing is known of it.
        effects: of each operation that is known.
        reads: what each node reads, and how; of an operation that is not known, all of it.
        roots: int64 by id: the id that stands for all that are one with it.
        pinned: ids that have to stay, and why: what reads them is not known.
        shared: ids that are one with others, and the operation that makes them so.
        whole: why nothing is known of a node, by node.
    """

    traced: Traced
    channels: Mapping[fx.Node, Channels]
    effects: Mapping[fx.Node, Effect]
    reads: Mapping[fx.Node, list[Read]]
    roots: Tensor
    pinned: tuple[Stop, ...]
    shared: tuple[Stop, ...]
    whole: Mapping[fx.Node, str]

    @classmethod
    def of(cls, traced: Traced, silent: Mapping[str, Tensor], structural: Iterable[UnitLayer] | None = None) -> Flow:
        """Walk along a graph.

        Args:
            traced: the model.
            silent: bool ``(units,)`` by layer: the units that put out zero.
            structural: the unit layers. If they are given, only a zero counts as constant, and only if it is one
                whatever values parameters and buffers have: of silent units, that of an activation or a pooling of
                zeros, a sum of zeros, a product with zero. None: constants as they are now.
        """
        walk = _Walk(traced, silent, None if structural is None else {layer.name: layer for layer in structural})
        for node in traced.graph.nodes:
            walk.follow(node)
        return cls(
            traced,
            walk.known.channels,
            walk.effects,
            walk.reads,
            torch.tensor([walk.root(index) for index in range(len(walk.parents))], dtype=torch.int64),
            tuple(walk.pinned),
            tuple(walk.shared),
            walk.whole,
        )


class _Walk:
    """What the walk has seen so far."""

    def __init__(
        self, traced: Traced, silent: Mapping[str, Tensor], structural: Mapping[str, UnitLayer] | None
    ) -> None:
        self.traced = traced
        self.silent = silent
        self.structural = structural
        self.known = Known()
        self.effects: dict[fx.Node, Effect] = {}
        self.reads: dict[fx.Node, list[Read]] = defaultdict(list)
        self.parents: list[int] = []
        self.pinned: list[Stop] = []
        self.whole: dict[fx.Node, str] = {}
        self.shared: list[Stop] = []

    def follow(self, node: fx.Node) -> None:
        if self._asks_for_size(node):
            return
        effect = self._effect(node)
        if effect is None:
            self._pin(node)
        else:
            if self.structural is not None:
                effect = replace(effect, channels=self._certain(node, effect.channels))
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
            ndim = node.meta.get("ndim") if axis == -1 else 1 - axis
            return Effect(Channels(self._new(units), unknown, axis, ndim), ())

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
        source, name = node.all_input_nodes[0], str(node.args[1])
        silent, known = self.silent[name], self.known.channels.get(source)
        said = None if known is None else known.spread(len(silent))
        if known is not None and said is not None:
            filled = replace(said, constant=said.constant.masked_fill(silent, 0.0))
            return Effect(filled, (Read(source, known.gather),))
        if self.structural is None:
            return None
        # Whatever the layer, its norm or its slopes may be: what recall fills with zero is zero.
        axis, ids = self.structural[name].axis, self._new(len(silent))
        unknown = torch.full((len(silent),), torch.nan, dtype=torch.float64)
        return Effect(Channels(ids, unknown.masked_fill(silent, 0.0), axis, None if axis == -1 else 1 - axis), ())

    def _certain(self, node: fx.Node, channels: Channels) -> Channels:
        """Only zeros are constants, and none that parameters or statistics may move."""
        module: Any = self.traced.modules.get(str(node.target)) if node.op == "call_module" else None
        kind = nn.Module if module is None else torch_class(module)
        moves = kind in LAYERS and module.bias is not None
        moves |= kind in CHANNEL_NORMS and (module.running_mean is not None or module.bias is not None)
        return replace(channels, constant=torch.where((channels.constant == 0) & (not moves), 0.0, torch.nan).double())

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

    def _new(self, count: int) -> Tensor:
        start = len(self.parents)
        self.parents.extend(range(start, start + count))
        return torch.arange(start, start + count)

    def root(self, index: int) -> int:
        while self.parents[index] != index:
            self.parents[index] = self.parents[self.parents[index]]
            index = self.parents[index]
        return index

    def _tie(self, ids: Tensor, others: Tensor) -> None:
        for one, other in zip(ids.tolist(), others.tolist(), strict=True):
            self.parents[self.root(one)] = self.root(other)


_MIXING_MODULES = (
    *(nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm, nn.MultiheadAttention, nn.Softmax, nn.Softmax2d),
    *(nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.TransformerDecoder, nn.TransformerDecoderLayer, nn.RNNBase),
)
_MIXING = frozenset(
    (
        *("layer_norm", "group_norm", "rms_norm", "local_response_norm", "normalize", "softmax", "log_softmax", "norm"),
        *("scaled_dot_product_attention", "multi_head_attention_forward", "matmul", "bmm", "einsum", "channel_shuffle"),
        *("lstm", "gru", "rnn_tanh", "rnn_relu"),
    )
)
_LAYER_FUNCTIONS = frozenset(("linear", *(f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3))))


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
        return f"{name} runs several times, or shares a parameter"
    if node.op == "call_module":
        mixes = isinstance(traced.modules[str(node.target)], _MIXING_MODULES)
    elif function_name(node) in _LAYER_FUNCTIONS:
        return f"{name} uses a weight as a function does"
    else:
        mixes = function_name(node) in _MIXING
    return f"{name} {'mixes channels' if mixes else 'is not known, or not in this form'}"


def _everything(count: int) -> Any:
    return lambda live: torch.ones(count, dtype=torch.bool)


def _is_shape(node: fx.Node) -> bool:
    name = function_name(node)
    return (name == "getattr" and str(node.args[1]) == "shape") or (name == "size" and len(node.args) == 1)


def _is_of_torch(node: fx.Node) -> bool:
    """Whether a name means what it means in torch."""
    origin = getattr(node.target, "__module__", None) or "torch"
    return node.op == "call_method" or (
        origin.partition(".")[0] in {"torch", "_operator"}
        and (not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace == "aten")
    )
