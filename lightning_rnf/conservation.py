"""Whether relevance was conserved: how much of the logits' arrives at each layer, and what lies where it isn't."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from torch import Tensor, nn
from zennit.types import BatchNorm

from lightning_rnf.units import UnitLayer

INPUT = "<input>"
"""Stands for the network's input among names of layers: what arrives at the inputs of its first unit layers."""

# Nodes of the autograd graph whose plain gradient hands relevance on without gain or loss, by name without "Backward":
# they move or copy values, choose some of them, or average them. A sum of two tensors is none; see `_hands_on`.
_CONSERVING = frozenset(
    """
    AccumulateGrad Identity _Evenly _ByContribution Add Sub Relu View UnsafeView Reshape ReshapeAlias Alias AsStrided
    T Transpose Permute MoveDim Squeeze Unsqueeze Slice Select Split SplitWithSizes Chunk Unbind Narrow Diagonal Index
    IndexSelect Gather TakeAlongDim Cat Stack Expand Repeat Clone ToCopy Copy CopySlices ConstantPadNd ReflectionPad1D
    ReflectionPad2D ReflectionPad3D ReplicationPad1D ReplicationPad2D ReplicationPad3D MaxPool2DWithIndices
    MaxPool3DWithIndices MkldnnMaxPool2D MkldnnMaxPool3D AdaptiveMaxPool2D AdaptiveMaxPool3D Amax Max Maximum
    MaskedFill MaskedSelect Where Flip Roll Im2Col Unfold PixelShuffle PixelUnshuffle Mean AvgPool2D AvgPool3D
    AdaptiveAvgPool2D AdaptiveAvgPool3D MkldnnAdaptiveAvgPool2D
    """.split()
)


@dataclass(frozen=True)
class Conservation:
    """What became of the relevance of the logits.

    Attributes:
        ratios: by unit layer, in execution order, after `INPUT`: sum of its relevance over that of the logits. NaN if
            the logits have none.
        cuts: those of them that all relevance runs through, from the logits down: 1 is right there. Elsewhere it is
            the share of a branch.
        size: sum of the absolute relevance of the logits over that of the signed, at least 1: how much they cancel.
        unruled: what had no rule, places by kind: ``{"LayerNorm": ("encoder.norm1",)}``.
        causes: by cut, what may take or make relevance between it and the one above: places by kind.
    """

    ratios: dict[str, float] = field(default_factory=dict)
    cuts: tuple[str, ...] = ()
    size: float = 1.0
    unruled: dict[str, tuple[str, ...]] = field(default_factory=dict)
    causes: dict[str, dict[str, tuple[str, ...]]] = field(default_factory=dict)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the relevance should know, in plain words."""
        return tuple(
            f"no rule for {_described({kind: places})}: relevance is a plain gradient there"
            for kind, places in self.unruled.items()
        )

    def loss(self, most: float) -> str | None:
        """The first cut, from the logits down, where relevance has changed by more than ``most``, in a sentence.

        Args:
            most: change of relevance, over the sum of the *absolute* relevance of the logits: that of logits whose
                signs cancel tells nothing as a ratio.
        """
        above = "the logits"
        for name in self.cuts:
            if abs(self.ratios[name] - 1) / self.size > most:
                causes = _described(self.causes[name]) or "nothing that is known to be a cause"
                return (
                    f"relevance is not conserved: {self.ratios[name]:.3g} times that of the logits is left at "
                    f"{_place(name)}; between it and {above}: {causes}"
                )
            above = _place(name)
        return None


class Journal:
    """Follows an attribution and makes its `Conservation`."""

    def __init__(self, layers: Sequence[UnitLayer]) -> None:
        self._layers = [layer.name for layer in layers]
        self._calls: list[_Call] = []
        self._graph: _Graph | None = None
        self._sent = self._sent_absolute = self._arrived = 0.0

    @contextmanager
    def recording(self, module: nn.Module, ruled: Mapping[str, nn.Module]) -> Iterator[None]:
        """Note what modules run in the first forward. One is enough: the others run the same.

        Args:
            module: a borrowed one.
            ruled: those of its modules that have rules of their own, by name.
        """
        with ExitStack() as hooks:
            for name, submodule in module.named_modules() if self._graph is None else ():
                call = _Call(name, submodule, name in ruled)
                hooks.callback(submodule.register_forward_pre_hook(call.enter, with_kwargs=True).remove)
                hooks.callback(submodule.register_forward_hook(self._leaver(call)).remove)
            yield

    def _leaver(self, call: _Call) -> Any:
        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self._calls.append(call.leave(output))

        return leave

    def add(
        self, logits: Tensor, relevance: Tensor, roots: Sequence[Tensor], arrived: Sequence[Tensor | None]
    ) -> None:
        """After each batch.

        Args:
            logits: with their graph.
            relevance: of the logits.
            roots: inputs of layers; the leaves among them are the network's input.
            arrived: relevance of each root.
        """
        leaves = {id(root): of_root for root, of_root in zip(roots, arrived, strict=True) if root.is_leaf}
        self._sent += relevance.sum().item()
        self._sent_absolute += relevance.abs().sum().item()
        self._arrived += sum(of_root.sum().item() for of_root in leaves.values() if of_root is not None)
        if self._graph is None:
            self._graph = _Graph(logits, leaves)

    def conservation(self, relevance: Mapping[str, Tensor]) -> Conservation:
        """What has been found.

        Args:
            relevance: summed over batches, ``(units,)`` by layer.
        """
        assert self._graph is not None
        sums = {INPUT: self._arrived} | {name: values.sum().item() for name, values in relevance.items()}
        ratios = {name: value / self._sent if self._sent else float("nan") for name, value in sums.items()}
        size = self._sent_absolute / abs(self._sent) if self._sent else 1.0
        at = {call.name: call.after[0] for call in self._calls if call.name in self._layers and call.after}
        cuts = [name for name, node in at.items() if self._graph.share.get(node) == 1]
        cuts.sort(key=lambda name: self._graph.position[at[name]])  # type: ignore[union-attr]
        found = _causes(self._graph, self._calls)
        causes: dict[str, dict[str, tuple[str, ...]]] = {}
        start = 0
        for name in (*cuts, INPUT):
            end = self._graph.position[at[name]] if name != INPUT else len(self._graph.position)
            causes[name] = _grouped(cause for cause in found if start <= cause.position < end)
            start = end
        unruled = _grouped(cause for cause in reversed(found) if not cause.is_bias)
        return Conservation(ratios, (*cuts, INPUT), size, unruled, causes)


class _Graph:
    """The part of the autograd graph that leads from the logits to the network's input."""

    def __init__(self, logits: Tensor, leaves: Iterable[int]) -> None:
        ends = set(leaves)
        self.share: dict[Any, Fraction] = {}  # of one drop poured in at the logits that splits evenly at every fork
        below: dict[Any, list[Any]] = {}
        for node in _depth_first(logits.grad_fn):  # everything below a node comes before it
            below[node] = [successor for successor, _ in node.next_functions if successor in self.share]
            if below[node] or id(getattr(node, "variable", None)) in ends:
                self.share[node] = Fraction(0)
        order = list(reversed(self.share))
        if order:
            self.share[order[0]] = Fraction(1)
        for node in order:
            for successor in below[node]:
                self.share[successor] += self.share[node] / len(below[node])
        self.position = {node: position for position, node in enumerate(order)}


def _depth_first(start: Any) -> Iterator[Any]:
    seen = {start}
    pending = [] if start is None else [(start, iter(start.next_functions))]
    while pending:
        node, successors = pending[-1]
        for successor, _ in successors:
            if successor is not None and successor not in seen:
                seen.add(successor)
                pending.append((successor, iter(successor.next_functions)))
                break
        else:
            pending.pop()
            yield node


class _Call:
    """One run of a module: the nodes that it read and made, as they were then."""

    def __init__(self, name: str, module: nn.Module, ruled: bool) -> None:
        self.name = name
        self.module = module
        self.ruled = ruled
        self.before: list[Any] = []
        self.after: list[Any] = []

    def enter(self, module: nn.Module, args: Any, options: Any) -> None:
        self.before = _nodes((args, options))

    def leave(self, output: Any) -> _Call:
        self.after = _nodes(output)
        return self

    def inside(self) -> Iterator[Any]:
        """The nodes between what it read and what it made."""
        seen = set(self.before)
        pending = list(self.after)
        while pending:
            node = pending.pop()
            if node not in seen:
                seen.add(node)
                yield node
                pending.extend(successor for successor, _ in node.next_functions if successor is not None)

    def has_bias(self) -> bool:
        bias = getattr(self.module, "bias", None)
        # A batch norm's shift takes no relevance, since it lets relevance pass.
        return self.ruled and isinstance(bias, Tensor) and not isinstance(self.module, BatchNorm) and bool(bias.any())


@dataclass(frozen=True)
class _Cause:
    position: int
    kind: str
    place: str
    is_bias: bool = False


def _causes(graph: _Graph, calls: Sequence[_Call]) -> list[_Cause]:
    """What may take or make relevance, from the logits down."""
    owners: dict[Any, _Call] = {}
    for call in (*(call for call in calls if call.ruled), *(call for call in calls if not call.ruled)):
        for node in call.inside():
            owners.setdefault(node, call)  # inner modules end before outer ones
    found = [
        _Cause(graph.position[call.after[0]], "a bias", call.name, is_bias=True)
        for call in calls
        if call.after and call.after[0] in graph.position and call.has_bias()
    ]
    for node, position in graph.position.items():
        owner = owners.get(node)
        if _hands_on(node, graph) or (owner is not None and owner.ruled):
            continue
        if owner is not None and type(owner.module).__module__.startswith("torch.nn."):
            found.append(_Cause(position, type(owner.module).__name__, owner.name))
        else:
            place = f"in {owner.name}" if owner is not None and owner.name else "in the model's forward"
            found.append(_Cause(position, f"the function {_function(node)}", place))
    return sorted(found, key=lambda cause: cause.position)


def _hands_on(node: Any, graph: _Graph) -> bool:
    kind = _kind(node)
    if kind in {"Add", "Sub", "Maximum"} and sum(part in graph.position for part, _ in node.next_functions) > 1:
        return kind == "Maximum"  # a sum outside the reach of rules: each part gets the whole
    return kind in _CONSERVING


def _kind(node: Any) -> str:
    return str(node.name()).rpartition("::")[2].partition("Backward")[0]


def _function(node: Any) -> str:
    """``NativeLayerNormBackward0`` is ``layer_norm``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", _kind(node).removeprefix("Native")).lower().strip("_")


def _nodes(value: Any) -> list[Any]:
    if isinstance(value, Tensor):
        return [] if value.grad_fn is None else [value.grad_fn]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return [node for part in parts for node in _nodes(part)]


def _grouped(causes: Iterable[_Cause]) -> dict[str, tuple[str, ...]]:
    places: dict[str, dict[str, None]] = defaultdict(dict)
    for cause in causes:
        places[cause.kind][cause.place] = None
    return {kind: tuple(names) for kind, names in places.items()}


def _described(places: Mapping[str, Sequence[str]], most: int = 6) -> str:
    return "; ".join(
        f"{kind} ({', '.join(names[:most])}{f' and {len(names) - most} more' if len(names) > most else ''})"
        for kind, names in places.items()
    )


def _place(name: str) -> str:
    return "the input" if name == INPUT else f"layer {name!r}"
