"""Networks whose targets are no class of a sample: pixels, tokens, characters, numbers. Two small tasks each."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import TensorDataset

from lightning_rnf import MultiHead
from lightning_rnf.streams import TaskDataModule

TASKS = ("a", "b")
SAMPLES = 48


class Learner(pl.LightningModule):
    """Trains by a loss of logits and target, in whatever form they are."""

    def __init__(self, loss: Any) -> None:
        super().__init__()
        self.loss = loss

    def training_step(self, batch):
        return self.loss(self(batch[0]), batch[1])

    def validation_step(self, batch):
        self.log("loss", self.loss(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class UNet(Learner):
    """One step down and up again: images ``(N, 1, 8, 8)`` to logits ``(N, 3, 8, 8)``."""

    def __init__(self, ignored: int = -100) -> None:
        super().__init__(nn.CrossEntropyLoss(ignore_index=ignored))
        self.down = nn.Sequential(nn.Conv2d(1, 12, 3, padding=1), nn.ReLU())
        self.bottom = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(12, 12, 3, padding=1), nn.ReLU(), nn.Upsample(None, 2))
        self.up = nn.Sequential(nn.Conv2d(24, 12, 3, padding=1), nn.ReLU())
        self.heads = MultiHead(
            12, dict.fromkeys(TASKS, 3), make_head=lambda width, classes: nn.Conv2d(width, classes, 1)
        )

    def forward(self, x):
        seen = self.down(x)
        return self.heads(self.up(torch.cat([seen, self.bottom(seen)], dim=1)))


class Tagger(Learner):
    """Tokens ``(N, T)`` to logits ``(N, T, 5)``: of each by itself and its neighbours."""

    def __init__(self) -> None:
        super().__init__(lambda logits, target: nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten()))
        self.embedding = nn.Embedding(12, 16)
        self.body = nn.ModuleList([nn.Conv1d(16, 24, 3, padding=1), nn.Linear(24, 24)])
        self.heads = MultiHead(24, dict.fromkeys(TASKS, 5))

    def forward(self, x):
        seen = self.body[0](self.embedding(x).transpose(1, 2)).relu().transpose(1, 2)
        return self.heads(self.body[1](seen).relu())


class Writer(Learner):
    """Characters ``(N, T)`` to logits ``(N, T, 6)`` of the next one: convolutions that look back only."""

    def __init__(self) -> None:
        super().__init__(lambda logits, target: nn.functional.cross_entropy(*next_of(logits, target)))
        self.embedding = nn.Embedding(6, 8)
        self.body = nn.Sequential(
            *(nn.ConstantPad1d((2, 0), 0.0), nn.Conv1d(8, 24, 3), nn.ReLU()),
            *(nn.ConstantPad1d((2, 0), 0.0), nn.Conv1d(24, 24, 3), nn.ReLU()),
        )
        self.heads = MultiHead(24, dict.fromkeys(TASKS, 6))

    def forward(self, x):
        return self.heads(self.body(self.embedding(x).transpose(1, 2)).transpose(1, 2))


def next_of(logits, ids):
    """Rows of logits and labels, as a language model's loss makes them."""
    return logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()


def of_next(module, batch):
    """A `Predict`: the label of a character is the one behind it, the last has none."""
    return module(batch[0]), nn.functional.pad(batch[0][:, 1:], (0, 1), value=-100)


class Regressor(Learner):
    """``(N, 6)`` to numbers ``(N, outputs)``, or of one ``(N,)``."""

    def __init__(self, outputs: int = 2, *, squeezed: bool = False) -> None:
        super().__init__(nn.MSELoss())
        self.body = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
        self.heads = MultiHead(32, dict.fromkeys(TASKS, outputs))
        self.squeezed = squeezed

    def forward(self, x):
        y = self.heads(self.body(x))
        return y.squeeze(1) if self.squeezed else y


def pixels(task: str, seed: int = 0, ignored: int = -100) -> TensorDataset:
    """Bright and dark pixels, and such in a bright place; some have no label. In task b bright is what was dark."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(SAMPLES, 1, 8, 8, generator=generator)
    bright = x[:, 0] if task == "a" else -x[:, 0]
    y = (bright > 0).long()
    y[nn.functional.avg_pool2d(bright, 3, 1, 1) > 0.3] = 2
    y[torch.rand(y.shape, generator=generator) < 0.2] = ignored
    return TensorDataset(x, y)


def tokens(task: str, seed: int = 0) -> TensorDataset:
    """A token's tag goes by it, or in task b by the one before it; of five tokens, that is as many as tags."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(12, (2 * SAMPLES, 5), generator=generator)
    y = (x if task == "a" else x.roll(1, 1)) % 5
    y[torch.arange(5) >= torch.randint(2, 6, (len(x), 1), generator=generator)] = -100
    return TensorDataset(x, y)


def text(task: str, seed: int = 0) -> TensorDataset:
    """Characters that go up by one or two, in task b down, now and then by anything."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(1, 3, (2 * SAMPLES, 9), generator=generator) * (1 if task == "a" else -1)
    x = steps.cumsum(1) % 6
    return TensorDataset(x, x)


def numbers(task: str, seed: int = 0, outputs: int = 2, *, squeezed: bool = False) -> TensorDataset:
    """Numbers around 7 and -2 that go by the sign and size of directions of the task's own."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * SAMPLES, 6, generator=generator)
    direction = torch.randn(6, outputs, generator=torch.Generator().manual_seed(10 + TASKS.index(task)))
    y = (x @ direction).tanh() + torch.tensor([7.0, -2.0])[:outputs]
    return TensorDataset(x, y.squeeze(1) if squeezed else y)


def data(make: Any, task: str, **options: Any) -> TaskDataModule:
    return TaskDataModule(task, 0, *(make(task, seed, **options) for seed in range(3)), batch_size=16)
