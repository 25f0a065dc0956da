"""CIFAR-100 in ten tasks of ten classes, a ResNet-18 for 32 × 32 images trained from scratch.

    python examples/cifar_resnet.py --data FOLDER                 # shards as in FOLDER/cifar100/train_00.avif
    python examples/cifar_resnet.py --data FOLDER --download      # or torchvision's layout: FOLDER/cifar-100-python
    python examples/cifar_resnet.py --data FOLDER --settings examples/cifar_resnet_narrow.yaml        # for a CPU
    python examples/cifar_resnet.py --data FOLDER --accelerator gpu --precision bf16-mixed

Not one of the paper's experiments: a modern network with batch norms and residuals. Classes are assigned to tasks at
random by the seed. A tenth of the training data is held out: reference data comes from there, the test set is only for
the report.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from experiment import Experiment
from images import Data, cifar, crop_and_flip, normalised
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from lightning_rnf import MultiHead
from lightning_rnf.streams import TaskDataModule, split_by_class


class OneCycle(LightningModule):
    """Cross-entropy by SGD with Nesterov momentum, and one cycle of the learning rate for each task.

    Args:
        learning_rate: the largest of the cycle.
        augment: crop and mirror training images at random.
    """

    def __init__(self, learning_rate: float, *, augment: bool) -> None:
        super().__init__()
        self.learning_rate, self.augment = learning_rate, augment

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        x, y = batch
        return (crop_and_flip(x) if self.augment and self.trainer.training else x), y

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


class ResNet18(OneCycle):
    """The ResNet-18 for small images: a 3 × 3 stem without pooling."""

    def __init__(self, *, width: int, stem_stride: int, learning_rate: float) -> None:
        super().__init__(learning_rate, augment=True)
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


def random_classes(data: Data, seed: int, classes: int) -> list[TaskDataModule]:
    """CIFAR-100 in tasks of so many random classes."""
    train, test = (normalised(cifar(data, 100, is_train)) for is_train in (True, False))
    order = torch.randperm(100, generator=torch.Generator().manual_seed(seed)).tolist()
    groups = [order[first : first + classes] for first in range(0, 100, classes)]
    return split_by_class(train, test, groups, name=[f"task {number}" for number in range(len(groups))], seed=seed)


def stream(data: Data, seed: int) -> list[TaskDataModule]:
    return random_classes(data, seed, 10)


EXPERIMENT = Experiment(stream, ResNet18)


def main(arguments: Sequence[str] | None = None) -> dict:
    return EXPERIMENT.main(__file__, __doc__, arguments)


if __name__ == "__main__":
    main()
