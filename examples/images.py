"""MNIST and CIFAR as tensors, from the layouts that they come in; the usual augmentation; a few images as text."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import TensorDataset
from torchvision.datasets import CIFAR10, CIFAR100, MNIST

RE_ENCODED = "re-encoded as AVIF, with loss"
MEAN, DEVIATION = torch.tensor([0.49, 0.48, 0.44]), torch.tensor([0.25, 0.24, 0.26])


@dataclass(frozen=True)
class Data:
    """Where the data are.

    Attributes:
        folder: as the user names it.
        download: fetch what is not there, where torchvision can.
        samples: only so many training and test samples, as many of each class as of any other; None: all.
        altered: what was read in another form than its makers publish, and how it was altered; filled on reading.
    """

    folder: Path
    download: bool = False
    samples: int | None = None
    altered: dict[str, str] = field(default_factory=dict)


def mnist(data: Data, is_train: bool) -> TensorDataset:
    """MNIST in torchvision's layout, ``MNIST/raw/…``: images ``(N, 28, 28)`` in [0, 1], and labels."""
    images = MNIST(data.folder, train=is_train, download=data.download)
    kept = balanced(images.targets, data.samples)
    return TensorDataset(images.data[kept].float() / 255, images.targets[kept])


def cifar(data: Data, classes: int, is_train: bool) -> TensorDataset:
    """CIFAR-10 or CIFAR-100: images ``(N, 3, 32, 32)`` in [0, 1], and labels.

    Taken from shards (``cifar100/train_00.avif``, labels as ``.npy``) if the folder has them; else from torchvision's
    layout (``cifar-100-python/…``).

    Args:
        data: where they are.
        classes: 10 or 100.
        is_train: training or test data.
    """
    own, split = data.folder / f"cifar{classes}", "train" if is_train else "test"
    if own.is_dir():
        labels = torch.from_numpy(np.load(own / f"{split}_labels.npy")).long()
        shards, pixels = sorted(own.glob(f"{split}_*.avif")), []
        while shards and sum(map(len, pixels)) < (data.samples or len(labels)):  # they are balanced from the beginning
            pixels.append(tiles(shards.pop(0), 32))
        data.altered[f"CIFAR-{classes}"] = RE_ENCODED
        values = torch.from_numpy(np.concatenate(pixels)[: len(labels)])
        labels = labels[: len(values)]
    else:
        kind = CIFAR100 if classes == 100 else CIFAR10
        whole = kind(data.folder, train=is_train, download=data.download)
        values, labels = torch.from_numpy(whole.data), torch.tensor(whole.targets)
    kept = balanced(labels, data.samples)
    return TensorDataset(values[kept].permute(0, 3, 1, 2) / 255, labels[kept])


def normalised(dataset: TensorDataset) -> TensorDataset:
    """Images of CIFAR with about zero mean and unit deviation in each channel."""
    images, labels = dataset.tensors
    return TensorDataset((images - MEAN.view(-1, 1, 1)) / DEVIATION.view(-1, 1, 1), labels)


def balanced(labels: Tensor, samples: int | None) -> Tensor:
    """The first samples of each class, in their order, so many in all: int64 ``(samples,)``. None: all."""
    if samples is None:
        return torch.arange(len(labels))
    rank = torch.zeros_like(labels)  # the how many-th of its class
    for label in labels.unique():
        own = labels == label
        rank[own] = torch.arange(int(own.sum()))
    return rank.argsort(stable=True)[:samples].sort().values


def tiles(path: Path, size: int) -> np.ndarray:
    """The images of a mosaic, row by row: uint8 ``(N, size, size, 3)``."""
    mosaic = np.asarray(Image.open(path).convert("RGB"))
    rows, columns = mosaic.shape[0] // size, mosaic.shape[1] // size
    return mosaic.reshape(rows, size, columns, size, 3).transpose(0, 2, 1, 3, 4).reshape(-1, size, size, 3)


def crop_and_flip(images: Tensor, padding: int = 4) -> Tensor:
    """A random crop of the padded image, mirrored at random, for each image of ``(N, channels, size, size)``."""
    n, _, size, _ = images.shape
    padded = torch.nn.functional.pad(images, [padding] * 4)
    top, left = torch.randint(2 * padding + 1, (2, n, 1, 1), device=images.device)
    rows = top + torch.arange(size, device=images.device).view(1, -1, 1)
    steps = torch.arange(size, device=images.device).view(1, 1, -1)
    mirrored = torch.rand(n, 1, 1, device=images.device) < 0.5
    columns = left + torch.where(mirrored, size - 1 - steps, steps)
    return padded[torch.arange(n, device=images.device).view(-1, 1, 1), :, rows, columns].permute(0, 3, 1, 2)


def as_text(images: Tensor) -> dict[str, Any]:
    """Images or heatmaps in a form that JSON takes: each scaled to its largest value, in 255 steps."""
    largest = images.flatten(1).abs().amax(dim=1).clamp(min=torch.finfo(images.dtype).tiny)
    steps = (127 * images / largest.view(-1, *[1] * (images.ndim - 1))).round().to(torch.int8)
    return {"shape": list(images.shape), "int8": base64.b64encode(steps.numpy().tobytes()).decode()}


def from_text(text: Mapping[str, Any]) -> Tensor:
    """The same back, each within [-1, 1]."""
    steps = np.frombuffer(base64.b64decode(text["int8"]), dtype=np.int8).reshape(text["shape"])
    return torch.from_numpy(steps.copy()).float() / 127
