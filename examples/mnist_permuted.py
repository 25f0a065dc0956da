"""MNIST-Permuted (section 4.1 of the paper): ten tasks of ten digits, the pixels of each in an order of its own.

    python examples/mnist_permuted.py --data FOLDER              # torchvision's layout: FOLDER/MNIST/raw/...
    python examples/mnist_permuted.py --data FOLDER --download

An MLP 2 × 1000. The paper's weak spot: with its procedure less than a tenth of the units is free after two tasks.
A tenth of the training data is held out: reference data comes from there, the test set is only for the report.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial

from experiment import Experiment
from split_mnist import load

from lightning_rnf import RelevanceFreezing
from lightning_rnf.demo import MLP
from lightning_rnf.streams import TaskDataModule, permute_pixels

METHODS = {
    "naive": lambda: None,
    "paper": RelevanceFreezing.paper,
    "default": RelevanceFreezing,
    "recovery": partial(RelevanceFreezing, recovery_epochs=3, recovery_criterion=0.1, reset_free=True),
    "recovery, ration": partial(
        RelevanceFreezing, recovery_epochs=6, recovery_criterion=0.0, ration=0.15, reset_free=True
    ),
}


def stream(options: argparse.Namespace, seed: int) -> list[TaskDataModule]:
    train, test = (load(options.data, is_train, options.download, options.samples) for is_train in (True, False))
    return permute_pixels(train, test, 10, name="permuted", seed=seed)


def model(options: argparse.Namespace) -> MLP:
    return MLP(28 * 28, 1000, options.learning_rate)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--download", action="store_true", help="fetch MNIST into the folder if it is not there")
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="of Adam (%(default)s)")


EXPERIMENT = Experiment(
    "MNIST-Permuted",
    METHODS,
    stream,
    model,
    epochs=5,
    default_methods=("naive", "paper", "default", "recovery"),
    setup={"network": "MLP 784-1000-1000, a head of 10 per task", "training": "Adam, batch 128"},
    arguments=arguments,
)


def main(arguments: Sequence[str] | None = None) -> dict:
    return EXPERIMENT.main("mnist_permuted", __doc__, arguments)


if __name__ == "__main__":
    main()
