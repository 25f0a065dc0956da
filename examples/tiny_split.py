"""Tiny-ImageNet in forty tasks of five classes, with the network of the published comparisons.

    python examples/tiny_split.py --data FOLDER --accelerator gpu --precision bf16-mixed
    python examples/tiny_split.py --data FOLDER --settings examples/tiny_split_short.yaml           # for a CPU

Not one of the paper's experiments: the protocol of FS-DGPM (Deng et al. 2021) and WSN (Kang et al. 2022), of four
convolutions and two linear layers, batches of 10 and 10 epochs a task; here the learning rate has one cycle in them.
Tiny-ImageNet is read from ``FOLDER/tinyimagenet200``. Classes are assigned to tasks at random by the seed. A tenth of
the training data is held out: reference data comes from there, the test set (its validation images) is only for the
report.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from cifar_resnet import OneCycle
from experiment import Experiment
from images import Data
from photographs import normalised, tiny_imagenet
from torch import Tensor, nn

from lightning_rnf import MultiHead
from lightning_rnf.streams import TaskDataModule, split_by_class


class ConvNet(OneCycle):
    """Four convolutions of stride 2 and two linear layers, without norms.

    Args:
        width: channels of each convolution; of the linear layers four times as many units.
        learning_rate: the largest of the cycle.
    """

    def __init__(self, *, width: int, learning_rate: float) -> None:
        super().__init__(learning_rate, augment=False)
        layers: list[nn.Module] = []
        for before in (3, width, width, width):
            layers += [nn.Conv2d(before, width, 3, stride=2, padding=1), nn.ReLU()]
        layers.append(nn.Flatten())
        for before in (width * 4 * 4, 4 * width):
            layers += [nn.Linear(before, 4 * width), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.heads = MultiHead(4 * width)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        return self.heads(self.body(x.contiguous(memory_format=torch.channels_last)))


def stream(data: Data, seed: int) -> list[TaskDataModule]:
    train, test = (tiny_imagenet(data, is_train).shown(normalised()) for is_train in (True, False))
    order = torch.randperm(200, generator=torch.Generator().manual_seed(seed)).tolist()
    groups = [order[first : first + 5] for first in range(0, 200, 5)]
    return split_by_class(train, test, groups, name=[f"task {number}" for number in range(1, 41)], seed=seed)


EXPERIMENT = Experiment(stream, ConvNet)


def main(arguments: Sequence[str] | None = None) -> dict:
    return EXPERIMENT.main(__file__, __doc__, arguments)


if __name__ == "__main__":
    main()
