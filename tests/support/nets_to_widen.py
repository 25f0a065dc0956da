"""Small networks of every kind that can be made wider, with a head for each task, and those that can't."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_rnf import MultiHead

CLASSES = 3
TASKS = ("a", "b", "c")


class Net(nn.Module):
    """A body and a head for each task."""

    def __init__(self, body: nn.Module, features: int) -> None:
        super().__init__()
        self.body = body
        self.heads = MultiHead(features, dict.fromkeys(TASKS, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.heads(self.body(x))


class Residual(nn.Module):
    """A sum of what a convolution says and what two others make of it, each with a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1)
        self.inner = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.outer = nn.Sequential(nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return (x + self.outer(self.inner(x))).relu().mean(dim=(2, 3))


class Concatenation(nn.Module):
    """Two branches side by side, one of them twice, behind them a norm that no layer owns, and a flattening."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Conv2d(2, 3, 3), nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(10)
        self.join = nn.Conv2d(10, 5, 3)
        self.last = nn.Linear(5 * 4, 9)

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.one(x).tanh(), self.other(x).relu()
        x = self.norm(torch.cat([one, other, one], dim=1))
        return self.last(torch.flatten(self.join(x), 1)).sigmoid()


class Gated(nn.Module):
    """Squeeze and excitation: a product with a gate of each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3)
        self.squeeze, self.excite = nn.Conv2d(8, 3, 1), nn.Conv2d(3, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        gate = self.excite(self.squeeze(nn.functional.adaptive_avg_pool2d(x, 1)).relu()).sigmoid()
        return (x * gate).amax(dim=(2, 3))


def mlp() -> Net:
    return Net(
        nn.Sequential(nn.Linear(6, 8), nn.PReLU(8), nn.Dropout(0.1), nn.Linear(8, 5), nn.BatchNorm1d(5), nn.ReLU()), 5
    )


def convolutions() -> Net:
    return Net(
        nn.Sequential(
            *(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.PReLU(4), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(4 * 4, 7), nn.ReLU(), nn.Linear(7, 6), nn.Tanh()),
        ),
        6,
    )


def groups() -> Net:
    return Net(
        nn.Sequential(
            *(nn.Conv2d(2, 8, 1), nn.ReLU(), nn.Conv2d(8, 12, 3, groups=4), nn.BatchNorm2d(12), nn.ReLU()),
            *(nn.Conv2d(12, 12, 3, groups=12), nn.ReLU(), nn.Conv2d(12, 24, 1, groups=12), nn.ReLU()),
            *(nn.Conv2d(24, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        ),
        5,
    )


def transposed() -> Net:
    return Net(
        nn.Sequential(
            *(nn.Conv2d(2, 6, 3, stride=2), nn.ReLU(), nn.ConvTranspose2d(6, 8, 3), nn.InstanceNorm2d(8), nn.ReLU()),
            *(nn.ConvTranspose2d(8, 4, 3, groups=2), nn.ReLU(), nn.Conv2d(4, 3, 2), nn.ReLU(), nn.Flatten()),
        ),
        3 * 25,
    )


WIDE = {
    "mlp": (mlp, (6,)),
    "convolutions": (convolutions, (2, 6, 6)),
    "residual": (lambda: Net(Residual(), 6), (2, 6, 6)),
    "concatenation": (lambda: Net(Concatenation(), 9), (2, 6, 6)),
    "gated": (lambda: Net(Gated(), 8), (2, 6, 6)),
    "groups": (groups, (2, 6, 6)),
    "transposed": (transposed, (2, 6, 6)),
}
"""What builds a network, and the shape of one input."""


class _OfSize(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Conv2d(2, 4, 3), nn.Linear(4 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.one(x).relu().view(-1, 4 * 16))


class _Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        return x if x.sum() > 0 else -x


class _Constant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.scale = nn.Linear(6, 5), nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) * self.scale


class _Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(6, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(self.one(x).unsqueeze(1)).squeeze(1)


class _Uneven(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.sum = nn.Linear(6, 2), nn.Linear(6, 3), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.two(x)], dim=-1) + self.sum(x)


def _normed() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5))


def _in_groups() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 6, groups=2), nn.Flatten())


NARROW = {
    "a norm that mixes channels": (_normed, (6,), 5, r"body\.0", r"body\.1 \(LayerNorm\)"),
    "a size in the forward": (_OfSize, (2, 6, 6), 5, r"body\.one", r"view in body has the size 64"),
    "a branch": (_Branching, (6,), 5, "forward of Net", "can't be traced"),
    "a constant": (_Constant, (6,), 5, r"body\.one", "mul in body"),
    "a whole module": (_Whole, (6,), 8, "self_attn", r"encoder \(TransformerEncoderLayer\) is not taken apart"),
    "parts that differ in size": (_Uneven, (6,), 5, r"body\.(one|two|sum)", r"add in body puts parts together"),
    "groups of the input": (_in_groups, (2, 6, 6), 4, r"body\.0", "has groups"),
}
"""What builds a body, the shape of one input, its features, a layer and the operation that keep it from growing."""
