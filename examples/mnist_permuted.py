"""MNIST-Permuted (section 4.2 of the paper): ten tasks of ten digits, the pixels of each in an order of its own.

    python examples/mnist_permuted.py --data FOLDER              # torchvision's layout: FOLDER/MNIST/raw/...
    python examples/mnist_permuted.py --data FOLDER --download

An MLP 2 × 1000, Adam 1e-4, batch 128, 10 epochs; the first task is not permuted. The paper's weak spot: with its
procedure less than a tenth of the units is free after two tasks. A tenth of the training data is held out: reference
data comes from there, the test set is only for the report.
"""

from __future__ import annotations

from collections.abc import Sequence

from experiment import Experiment
from images import Data, mnist
from mnist_split import model

from lightning_rnf.streams import TaskDataModule, permute_pixels


def stream(data: Data, seed: int) -> list[TaskDataModule]:
    train, test = (mnist(data, is_train) for is_train in (True, False))
    return permute_pixels(train, test, 10, name="permuted", seed=seed)


EXPERIMENT = Experiment(stream, model)


def main(arguments: Sequence[str] | None = None) -> dict:
    return EXPERIMENT.main(__file__, __doc__, arguments)


if __name__ == "__main__":
    main()
