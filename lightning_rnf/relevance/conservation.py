"""Whether relevance was conserved: how much of the logits' arrives at each layer, and what lies where it isn't."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from typing import Any

from torch import Tensor, nn
from zennit.types import BatchNorm

from lightning_rnf.anatomy import OUTPUT_AXIS, UnitLayer, computes_itself
from lightning_rnf.relevance.splits import kind_of, successors
from lightning_rnf.runtime import Ranks

INPUT = "<input>"
"""Stands for the network's input among names of layers: what arrives at the inputs of its first unit layers."""

BIAS = "a bias"
"""The cause that is no missing rule: a bias is one more contribution, whose share of relevance is lost."""

UNKNOWN = (
    "no bias, and a rule for everything; either activations are so small that the rules' stabilisers absorb it, or "
    "outputs have relevance and no positive contribution (z⁺)"
)

# How far relevance may be from what it was at the cut above. A bias may take all of it. Measured on MNIST, two seeds,
# 100 to 400 steps of Adam, the smallest share of the logits' relevance that was left at the input: multilayer
# perceptrons of two to six hidden layers 0.94, with batch norms 0.14 (0.5 of it lost at once), a convolutional network
# 0.63, a VGG with batch norms 0.61, a residual network 0.43. It never grew. Hence: no more than all of it.
FAR_WITH_BIASES = 1.0
# Without biases, over two to fifty layers, within 0.001 of 1, in transformers within 0.006. Beside ReLUs gates of
# squeeze-and-excitation lose what has no positive contribution: 0.94 (RegNet-Y). Through one softmax in the middle
# 0.0 is left, after an addition without a rule 2.0.
FAR = 0.1

# Nodes of the autograd graph whose plain gradient hands relevance on without gain or loss, by name without "Backward":
# they move or copy values, choose some of them, or average them. A sum of two tensors is none; see `_hands_on`.
_CONSERVING = """
    AccumulateGrad Identity Evenly ByContribution ToOne Gated Weighing
    Add Sub Relu View UnsafeView Reshape ReshapeAlias Alias AsStrided
    T Transpose Permute MoveDim Squeeze Unsqueeze Slice Select Split SplitWithSizes Chunk Unbind Narrow Diagonal Index
    IndexSelect Gather TakeAlongDim Cat Stack Expand Repeat Clone ToCopy Copy CopySlices ConstantPadNd ReflectionPad1D
    ReflectionPad2D ReflectionPad3D ReplicationPad1D ReplicationPad2D ReplicationPad3D MaxPool2DWithIndices
    MaxPool3DWithIndices MkldnnMaxPool2D MkldnnMaxPool3D AdaptiveMaxPool2D AdaptiveMaxPool3D Amax Max Maximum
    MaskedFill MaskedSelect Where Flip Roll Im2Col Unfold PixelShuffle PixelUnshuffle PackPaddedSequence Mean
    AvgPool2D AvgPool3D
    AdaptiveAvgPool2D AdaptiveAvgPool3D MkldnnAdaptiveAvgPool2D
"""


@dataclass(frozen=True)
class Loss:
    """Where relevance was not conserved.

    Attributes:
        sentence: which layer is the first, and what lies on the way to it.
        only_biases: whether that is biases alone: they take their share by the rules, and no rule can mend it.
    """

    sentence: str
    only_biases: bool


@dataclass(frozen=True)
class Conservation:
    """What became of the relevance of the logits.

    Attributes:
        ratios: by unit layer, in execution order, after `INPUT`: sum of its relevance over that of the logits. NaN if
            the logits have none. Of recurrent layers it is the sum over steps, and of a layer that runs
            several times that over its runs, each of which may have all of it.
        cuts: those of them that all relevance runs through, from the logits down: 1 is right there. Elsewhere it is
            the share of a branch.
        size: sum of the absolute relevance of the logits over that of the signed, at least 1: how much they cancel.
        unruled: what had no rule, places by kind: ``{"LayerNorm": ("encoder.norm1",)}``.
        causes: by cut, what may take or make relevance between it and the one above: places by kind.
        own: layers with a forward of their own, where another rule stands in for the right one, places by what it is.
    """

    ratios: dict[str, float] = field(default_factory=dict)
    cuts: tuple[str, ...] = ()
    size: float = 1.0
    unruled: dict[str, tuple[str, ...]] = field(default_factory=dict)
    causes: dict[str, dict[str, tuple[str, ...]]] = field(default_factory=dict)
    own: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the relevance should know, in plain words."""
        return tuple(
            f"no rule for {_described({kind: places})}: relevance is a plain gradient there"
            for kind, places in self.unruled.items()
        ) + tuple(
            f"no rule is made for {_described({kind: places})}: relevance is approximate there"
            for kind, places in self.own.items()
        )

    def loss(self) -> Loss | None:
        """The first cut, from the logits down, where relevance is far from what it was at the one above.

        The change is taken over the sum of the *absolute* relevance of the logits: where their signs cancel, a ratio
        to the signed sum tells nothing.
        """
        above, before = "", 1.0
        for name in self.cuts:
            causes = self.causes[name]
            far = FAR_WITH_BIASES if set(causes) == {BIAS} else FAR
            if abs(self.ratios[name] - before) / self.size > far:
                sentence = (
                    f"relevance is not conserved: of 1 at the logits {above}{self.ratios[name]:.3g} is left at "
                    f"{_place(name)}; on the way: {_described(causes) or UNKNOWN}"
                )
                return Loss(sentence, only_biases=set(causes) == {BIAS})
            above, before = f"{self.ratios[name]:.3g} is left at {_place(name)}, and ", self.ratios[name]
        return None


class Journal:
    """Follows an attribution and makes its `Conservation`."""

    def __init__(self, layers: Sequence[UnitLayer]) -> None:
        # What arrives at a recurrent layer's units arrives again in the step before, and beside what arrives at one of
        # attention's there is more: no cuts of all relevance. Neither is one run of several, or a layer of those tied.
        self._layers = {layer.name for layer in layers if layer.is_open and not layer.tied}
        self._calls: list[_Call] | None = []
        self._cuts: tuple[str, ...] = ()
        self._unruled: dict[str, tuple[str, ...]] = {}
        self._causes: dict[str, dict[str, tuple[str, ...]]] = {}
        self._own: dict[str, tuple[str, ...]] = {}
        self._sent = self._sent_absolute = self._arrived = 0.0

    @contextmanager
    def recording(self, module: nn.Module, ruled: Container[str]) -> Iterator[None]:
        """Note what modules run in the first forward. One is enough: the others run the same.

        Args:
            module: a borrowed one.
            ruled: names of its modules with rules of their own.
        """
        running: list[_Call] = []
        if self._calls is not None:
            self._calls.clear()  # the forward may run again

        def enter(name: str, own: bool, module: nn.Module, args: Any, options: Any) -> None:
            running.append(_Call(name, module, name in ruled, _nodes((args, options)), own))

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            while running and running[-1].module is not module:
                running.pop()  # those that ended with an exception
            call = running.pop()
            if self._calls is not None:  # in a backward, checkpointed modules run again
                call.after = _nodes(output)
                self._calls.append(call)

        with ExitStack() as hooks:
            for name, submodule in module.named_modules() if self._calls is not None else ():
                entered = partial(enter, name, computes_itself(submodule))
                hooks.callback(submodule.register_forward_pre_hook(entered, with_kwargs=True).remove)
                hooks.callback(submodule.register_forward_hook(leave).remove)
            yield

    def read(self, logits: Tensor) -> None:
        """After each forward, with the graph of the logits."""
        if self._calls is None:
            return
        graph = _Graph(logits)
        runs = Counter(call.name for call in self._calls)
        at = {
            call.name: call.after[0]
            for call in self._calls
            if call.name in self._layers and call.after and runs[call.name] == 1
        }
        cuts = [name for name, node in at.items() if graph.share.get(node) == 1]
        cuts.sort(key=lambda name: graph.position[at[name]])
        found = _causes(graph, self._calls)
        start = 0
        for name in (*cuts, INPUT):
            end = graph.position[at[name]] if name != INPUT else len(graph.position)
            self._causes[name] = _grouped(cause for cause in found if start <= cause.position < end)
            start = end
        self._cuts = (*cuts, INPUT)
        self._unruled = _grouped(cause for cause in reversed(found) if cause.kind != BIAS)
        # For a linear layer it is the epsilon rule, of the weight that it computes: as it should be. What a kind that
        # is not torch's does is told by its functions.
        self._own = _grouped(
            _Cause(0, f"the own forward of {_class(call.module)}", call.name)
            for call in self._calls
            if call.own and (call.ruled or _is_convolution(call.module))
        )
        self._calls = None  # nodes hold tensors

    def add(self, relevance: Tensor, roots: Sequence[Tensor], arrived: Sequence[Tensor | None]) -> None:
        """After each batch.

        Args:
            relevance: of the logits.
            roots: inputs of layers; the leaves among them are the network's input.
            arrived: relevance of each root.
        """
        leaves = {id(root): of_root for root, of_root in zip(roots, arrived, strict=True) if root.is_leaf}
        self._sent += relevance.sum().item()
        self._sent_absolute += relevance.abs().sum().item()
        self._arrived += sum(of_root.sum().item() for of_root in leaves.values() if of_root is not None)

    def join(self, ranks: Ranks) -> None:
        """Once, after the last batch: what all ranks have found together. Rank 0 has had a batch, others may not."""
        found = ranks.gather((self._sent, self._sent_absolute, self._arrived))
        self._sent, self._sent_absolute, self._arrived = (sum(values) for values in zip(*found, strict=True))
        mine = self._cuts, self._unruled, self._causes, self._own
        self._cuts, self._unruled, self._causes, self._own = ranks.gather(mine)[0]

    def conservation(self, relevance: Mapping[str, Tensor]) -> Conservation:
        """What has been found.

        Args:
            relevance: summed over batches, ``(units,)`` by layer.
        """
        sums = {INPUT: self._arrived} | {name: values.sum().item() for name, values in relevance.items()}
        ratios = {name: value / self._sent if self._sent else float("nan") for name, value in sums.items()}
        size = self._sent_absolute / abs(self._sent) if self._sent else 1.0
        return Conservation(ratios, self._cuts, size, self._unruled, self._causes, self._own)


def is_of_torch(module: nn.Module) -> bool:
    """Whether it computes what a class of torch does, so that its own class names it. Containers compute nothing."""
    kinds = [kind for kind in type(module).__mro__ if kind.__module__.startswith("torch.nn.modules.")]
    return bool({kind.__module__ for kind in kinds} - {"torch.nn.modules.module", "torch.nn.modules.container"})


def _class(module: nn.Module) -> str:
    return type(module).__name__


def _is_convolution(module: nn.Module) -> bool:
    return isinstance(module, tuple(OUTPUT_AXIS)) and not isinstance(module, nn.Linear)


class _Graph:
    """The part of the autograd graph that leads from the logits to the network's input."""

    def __init__(self, logits: Tensor) -> None:
        self.share: dict[Any, Fraction] = {}  # of one drop poured in at the logits that splits evenly at every fork
        below: dict[Any, list[Any]] = {}
        for node in _depth_first(logits.grad_fn):  # everything below a node comes before it
            below[node] = [successor for successor in successors(node) if successor in self.share]
            leaf = getattr(node, "variable", None)
            if below[node] or not (leaf is None or isinstance(leaf, nn.Parameter)):  # canonizers make biases
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
    pending = [] if start is None else [(start, successors(start))]
    while pending:
        node, following = pending[-1]
        for successor in following:
            if successor not in seen:
                seen.add(successor)
                pending.append((successor, successors(successor)))
                break
        else:
            pending.pop()
            yield node


@dataclass
class _Call:
    """One run of a module: the nodes that it read and made, as they were then; whether its forward is its own."""

    name: str
    module: nn.Module
    ruled: bool
    before: list[Any]
    own: bool
    after: list[Any] = field(default_factory=list)

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
        ruled = self.ruled or self.own
        return ruled and isinstance(bias, Tensor) and not isinstance(self.module, BatchNorm) and bool(bias.any())


@dataclass(frozen=True)
class _Cause:
    position: int
    kind: str
    place: str


def _causes(graph: _Graph, calls: Sequence[_Call]) -> list[_Cause]:
    """What may take or make relevance, from the logits down."""
    owners: dict[Any, _Call] = {}
    for call in (*(call for call in calls if call.ruled), *(call for call in calls if not call.ruled)):
        for node in call.inside():
            owners.setdefault(node, call)  # inner modules end before outer ones
    found = [
        _Cause(graph.position[call.after[0]], BIAS, call.name)
        for call in calls
        if call.after and call.after[0] in graph.position and call.has_bias()
    ]
    for node, position in graph.position.items():
        owner = owners.get(node)
        if getattr(node, "biased", False):
            found.append(_Cause(position, BIAS, f"in {owner.name}" if owner is not None and owner.name else "added"))
        if _hands_on(node, graph) or (owner is not None and owner.ruled):
            continue
        if owner is not None and is_of_torch(owner.module):
            found.append(_Cause(position, type(owner.module).__name__, owner.name))
        else:
            place = f"in {owner.name}" if owner is not None and owner.name else "in the model's forward"
            found.append(_Cause(position, f"the function {_function(node)}", place))
    return sorted(found, key=lambda cause: cause.position)


def _hands_on(node: Any, graph: _Graph) -> bool:
    kind = kind_of(node)
    if kind in {"Add", "Sub", "Maximum"} and sum(part in graph.position for part, _ in node.next_functions) > 1:
        return kind == "Maximum"  # a sum outside the reach of rules: each part gets the whole
    if kind == "Softmax":
        return bool(getattr(node, "weighing", False))  # beside a composite of the user's own it is torch's
    return kind in _CONSERVING.split()


def _function(node: Any) -> str:
    """``NativeLayerNormBackward0`` is ``layer_norm``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", kind_of(node).removeprefix("Native")).lower().strip("_")


def _nodes(value: Any) -> list[Any]:
    if isinstance(value, Tensor):
        return [] if value.grad_fn is None else [value.grad_fn]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return [node for part in parts for node in _nodes(part)]


def _grouped(causes: Iterable[_Cause]) -> dict[str, tuple[str, ...]]:
    places: dict[str, dict[str, None]] = defaultdict(dict)
    for cause in causes:
        places[cause.kind][cause.place] = None
    return {kind: tuple(places[kind]) for kind in sorted(places, key=BIAS.__eq__)}  # the least suspicious last


def _described(places: Mapping[str, Sequence[str]], most: int = 3) -> str:
    return "; ".join(
        f"{kind} ({', '.join(names[:most])}{f' and {len(names) - most} more' if len(names) > most else ''})"
        for kind, names in places.items()
    )


def _place(name: str) -> str:
    return "the input" if name == INPUT else f"layer {name!r}"
