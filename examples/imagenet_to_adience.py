"""ImageNet, then Adience (section 4.5 of the paper): a pretrained network keeps ImageNet and learns eight age groups.

    python examples/imagenet_to_adience.py --data FOLDER --accelerator gpu
    python examples/imagenet_to_adience.py --data FOLDER --settings examples/imagenet_to_adience_utkface.yaml

ImageNet is never trained here: `RelevanceFreezing.protect` keeps it first, with a tolerance of 5 %. Its images are in
``FOLDER/imagenet/val/n01440764/….JPEG``: the first five of each class are the reference data, the others the test.
Adience is read as in adience_split.py, the weights are VGG-16's of torchvision.

The stand-in (the second line) is UTKFace for Adience, SqueezeNet 1.0 for VGG-16, and one image of each of ImageNet's
classes (``FOLDER/imagenet1000_sample``). **They are reference data and test at once**: what is kept of ImageNet was
chosen by the images that it is measured on. ``held_out`` in the JSON is the accuracy on others, at ImageNet's end and
after the age groups: Tiny-ImageNet's validation images, enlarged from 64 × 64, among its 200 classes
(``FOLDER/tinyimagenet200``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from adience_split import ages
from experiment import Experiment
from images import Data, balanced
from photographs import Photographs, imagenet_sample, normalised, tiny_imagenet
from photographs import imagenet as imagenet_in_folders
from pretrained import Pretrained, averaged, load
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from torchvision.transforms import v2

from lightning_rnf import RelevanceFreezing
from lightning_rnf.anatomy import measure
from lightning_rnf.runtime import evaluating
from lightning_rnf.streams import TaskDataModule, TrainerFactory, fit_stream

IMAGENET = "imagenet"
HELD_OUT = 2000
"""At most so many images of Tiny-ImageNet."""


class Known(TaskDataModule):
    """ImageNet, which the network knows: reference data and test data, and none to train on.

    Attributes:
        held_out: other images of some of its classes, and which classes those are; None: there are none.
    """

    held_out: tuple[Photographs, Tensor] | None = None


def known(data: Data, source: str, size: int) -> Known:
    """ImageNet's validation images, or one of each class; in centre crops of ``size`` pixels."""
    if source == "imagenet":
        images = imagenet_in_folders(replace(data, samples=None), is_train=False)
        images = images.shown(normalised(v2.Resize(size * 8 // 7, antialias=True), v2.CenterCrop(size)))
        rank = torch.cat([torch.arange(int(number)) for number in images.targets.bincount()])  # they are in class order
        parts = [images.chosen(kept.nonzero().view(-1)) for kept in (rank < 5, rank >= 5)]
        reference, test = (part.chosen(balanced(part.targets, data.samples)) for part in parts)
        return Known(IMAGENET, 1000, Subset(images, []), reference, test)
    if source != "one of each class":
        raise ValueError(f"imagenet is {source!r}, expected 'imagenet' or 'one of each class'")
    scaled = normalised(v2.Resize(size, antialias=True))
    images = imagenet_sample(data).shown(scaled)
    task = Known(IMAGENET, 1000, Subset(images, []), images, images)
    folders = [data.folder / name for name in ("imagenet1000_sample", "tinyimagenet200")]
    if folders[1].is_dir():
        of_all, of_some = (
            [line.split()[0] for line in (folder / "classes.txt").read_text(encoding="utf-8").splitlines()]
            for folder in folders
        )
        others = tiny_imagenet(replace(data, samples=min(data.samples or HELD_OUT, HELD_OUT)), is_train=False)
        task.held_out = others.shown(scaled), torch.tensor([of_all.index(name) for name in of_some])
    return task


def stream(
    data: Data,
    seed: int,
    *,
    imagenet: str,
    imagenet_size: int,
    source: str,
    size: int,
    crop: int,
    validation: float = 0.1,
    workers: int = 0,
) -> list[TaskDataModule]:
    return [
        known(data, imagenet, imagenet_size),
        *ages(data, seed, [range(8)], ["all ages"], source, size, crop, validation, workers),
    ]


def keep_and_learn(
    model: Pretrained,
    stream: Sequence[TaskDataModule],
    callback: RelevanceFreezing | None,
    trainer_factory: TrainerFactory,
    *,
    folder: Path,
) -> tuple[Tensor, dict[str, Any]]:
    """Keep ImageNet, if there is a callback, and train the age groups; test both before and after."""
    first, *others = stream
    matrix, held_out = torch.full((len(stream), len(stream)), torch.nan), []

    def test(after: int) -> None:
        model.heads.activate(IMAGENET)
        model.to(device)
        with evaluating(model) if callback is None else callback.recall(IMAGENET, model):
            matrix[after, 0] = accuracy(model, first.test_dataloader(), device)
            if first.held_out is not None:
                images, classes = first.held_out
                held_out.append(round(accuracy(model, DataLoader(images, first.batch_size), device, classes), 6))

    device = trainer_factory(callbacks=[]).strategy.root_device
    model.heads.activate(IMAGENET)
    model.to(device)
    if callback is not None:
        callback.protect(model, first, name=IMAGENET)
    test(after=0)
    if others:
        matrix[1:, 1:] = fit_stream(model, others, callback, trainer_factory, predict=averaged, folder=folder)
        test(after=1)
    return matrix, {"held_out": held_out} if held_out else {}


def accuracy(
    model: Pretrained, loader: Iterable[tuple[Tensor, Tensor]], device: torch.device, classes: Tensor | None = None
) -> float:
    """Share of right answers, in [0, 1]; among some classes, if the labels number those."""
    batches = ((x.to(device), y.to(device)) for x, y in loader)
    return measure(model, batches, partial(among, classes=classes)).accuracy


def among(model: Pretrained, batch: tuple[Tensor, Tensor], classes: Tensor | None) -> tuple[Tensor, Tensor]:
    logits = model(batch[0])
    return logits if classes is None else logits[:, classes.to(logits.device)], batch[1]


EXPERIMENT = Experiment(stream, partial(Pretrained, keep=IMAGENET), keep_and_learn, {"predict": averaged}, load)


def main(arguments: Sequence[str] | None = None) -> dict:
    return EXPERIMENT.main(__file__, __doc__, arguments)


if __name__ == "__main__":
    main()
