"""Additions that conserve relevance, in any architecture: residual sums need no canonizer written for their class."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_SUMS = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
_SUMS_IN_PLACE = (Tensor.add_, Tensor.__iadd__)
_STABILISER = 1e-6  # that of Zennit's epsilon rule


class ConservingAdditions(TorchFunctionMode):
    """Inside the context, the sum of two tensors of the graph splits relevance in proportion to what each contributes.

    Plain autograd hands the whole relevance of ``x + y`` to both, so that it doubles with every residual block: 256
    times in a ResNet-18. The epsilon rule (equation 2 of the paper) for a sum is ``R_x = x / (x + y) R``.

    Additions of a constant, of a parameter and of another shape stay as they are.
    """

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Called by torch in place of ``function``."""
        options = dict(kwargs or {})
        in_place = function in _SUMS_IN_PLACE
        if (in_place or function in _SUMS) and len(args) == 2 and not options.keys() - {"alpha"} and _of_graph(*args):
            x, y = args
            y = y * options["alpha"] if "alpha" in options else y
            if in_place:  # others may hold x, or a view of it
                return x.copy_(_Sum.apply(x.clone(), y))
            return _Sum.apply(x, y)
        return function(*args, **options)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return x + y

    @staticmethod
    def backward(ctx: Any, relevance: Tensor) -> tuple[Tensor, Tensor]:
        x, y = ctx.saved_tensors
        total = x + y
        share = relevance / (total + torch.where(total < 0, -_STABILISER, _STABILISER))
        return x * share, y * share


def _of_graph(x: object, y: object) -> bool:
    return (
        isinstance(x, Tensor)
        and isinstance(y, Tensor)
        and x.requires_grad
        and y.requires_grad
        and x.shape == y.shape
        and x.is_floating_point()
        and x.dtype == y.dtype
    )
