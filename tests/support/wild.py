"""Modules as users write them: routing, coupled rows, casts, randomness in eval mode, heads of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_rnf import MultiHead

FEATURES, WIDTH, POSITIONS = 6, 12, 3


class ScaledByAll(nn.Linear):
    """One scale for the whole weight."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight / self.weight.detach().abs().mean(), self.bias)


class Quantised(nn.Linear):
    """Steps as wide as the largest weight of all says."""

    def forward(self, x: Tensor) -> Tensor:
        step = self.weight.detach().abs().max() / 7
        rounded = (self.weight / step).round() * step
        return nn.functional.linear(x, self.weight + (rounded - self.weight).detach(), self.bias)


class Standardised(nn.Linear):
    """Each row by itself."""

    def forward(self, x: Tensor) -> Tensor:
        mean, spread = self.weight.mean(1, keepdim=True), self.weight.std(1, keepdim=True)
        return nn.functional.linear(x, (self.weight - mean) / (spread + 1e-3), self.bias)


class Casting(nn.Module):
    """In half precision, whatever the rest is in."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH).to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.to(torch.bfloat16)).to(x.dtype).relu()


class Experts(nn.Module):
    """Which expert a sample goes to is told by its own sum; one that no sample goes to does not run."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.threshold = threshold

    def forward(self, x: Tensor) -> Tensor:
        to = (x.mean(-1) > self.threshold).long()
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            chosen = (to == number).unsqueeze(-1)
            if chosen.any():
                out = out + expert(x).relu() * chosen
        return out


class Exits(nn.Module):
    """A second layer for batches that are not sure enough."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return self.second(x).relu() if x.mean() < 0.4 else x


class Dropped(nn.Module):
    """In eval mode, too."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.3)


class Drifting(nn.Module):
    """A state that is no buffer."""

    runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return x * (1 + 0.01 * self.runs)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(self.norm(x)).relu()


BLOCKS = {
    "plain": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()),
    "residual": Residual,
    "scaled by all": lambda: nn.Sequential(ScaledByAll(WIDTH, WIDTH), nn.ReLU()),
    "quantised": lambda: nn.Sequential(Quantised(WIDTH, WIDTH), nn.ReLU()),
    "standardised": lambda: nn.Sequential(Standardised(WIDTH, WIDTH), nn.ReLU()),
    "casting": Casting,
    "experts": lambda: Experts(0.3),
    "rare expert": lambda: Experts(1.0),
    "exits": Exits,
    "dropped": Dropped,
    "drifting": Drifting,
}


@dataclass(frozen=True)
class Wild:
    """What a module is made of.

    Attributes:
        blocks: names of `BLOCKS`.
        own_heads: a ``ModuleDict`` of the user's, else a `MultiHead`.
        classes: of the two tasks.
        targets: ``"samples"``, ``"positions"`` (a label for each, flattened), ``"some"`` (of those, some are masked).
        batch_size: of reference data.
    """

    blocks: Sequence[str]
    own_heads: bool
    classes: tuple[int, int]
    targets: str
    batch_size: int


class WildModule(pl.LightningModule):
    def __init__(self, wild: Wild) -> None:
        super().__init__()
        self.wild = wild
        self.start = nn.Linear(FEATURES, WIDTH)
        self.body = nn.Sequential(*(BLOCKS[name]() for name in wild.blocks))
        sizes = dict(zip("ab", wild.classes, strict=True))
        own = nn.ModuleDict({task: nn.Linear(WIDTH, size) for task, size in sizes.items()})
        self.heads = own if wild.own_heads else MultiHead(WIDTH, sizes)
        self.task = "a"

    def activate(self, task: str) -> None:
        self.task = task
        if not self.wild.own_heads:
            self.heads.activate(task)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.start(x).relu())
        return self.heads[self.task](x) if self.wild.own_heads else self.heads(x)

    def predict(self, batch: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Logits and targets, of those that have one."""
        x, y = batch
        if self.wild.targets == "samples":
            return self(x[:, 0]), y[:, 0]
        logits, target = self(x.flatten(0, 1)), y.flatten()
        there = target >= (1 if self.wild.targets == "some" else 0)
        return logits[there], target[there]

    def training_step(self, batch: Sequence[Tensor]) -> Tensor:
        return nn.functional.cross_entropy(*self.predict(batch))

    def validation_step(self, batch: Sequence[Tensor]) -> None: ...

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-2, weight_decay=0.1)


def loader(wild: Wild, task: str, samples: int = 96) -> DataLoader:
    """Positions whose labels are told by a direction of the task's own; the hard ones last."""
    number = "ab".index(task)
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(samples, POSITIONS, FEATURES, generator=generator)
    y = (x @ torch.randn(FEATURES, wild.classes[number], generator=generator)).argmax(-1)
    return DataLoader(TensorDataset(x, y), wild.batch_size)
