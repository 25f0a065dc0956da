"""Zennit's rules for modules, where they hold: its composite, or the user's own."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

import torch
from torch import Tensor, nn
from zennit.composites import EpsilonPlus
from zennit.core import BasicHook, Composite
from zennit.rules import ClampMod, ZPlus, zero_bias
from zennit.types import BatchNorm, Convolution

from lightning_rnf.anatomy import computes_itself
from lightning_rnf.relevance.splits import stabilised

_BY_FUNCTION = (nn.MultiheadAttention, BatchNorm, nn.Sigmoid, nn.Hardsigmoid)
"""Modules of Zennit's whose functions have rules of their own: see `functions`."""


def applicable(given: Composite | None, smooth: Callable[[], bool], repeated: Container[str] = ()) -> Composite:
    """The rules, without those for what they are not made for.

    For attention there are none: Zennit takes it for an activation, and fails on its three inputs. And none of our
    choice for a layer that computes its weight (z⁺ would take the positive part of what it is computed from) or runs
    several times, whose last run alone Zennit's rules know.

    Args:
        given: the user's own; None: ``EpsilonPlus``, and convolutions of smooth networks have `BySign`.
        smooth: asked in the backward, whether the network is none of ReLUs.
        repeated: names of modules that run several times in a forward; asked when a module is given its rule.
    """
    composite = EpsilonPlus() if given is None else given

    def module_map(context: dict[str, Any], name: str, module: nn.Module) -> Any:
        if isinstance(module, nn.MultiheadAttention):
            return None
        by_functions = isinstance(module, _BY_FUNCTION) or computes_itself(module) or name in repeated
        if given is None and by_functions:
            return None
        if given is None and isinstance(module, Convolution):
            return _PlusOrBySign(smooth)
        return composite.module_map(context, name, module)

    return Composite(module_map, composite.canonizers)


class BySign(BasicHook):  # type: ignore[misc]
    """Contributions of the output's own sign: ``R_i = z_i^s / Σ z_j^s R``, where s is the sign of z.

    z⁺ where outputs are positive (Bach et al. 2015), and the same for negative ones, whose relevance z⁺ would hand to
    the few contributions that speak against them, or to none. So no share is larger than its part of the output.
    """

    def __init__(self) -> None:
        without_bias = zero_bias()
        super().__init__(
            input_modifiers=[_positive, _negative, _positive, _negative],
            param_modifiers=[
                ClampMod(min=0.0),
                ClampMod(max=0.0, zero_params=without_bias),
                ClampMod(max=0.0),
                ClampMod(min=0.0, zero_params=without_bias),
            ],
            output_modifiers=[lambda output: output] * 4,
            gradient_mapper=_of_own_sign,
            reducer=lambda inputs, gradients: sum(x * gradient for x, gradient in zip(inputs, gradients, strict=True)),
        )

    def copy(self) -> BySign:
        """Another one, for another module."""
        return BySign()


def _positive(x: Tensor) -> Tensor:
    return x.clamp(min=0)


def _negative(x: Tensor) -> Tensor:
    return x.clamp(max=0)


def _of_own_sign(relevance: Tensor, outputs: list[Tensor]) -> list[Tensor]:
    plus, minus = outputs[0] + outputs[1], outputs[2] + outputs[3]
    speaks_for = plus + minus > 0
    for_it = torch.where(speaks_for, relevance / stabilised(plus), 0.0)
    against_it = torch.where(speaks_for, 0.0, relevance / stabilised(minus))
    return [for_it, for_it, against_it, against_it]


class _PlusOrBySign(ZPlus):  # type: ignore[misc]
    """z⁺, or `BySign` in smooth networks: what a network is shows when its forward has run."""

    def __init__(self, smooth: Callable[[], bool]) -> None:
        super().__init__()
        self.smooth = smooth
        self.by_sign = BySign()

    def copy(self) -> _PlusOrBySign:
        """Another one, for another module."""
        return _PlusOrBySign(self.smooth)

    def backward(self, module: nn.Module, grad_input: Any, grad_output: Any) -> Any:
        """Called by Zennit."""
        if not self.smooth():
            return super().backward(module, grad_input, grad_output)
        self.by_sign.stored_tensors = self.stored_tensors
        return self.by_sign.backward(module, grad_input, grad_output)
