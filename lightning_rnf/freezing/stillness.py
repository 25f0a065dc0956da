"""What torch's own optimizers leave alone: entries that need not be put back after every step.

In SGD, Adam and AdamW each entry moves by itself. Where its gradient is zero and its first moment is zero, too, it
moves by weight decay alone, whatever its second moment is. So without decay it stays, to the bit, and its second moment
may be anything: a number whose square root is quickly taken.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_rnf.freezing.slices import Slice

_FIRST_MOMENT: dict[type, str] = {
    torch.optim.SGD: "momentum_buffer",
    torch.optim.Adam: "exp_avg",
    torch.optim.AdamW: "exp_avg",
}
"""By the very class: what a subclass does nobody knows."""

_IS_ADAM = issubclass(torch.optim.AdamW, torch.optim.Adam)
"""Not so in torch 2.6, whose AdamW multiplies by one where there is no decay, and so writes twice."""

_SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq")

_UNUSUAL = ("maximize", "capturable", "differentiable")
"""Options of a group with which an optimizer writes in another way: negated, a gradient of zero is a negative zero."""


class Groups:
    """One optimizer's parameter groups, by parameter."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._known: list[tuple[int, int]] = []
        self._found: dict[Tensor, dict[str, Any]] = {}

    def __call__(self) -> Mapping[Tensor, dict[str, Any]]:
        """As they are now: groups may be added at any time, and loading a state makes them anew."""
        groups = self._optimizer.param_groups
        known = [(id(group), len(group["params"])) for group in groups]
        if known != self._known:
            self._known = known
            self._found = {parameter: group for group in groups for parameter in group["params"]}
        return self._found


class Stillness:
    """Whether steps have left one parameter's frozen entries alone, by what can be known without looking at them.

    Args:
        parameter: of one process, with strides.
        frozen: its entries whose gradients are filled with zero as they arrive.
    """

    def __init__(self, parameter: Tensor, frozen: Slice) -> None:
        self._parameter = parameter
        self._frozen = frozen
        self._masked: weakref.ref[Tensor] | None = None
        self._masked_writes = -1
        self._zero: Tensor | None = None  # the first moment that was zero when it was looked at

    def note_masked(self, gradient: Tensor) -> None:
        """The parameter's gradient is zero in frozen entries now."""
        self._masked, self._masked_writes = weakref.ref(gradient), gradient._version

    def holds(self, optimizer: torch.optim.Optimizer, group: Mapping[str, Any] | None) -> bool:
        """After a step: whether the optimizer can't have moved what is frozen. Ask after every step.

        A gradient that anybody has written to since it was masked (clipping does) is not known to be zero: where its
        norm is NaN, clipping makes all of it NaN. Nor is a first moment, once a gradient was not.

        Args:
            optimizer: that has made the step.
            group: of its parameter groups the one of this parameter; None: there is none.
        """
        if type(optimizer) not in _FIRST_MOMENT:
            return False  # whatever its groups are, it may write anywhere
        gradient = self._parameter.grad
        if group is None or gradient is None:
            return True  # torch's own pass over it
        if (
            not _moves_by_gradient_alone(group, self._parameter.dtype)
            or self._masked is None
            or self._masked() is not gradient
            or self._masked_writes != gradient._version
        ):
            return False
        first = optimizer.state[self._parameter].get(_FIRST_MOMENT[type(optimizer)])
        if first is not None and first is not self._zero:  # of the first step, or loaded
            if first[self._frozen.chosen(first)].any():
                return False
            self._zero = first
        return True


def writes_of_step(optimizer: torch.optim.Optimizer, group: Mapping[str, Any] | None, parameter: Tensor) -> int:
    """How many writes to a parameter torch counts in a step of an optimizer whose steps are known."""
    if group is None or parameter.grad is None or group.get("fused"):  # fused kernels' are not counted
        return 0
    return 1 if _IS_ADAM or type(optimizer) is not torch.optim.AdamW else 2


class SecondMoments:
    """Keeps the second moments of frozen entries from being zero, for Adam and AdamW on a CPU.

    MKL takes fifteen times as long for the square root of a zero as of another number on some processors, and for one
    that is no normal number fifty times: with most of a layer frozen the optimizer's step would take three times as
    long. Where gradient and first moment are zero nothing depends on the second one. What is given back, and what
    `state_dict` says, is zero, as it would be. A byte for each entry of the parameter says which are meant.

    Args:
        parameter: of one process.
        frozen: its entries whose gradients are filled with zero as they arrive.
    """

    def __init__(self, parameter: Tensor, frozen: Slice) -> None:
        self._parameter = parameter
        self._frozen = frozen
        self._state: Mapping[str, Tensor] = {}
        self._seconds: list[Tensor] = []
        self._filled: Tensor | None = None
        self._steps_left = 0

    @torch.no_grad()
    def fill(self, optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> None:
        """After a step of its optimizer: with ones, if they are zero there or have decayed."""
        state = optimizer.state.get(self._parameter, {})
        seconds = [state[name] for name in _SECOND_MOMENTS if name in state]
        if (
            type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW)
            or not seconds
            or group.get("fused")  # takes its own roots
            or seconds[0].device.type != "cpu"
            or seconds[0].dtype not in (torch.float32, torch.float64)
        ):
            return
        if not self._seconds or seconds[0] is not self._seconds[0]:  # the first step, or they were loaded
            self._state, self._seconds, self._steps_left = state, seconds, 0
            self._filled = self._frozen.chosen(seconds[0])
            for moment in (state["exp_avg"], *seconds):
                self._filled &= moment == 0
        if self._steps_left == 0:
            for moment in seconds:
                moment.masked_fill_(self._filled, 1.0)
            decay = float(group["betas"][1])
            # Each step multiplies them by it; the logarithm of float32's least normal number is -87.
            self._steps_left = max(int(80 / -math.log(decay)), 1) if 0 < decay < 1 else 1
        self._steps_left -= 1

    @torch.no_grad()
    def clear(self) -> None:
        """Give zeros back; the next step fills them again, if it is asked to."""
        if self._filled is not None:
            # Where there was a gradient after all, a zero would have the next step go far.
            filled = self._filled & (self._state["exp_avg"] == 0)
            for moment in self._seconds:
                moment.masked_fill_(filled, 0.0)
        self._state, self._seconds, self._filled = {}, [], None


def _moves_by_gradient_alone(group: Mapping[str, Any], dtype: torch.dtype) -> bool:
    """Whether a step with these options adds zero where gradient and first moment are zero: no decay, and no 0 / 0."""
    rate, decay, eps = group["lr"], group["weight_decay"], group.get("eps", 1.0)
    return (
        isinstance(rate, (int, float))
        and math.isfinite(rate)
        and isinstance(decay, (int, float))
        and decay == 0
        and isinstance(eps, (int, float))
        and eps >= torch.finfo(dtype).tiny
        and all(isinstance(beta, (int, float)) and 0 <= beta < 1 for beta in group.get("betas", ()))
        and math.isfinite(group.get("momentum", 0.0))
        and not any(group.get(option) for option in _UNUSUAL)
    )
