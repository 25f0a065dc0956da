"""What a network looks at, right after its first task and after later ones (the paper's Figure 5), on CIFAR-10.

    python examples/heatmaps.py --data FOLDER                     # shards as in FOLDER/cifar10/train_00.avif
    python examples/heatmaps.py --data FOLDER --download          # or torchvision's layout: FOLDER/cifar-10-batches-py

Five tasks of two classes; a small convolutional network without norms, Adam. Test images of the first task are shown
to the network after every task, and the relevance of their pixels for the true class is compared with what it was
right after that task. The paper shows faces (Adience), which no figure here is to show.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from experiment import Experiment
from images import Data, as_text, cifar, normalised
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lightning_rnf import Drift, MultiHead, RelevanceFreezing, UnitMap, heatmaps
from lightning_rnf.streams import Scenario, TaskDataModule, TrainerFactory, fit_stream, split_by_class

SHOWN = 2


class Network(LightningModule):
    """Four convolutions and a linear layer."""

    def __init__(self, *, learning_rate: float) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        layers: list[nn.Module] = []
        for before, channels in ((3, 32), (32, 64), (64, 64), (64, 128)):
            layers += [nn.Conv2d(before, channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 4, 256), nn.ReLU())
        self.heads = MultiHead(256)

    def forward(self, x: Tensor) -> Tensor:
        return self.heads(self.body(x))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)


class Watch(Callback):
    """Heatmaps of the first task's test images at the end of every fit.

    Args:
        first: the task.
        callback: recalls it; None: naive fine-tuning.

    Attributes:
        batch: the images with their labels.
        maps: after each task, ``(N, height, width)``.
    """

    def __init__(self, first: TaskDataModule, callback: RelevanceFreezing | None) -> None:
        self.first = first.task
        self.callback = callback
        self.batch = next(iter(first.test_dataloader()))
        self.maps: list[Tensor] = []

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        recalled = nullcontext() if self.callback is None else self.callback.recall(self.first, pl_module)
        with pl_module.heads.running(self.first):
            units = UnitMap.of(pl_module, self.batch)
            with recalled:
                self.maps.append(heatmaps(pl_module, units.layers, self.batch))


def stream(data: Data, seed: int) -> list[TaskDataModule]:
    train, test = (normalised(cifar(data, 10, is_train)) for is_train in (True, False))
    return split_by_class(train, test, [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)], name="cifar", seed=seed)


def fit(
    model: LightningModule,
    stream: list[TaskDataModule],
    callback: RelevanceFreezing | None,
    trainer_factory: TrainerFactory,
    *,
    folder: Path,
    scenario: Scenario = "task",
) -> tuple[Tensor, dict[str, Any]]:
    """The matrix, how far relevance drifts after each task, and a few images with their heatmaps after each."""
    watch = Watch(stream[0], callback)

    def watched(*, callbacks: list[Callback]) -> Trainer:
        return trainer_factory(callbacks=[*callbacks, watch])

    matrix = fit_stream(model, stream, callback, watched, folder=folder, scenario=scenario)
    maps = {task.task: of_images for task, of_images in zip(stream, watch.maps, strict=True)}
    return matrix, {
        "images compared": len(watch.maps[0]),
        "drift": [vars(Drift.between(watch.maps[0], later)) for later in watch.maps],
        "images": as_text(watch.batch[0][:SHOWN]),
        "heatmaps": {f"after {task}": as_text(of_images[:SHOWN]) for task, of_images in maps.items()},
    }


EXPERIMENT = Experiment(stream, Network, fit)


def main(arguments: Sequence[str] | None = None) -> dict:
    return EXPERIMENT.main(__file__, __doc__, arguments)


if __name__ == "__main__":
    main()
