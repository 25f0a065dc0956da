"""Which channels of every tensor in a model's graph a sub-network can do without.

A silenced unit puts out zero. What is computed of zeros alone is a known constant, channel by channel, and whoever
reads a known constant can do without it: a linear layer or convolution takes it into its bias. What only silenced
units read is not needed either. Channels of different tensors that meet in a sum or product, or that a depthwise
convolution ties, are one: they go together or stay together. What an unknown operation reads stays.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_rnf.tracing import Traced, silenced, torch_class

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
CHANNEL_NORMS = (*BATCH_NORMS, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)

_ELEMENTWISE_MODULES = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Softsign),
    *(nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Tanhshrink, nn.Threshold),
    *(nn.Softshrink, nn.Hardshrink, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    *(nn.AlphaDropout, nn.FeatureAlphaDropout),
)
_ELEMENTWISE = frozenset(
    (
        *("relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "softplus", "softsign"),
        *("hardswish", "hardsigmoid", "hardtanh", "sigmoid", "logsigmoid", "tanh", "clamp", "clamp_min", "clamp_max"),
        *("abs", "neg", "exp", "sqrt", "square", "pow", "add", "sub", "mul", "div", "truediv", "multiply", "subtract"),
        *("iadd", "isub", "imul", "itruediv", "divide", "maximum", "minimum", "expand_as"),
        *("contiguous", "clone", "detach", "float", "double", "half"),
    )
)
_PRODUCTS = frozenset({"mul", "imul", "multiply"})
_MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_AVERAGE_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_ADAPTIVE_POOLS = (
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
)
_POOLS = frozenset(f"{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for n in (1, 2, 3))


@dataclass(frozen=True)
class Channels:
    """What is known about one tensor, channel by channel.

    Attributes:
        ids: int64 ``(channels,)``: channels of the same id go together.
        constant: float64 ``(channels,)``: the value of all its elements for every input, NaN if they vary.
        axis: that counts channels, from the end.
        ndim: of the tensor, or None.
        width: how many neighbours along the axis belong to one channel: after flattening, one per position. None: as
            many as there are positions, whoever reads them knows.
        single: there is one position per channel.
    """

    ids: Tensor
    constant: Tensor
    axis: int
    ndim: int | None
    width: int | None = 1
    single: bool = False

    @property
    def first(self) -> bool:
        """Whether channels are the axis after the samples."""
        return self.ndim is not None and self.axis == 1 - self.ndim

    def spread(self, features: int) -> Channels | None:
        """The same with one channel per feature of the axis, or None if that many features are none of it."""
        width, rest = divmod(features, len(self.ids))
        if rest or self.width not in (None, width):
            return None
        ids, constant = (values.repeat_interleave(width) for values in (self.ids, self.constant))
        return replace(self, ids=ids, constant=constant, width=1)


@dataclass(frozen=True)
class _Read:
    """That a node reads another one.

    Attributes:
        source: what is read.
        wanted: turns which of the reader's channels are unknown and needed into which of the source's it needs.
        absorbs: the reader can do without a constant that is not zero.
    """

    source: fx.Node
    wanted: Callable[[Tensor], Tensor]
    absorbs: bool = True


@dataclass(frozen=True)
class Literal:
    """A size in a ``view`` that counts channels: ``args[position]`` of the node, or ``args[1][position]``."""

    position: int
    nested: bool
    width: int


@dataclass(frozen=True)
class Plan:
    """What stays of every tensor.

    Attributes:
        inputs: of each layer, norm or other module with channels: of what it reads, one per feature; absent if
            everything that it reads stays.
        outputs: of what each node puts out; absent if all of it stays.
        keep: bool by id.
        literals: sizes to change.
    """

    inputs: dict[fx.Node, Channels]
    outputs: dict[fx.Node, Channels]
    keep: Tensor
    literals: dict[fx.Node, Literal]

    def kept(self, channels: Channels) -> Tensor:
        """Bool ``(channels,)``."""
        return self.keep[channels.ids]

    def kept_inputs(self, node: fx.Node, features: int) -> Tensor:
        """Bool ``(features,)``: which features of its input a module is left with."""
        return self.kept(self.inputs[node]) if node in self.inputs else torch.ones(features, dtype=torch.bool)


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
        self.values: dict[fx.Node, Channels] = {}
        self.inputs: dict[fx.Node, Channels] = {}
        self.reads: dict[fx.Node, list[_Read]] = defaultdict(list)
        self.literals: dict[fx.Node, Literal] = {}
        # Sizes in the graph: all of a tracked tensor's, its number of channels, any tensor's number of samples.
        self.sizes: dict[fx.Node, Channels] = {}
        self.counts: dict[fx.Node, Channels] = {}
        self.samples: set[fx.Node] = set()
        self.parents: list[int] = []
        self.pinned: list[Tensor] = []

    def plan(self) -> Plan:
        for node in self.traced.graph.nodes:
            value = self._output(node)
            if value is not None:
                self.values[node] = value
        keep = self._keep()
        return Plan(self.inputs, self.values, keep, self.literals)

    # -- forward: constants -------------------------------------------------------------------------------------------

    def _output(self, node: fx.Node) -> Channels | None:
        sources = [source for source in node.all_input_nodes if source in self.values]
        if node.op == "call_module":
            module = self.traced.modules[str(node.target)]
            kind = torch_class(module)
            if node.target not in self.traced.bound and len(node.all_input_nodes) == 1:
                if kind in LAYERS:
                    return self._layer(node, module)
                if sources:
                    value = self._module(node, module, kind)
                    if value is not None:
                        return value
        elif node.target is silenced:
            return self._silenced(node, sources)
        elif node.op in {"call_function", "call_method"} and _is_of_torch(node):
            if self._is_size(node):
                return None
            found = self._function(node, sources)
            if found is not None:
                return found
        self._opaque(node)
        return None

    def _opaque(self, node: fx.Node) -> None:
        """An operation that nothing is known about: it gets what it gets today."""
        for source in node.all_input_nodes:
            for known in (self.values, self.sizes, self.counts):
                if source in known:
                    self.pinned.append(known[source].ids)
            if source in self.values:
                everything = torch.ones(len(self.values[source].ids), dtype=torch.bool)
                self.reads[node].append(_Read(source, partial(_always, everything)))

    def _layer(self, node: fx.Node, module: Any) -> Channels | None:
        """A linear layer or convolution: new channels, except where each reads one channel only."""
        source = node.all_input_nodes[0]
        read = self.values.get(source)
        features, units, groups, axis = layer_form(module)
        if read is not None:
            spread = read.spread(features) if read.axis == axis else None
            if spread is None:
                self._opaque(node)
                read = None
            else:
                self.inputs[node] = read = spread
        ndim = (None if read is None else read.ndim) if axis == -1 else 1 - axis
        constant = torch.full((units,), torch.nan, dtype=torch.float64)
        if read is None:
            ids = self._new(units)
        else:
            ids = read.ids.repeat_interleave(units // groups) if 1 < features == groups else self._new(units)
            constant = constant_output(module, read.constant)
            absorbs = _absorbs(module)
            shape = (groups, -1)

            def wanted(live: Tensor) -> Tensor:
                by_feature = live.view(shape).any(dim=1).repeat_interleave(features // groups)
                return gather(by_feature)

            gather = self._gather(source, features)
            self.reads[node].append(_Read(source, wanted, absorbs))
        return Channels(ids, constant, axis, ndim, single=read is not None and read.single and _absorbs(module))

    def _gather(self, source: fx.Node, features: int) -> Callable[[Tensor], Tensor]:
        """From a mask of features back to one of the source's channels."""
        count = len(self.values[source].ids)
        return lambda mask: mask.view(count, features // count).any(dim=1)

    def _module(self, node: fx.Node, module: Any, kind: type[nn.Module]) -> Channels | None:
        """A module of torch that reads one tracked tensor."""
        (read,) = node.all_input_nodes
        source = self.values[read]
        if kind in CHANNEL_NORMS or (kind is nn.PReLU and module.num_parameters > 1):
            return self._by_channel(node, module, read, source)
        if kind is nn.PReLU:
            return self._same(node, read, replace(source, constant=_constant_row(module, source.constant)))
        if kind in _ELEMENTWISE_MODULES:
            return self._same(node, read, replace(source, constant=_applied(module, source.constant)))
        if kind in (*_MAX_POOLS, *_AVERAGE_POOLS, *_ADAPTIVE_POOLS):
            if getattr(module, "return_indices", False):
                return None
            borders = kind in _AVERAGE_POOLS and (_any(module.padding) or _divides(module))
            sized = (module.output_size,) if kind in _ADAPTIVE_POOLS else ()
            return self._pool(node, read, source, int(kind.__name__[-2]), borders, *sized)
        if kind is nn.Flatten:
            return self._flatten(node, read, source, module.start_dim, module.end_dim)
        return None

    def _by_channel(self, node: fx.Node, module: Any, read: fx.Node, source: Channels) -> Channels | None:
        """A module with one row of parameters per channel: norms in eval mode, PReLU."""
        features = module.num_parameters if isinstance(module, nn.PReLU) else module.num_features
        spread = source.spread(features)
        # What is not an axis of its own may be counted along another: axis 1 is the channels' by definition.
        flat = spread is not None and spread.axis == -1 and spread.ndim in (None, 2) and not _is_instance_norm(module)
        if spread is None or not (spread.first or flat):
            return None
        self.inputs[node] = spread
        self.reads[node].append(_Read(read, self._gather(read, features)))
        return replace(spread, constant=_constant_row(module, spread.constant))

    def _same(self, node: fx.Node, read: fx.Node, value: Channels) -> Channels:
        """The channels of ``read``, one to one."""
        self.reads[node].append(_Read(read, lambda live: live))
        return value

    def _pool(
        self, node: fx.Node, read: fx.Node, source: Channels, dims: int, borders: bool, size: Any = None
    ) -> Channels | None:
        if source.axis != -dims - 1:
            return None
        constant = source.constant
        if borders:  # zeros from outside are averaged in
            constant = constant.where(constant == 0, torch.nan)
        sizes = size if isinstance(size, (tuple, list)) else (size,)
        single = source.single or all(entry == 1 for entry in sizes)
        return self._same(node, read, replace(source, constant=constant, single=single))

    def _flatten(self, node: fx.Node, read: fx.Node, source: Channels, start: int, end: int) -> Channels | None:
        if not source.first or source.ndim is None or end not in (-1, source.ndim - 1):
            return None
        start = start % source.ndim
        if start == 1:
            if source.ndim == 2:
                return self._same(node, read, source)
            width = 1 if source.single else None
            return self._same(node, read, replace(source, axis=-1, ndim=2, width=width))
        if start > 1 and source.width == 1:
            return self._same(node, read, replace(source, axis=-start, ndim=start + 1))
        return None

    def _silenced(self, node: fx.Node, sources: Sequence[fx.Node]) -> Channels | None:
        source = node.all_input_nodes[0]
        if not sources:
            return None
        silent = self.silent[str(node.args[1])]
        value = self.values[source].spread(len(silent))
        if value is None:
            self._opaque(node)
            return None
        self.reads[node].append(_Read(source, self._gather(source, len(silent))))
        return replace(value, constant=value.constant.masked_fill(silent, 0.0))

    def _function(self, node: fx.Node, sources: Sequence[fx.Node]) -> Channels | None:
        """A function or method of torch that reads tracked tensors."""
        name = _name(node)
        if not sources:
            return None
        read = sources[0]
        source = self.values[read]
        if name in _ELEMENTWISE or (name.startswith("dropout") and _argument(node, 2, "training") is False):
            return self._elementwise(node, name, sources)
        if name in {"cat", "concat", "concatenate"}:
            return self._concatenated(node)
        if node.args[:1] != (read,):
            return None
        if name in _POOLS:
            count = int(name[-2])
            size = {"size": _argument(node, 1, "output_size")} if name.startswith("adaptive") else {}
            borders = name.startswith("avg") and (
                _any(_argument(node, 3, "padding", 0)) or _argument(node, 6, "divisor_override") is not None
            )
            indices = "max" in name and _argument(node, 6 if name.startswith("max") else 2, "return_indices", False)
            return None if indices else self._pool(node, read, source, count, borders, **size)
        if name in {"mean", "amax"}:
            dims, keepdim = _argument(node, 1, "dim"), bool(_argument(node, 2, "keepdim", False))
            return self._reduced(node, read, source, dims, keepdim)
        if name == "flatten":
            start, end = _argument(node, 1, "start_dim", 0), _argument(node, 2, "end_dim", -1)
            return self._flatten(node, read, source, start, end)
        if name in {"view", "reshape"}:
            return self._viewed(node, read, source)
        if name in {"permute", "transpose"}:
            return self._permuted(node, name, read, source)
        if name == "unsqueeze" and source.ndim is not None:
            after = _argument(node, 1, "dim") % (source.ndim + 1) > source.ndim + source.axis
            return self._same(node, read, replace(source, axis=source.axis - after, ndim=source.ndim + 1))
        return self._indexed(node, read, source) if name == "getitem" else None

    def _elementwise(self, node: fx.Node, name: str, sources: Sequence[fx.Node]) -> Channels | None:
        if len(sources) < len(node.all_input_nodes):
            return None
        first = self.values[sources[0]]
        others = [self.values[source] for source in sources[1:]]
        if any(
            (len(other.ids), other.axis, other.width) != (len(first.ids), first.axis, first.width) for other in others
        ):
            return None
        for other in others:
            self._tie(first.ids, other.ids)
        constants = {source: self.values[source].constant for source in sources}
        if name == "expand_as":
            constant = first.constant
        else:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: constants[source].clone())
            function = getattr(torch.Tensor, node.target) if isinstance(node.target, str) else node.target
            constant = _known(function(*args, **kwargs), constants.values())
        if name in _PRODUCTS:
            zero = torch.stack([constant == 0 for constant in constants.values()]).any(dim=0)
            constant = constant.masked_fill(zero, 0.0)
        for source in sources:
            self.reads[node].append(_Read(source, lambda live: live))
        ndims = {value.ndim for value in (first, *others)}
        ndim = ndims.pop() if len(ndims) == 1 else None
        return replace(first, constant=constant, ndim=ndim, single=all(v.single for v in (first, *others)))

    def _concatenated(self, node: fx.Node) -> Channels | None:
        parts = node.args[0]
        if not isinstance(parts, (tuple, list)) or not all(part in self.values for part in parts):
            return None
        values = [self.values[part] for part in parts]  # type: ignore[index]
        first, dim = values[0], _argument(node, 1, "dim", _argument(node, 1, "axis", 0))
        if not isinstance(dim, int) or any(
            (value.axis, value.ndim, value.width) != (first.axis, first.ndim, 1) for value in values
        ):
            return None
        if dim != first.axis and (first.ndim is None or dim - first.ndim != first.axis):
            return None
        start = 0
        for part, value in zip(parts, values, strict=True):
            stop = start + len(value.ids)
            self.reads[node].append(_Read(part, operator.itemgetter(slice(start, stop))))
            start = stop
        ids, constant = (torch.cat([getattr(value, key) for value in values]) for key in ("ids", "constant"))
        return replace(first, ids=ids, constant=constant, single=all(value.single for value in values))

    def _reduced(self, node: fx.Node, read: fx.Node, source: Channels, dims: Any, keepdim: bool) -> Channels | None:
        dims = (dims,) if isinstance(dims, int) else dims
        if source.ndim is None or not dims or not all(isinstance(dim, int) for dim in dims):
            return None
        gone = {dim % source.ndim - source.ndim for dim in dims}
        if source.axis in gone:
            return None
        others = set(range(-source.ndim + 1, 0)) - {source.axis}
        single = source.single or others <= gone
        if keepdim:
            return self._same(node, read, replace(source, single=single))
        axis = source.axis + sum(dim > source.axis for dim in gone)
        return self._same(node, read, replace(source, axis=axis, ndim=source.ndim - len(gone), single=single))

    def _viewed(self, node: fx.Node, read: fx.Node, source: Channels) -> Channels | None:
        """``view(samples, channels, ...)`` and ``view(samples, features)``."""
        nested = isinstance(node.args[1], (tuple, list))
        sizes: Any = node.args[1] if nested else node.args[1:]
        if not source.first or len(sizes) < 2 or not (sizes[0] == -1 or sizes[0] in self.samples):
            return None
        # What else is computed of the number of channels would not hold any more.
        if any(size in self.counts for size in (*sizes[:1], *sizes[2:]) if isinstance(size, fx.Node)):
            return None
        size, ndim = sizes[1], len(sizes)
        count, features = len(source.ids), len(source.ids) * (source.width or 1)
        if isinstance(size, fx.Node):
            counted = self.counts.get(size)
            if counted is None or len(counted.ids) != count or source.width != 1:
                return None
            self._tie(source.ids, counted.ids)
            size = count
        elif size == -1 and ndim == 2:
            return self._flatten(node, read, source, 1, -1)
        elif not isinstance(size, int) or size % features or (size != features and ndim > 2):
            return None
        else:
            self.literals[node] = Literal(1 if nested else 2, nested, size // count)
        if ndim == 2:
            width = size // count
            if source.single and width != 1:
                return None
            return self._same(node, read, replace(source, axis=-1, ndim=2, width=width))
        return self._same(node, read, replace(source, axis=1 - ndim, ndim=ndim)) if source.width == 1 else None

    def _permuted(self, node: fx.Node, name: str, read: fx.Node, source: Channels) -> Channels | None:
        given: Any = node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:]
        if source.ndim is None or not all(isinstance(dim, int) for dim in given):
            return None
        order = list(range(source.ndim))
        if name == "transpose":
            one, other = given
            order[one], order[other] = order[other], order[one]
        else:
            order = [dim % source.ndim for dim in given]
        return self._same(node, read, replace(source, axis=order.index(source.ndim + source.axis) - source.ndim))

    def _indexed(self, node: fx.Node, read: fx.Node, source: Channels) -> Channels | None:
        """``x[:, :, None, None]``: new axes only."""
        index = node.args[1]
        if source.ndim is None or not isinstance(index, tuple):
            return None
        if not all(entry is None or entry == slice(None) for entry in index):
            return None
        left = [entry for entry in index if entry is not None]
        full = list(index) + [slice(None)] * (source.ndim - len(left))
        places = [place for place, entry in enumerate(full) if entry is not None]
        axis = places[source.ndim + source.axis] - len(full)
        return self._same(node, read, replace(source, axis=axis, ndim=len(full)))

    def _is_size(self, node: fx.Node) -> bool:
        """Whether a node asks a tensor for its form; then what it is told is noted, and nothing has to stay for it."""
        name, source = _name(node), node.args[0] if node.args else None
        if not isinstance(source, fx.Node):
            return False
        if name == "getitem" and (source in self.sizes or _is_shape(source)):
            return self._count(node, self.sizes.get(source), node.args[1])
        if name == "size" and _argument(node, 1, "dim") is not None:
            return self._count(node, self.values.get(source), _argument(node, 1, "dim"))
        if _is_shape(node):
            if source in self.values:
                self.sizes[node] = self.values[source]
            return True
        return name in {"dim", "ndimension"} or (name == "getattr" and node.args[1] in {"ndim", "dtype", "device"})

    def _count(self, node: fx.Node, value: Channels | None, index: Any) -> bool:
        if index == 0:  # the samples come first, whatever else there is
            self.samples.add(node)
        elif value is not None and value.ndim is not None and isinstance(index, int):
            if index % value.ndim - value.ndim == value.axis:
                self.counts[node] = value
        elif value is not None:
            self.pinned.append(value.ids)
        return True

    # -- backward: needs ----------------------------------------------------------------------------------------------

    def _keep(self) -> Tensor:
        keep = torch.zeros(len(self.parents), dtype=torch.bool)
        for ids in self.pinned:
            keep[ids] = True
        needed: dict[fx.Node, Tensor] = {}
        for node in reversed(self.traced.graph.nodes):
            live = torch.empty(0, dtype=torch.bool)
            if node in self.values:
                value = self.values[node]
                live = needed.get(node, torch.zeros(len(value.ids), dtype=torch.bool)) & value.constant.isnan()
                keep[value.ids[live]] = True
            for read in self.reads[node]:
                source = self.values[read.source]
                wanted = read.wanted(live)
                needed[read.source] = needed.get(read.source, torch.zeros_like(wanted)) | wanted
                if not read.absorbs:
                    keep[source.ids[wanted & ~source.constant.isnan() & (source.constant != 0)]] = True
        roots = torch.tensor([self._root(index) for index in range(len(self.parents))], dtype=torch.int64)
        layers = [self._grouped(node, roots) for node in self.values if self._is_layer(node)]
        by_root = torch.zeros_like(keep).index_put((roots[keep],), torch.tensor(True))
        while any([_completed(by_root, *layer) for layer in layers]):  # noqa: C419, each of them has to run
            pass
        return by_root[roots]

    def _is_layer(self, node: fx.Node) -> bool:
        return node.op == "call_module" and torch_class(self.traced.modules[str(node.target)]) in LAYERS

    def _grouped(self, node: fx.Node, roots: Tensor) -> tuple[Tensor | None, Tensor]:
        """Ids that a layer reads and puts out, ``(groups, channels per group)``."""
        groups = layer_form(self.traced.modules[str(node.target)])[2]
        read = roots[self.inputs[node].ids].view(groups, -1) if node in self.inputs else None
        return read, roots[self.values[node].ids].view(groups, -1)

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


def layer_form(module: Any) -> tuple[int, int, int, int]:
    """Features that a linear layer or convolution reads, its units, its groups, and its channel axis from the end."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features, 1, -1
    return module.in_channels, module.out_channels, module.groups, 1 - module.weight.ndim


def by_group(module: Any, weight: Tensor) -> Tensor:
    """A weight as ``(groups, units, features, ...)``, units and features of one group."""
    groups = layer_form(module)[2]
    grouped: Tensor = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    # A transposed convolution has its features first.
    return grouped.transpose(1, 2) if isinstance(module, TRANSPOSED) else grouped


@torch.no_grad()
def folded(module: Any, constant: Tensor) -> Tensor:
    """What constant inputs, float64 ``(features,)``, add to each unit: ``(units,)``."""
    weight = by_group(module, module.weight).to("cpu", torch.float64)
    by_feature = constant.view(len(weight), 1, -1)
    summed: Tensor = weight.reshape(*weight.shape[:3], -1).sum(dim=3)
    # A zero reads nothing, whatever the weight has become.
    return summed.mul(by_feature).masked_fill(by_feature == 0, 0.0).sum(dim=2).flatten()


def constant_output(module: Any, constant: Tensor) -> Tensor:
    """The value of each unit whose inputs are all constant, float64 ``(units,)``; NaN for the others."""
    units, groups = layer_form(module)[1:3]
    bias = torch.zeros(units, dtype=torch.float64) if module.bias is None else module.bias.detach().cpu().double()
    known = ~constant.isnan() if _absorbs(module) else constant == 0
    by_unit = known.view(groups, -1).all(dim=1).repeat_interleave(units // groups)
    if not by_unit.any():
        return torch.full_like(bias, torch.nan)
    return (bias + folded(module, constant)).where(by_unit, torch.nan)


def _absorbs(module: Any) -> bool:
    """Whether a constant input is a constant output, also at the borders."""
    return isinstance(module, nn.Linear) or (
        isinstance(module, CONVOLUTIONS) and (module.padding == "valid" or not _any(module.padding))
    )


@torch.no_grad()
def _constant_row(module: Any, constant: Tensor) -> Tensor:
    """A norm's or PReLU's output for constant inputs."""
    rows = {key: value.detach().cpu().double() for key, value in module.state_dict().items()}
    if isinstance(module, nn.PReLU):
        return constant.where(constant >= 0, constant * rows["weight"])
    weight, bias = (rows.get(key, torch.tensor(default)) for key, default in (("weight", 1.0), ("bias", 0.0)))
    if module.running_mean is None:
        return (constant * 0 + bias).double()  # a constant is its own mean
    scale = weight * (rows["running_var"] + module.eps).rsqrt()
    return (constant - rows["running_mean"]) * scale + bias


@torch.no_grad()
def _applied(module: nn.Module, constant: Tensor) -> Tensor:
    if isinstance(module, (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)):
        return constant
    return _known(module(constant.clone()), [constant])


def _known(result: Tensor, constants: Iterable[Tensor]) -> Tensor:
    """NaN wherever an operand is: not every function hands it on."""
    unknown = torch.stack([constant.isnan() for constant in constants]).any(dim=0)
    return result.double().masked_fill(unknown, torch.nan)


def _completed(keep: Tensor, read: Tensor | None, said: Tensor) -> bool:
    """Let all groups of a layer have the same number of channels, and at least one. True if more have to stay now."""
    sides = [said] if read is None else [read, said]
    present = keep[said].any(dim=1) if read is None else keep[read].any(dim=1) | keep[said].any(dim=1)
    if read is None and len(said) > 1:
        present = torch.ones_like(present)  # all groups are read
    if not present.any():
        present = torch.arange(len(present)) == 0
    before = int(keep.sum())
    for ids in sides:
        kept = keep[ids]
        most = max(1, int(kept.sum(dim=1).max()))
        for group in (present & (kept.sum(dim=1) < most)).nonzero().flatten().tolist():
            spare = ids[group][~kept[group]]
            keep[spare[: most - int(kept[group].sum())]] = True
    return int(keep.sum()) > before


def _always(wanted: Tensor, live: Tensor) -> Tensor:
    return wanted


def _name(node: fx.Node) -> str:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return str(name).strip("_")


def _is_of_torch(node: fx.Node) -> bool:
    if node.op == "call_method":
        return True
    origin = getattr(node.target, "__module__", None) or "torch"
    return node.target is getattr or origin.partition(".")[0] in {"torch", operator.__name__, "_operator"}


def _is_shape(node: fx.Node) -> bool:
    return (_name(node) == "getattr" and node.args[1] == "shape") or (_name(node) == "size" and len(node.args) == 1)


def _argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def _any(padding: Any) -> bool:
    """Whether a padding reaches anywhere outside."""
    if isinstance(padding, str):
        return padding != "valid"
    return any(size != 0 for size in (padding if isinstance(padding, (tuple, list)) else (padding,)))


def _divides(pool: Any) -> bool:
    """Whether an average is divided by a number of the user's."""
    return getattr(pool, "divisor_override", None) is not None


def _is_instance_norm(module: nn.Module) -> bool:
    return not isinstance(module, (*BATCH_NORMS, nn.PReLU))
