"""CIFAR as tensors, from either of two layouts, and the usual augmentation."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import TensorDataset
from torchvision.datasets import CIFAR10, CIFAR100

MEAN, DEVIATION = torch.tensor([0.49, 0.48, 0.44]), torch.tensor([0.25, 0.24, 0.26])


def cifar(folder: Path, classes: int, is_train: bool, options: argparse.Namespace) -> TensorDataset:
    """CIFAR-10 or CIFAR-100: images ``(N, 3, 32, 32)``, normalised, and labels.

    Args:
        folder: with ``cifar100/train_00.avif`` and labels as ``.npy``, or in torchvision's layout.
        classes: 10 or 100.
        is_train: training or test data.
        options: ``torchvision`` and ``download`` say which layout; ``samples`` limits the number.
    """
    if options.torchvision:
        kind = CIFAR100 if classes == 100 else CIFAR10
        data = kind(folder, train=is_train, download=options.download)
        pixels, labels = data.data, np.array(data.targets)
    else:
        split = "train" if is_train else "test"
        own = folder / f"cifar{classes}"
        labels = np.load(own / f"{split}_labels.npy")
        pixels = np.concatenate([tiles(path) for path in sorted(own.glob(f"{split}_*.avif"))])[: len(labels)]
    images = torch.from_numpy(pixels[: options.samples]).permute(0, 3, 1, 2) / 255
    images = (images - MEAN.view(-1, 1, 1)) / DEVIATION.view(-1, 1, 1)
    return TensorDataset(images, torch.from_numpy(labels[: options.samples]).long())


def tiles(path: Path, size: int = 32) -> np.ndarray:
    """The images of a mosaic, row by row: ``(N, size, size, 3)``."""
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
