"""MNIST-Split (section 4.1 of the paper): five tasks of two digits, an MLP 2 × 400, Adam 1e-3, batch 128, 4 epochs.

    python examples/mnist_split.py --data FOLDER              # torchvision's layout: FOLDER/MNIST/raw/...
    python examples/mnist_split.py --data FOLDER --download
    python examples/mnist_split.py --data FOLDER --settings examples/mnist_split_levers.yaml
    python examples/mnist_split.py --data FOLDER --settings examples/mnist_split_importances.yaml

A tenth of each task's training data is held out: reference data comes from there, the test set is only for the report.
Of the other files of settings, one changes the defaults of before one at a time, one compares relevance with other
importances.
"""

from __future__ import annotations

from collections.abc import Sequence

from experiment import Experiment
from images import Data, mnist

from lightning_rnf.commands.demo import MLP
from lightning_rnf.streams import TaskDataModule, split_by_class


def stream(data: Data, seed: int) -> list[TaskDataModule]:
    train, test = (mnist(data, is_train) for is_train in (True, False))
    return split_by_class(train, test, [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)], name="mnist", seed=seed)


def model(*, width: int, learning_rate: float) -> MLP:
    return MLP(28 * 28, width, learning_rate)


EXPERIMENT = Experiment(stream, model)


def main(arguments: Sequence[str] | None = None) -> dict:
    return EXPERIMENT.main(__file__, __doc__, arguments)


if __name__ == "__main__":
    main()
