"""CIFAR-100 in ten tasks of ten classes, a ResNet-18 for 32 × 32 images trained from scratch.

    python examples/cifar_resnet.py --data FOLDER                # shards as in FOLDER/cifar100/train_00.avif
    python examples/cifar_resnet.py --data FOLDER --torchvision  # torchvision's layout: FOLDER/cifar-100-python
    python examples/cifar_resnet.py --data FOLDER --width 16 --stem-stride 2 # for a CPU
    python examples/cifar_resnet.py --data FOLDER --accelerator gpu --precision bf16-mixed --epochs 30

Classes are assigned to tasks at random by the seed. A tenth of the training data is held out: reference data comes
from there, the test set is only for the report.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial

import torch
from experiment import Experiment
from images import cifar, crop_and_flip
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from lightning_rnf import MultiHead, RelevanceFreezing
from lightning_rnf.importance import IMPORTANCES
from lightning_rnf.streams import TaskDataModule, split_by_class

RECOVERY = {"recovery_epochs": 6, "reset_free": True}
METHODS = {
    "naive": lambda: None,
    "paper": RelevanceFreezing.paper,
    "exact": partial(RelevanceFreezing, recalibrate_norm=False),
    "exact, recalibrated": RelevanceFreezing,
    "recovery": partial(RelevanceFreezing, **RECOVERY),
    "recovery, ration": partial(RelevanceFreezing, ration=0.35, recovery_criterion=0.0, **RECOVERY),
    "longer recovery, ration": partial(
        RelevanceFreezing, ration=0.35, recovery_criterion=0.0, recovery_epochs=16, reset_free=True
    ),
    **{name: partial(RelevanceFreezing, importance=name) for name in IMPORTANCES},
}


class ResNet18(LightningModule):
    """The ResNet-18 for small images: a 3 × 3 stem without pooling; SGD with Nesterov momentum, one cycle a task."""

    def __init__(self, width: int = 64, stem_stride: int = 1, learning_rate: float = 0.05) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        blocks: list[nn.Module] = []
        before = width
        for stage, channels in enumerate((width, 2 * width, 4 * width, 8 * width)):
            stride = 1 if stage == 0 else 2
            shortcut = None
            if stride != 1:
                shortcut = nn.Sequential(nn.Conv2d(before, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))
            blocks += [BasicBlock(before, channels, stride, shortcut), BasicBlock(channels, channels)]
            before = channels
        self.body = nn.Sequential(
            nn.Conv2d(3, width, 3, stem_stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            *blocks,
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.heads = MultiHead(before)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        return self.heads(self.body(x.contiguous(memory_format=torch.channels_last)))

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        x, y = batch
        return (crop_and_flip(x) if self.trainer.training else x), y

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.SGD(
            self.parameters(), self.learning_rate, momentum=0.9, nesterov=True, weight_decay=5e-4
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.learning_rate, total_steps=int(self.trainer.estimated_stepping_batches)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def stream(options: argparse.Namespace, seed: int) -> list[TaskDataModule]:
    train, test = (cifar(options.data, 100, is_train, options) for is_train in (True, False))
    classes = torch.randperm(100, generator=torch.Generator().manual_seed(seed)).tolist()
    groups = [classes[first : first + 10] for first in range(0, 100, 10)]
    names = [f"task {number}" for number in range(len(groups))]
    return split_by_class(train, test, groups, name=names, batch_size=options.batch_size, seed=seed)


def model(options: argparse.Namespace) -> ResNet18:
    return ResNet18(options.width, options.stem_stride, options.learning_rate)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--torchvision", action="store_true", help="the data are in torchvision's layout")
    parser.add_argument("--download", action="store_true", help="fetch them if they are not there (torchvision)")
    parser.add_argument("--width", type=int, default=64, help="channels of the first stage (%(default)s)")
    parser.add_argument("--stem-stride", type=int, default=1, help="2 for a quarter of the work (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="(%(default)s)")
    parser.add_argument("--learning-rate", type=float, default=0.05, help="the cycle's highest (%(default)s)")


EXPERIMENT = Experiment(
    "CIFAR-100 in 10 tasks",
    METHODS,
    stream,
    model,
    epochs=10,
    default_methods=("naive", "paper", "exact", "exact, recalibrated", "recovery", "recovery, ration"),
    drawn=("naive", "paper", "exact, recalibrated", "recovery, ration"),
    setup={"network": "ResNet-18 for 32 x 32", "training": "SGD, one cycle a task, crops and flips"},
    arguments=arguments,
)


def main(arguments: Sequence[str] | None = None) -> dict:
    return EXPERIMENT.main("cifar_resnet", __doc__, arguments)


if __name__ == "__main__":
    main()
