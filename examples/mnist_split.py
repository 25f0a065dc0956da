"""MNIST-Split (section 4.1 of the paper): five tasks of two digits, an MLP 2 × 400, Adam 1e-3, batch 128, 4 epochs.

    python examples/mnist_split.py --data FOLDER              # torchvision's layout: FOLDER/MNIST/raw/...
    python examples/mnist_split.py --data FOLDER --download
    python examples/mnist_split.py --data FOLDER --settings examples/mnist_split_levers.yaml
    python examples/mnist_split.py --data FOLDER --settings examples/mnist_split_importances.yaml
    python examples/mnist_split.py --data FOLDER --settings examples/mnist_split_paper.yaml

A tenth of each task's training data is held out: reference data comes from there, the test set is only for the report.
Of the other files of settings, one changes the defaults of before one at a time, one compares relevance with other
importances, and one has the paper's search, step by step and on the test data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from experiment import Experiment
from images import Data, mnist

from lightning_rnf.commands.demo import MLP
from lightning_rnf.streams import TaskDataModule, split_by_class


def stream(data: Data, seed: int, *, reference: Literal["validation", "test"] = "validation") -> list[TaskDataModule]:
    """The tasks; their reference data are test data only to see what the paper reports by a search on those."""
    train, test = (mnist(data, is_train) for is_train in (True, False))
    tasks = split_by_class(train, test, [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)], name="mnist", seed=seed)
    if reference not in ("validation", "test"):
        raise ValueError(f"stream.reference is {reference!r}, expected 'validation' or 'test'")
    for task in tasks if reference == "test" else ():
        task.validation = task.test
    return tasks


def model(*, width: int, learning_rate: float) -> MLP:
    return MLP(28 * 28, width, learning_rate)


EXPERIMENT = Experiment(stream, model)


def main(arguments: Sequence[str] | None = None) -> dict:
    return EXPERIMENT.main(__file__, __doc__, arguments)


if __name__ == "__main__":
    main()
