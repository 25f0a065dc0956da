"""Tasks whose inputs differ, so that it can be told which one a sample is of."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.utils.data import TensorDataset
from training import TASKS, clusters, trainer

from lightning_rnf import RelevanceFreezing
from lightning_rnf.streams import TaskDataModule


def shifted(task: str, samples: int, seed: int = 0, by: float = 3.0) -> TensorDataset:
    """`clusters`, moved in a direction of the task's own: two of the six numbers are ``by`` larger."""
    x, y = clusters(task, samples, seed).tensors
    move = torch.zeros(6)
    move[2 * TASKS.index(task) : 2 * TASKS.index(task) + 2] = by
    return TensorDataset(x + move, y)


def held_out(*tasks: str, samples: int = 100, by: float = 3.0) -> tuple[Tensor, list[str]]:
    """Samples that no fit has seen, and the task of each, mixed."""
    order = torch.randperm(samples * len(tasks), generator=torch.Generator().manual_seed(0))
    x = torch.cat([shifted(task, samples, seed=9, by=by).tensors[0] for task in tasks])[order]
    names = [task for task in tasks for _ in range(samples)]
    return x, [names[index] for index in order.tolist()]


def train_apart(
    model: LightningModule, rnf: RelevanceFreezing, *tasks: str, samples: int = 640, by: float = 3.0, **options: Any
) -> None:
    """As `train`, of `shifted` tasks."""
    for task in tasks:
        model.heads.activate(task)
        data = TaskDataModule(task, 2, *(shifted(task, samples, seed, by) for seed in range(3)), batch_size=32)
        trainer(rnf, **options).fit(model, datamodule=data)
