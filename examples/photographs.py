"""Photographs: ImageNet, Tiny-ImageNet, faces with ages, from the layouts that they come in; and their crops."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from images import RE_ENCODED, Data, balanced, tiles
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

AGES = ((0, 2), (4, 6), (8, 13), (15, 20), (25, 32), (38, 43), (48, 53), (60, 200))
"""Adience's eight groups, in years."""


@dataclass(frozen=True)
class Photographs(Dataset):
    """Images with their classes, each transformed anew whenever it is asked for.

    Attributes:
        images: uint8 ``(N, 3, height, width)``, or paths.
        targets: classes, int64 ``(N,)``.
        transform: of an image, uint8 ``(3, height, width)``.
    """

    images: Tensor | Sequence[Path]
    targets: Tensor
    transform: Callable[[Tensor], Any] = lambda image: image

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.images[index]
        if not isinstance(image, Tensor):
            image = v2.functional.pil_to_tensor(Image.open(image).convert("RGB"))
        return self.transform(image), int(self.targets[index])

    def shown(self, transform: Callable[[Tensor], Any]) -> Photographs:
        """The same images, transformed in another way."""
        return replace(self, transform=transform)

    def chosen(self, kept: Tensor) -> Photographs:
        """Those of the given numbers, ``(M,)``."""
        images = self.images[kept] if isinstance(self.images, Tensor) else [self.images[i] for i in kept.tolist()]
        return replace(self, images=images, targets=self.targets[kept])


def imagenet(data: Data, is_train: bool) -> Photographs:
    """ImageNet in folders, ``imagenet/train/n01440764/….JPEG`` and ``imagenet/val/…``: 1,000 classes in their order."""
    found = ImageFolder(data.folder / "imagenet" / ("train" if is_train else "val"))
    paths, targets = zip(*found.samples, strict=True)
    return _part(Photographs([Path(path) for path in paths], torch.tensor(targets)), data.samples)


def tiny_imagenet(data: Data, is_train: bool) -> Photographs:
    """Tiny-ImageNet as mosaics, ``tinyimagenet200/train_00.avif`` and ``val_00.avif``: 200 classes, 64 × 64."""
    split = "train" if is_train else "val"
    return _part(_mosaics(data, "Tiny-ImageNet", "tinyimagenet200", split, f"{split}_labels", 64), data.samples)


def imagenet_sample(data: Data) -> Photographs:
    """One image of each of the 1,000 classes as mosaics, ``imagenet1000_sample/images_00.avif``: 224 × 224."""
    return _part(_mosaics(data, "ImageNet's sample", "imagenet1000_sample", "images", None, 224), data.samples)


def utkface(data: Data, is_train: bool) -> Photographs:
    """UTKFace as mosaics, ``utkface128/train_00.avif``, in Adience's age groups: 128 × 128. Other ages are left out."""
    split = "train" if is_train else "test"
    twice = replace(
        data, samples=None if data.samples is None else 2 * data.samples
    )  # a third of the ages has no group
    found = _mosaics(twice, "UTKFace", "utkface128", split, f"{split}_ages", 128)
    groups = torch.tensor([age_group(age, age) for age in found.targets.tolist()])
    return _part(replace(found, targets=groups).chosen((groups >= 0).nonzero().view(-1)), data.samples)


def adience(data: Data, is_train: bool) -> Photographs:
    """Adience as its authors give it, ``adience/fold_0_data.txt`` and ``adience/aligned/…``; the last fold is the test.

    Folds share no person. Labels that lie in no age group, or in several, are left out.
    """
    folder = data.folder / "adience"
    folds = sorted(folder.glob("fold_[0-9]_data.txt"))
    if len(folds) < 2:
        raise FileNotFoundError(f"{folder} has {len(folds)} files fold_<n>_data.txt, expected those of Adience")
    paths, groups = [], []
    for fold in folds[:-1] if is_train else folds[-1:]:
        lines = [line.split("\t") for line in fold.read_text(encoding="utf-8").splitlines()]
        columns = [lines[0].index(name) for name in ("user_id", "original_image", "face_id", "age")]
        for line in lines[1:]:
            user, image, face, age = (line[column] for column in columns)
            years = [int(number) for number in re.findall(r"\d+", age)]
            group = age_group(min(years), max(years)) if years else -1
            if group >= 0:
                paths.append(folder / "aligned" / user / f"landmark_aligned_face.{face}.{image}")
                groups.append(group)
    return _part(Photographs(paths, torch.tensor(groups)), data.samples)


def age_group(youngest: int, oldest: int) -> int:
    """The one of `AGES` that holds both; -1: none.

    >>> age_group(25, 25), age_group(8, 12), age_group(38, 48), age_group(35, 35)
    (4, 2, -1, -1)
    """
    return next((group for group, (first, last) in enumerate(AGES) if first <= youngest <= oldest <= last), -1)


def normalised(*before: v2.Transform) -> v2.Compose:
    """Crops and the like, then the usual mean and deviation of ImageNet's channels."""
    to_float = v2.ToDtype(torch.float32, scale=True)
    return v2.Compose([*before, to_float, v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])


def ten_crops(image: Tensor, size: int, shown: Callable[[Tensor], Tensor]) -> Tensor:
    """The corners and the centre of an image as it is ``shown``, each mirrored, too: ``(10, 3, size, size)``."""
    return torch.stack(v2.functional.ten_crop(shown(image), [size, size]))


def _mosaics(data: Data, name: str, folder_name: str, split: str, labels: str | None, size: int) -> Photographs:
    """Of a whole split, or of as many mosaics as hold so many samples; without labels image i is of class i."""
    folder, samples = data.folder / folder_name, data.samples
    data.altered[name] = RE_ENCODED
    shards, pixels = sorted(folder.glob(f"{split}_*.avif")), []
    if not shards:
        raise FileNotFoundError(f"{folder} has no {split}_*.avif")
    while shards and (samples is None or sum(map(len, pixels)) < samples):
        pixels.append(tiles(shards.pop(0), size))
    images = torch.from_numpy(np.concatenate(pixels)).permute(0, 3, 1, 2)
    targets = (
        torch.arange(len(images)) if labels is None else torch.from_numpy(np.load(folder / f"{labels}.npy")).long()
    )
    number = min(len(images), len(targets))  # the last mosaic may be filled up
    return Photographs(images[:number], targets[:number])


def _part(photographs: Photographs, samples: int | None) -> Photographs:
    return photographs if samples is None else photographs.chosen(balanced(photographs.targets, samples))
