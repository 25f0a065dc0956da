"""Linear layers and convolutions that compute some of their rows only: what is silent need not be worked out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

FEWEST = 32
"""With fewer vectors to multiply, copying the rows takes longer than what is saved (measured on a CPU)."""

LARGEST_SHARE = 0.9
"""Of the rows, for the same reason."""


@contextmanager
def computed(layer: Any, relevant: Tensor) -> Iterator[None]:
    """Inside the context and without gradients, the layer computes its relevant rows; all others of its output are 0.

    The product of fewer rows may be rounded in another way than the same rows of the whole product. It is always the
    same way for the same rows, layer and batch, so what has been measured is what recall repeats.

    Args:
        layer: left as it is if it is no plain linear layer or ungrouped convolution, or has a forward of the user's.
        relevant: bool ``(units,)``.
    """
    kept = int(relevant.sum())
    if not can_choose_rows(layer) or not 0 < kept <= LARGEST_SHARE * len(relevant):
        yield
        return
    whole = layer.forward
    chosen = relevant.nonzero().view(-1)

    def forward(x: Tensor) -> Tensor:
        nonlocal chosen
        weight, bias = layer._parameters["weight"], layer._parameters["bias"]
        if torch.is_grad_enabled() or type(weight) is not nn.Parameter or not _pays(layer, x):
            result: Tensor = whole(x)
            return result
        chosen = chosen.to(weight.device)
        rows = weight.index_select(0, chosen)
        of_bias = None if bias is None else bias.index_select(0, chosen)
        if isinstance(layer, nn.Linear):
            some = nn.functional.linear(x, rows, of_bias)
            return some.new_zeros(*some.shape[:-1], len(weight)).index_copy_(-1, chosen, some)
        some = layer._conv_forward(x, rows, of_bias)
        return _like(some, len(weight)).index_copy_(1, chosen, some)

    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward


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


def _like(some: Tensor, channels: int) -> Tensor:
    """Zeros of the same form and memory format with so many channels."""
    shape = (some.shape[0], channels, *some.shape[2:])
    memory = torch.contiguous_format
    if some.ndim == 4 and some.is_contiguous(memory_format=torch.channels_last) and not some.is_contiguous():
        memory = torch.channels_last
    return torch.empty(shape, dtype=some.dtype, device=some.device, memory_format=memory).zero_()
