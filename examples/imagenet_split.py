"""ImageNet-Split (section 4.4 of the paper): six tasks of a hundred classes each, 10 epochs a task.

    python examples/imagenet_split.py --data FOLDER --accelerator gpu --precision bf16-mixed
    python examples/imagenet_split.py --data FOLDER --settings examples/imagenet_split_tiny.yaml          # a stand-in
    python examples/imagenet_split.py --data FOLDER --settings examples/imagenet_split_tiny_short.yaml    # for a CPU

ImageNet is read from folders as torchvision's ``ImageFolder`` does: ``FOLDER/imagenet/train/n01440764/….JPEG`` and
``FOLDER/imagenet/val/n01440764/….JPEG``. The stand-in is Tiny-ImageNet, 64 × 64 pixels, six tasks of 33 of its 200
classes, from ``FOLDER/tinyimagenet200``. For network and training the paper only cites another one; here it is a
ResNet-18 from scratch. Classes are assigned to tasks at random by the seed. A tenth of the training data is held out:
reference data comes from there, the test set (ImageNet's validation images) is only for the report.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from cifar_resnet import ResNet18
from experiment import Experiment
from images import Data
from photographs import imagenet, normalised, tiny_imagenet
from torch import Tensor, nn
from torchvision.transforms import v2

from lightning_rnf.streams import TaskDataModule, split_by_class

SOURCES = {
    "imagenet": (
        imagenet,
        normalised(v2.RandomResizedCrop(224, antialias=True), v2.RandomHorizontalFlip()),
        normalised(v2.Resize(256, antialias=True), v2.CenterCrop(224)),
    ),
    "tiny_imagenet": (
        tiny_imagenet,
        normalised(v2.RandomCrop(64, padding=8), v2.RandomHorizontalFlip()),
        normalised(),
    ),
}
"""Where images come from, how they are shown in training, and how elsewhere."""


class ResNet18OfPhotographs(ResNet18):
    """With ImageNet's stem, if it is asked for; images come cropped and mirrored.

    Args:
        width: channels of the first stage.
        stem: ``"imagenet"``: 7 × 7 with stride 2, and pooling; ``"tiny"``: 3 × 3 with stride 2.
        learning_rate: the largest of the cycle.
    """

    def __init__(self, *, width: int, stem: str, learning_rate: float) -> None:
        super().__init__(width=width, stem_stride=2, learning_rate=learning_rate)
        if stem == "imagenet":
            self.body[0] = nn.Conv2d(3, width, 7, 2, 3, bias=False)
            self.body.insert(3, nn.MaxPool2d(3, 2, 1))
            self.to(memory_format=torch.channels_last)
        elif stem != "tiny":
            raise ValueError(f"stem is {stem!r}, expected 'imagenet' or 'tiny'")

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        return batch


def stream(data: Data, seed: int, *, source: str, classes: int, workers: int = 0) -> list[TaskDataModule]:
    if source not in SOURCES:
        raise ValueError(f"source is {source!r}, expected one of {', '.join(SOURCES)}")
    photographs, in_training, elsewhere = SOURCES[source]
    train, test = (photographs(data, is_train).shown(elsewhere) for is_train in (True, False))
    order = torch.randperm(int(train.targets.max()) + 1, generator=torch.Generator().manual_seed(seed)).tolist()
    groups = [order[first : first + classes] for first in range(0, 6 * classes, classes)]
    names = [f"task {number}" for number in range(1, len(groups) + 1)]
    tasks = split_by_class(train, test, groups, name=names, num_workers=workers, seed=seed)
    for task in tasks:
        task.train.dataset = train.shown(in_training)
    return tasks


EXPERIMENT = Experiment(stream, ResNet18OfPhotographs)


def main(arguments: Sequence[str] | None = None) -> dict:
    return EXPERIMENT.main(__file__, __doc__, arguments)


if __name__ == "__main__":
    main()
