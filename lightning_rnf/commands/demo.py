"""`rnf demo`: five tasks of two handwritten digits each, naive fine-tuning beside relevance freezing."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_rnf.callback import RelevanceFreezing
from lightning_rnf.heads import MultiHead
from lightning_rnf.memory import free_capacity_over_tasks
from lightning_rnf.metrics import average_accuracy, forgetting
from lightning_rnf.packages import LightningModule, Trainer, pl, seed_everything
from lightning_rnf.report import StreamResult, accuracy_rows, plot_retention, rich_table
from lightning_rnf.streams import TaskDataModule, fit_stream, split_by_class


class MLP(LightningModule):
    """Two hidden layers, a head per task, Adam: the paper's network for MNIST (appendix A.1) at any size.

    Args:
        features: number of inputs; images are flattened.
        width: units of each hidden layer.
        learning_rate: of Adam.
    """

    def __init__(self, features: int, width: int, learning_rate: float = 1e-3) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.hidden = nn.Sequential(
            nn.Flatten(), nn.Linear(features, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        )
        self.heads = MultiHead(width)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(N, …)`` to the active task's logits ``(N, classes)``."""
        logits: Tensor = self.heads(self.hidden(x))
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross entropy."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Log the loss."""
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam over everything: the callback sees to what is frozen."""
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)


def run(output: Path = Path("retention.png"), seed: int = 0) -> None:
    """Train the stream twice, print the accuracy of the one and the report of the other, and write the figure.

    Raises:
        SystemExit: if the packages of the extra ``demo`` are missing.
    """
    try:
        import matplotlib  # noqa: F401
        import rich.console
        import sklearn  # noqa: F401
    except ImportError as error:
        raise SystemExit(f"rnf demo needs {error.name}: pip install 'lightning-rnf[demo]'") from None
    console = rich.console.Console()
    results = []
    start = time.perf_counter()
    for method, callback in (("naive fine-tuning", None), ("relevance freezing", RelevanceFreezing())):
        seed_everything(seed, verbose=False)
        stream = digits()
        with _quiet_lightning(), _one_thread(), console.status(method) as status, _shown(status):
            matrix = fit_stream(
                MLP(64, 256, learning_rate=2e-2),  # a rate at which forgetting shows within seconds
                stream,
                callback,
                partial(
                    Trainer,
                    accelerator="cpu",
                    max_epochs=15,
                    logger=False,
                    enable_checkpointing=False,
                    enable_progress_bar=False,
                    enable_model_summary=False,
                ),
            )
        capacity = free_capacity_over_tasks(callback.state) if callback else []
        results.append(StreamResult(method, [task.task for task in stream], matrix, capacity))
        if callback is None:
            console.print(rich_table(f"{method}: test accuracy after each task, %", accuracy_rows(results[-1])))
        else:
            console.print(f"{method}\n")
            console.print(callback.report())
    plot_retention(results, output)
    averages = [100 * float(average_accuracy(result.matrix)[-1]) for result in results]
    forgotten = [100 * float(forgetting(result.matrix)) for result in results]
    console.print(
        f"average {averages[0]:.1f} → {averages[1]:.1f}, forgetting {forgotten[0]:.2f} → {forgotten[1]:.2f} points, "
        f"{results[1].free_capacity[-1]:.0%} of the units still free; {time.perf_counter() - start:.0f} s; see {output}"
    )


def digits() -> list[TaskDataModule]:
    """Five tasks from scikit-learn's 1,797 digits of 8 × 8 pixels; every fourth is test data."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(pixels).float() / 16, torch.from_numpy(labels).long()
    test = torch.arange(len(y)) % 4 == 0
    return split_by_class(
        TensorDataset(x[~test], y[~test]),
        TensorDataset(x[test], y[test]),
        [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)],
        name="digits",
        validation=0.4,  # about 105 samples a task: what is left after pruning is only as sure as these
        batch_size=16,
    )


class _StatusHandler(logging.Handler):
    """Shows what attribution and search say in one line."""

    def __init__(self, status: object) -> None:
        super().__init__(logging.DEBUG)
        self.status = status

    def emit(self, record: logging.LogRecord) -> None:
        self.status.update(record.getMessage())  # type: ignore[attr-defined]


@contextmanager
def _shown(status: object) -> Iterator[None]:
    logger, handler = logging.getLogger("lightning_rnf"), _StatusHandler(status)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@contextmanager
def _one_thread() -> Iterator[None]:
    """The network is so small that threads only wait for each other: with two on two busy cores, ten times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    logger = logging.getLogger(pl.__name__)
    level = logger.level
    logger.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*")
        try:
            yield
        finally:
            logger.setLevel(level)
