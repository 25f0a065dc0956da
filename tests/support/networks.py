"""Small networks and batches for the tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

CLASSES = 3


class Built(nn.Module):
    """A module of the given parts, registered in the order they are named in, and of a function as its forward."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.compute = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, x)


def mlp(*, bias: bool = True) -> nn.Sequential:
    """Inputs (N, 4); hidden layers "0" and "2", head "4"."""
    return nn.Sequential(
        nn.Linear(4, 8, bias=bias),
        nn.ReLU(),
        nn.Linear(8, 6, bias=bias),
        nn.ReLU(),
        nn.Linear(6, CLASSES, bias=bias),
    )


def convnet(*, bias: bool = True, inplace: bool = False) -> nn.Sequential:
    """Inputs (N, 2, 6, 6); hidden layers "0", "2" and "6", head "8"."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=bias),
        nn.ReLU(inplace),
        nn.Conv2d(4, 5, 3, bias=bias),
        nn.ReLU(inplace),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(20, 6, bias=bias),
        nn.ReLU(inplace),
        nn.Linear(6, CLASSES, bias=bias),
    )


def labelled(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Normal inputs of this shape, samples first, and labels."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator), torch.randint(CLASSES, shape[:1], generator=generator)


def split(batch: tuple[Tensor, Tensor], sizes: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """The samples of a batch, in batches of these sizes."""
    x, y = batch
    return zip(x.split(sizes), y.split(sizes), strict=True)
