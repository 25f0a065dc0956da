"""Linear layers and all kinds of convolutions seen as one thing: groups of units, each reading a group of features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_rnf.anatomy.kinds import TRANSPOSED

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LAYERS = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)


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
    known = ~constant.isnan() if absorbs(module) else constant == 0
    by_unit = known.view(groups, -1).all(dim=1).repeat_interleave(units // groups)
    if not by_unit.any():
        return torch.full_like(bias, torch.nan)
    return (bias + folded(module, constant)).where(by_unit, torch.nan)


def absorbs(module: Any) -> bool:
    """Whether a constant input is a constant output, also at the borders."""
    return isinstance(module, nn.Linear) or (
        isinstance(module, CONVOLUTIONS) and (module.padding == "valid" or not reaches_outside(module.padding))
    )


def reaches_outside(padding: Any) -> bool:
    """Whether a padding reaches anywhere outside."""
    if isinstance(padding, str):
        return padding != "valid"
    return any(bool(size) for size in (padding if isinstance(padding, (tuple, list)) else (padding,)))
