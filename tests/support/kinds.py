"""Layers as other packages have them: they are known by the names of their classes and modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Conv1D(nn.Module):
    """A linear layer whose weight is ``(inputs, units)``, as transformers' GPT-2 has it."""

    __module__ = "transformers.pytorch_utils"

    def __init__(self, units: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, units) / inputs**0.5)
        self.bias = nn.Parameter(torch.randn(units) / 10)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])


class Linear(nn.Module):
    """A linear layer of its own class, as torch-geometric has it."""

    __module__ = "torch_geometric.nn.dense.linear"

    def __init__(self, inputs: int, units: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(units, inputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.randn(units) / 10) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class Cosine(nn.Module):
    """Rows of length one, and a scale for each: a layer of somebody's own."""

    def __init__(self, inputs: int, units: int) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.randn(units, inputs)), nn.Parameter(torch.rand(units) + 1)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, nn.functional.normalize(self.weight, dim=1)) * self.scale


class Pixelwise(nn.Module):
    """A 1 × 1 convolution of somebody's own, its weight ``(inputs, units)``."""

    def __init__(self, inputs: int, units: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, units))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nihw,iu->nuhw", x, self.weight)


class Competing(Cosine):
    """Units that hear of each other."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).softmax(-1)
