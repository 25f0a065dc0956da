"""MNIST-Split (section 4.1 of the paper): five tasks of two digits, an MLP 2 × 400, Adam 1e-3, batch 128, 4 epochs.

    python examples/split_mnist.py --data FOLDER              # torchvision's layout: FOLDER/MNIST/raw/...
    python examples/split_mnist.py --data FOLDER --download

Prints one table, means and standard deviations over the seeds; writes the results with versions as JSON, and the
figure of the first seed. A tenth of each task's training data is held out: reference data comes from there, the test
set is only for the report.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from experiment import Experiment
from torch.utils.data import Dataset, Subset, TensorDataset
from torchvision.datasets import MNIST

from lightning_rnf import RelevanceFreezing
from lightning_rnf.demo import MLP
from lightning_rnf.importance import IMPORTANCES
from lightning_rnf.streams import TaskDataModule, split_by_class

METHODS = {
    "naive": lambda: None,
    "default": RelevanceFreezing,
    "paper": RelevanceFreezing.paper,
    **{name: partial(RelevanceFreezing, importance=name) for name in IMPORTANCES},
}


def load(folder: Path, is_train: bool, download: bool, samples: int | None) -> Dataset:
    images = MNIST(folder, train=is_train, download=download)
    dataset = TensorDataset(images.data.float() / 255, images.targets)
    return dataset if samples is None else FirstSamples(dataset, samples)


class FirstSamples(Subset):
    """The first samples of a data set, with their labels to read."""

    def __init__(self, dataset: TensorDataset, samples: int) -> None:
        super().__init__(dataset, range(samples))
        self.targets = dataset.tensors[1][:samples]


def stream(options: argparse.Namespace, seed: int) -> list[TaskDataModule]:
    train, test = (load(options.data, is_train, options.download, options.samples) for is_train in (True, False))
    return split_by_class(train, test, [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)], name="mnist", seed=seed)


def model(options: argparse.Namespace) -> MLP:
    return MLP(28 * 28, 400)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--download", action="store_true", help="fetch MNIST into the folder if it is not there")


EXPERIMENT = Experiment(
    "MNIST-Split",
    METHODS,
    stream,
    model,
    epochs=4,
    default_methods=("naive", "default", "paper"),
    seeds=5,
    setup={"network": "MLP 784-400-400, a head of 2 per task", "training": "Adam 1e-3, batch 128"},
    arguments=arguments,
)


def main(arguments: Sequence[str] | None = None) -> dict:
    return EXPERIMENT.main("split_mnist", __doc__, arguments)


if __name__ == "__main__":
    main()
