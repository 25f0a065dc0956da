"""CIFAR-10 in five tasks of two classes, the ResNet-18 of `cifar_resnet.py` at a quarter of its width.

    python examples/cifar_split.py --data FOLDER                          # shards as in FOLDER/cifar10/train_00.avif
    python examples/cifar_split.py --data FOLDER --scenario class         # and nobody says which task an image is of

Not one of the paper's experiments: the usual small stream for learning without a task's name. A tenth of the training
data is held out: reference data comes from there, the test set is only for the report.
"""

from __future__ import annotations

from collections.abc import Sequence

from cifar_resnet import ResNet18
from experiment import Experiment
from images import Data, cifar, normalised

from lightning_rnf.streams import TaskDataModule, split_by_class

GROUPS = ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9))


def stream(data: Data, seed: int) -> list[TaskDataModule]:
    train, test = (normalised(cifar(data, 10, is_train)) for is_train in (True, False))
    return split_by_class(train, test, GROUPS, name="cifar", seed=seed)


EXPERIMENT = Experiment(stream, ResNet18)


def main(arguments: Sequence[str] | None = None) -> dict:
    return EXPERIMENT.main(__file__, __doc__, arguments)


if __name__ == "__main__":
    main()
