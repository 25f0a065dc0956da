"""Adience-Split (section 4.5 of the paper): two tasks of four age groups each, a network pretrained on ImageNet.

    python examples/adience_split.py --data FOLDER --accelerator gpu                    # in order: 0 to 3, then 4 to 7
    python examples/adience_split.py --data FOLDER --accelerator gpu --settings examples/adience_split_mixed.yaml
    python examples/adience_split.py --data FOLDER --settings examples/adience_split_utkface.yaml       # a stand-in
    python examples/adience_split.py --data FOLDER --settings examples/adience_split_mixed_utkface.yaml

Adience is read as its authors give it, ``FOLDER/adience/fold_0_data.txt`` and ``FOLDER/adience/aligned/…``; VGG-16's
weights are torchvision's, as ``FOLDER/weights/vgg16-397923af.pth``. The stand-in is UTKFace in the same age groups
(``FOLDER/utkface128``), with SqueezeNet 1.0 (``FOLDER/weights/squeezenet1_0_imagenet.pt``) in VGG-16's place.

In training images are cropped at random and mirrored, and classes are drawn with equal probability. Relevance and the
search see centre crops of a tenth of the training data, which is held out. A test image is answered by the mean softmax
of ten crops; test data is only for the report. What is held out may show persons who are trained on, too; those of the
test fold are others.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from experiment import Experiment
from images import Data
from photographs import adience, normalised, ten_crops, utkface
from pretrained import Pretrained, averaged, load
from torch.utils.data import DataLoader, WeightedRandomSampler
from torchvision.transforms import v2

from lightning_rnf.streams import TaskDataModule, fit_stream, split_by_class

SOURCES = {"adience": adience, "utkface": utkface}


class Resampled(TaskDataModule):
    """Draws training images with replacement, each class with the same probability: as many as there are."""

    def train_dataloader(self) -> DataLoader[Any]:
        view = self.train
        labels = torch.tensor([view.labels[int(view.dataset.targets[index])] for index in view.indices])
        weights = 1 / labels.bincount(minlength=self.classes)[labels]
        sampler = WeightedRandomSampler(weights.tolist(), len(labels))
        return DataLoader(view, self.batch_size, sampler=sampler, num_workers=self.num_workers)


def ages(
    data: Data,
    seed: int,
    groups: Sequence[Sequence[int]],
    names: Sequence[str],
    source: str,
    size: int,
    crop: int,
    validation: float,
    workers: int,
) -> list[Resampled]:
    """A task for each list of age groups.

    Args:
        data: where they are.
        seed: of what is held out.
        groups: the age groups of each task.
        names: of the tasks.
        source: a key of `SOURCES`.
        size: to which images are scaled, in pixels.
        crop: size of the crops.
        validation: share of the training data to hold out.
        workers: processes that load images.
    """
    if source not in SOURCES:
        raise ValueError(f"source is {source!r}, expected one of {', '.join(SOURCES)}")
    scaled = v2.Resize(size, antialias=True)
    in_training = normalised(scaled, v2.RandomCrop(crop), v2.RandomHorizontalFlip())
    train, test = (SOURCES[source](data, is_train) for is_train in (True, False))
    train = train.shown(normalised(scaled, v2.CenterCrop(crop)))
    test = test.shown(partial(ten_crops, size=crop, shown=normalised(scaled)))
    tasks = []
    for task in split_by_class(train, test, groups, name=names, validation=validation, seed=seed):
        task.train.dataset = train.shown(in_training)
        tasks.append(Resampled(task.task, task.classes, task.train, task.validation, task.test, num_workers=workers))
    return tasks


def stream(
    data: Data,
    seed: int,
    *,
    groups: Sequence[Sequence[int]],
    source: str,
    size: int,
    crop: int,
    validation: float = 0.1,
    workers: int = 0,
) -> list[Resampled]:
    names = [f"ages {' '.join(map(str, group))}" for group in groups]
    return ages(data, seed, groups, names, source, size, crop, validation, workers)


EXPERIMENT = Experiment(stream, Pretrained, partial(fit_stream, predict=averaged), {"predict": averaged}, load)


def main(arguments: Sequence[str] | None = None) -> dict:
    return EXPERIMENT.main(__file__, __doc__, arguments)


if __name__ == "__main__":
    main()
