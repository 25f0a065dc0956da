"""CIFAR-10, then CIFAR-100 in ten tasks of ten random classes (section 4.3 of the paper).

    python examples/cifar_random.py --data FOLDER                 # shards as in FOLDER/cifar10/train_00.avif
    python examples/cifar_random.py --data FOLDER --download      # or torchvision's layout: FOLDER/cifar-10-batches-py
    python examples/cifar_random.py --data FOLDER --settings examples/cifar_random_six.yaml           # Zenke's stream
    python examples/cifar_random.py --data FOLDER --settings examples/cifar_random_short.yaml         # for a CPU
    python examples/cifar_random.py --data FOLDER --settings examples/cifar_random_short_levers.yaml
    python examples/cifar_random.py --data FOLDER --settings examples/cifar_random_short_importances.yaml

Network and training are those of Zenke et al. 2017 ("Continual Learning Through Synaptic Intelligence"), which the
paper takes over: Adam 1e-3, batch 256, 60 epochs a task, no augmentation; `tuned` has its own. Classes are assigned to
tasks at random by the seed. A tenth of each task's training data is held out: reference data comes from there, the test
set is only for the report. The last two files of settings change the defaults of before one at a time, and compare
relevance with other importances.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from experiment import Experiment
from images import Data, cifar, crop_and_flip
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_rnf import MultiHead
from lightning_rnf.streams import TaskDataModule, split_by_class


class Zenke(LightningModule):
    """Four convolutions and a linear layer, with dropout; Adam.

    Args:
        learning_rate: of Adam.
        augment: crop and mirror training images at random, which Zenke et al. did not.
    """

    def __init__(self, *, learning_rate: float, augment: bool = False) -> None:
        super().__init__()
        self.learning_rate, self.augment = learning_rate, augment
        layers: list[nn.Module] = []
        for before, channels in ((3, 32), (32, 64)):
            layers += [
                nn.Conv2d(before, channels, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(channels, channels, 3),
                nn.ReLU(),
            ]
            layers += [nn.MaxPool2d(2), nn.Dropout(0.25)]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 6 * 6, 512), nn.ReLU(), nn.Dropout(0.5))
        self.heads = MultiHead(512)
        for module in self.body:
            if isinstance(module, (nn.Conv2d, nn.Linear)):  # as in Keras, which the authors used
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        return self.heads(self.body(x.contiguous(memory_format=torch.channels_last)))

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        x, y = batch
        return (crop_and_flip(x) if self.augment and self.trainer.training else x), y

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)


def cifar10_first(data: Data, groups: Sequence[Sequence[int]], names: Sequence[str], seed: int) -> list[TaskDataModule]:
    """All of CIFAR-10 as one task, then a task for each group of classes of CIFAR-100."""
    stream = []
    for classes, of_each, named in ((10, [range(10)], ["CIFAR-10"]), (100, groups, names)):
        train, test = (cifar(data, classes, is_train) for is_train in (True, False))
        stream += split_by_class(train, test, of_each, name=named, seed=seed)
    return stream


def stream(data: Data, seed: int) -> list[TaskDataModule]:
    classes = torch.randperm(100, generator=torch.Generator().manual_seed(seed)).tolist()
    groups = [classes[first : first + 10] for first in range(0, 100, 10)]
    return cifar10_first(data, groups, [f"CIFAR-100, {number}" for number in range(1, 11)], seed)


EXPERIMENT = Experiment(stream, Zenke)


def main(arguments: Sequence[str] | None = None) -> dict:
    return EXPERIMENT.main(__file__, __doc__, arguments)


if __name__ == "__main__":
    main()
