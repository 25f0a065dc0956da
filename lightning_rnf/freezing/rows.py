"""Linear layers and convolutions that work on some of their rows only.

What is silent need not be computed, and what is frozen needs no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_rnf.anatomy import SilentHook

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

FEWEST = 32
"""With fewer vectors to multiply, copying the rows takes longer than what is saved (measured on a CPU)."""

LARGEST_SHARE = 0.9
"""Of the rows, for the same reason."""

BLOCK = 16
"""Channels that a convolution works on at once: with 14 of 16 it takes twice as long as with all (measured on a CPU,
256 images of 32 × 32: 26 ms and 13). So it gets as many as fill blocks, some of them for nothing."""

FEW = 4
"""Samples in which nearly every channel of the input speaks that speaks at all."""

LARGEST_LEARNING_SHARE = {"linear": 0.75, "convolution": 0.5}
"""With more free rows than that, their gradient alone takes as long as that of all (measured on a CPU)."""

FEWEST_PRODUCTS = 2**22
"""The same for a linear layer with fewer multiplications in its weight's gradient."""

FEWEST_WEIGHTS = 288
"""The same for a convolution with fewer weights a row."""


@contextmanager
def computed(
    layer: Any, relevant: Tensor, *, by_columns: Callable[[], bool] | None = None
) -> Iterator[Callable[[], bool]]:
    """Inside the context and without gradients, the layer computes its relevant rows; all others of its output are 0.

    The product of fewer rows may be rounded in another way than the same rows of the whole product. It is always the
    same way for the same rows, layer and batch, so what has been measured is what recall repeats.

    Args:
        layer: left as it is if it is no plain linear layer or ungrouped convolution, or has a forward of the user's.
        relevant: bool ``(units,)``.
        by_columns: whether to leave out channels of the input that are zero in the whole batch, too. That rounds in
            another way again, which depends on what is zero: for a search, and not for recall. None: never.

    Yields:
        Whether the output that it gave last has its zeros already.
    """
    kept, acted = int(relevant.sum()), False
    if not can_choose_rows(layer) or (kept > LARGEST_SHARE * len(relevant) and by_columns is None):
        yield lambda: False
        return
    whole = layer.forward
    chosen, of_blocks = relevant.nonzero().view(-1), _in_blocks(layer, relevant)
    if by_columns is None and len(of_blocks) > LARGEST_SHARE * len(relevant):
        yield lambda: False
        return

    def forward(input: Tensor) -> Tensor:
        nonlocal chosen, of_blocks, acted
        weight, bias = layer._parameters["weight"], layer._parameters["bias"]
        columns = by_columns is not None and by_columns() and input.device.type == "cpu"  # elsewhere one would wait
        acted = not torch.is_grad_enabled() and type(weight) is nn.Parameter and _pays(layer, input)
        acted = acted and (columns or len(of_blocks) <= LARGEST_SHARE * len(weight))
        if not acted:
            result: Tensor = whole(input)
            return result
        chosen, of_blocks = chosen.to(weight.device), of_blocks.to(weight.device)
        rows = weight.index_select(0, of_blocks if kept else of_blocks.new_zeros(1))
        of_bias = None if bias is None or not kept else bias.index_select(0, of_blocks)
        axis = -1 if isinstance(layer, nn.Linear) else 1
        samples = len(input)
        if not kept:
            input = input[:1]  # one row of one sample shows the form of the output
        elif columns:
            input, rows = _without_zeros(input, rows, axis)
        some = layer._conv_forward(input, rows, of_bias) if axis == 1 else nn.functional.linear(input, rows, of_bias)
        # Before some of it is left out: a part of it has no memory format.
        if axis == 1:
            zeros = _like(some, samples, len(weight))
        else:
            zeros = some.new_zeros(samples, *some.shape[1:-1], len(weight))
        some = some.narrow(axis, 0, kept) if 0 < kept < len(of_blocks) else some
        return zeros.index_copy_(axis, chosen, some) if kept else zeros

    layer.forward = forward
    try:
        yield lambda: acted
    finally:
        del layer.forward


class LearnRows(SilentHook):
    """A forward hook: of the weight's gradient only the rows of free units are worked out, all others are zero.

    The layer computes what it always does, so its output has the same bits. Only the graph behind it is another one.
    Where the hook does not act (a compiled module does not see it) the gradient is that of all rows. When it acts is
    told by sizes and not by a clock: rows of a smaller product may be rounded in another way, and the same seed has to
    give the same masks.

    Args:
        free: indices of the rows to learn, ``(rows,)``.
        share: of the layer's rows that these are; with columns, of what has to be worked out.
        rows: of the layer, how many there are.
        columns: indices of the channels that frozen rows learn from, too, ``(columns,)``.
    """

    def __init__(self, free: Tensor, share: float, rows: int, columns: Tensor | None = None) -> None:
        self.free = free
        self.share = share
        self.columns = columns
        self.places = torch.full((rows,), len(free), device=free.device)
        self.places[free] = torch.arange(len(free), device=free.device)
        self._made: tuple[int, int] | None = None

    def note(self, gradient: Tensor) -> None:
        """Remember the weight's gradient that has just been made."""
        self._made = gradient.data_ptr(), gradient._version

    def has_made(self, gradient: Tensor) -> bool:
        """Whether this very gradient was the last one noted and nothing has been added to it since; asked once."""
        made, self._made = self._made, None
        return made == (gradient.data_ptr(), gradient._version)

    def __call__(self, layer: Any, args: tuple[Any, ...], output: Any) -> Tensor | None:
        """The output with another graph behind it; None: as it is."""
        weight = layer._parameters.get("weight")
        if (
            type(weight) is not nn.Parameter
            or not (torch.is_grad_enabled() and weight.requires_grad)
            or weight.device.type != "cpu"  # elsewhere it was not measured
            or torch.compiler.is_compiling()
            or torch._C._get_tracing_state() is not None
            or torch._C._are_functorch_transforms_active()
            or not args
            or not self._pays(layer, weight, args[0])
        ):
            return None
        bias = layer._parameters.get("bias")
        of_convolution = None if isinstance(layer, nn.Linear) else (layer.stride, layer.padding, layer.dilation)
        learned: Tensor = _Learn.apply([output.detach()], args[0], weight, bias, self, of_convolution)
        return learned

    def _pays(self, layer: Any, weight: Tensor, x: Tensor) -> bool:
        if isinstance(layer, nn.Linear):
            enough = x.ndim > 1 and x.numel() * len(weight) >= FEWEST_PRODUCTS
            return enough and self.share <= LARGEST_LEARNING_SHARE["linear"]
        return (
            self.share <= LARGEST_LEARNING_SHARE["convolution"]
            and weight[0].numel() >= FEWEST_WEIGHTS
            and x.ndim == weight.ndim  # a batch, no single one
        )


def learning(layer: Any, frozen: Tensor) -> tuple[LearnRows, Any] | None:
    """Let only the rows that are not frozen learn, from here on: the hook and its handle; None if it can't be done.

    Args:
        layer: any module.
        frozen: bool ``(units,)``, or ``(units, channels)``: whose gradient nobody needs.
    """
    if not can_choose_rows(layer) or getattr(layer, "padding_mode", "zeros") != "zeros":
        return None
    device, columns, share = layer._parameters["weight"].device, None, 0.0
    if frozen.ndim > 1:
        rows, read = frozen.any(dim=1), frozen.any(dim=0)
        if int(rows.sum()) * int(read.sum()) != int(frozen.sum()):
            return None  # no block
        columns, frozen = (~read).nonzero().view(-1).to(device), rows
        share = len(columns) / len(read)
    if isinstance(getattr(layer, "padding", 0), str) or not frozen.any() or (columns is None and frozen.all()):
        return None
    free = (~frozen).nonzero().view(-1).to(device)
    # First of all hooks: those of the user's are to see the output that the gradient arrives at.
    hook = LearnRows(free, len(free) / len(frozen) + share, len(frozen), columns)
    return hook, layer.register_forward_hook(hook, prepend=True)


class _Learn(torch.autograd.Function):
    """The output of a layer that has run already, in a list so that it counts as new and not as a view of an input."""

    @staticmethod
    def forward(
        ctx: Any,
        output: list[Tensor],
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        hook: LearnRows,
        of_convolution: Sequence[Any] | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.hook, ctx.of_convolution = hook, of_convolution
        return output.pop()

    @staticmethod
    def backward(ctx: Any, arrived: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        x, of_rows = x.to(arrived.dtype), weight.to(arrived.dtype)  # what autocast has made of them
        backward = _linear_backward if ctx.of_convolution is None else _convolution_backward
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[1:4]
        needs = needs_x, needs_weight and len(ctx.hook.free) > 0
        at_weight = at_bias = None
        at_x, rows = backward(arrived, x, of_rows, ctx.hook.free, ctx.of_convolution, needs)
        if rows is not None and ctx.hook.columns is None and ctx.of_convolution is None:
            at_weight = rows.index_select(0, ctx.hook.places).to(weight.dtype)
            torch.autograd.graph.increment_version(at_weight)  # unlike any gradient that is as fresh
            ctx.hook.note(at_weight)
        elif needs_weight:
            at_weight = torch.zeros_like(weight)
            if ctx.hook.columns is not None:
                of_columns = _columns(arrived, x, of_rows, ctx.hook.columns, ctx.of_convolution)
                at_weight.index_copy_(1, ctx.hook.columns, of_columns.to(weight.dtype))
            if rows is not None:
                at_weight.index_copy_(0, ctx.hook.free, rows[: len(ctx.hook.free)].to(weight.dtype))
            ctx.hook.note(at_weight)
        if needs_bias:
            axis = arrived.ndim - 1 if ctx.of_convolution is None else 1
            at_bias = arrived.sum(dim=[dimension for dimension in range(arrived.ndim) if dimension != axis])
        return None, at_x, at_weight, at_bias, None, None


_Needs = tuple[bool, bool]


def _linear_backward(
    arrived: Tensor, x: Tensor, weight: Tensor, free: Tensor, how: None, needs: _Needs
) -> tuple[Tensor | None, Tensor | None]:
    at_x = arrived @ weight if needs[0] else None
    if not needs[1]:
        return at_x, None
    # The last row is for all that are frozen: to take each from here is faster than to fill and to copy.
    some, x = arrived.flatten(0, -2).index_select(1, free).t(), x.flatten(0, -2)
    if torch.is_grad_enabled():  # of this a gradient is wanted, too
        return at_x, torch.cat([some @ x, x.new_zeros(1, x.shape[1])])
    rows = x.new_empty(len(free) + 1, x.shape[1])
    torch.mm(some, x, out=rows[:-1])
    rows[-1] = 0.0
    return at_x, rows


def _convolution_backward(
    arrived: Tensor, x: Tensor, weight: Tensor, free: Tensor, how: Sequence[Any], needs: _Needs
) -> tuple[Tensor | None, Tensor | None]:
    stride, padding, dilation = how
    rest = (None, stride, padding, dilation, False, [0] * len(stride), 1)
    backward = torch.ops.aten.convolution_backward
    at_x = backward(arrived, x, weight, *rest, (True, False, False))[0] if needs[0] else None
    if not needs[1]:
        return at_x, None
    some = arrived.index_select(1, free), x, weight.index_select(0, free)
    return at_x, backward(*some, *rest, (False, True, False))[1]


def _columns(arrived: Tensor, x: Tensor, weight: Tensor, columns: Tensor, how: Sequence[Any] | None) -> Tensor:
    """The weight's gradient for some of the channels that are read, of all rows."""
    if how is None:
        return arrived.flatten(0, -2).t() @ x.flatten(0, -2).index_select(1, columns)
    stride, padding, dilation = how
    given = (None, stride, padding, dilation, False, [0] * len(stride), 1, (False, True, False))
    some = x.index_select(1, columns), weight.index_select(1, columns)
    found: Tensor = torch.ops.aten.convolution_backward(arrived, *some, *given)[1]
    return found


def can_choose_rows(layer: Any) -> bool:
    """Whether it is one of torch's own layers whose rows stand for themselves, and does what torch says."""
    if "forward" in vars(layer) or is_parametrized(layer):
        return False
    return type(layer) is nn.Linear or (type(layer) in CONVOLUTIONS and bool(layer.groups == 1))


def _pays(layer: Any, x: Tensor) -> bool:
    if isinstance(layer, nn.Linear):
        return bool(x.numel() >= FEWEST * x.shape[-1])
    return bool(
        x.ndim == layer.get_parameter("weight").ndim and x.numel() >= FEWEST * x.shape[1]
    )  # a batch, no single one


def _in_blocks(layer: Any, relevant: Tensor) -> Tensor:
    """Indices of the relevant rows, and behind them those of as many others as fill a convolution's last block."""
    chosen = relevant.nonzero().view(-1)
    if isinstance(layer, nn.Linear) or not len(chosen) or layer.weight.device.type != "cpu":
        return chosen  # elsewhere it was not measured
    return torch.cat([chosen, relevant.logical_not().nonzero().view(-1)[: -len(chosen) % BLOCK]])


def _without_zeros(input: Tensor, rows: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """The channels of the input that are not zero in the whole batch, at least one, and the weights for them."""
    others = [dimension for dimension in range(input.ndim) if dimension != axis % input.ndim]
    speaks = input[:FEW].abs().sum(others) != 0  # of NaN, too
    silent = speaks.logical_not().nonzero().view(-1)
    speaks[silent] = input.index_select(axis, silent).abs().amax(others) != 0  # most are seen in a few samples already
    if axis == 1:
        speaks[speaks.logical_not().nonzero().view(-1)[: -int(speaks.sum()) % BLOCK]] = True
    some = speaks.nonzero().view(-1)
    if not len(some):
        some = silent[:1]  # a convolution has to hear something
    if len(some) > LARGEST_SHARE * len(speaks):
        return input, rows
    return input.index_select(axis, some), rows.index_select(1, some)


def _like(some: Tensor, samples: int, channels: int) -> Tensor:
    """Zeros of the same form and memory format with so many samples and channels."""
    shape = (samples, channels, *some.shape[2:])
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(some.ndim, torch.contiguous_format)
    is_last = some.is_contiguous(memory_format=last) and not some.is_contiguous()
    memory = last if is_last else torch.contiguous_format
    return torch.empty(shape, dtype=some.dtype, device=some.device, memory_format=memory).zero_()
