"""How relevance at the output of a function is split among the tensors that it was computed from.

All but `Evenly` hand on relevance that is a multiple of what they hand it to: what is nearly 0 gets nearly none, so no
sum below that cancels is divided by nearly 0. Where relevance grew without bound, it was for a share that was none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

STABILISER = 1e-6  # that of Zennit's epsilon rule

# Nodes of the autograd graph, by name without "Backward", that move or copy values.
_MOVES = """
    Identity View UnsafeView Reshape ReshapeAlias Alias AsStrided T Transpose Permute MoveDim Squeeze Unsqueeze Slice
    Select Split SplitWithSizes Chunk Unbind Narrow Diagonal Index IndexSelect Gather TakeAlongDim Cat Stack Expand
    Repeat Clone ToCopy Copy CopySlices ConstantPadNd MaskedFill MaskedSelect Where Flip Roll Im2Col Unfold
    PixelShuffle PixelUnshuffle
"""
MOVES = frozenset(_MOVES.split())
# Of those, the ones that leave the number of entries and their order as they were.
_KEPT = "Identity View UnsafeView Reshape ReshapeAlias Alias Squeeze Unsqueeze Clone ToCopy Copy MaskedFill"
LAYOUT_KEPT = frozenset(_KEPT.split())
# What else lets relevance pass to places of the same kind: below it a sum is still the sum that is read.
_ALSO = "Relu Evenly ToOne MaxPool2DWithIndices AdaptiveMaxPool2D Amax Max"
_PASSING = MOVES.union(_ALSO.split())


def kind_of(node: Any) -> str:
    """``ReluBackward0`` is ``Relu``, of any namespace."""
    return str(node.name()).rpartition("::")[2].partition("Backward")[0]


def over(relevance: Tensor, total: Tensor) -> Tensor:
    """Relevance over what it is of, where it is a multiple of that: nothing over nothing is nothing."""
    return torch.where(total == 0, 0.0, relevance / total)


def stabilised(total: Tensor) -> Tensor:
    """Away from 0 by `STABILISER`, without a change of sign."""
    return torch.where(total < 0, total - STABILISER, total + STABILISER)


class WrittenToError(Exception):
    """What a rule has kept by reference was written to in place after it had been read."""


def kept(ctx: Any) -> tuple[Tensor, ...]:
    """What the forward of a function has saved.

    Raises:
        WrittenToError: if it is no longer what it was.
    """
    try:
        found: tuple[Tensor, ...] = ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" in str(error):
            raise WrittenToError(str(error)) from error
        raise
    return found


def may_be_copied() -> bool:
    """Whether what is saved goes through hooks, as in a checkpointed part, so that nobody sees if it is written to."""
    hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return hooks is None or hooks(False) is not None


def not_a_view(result: Tensor) -> Tensor:
    """For a function's value: what is a view there could not be written to afterwards."""
    return result.clone() if result._is_view() else result


@dataclass(frozen=True)
class Call:
    """A function of the tensors that relevance is split among.

    Attributes:
        run: of these tensors.
        linear: what is linear in them (affine, if constants are added) and has the same value; None: ``run``.
        exact: no stabiliser: relevance is a multiple of the value there.
        factors: of how many of them it is a product.
        biased: whether constants other than 0 are added, which take their share.
        sums: whether it adds several tensors of the graph.
        at_zero: a number that is added to the one tensor.
    """

    run: Callable[..., Tensor]
    linear: Callable[..., Tensor] | None = None
    exact: bool = False
    factors: int = 1
    biased: bool = False
    sums: bool = False
    at_zero: float | None = None


class ByContribution(torch.autograd.Function):
    """``R_i = x_i (∂f/∂x_i)ᵀ R / (k f)``, where f is linear in each of its k factors: by Euler, the sum is R.

    A constant that is added has a share, which is lost, as that of a bias. Only where a product that reads the sum as
    a gate has seen to it (`paid`) is all of the relevance that of the tensor.
    """

    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Tensor) -> Tensor:
        """The value."""
        ctx.call, ctx.biased, ctx.sums, ctx.at_zero, ctx.paid = call, call.biased, call.sums, call.at_zero, False
        ctx.save_for_backward(*tensors)
        return not_a_view(call.run(*tensors))

    @staticmethod
    def backward(ctx: Any, relevance: Tensor) -> tuple[Tensor | None, ...]:
        """The shares."""
        tensors = [tensor.detach().requires_grad_() for tensor in kept(ctx)]
        if ctx.paid:
            return None, relevance.sum_to_size(tensors[0].shape)
        with torch.enable_grad():
            output = (ctx.call.linear or ctx.call.run)(*tensors)
        total = ctx.call.factors * output.detach()
        share = over(relevance, total) if ctx.call.exact else relevance / stabilised(total)
        gradients = torch.autograd.grad(output, tensors, share)
        return None, *(x.detach() * gradient for x, gradient in zip(tensors, gradients, strict=True))


class Evenly(torch.autograd.Function):
    """``R_i = R / k``, summed over what was broadcast."""

    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Tensor) -> Tensor:
        """The value."""
        ctx.shapes = [tensor.shape for tensor in tensors]
        ctx.factors, ctx.at_zero = call.factors, call.at_zero
        return not_a_view(call.run(*tensors))

    @staticmethod
    def backward(ctx: Any, relevance: Tensor) -> tuple[Tensor | None, ...]:
        """The shares."""
        share = relevance if ctx.factors == 1 else relevance / ctx.factors
        return None, *(share.sum_to_size(shape) for shape in ctx.shapes)


class ToOne(torch.autograd.Function):
    """All to the tensor of this index; the others are constants, such as normalisers."""

    @staticmethod
    def forward(ctx: Any, call: Call, index: int, *tensors: Tensor) -> Tensor:
        """The value."""
        ctx.shapes = [tensor.shape for tensor in tensors]
        ctx.index = index
        ctx.without = frozenset(range(len(tensors))) - {index}
        return not_a_view(call.run(*tensors))

    @staticmethod
    def backward(ctx: Any, relevance: Tensor) -> tuple[Tensor | None, ...]:
        """The shares."""
        shares = (
            relevance.sum_to_size(shape) if index == ctx.index else relevance.new_zeros(shape)
            for index, shape in enumerate(ctx.shapes)
        )
        return None, None, *shares


class Gated(torch.autograd.Function):
    """A product with a gate ``c + h``: of ``c x`` all is x's, of ``h x`` half is each's.

    The uniform rule for what the gate adds to where it stands at 0: ``c`` is 1/2 for a sigmoid, 1 in ``1 + tanh``. So
    the gate's share is a multiple of what opens and closes it. In networks of ReLUs it is half.
    """

    @staticmethod
    def forward(ctx: Any, call: Call, smooth: Callable[[], bool], gate: int, node: Any, *tensors: Tensor) -> Tensor:
        """The value."""
        ctx.smooth, ctx.gate, ctx.node = smooth, gate, node
        ctx.shapes = [tensor.shape for tensor in tensors]
        ctx.save_for_backward(tensors[gate])
        return not_a_view(call.run(*tensors))

    @staticmethod
    def backward(ctx: Any, relevance: Tensor) -> tuple[Tensor | None, ...]:
        """The shares."""
        half = relevance / 2
        of_gate, of_gated = half, half
        if ctx.smooth():
            (value,) = kept(ctx)
            ctx.node.paid = True
            at_zero = over(relevance, value) * ctx.node.at_zero
            of_gate = (relevance - at_zero) / 2
            of_gated = relevance - of_gate
        shares = (
            (of_gate if index == ctx.gate else of_gated).sum_to_size(shape) for index, shape in enumerate(ctx.shapes)
        )
        return None, None, None, None, *shares


def successors(node: Any) -> Iterator[Any]:
    """The nodes that a node hands relevance to."""
    without = getattr(node, "without", ())
    for index, (successor, _) in enumerate(node.next_functions):
        if successor is not None and index not in without:
            yield successor


def behind(tensor: Tensor, moves: frozenset[str], *, scaled: bool = False) -> Any:
    """The node whose result this tensor is, but for moves; and for constant factors, if it may be ``scaled``."""
    node = tensor.grad_fn
    while node is not None and (
        kind_of(node) in moves or (scaled and kind_of(node) == "Evenly" and len(node.next_functions) == 1)
    ):
        node = node.next_functions[0][0]
    return node


def is_of_a_sum(tensor: Tensor) -> bool:
    """Whether it is a sum of tensors of the graph, or such sums passed through ReLUs, pooling and moves."""
    pending, seen = [tensor.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if getattr(node, "sums", False):
            return True
        if kind_of(node) in _PASSING:
            pending.extend(successors(node))
    return False
