"""Which units make queries, keys and values: found by what attention reads when it runs, whatever class it is in."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from lightning_rnf.anatomy.layers import UnitLayer
    from lightning_rnf.anatomy.trace import Call, Trace

ROLES = ("queries", "keys", "values")
"""What attention reads, in the order of their bits in `Projection.roles`."""

_QUERIES, _KEYS = 1, 2


@dataclass(frozen=True, eq=False)
class Projection:
    """What attention makes of a layer's units.

    Attributes:
        roles: int64 ``(units,)``: sums of 1 for queries, 2 for keys and 4 for values. Units may be several of them:
            keys that are queries, too, say.
        heads: how many there are and how many units each has, by role, where that is known.
    """

    roles: Tensor
    heads: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def parts(self) -> tuple[tuple[Tensor, float], ...]:
        """Units that are ranked by themselves: bool ``(units,)``, and what the size of their relevance sums to.

        Attention is two things: where it looks, and what it says of that. Values have 1, and so has where it looks:
        half for queries and half for keys, since one says nothing without the other.
        """
        halves = (_QUERIES, _KEYS)
        return tuple((self.roles == role, 0.5 if role in halves else 1.0) for role in self.roles.unique().tolist())

    def __str__(self) -> str:
        """``queries: 4 heads of 16; keys, values: 2 heads of 16``."""
        named: dict[str, list[str]] = {}
        for bit, role in enumerate(ROLES):
            if bool((self.roles & 1 << bit).any()):
                heads, width = self.heads.get(role, (0, 0))
                named.setdefault(f": {heads} head{'s' * (heads != 1)} of {width}" if heads else "", []).append(role)
        return "; ".join(f"{', '.join(roles)}{form}" for form, roles in named.items())


@dataclass(frozen=True, eq=False)
class Attended:
    """One run of attention.

    Attributes:
        read: queries, keys and values.
        widths: how many numbers each has in a head.
        nodes: of the autograd graph, that made the scores and what comes out.
    """

    read: tuple[Tensor, Tensor, Tensor]
    widths: tuple[int, int, int]
    nodes: frozenset[Any]


class Attending(TorchFunctionMode):
    """Notes what attention reads: `scaled_dot_product_attention`, or a softmax between two products.

    Attributes:
        found: in the order in which they ran.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Attended] = []
        self._products: dict[Any, list[Tensor]] = {}
        self._softmaxes: dict[Any, Tensor] = {}

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if not isinstance(result, Tensor) or result.grad_fn is None:
            return result
        operands = [x for x in (*args, *(kwargs or {}).values()) if isinstance(x, Tensor)]
        name = str(getattr(function, "__name__", "")).strip("_")
        if name == "scaled_dot_product_attention":
            given = {**dict(zip(("query", "key", "value"), args, strict=False)), **(kwargs or {})}
            self._note((given["query"], given["key"], given["value"]), result.grad_fn)
        elif name == "softmax" and operands and operands[0].grad_fn is not None:
            self._softmaxes[result.grad_fn] = operands[0]
        elif name in _PRODUCTS and len(operands) >= 2:
            pair = operands[-2:]  # baddbmm adds them to what comes first
            self._weighs(pair, result.grad_fn)
            self._products[result.grad_fn] = pair
        return result

    def _weighs(self, pair: Sequence[Tensor], made: Any) -> None:
        """Whether one of two factors is the softmax of a product, and so the other one values."""
        for weights, values in (pair, pair[::-1]):
            softmaxes = _behind(weights.grad_fn, self._softmaxes)
            if len(softmaxes) == 1:
                scores = _behind(self._softmaxes[softmaxes[0]].grad_fn, self._products)
                if len(scores) == 1:
                    query, key = self._products[scores[0]]
                    self._note((query, key, values), made, scores[0])

    def _note(self, read: tuple[Tensor, Tensor, Tensor], *nodes: Any) -> None:
        width = read[0].shape[-1]
        self.found.append(Attended(read, (width, width, read[2].shape[-1]), frozenset(nodes)))


_PRODUCTS = ("matmul", "rmatmul", "bmm", "baddbmm", "einsum")
_MIXES = ("Mm", "Addmm", "Bmm", "Baddbmm", "Addbmm", "Convolution", "Linear", "Softmax")
"""Beginnings of names of nodes that mix numbers. Weights are scaled, masked and moved only."""


def _behind(node: Any, wanted: Mapping[Any, Any]) -> list[Any]:
    """The wanted nodes whose numbers these are, but for what is done to them one by one."""
    found, pending, seen = [], [node], {None}
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in wanted:
            found.append(node)
        elif not str(node.name()).rpartition("::")[2].startswith(_MIXES):
            pending.extend(successor for successor, _ in node.next_functions)
    return found


def projections(trace: Trace, layers: Iterable[UnitLayer]) -> dict[str, Projection]:
    """The layers that make queries, keys and values and nothing else, by name.

    Which of their units make which is seen from the gradients of what attention has read, so it doesn't matter how they
    are cut, scaled, normalised or turned (rotary embeddings) on their way there.

    What is not certain is left out: layers that anything else reads, too, that have units of which attention reads
    none, or that the graph doesn't lead back to. Of `nn.MultiheadAttention` the rows are known.
    """
    layers = tuple(layers)
    packed = {layer.name: _packed(layer, trace.modules[layer.name]) for layer in layers if layer.packed}
    axes = {layer.name: layer.axis for layer in layers}
    outputs = {
        call.node: call
        for call in trace.calls
        if call.name in axes and call.output is not None and call.node is call.output.grad_fn is not None
    }
    if not trace.attended or not outputs:
        return packed
    inside = frozenset().union(*(attended.nodes for attended in trace.attended))
    reached = _reached([trace.logits.grad_fn], inside)
    elsewhere = {call.name for node, call in outputs.items() if node in reached}  # in any of its runs
    roles: dict[str, Tensor] = {}
    heads: dict[str, dict[str, tuple[int, int]]] = defaultdict(dict)
    for attended in trace.attended:
        for bit, (tensor, width) in enumerate(zip(attended.read, attended.widths, strict=True)):
            nodes = _reached([tensor.grad_fn], {*outputs, *inside})
            calls = [call for node, call in outputs.items() if node in nodes and call.name not in elsewhere]
            for call, read in zip(calls, _read_of(tensor, calls, axes), strict=True):
                roles[call.name] = roles.get(call.name, 0) | (read.long() << bit)
                made, left = divmod(int(read.sum()), width)
                # Those that several queries share may have been repeated. In three dimensions heads are among samples.
                if made and not left and tensor.ndim > 3 and tensor.shape[-3] % made == 0:
                    heads[call.name][ROLES[bit]] = made, width
    found = {}
    for name, of_units in roles.items():
        some = of_units.unique().tolist()
        if len(some) == 2 and some[0] == 0:  # those of one role that happened to say nothing
            of_units = torch.full_like(of_units, some[1])
        if bool(of_units.all()):
            found[name] = Projection(of_units, heads[name])
    return found | packed


def _packed(layer: UnitLayer, module: Any) -> Projection:
    """Of torch's attention."""
    roles = torch.tensor([1 << bit for bit in range(len(ROLES))]).repeat_interleave(layer.units // len(ROLES))
    return Projection(roles, dict.fromkeys(ROLES, (module.num_heads, module.head_dim)))


def _reached(starts: Sequence[Any], ends: Container[Any]) -> set[Any]:
    """All nodes of the graph that are reached, up to the ends."""
    seen: set[Any] = {None}
    pending = list(starts)
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            if node not in ends:
                pending.extend(successor for successor, _ in node.next_functions)
    return seen - {None}


def _read_of(tensor: Tensor, calls: Sequence[Call], axes: Mapping[str, int]) -> list[Tensor]:
    """Of each layer's output, which of its units a tensor is made of: bool ``(units,)`` on the CPU."""
    outputs = [call.output for call in calls if call.output is not None]
    if not outputs:
        return []
    # Weighed at random: the sum of what a norm has made doesn't change with what it reads.
    weights = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)).to(tensor)
    gradients: Sequence[Tensor | None] = (None,) * len(outputs)
    # Whatever a forward of the user's has written over on its way there: then it is not known.
    with suppress(Exception):
        gradients = torch.autograd.grad(tensor, outputs, weights, retain_graph=True, allow_unused=True)
    return [
        torch.zeros(output.shape[axes[call.name]], dtype=torch.bool)
        if gradient is None
        else (gradient != 0).movedim(axes[call.name], 0).flatten(1).any(dim=1).cpu()
        for call, output, gradient in zip(calls, outputs, gradients, strict=True)
    ]
