"""Texts of a few words in two tasks: some words both have, some each alone, and some nobody has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from training import TASKS, Classifier

from lightning_rnf import MultiHead
from lightning_rnf.streams import TaskDataModule

WORDS, LENGTH, PADDING = 60, 10, 0
VOCABULARY = {"a": range(1, 25), "b": range(17, 41), "c": range(33, 49)}
"""Words of each task; 0 is padding, those from 49 on nobody has."""


class Reader(Classifier):
    """The mean of its words, and two hidden layers."""

    def __init__(self, width: int = 6, words: int = WORDS, **options: Any) -> None:
        super().__init__(**{"weight_decay": 0.1, **options})
        self.embedding = nn.Embedding(words, width, padding_idx=PADDING)
        self.body = nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
        self.heads = MultiHead(32, dict.fromkeys(TASKS, 2))

    def forward(self, x: Tensor) -> Tensor:
        there = (x != PADDING).unsqueeze(-1)
        return self.heads(self.body((self.embedding(x) * there).sum(1) / there.sum(1).clamp(min=1)))


class Attending(Classifier):
    """One block of attention over words and their places, without dropout."""

    def __init__(self, width: int = 16, words: int = WORDS, **options: Any) -> None:
        super().__init__(**{"weight_decay": 0.1, **options})
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(LENGTH + 4, width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.body = nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, width))
        self.norm = nn.LayerNorm(width)
        self.heads = MultiHead(width, dict.fromkeys(TASKS, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.words(x) + self.places(torch.arange(x.shape[1], device=x.device))
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v))
        return self.heads(self.norm(x + self.body(x)).mean(1))


def texts(task: str, samples: int, seed: int = 0, *, padded: bool = True) -> TensorDataset:
    """Each word speaks for one of two classes, in each task as strongly as it likes; most say which it is."""
    generator = torch.Generator().manual_seed(100 * TASKS.index(task) + seed)
    words = torch.tensor(VOCABULARY[task])
    x = words[torch.randint(len(words), (samples, LENGTH), generator=generator)]
    weight = torch.randn(WORDS, generator=torch.Generator().manual_seed(TASKS.index(task)))
    if padded:
        length = torch.randint(LENGTH // 2, LENGTH + 1, (samples, 1), generator=generator)
        x = x.where(torch.arange(LENGTH) < length, PADDING)
    return TensorDataset(x, (weight.index_fill(0, torch.tensor([PADDING]), 0.0)[x].sum(1) > 0).long())


def text_data(task: str, samples: int = 320, batch_size: int = 32) -> TaskDataModule:
    return TaskDataModule(task, 2, *(texts(task, samples, seed) for seed in range(3)), batch_size=batch_size)


def anything(samples: int = 64, words: Any = range(1, WORDS), length: int = LENGTH) -> Tensor:
    """Texts of any words."""
    words = torch.tensor(list(words))
    return words[torch.randint(len(words), (samples, length), generator=torch.Generator().manual_seed(7))]
