"""CIFAR-100 in ten tasks of ten classes, or twenty of five, with the AlexNet of the published comparisons.

    python examples/cifar_alexnet.py --data FOLDER --accelerator gpu --precision bf16-mixed
    python examples/cifar_alexnet.py --data FOLDER --settings examples/cifar_alexnet_twenty.yaml --accelerator gpu
    python examples/cifar_alexnet.py --data FOLDER --settings examples/cifar_alexnet_short.yaml           # for a CPU

Not one of the paper's experiments: the protocol that HAT (Serrà et al. 2018) began, and by which methods that forget
nothing are compared since: its network (some of the later ones have added norms), batches of 64, at most 200 epochs a
task, no augmentation. There the learning rate falls where the loss on validation data does not, and training ends
early; here it has one cycle in all epochs. Classes are assigned to tasks at random by the seed. A tenth of the training
data is held out: reference data comes from there, the test set is only for the report.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from cifar_resnet import OneCycle, random_classes
from experiment import Experiment
from images import Data
from torch import Tensor, nn

from lightning_rnf import MultiHead
from lightning_rnf.streams import TaskDataModule


class AlexNet(OneCycle):
    """Three convolutions with pooling and two wide linear layers, with dropout and without norms.

    Args:
        width: channels of the first convolution; the next has twice as many, and a linear layer 32 times as many units.
        learning_rate: the largest of the cycle.
    """

    def __init__(self, *, width: int, learning_rate: float) -> None:
        super().__init__(learning_rate, augment=False)
        layers: list[nn.Module] = []
        before = 3
        for channels, size, dropped in ((width, 4, 0.2), (2 * width, 3, 0.2), (4 * width, 2, 0.5)):
            layers += [nn.Conv2d(before, channels, size), nn.ReLU(), nn.Dropout(dropped), nn.MaxPool2d(2)]
            before = channels
        layers.append(nn.Flatten())
        for inputs in (before * 2 * 2, 32 * width):
            layers += [nn.Linear(inputs, 32 * width), nn.ReLU(), nn.Dropout(0.5)]
        self.body = nn.Sequential(*layers)
        self.heads = MultiHead(32 * width)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        return self.heads(self.body(x.contiguous(memory_format=torch.channels_last)))


def stream(data: Data, seed: int, *, classes: int) -> list[TaskDataModule]:
    return random_classes(data, seed, classes)


EXPERIMENT = Experiment(stream, AlexNet)


def main(arguments: Sequence[str] | None = None) -> dict:
    return EXPERIMENT.main(__file__, __doc__, arguments)


if __name__ == "__main__":
    main()
