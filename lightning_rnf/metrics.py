"""How well old tasks are kept: the accuracy matrix, and the numbers of the field that are read off it.

Entry ``[i, j]`` of the matrix is the test accuracy of task j after training task i, in [0, 1]. The part above the
diagonal (tasks not yet trained) is not used and may be NaN.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_rnf.anatomy import answers


def average_accuracy(matrix: Tensor) -> Tensor:
    """Mean accuracy of the tasks seen so far, after each task (Lopez-Paz and Ranzato 2017; the paper's figures).

    Args:
        matrix: ``(tasks, tasks)``.

    Returns:
        ``(tasks,)``: the last entry is the average over all tasks at the end.

    Raises:
        ValueError: if the matrix is not square or empty.

    >>> average_accuracy(torch.tensor([[0.9, 0.0, 0.0], [0.8, 0.7, 0.0], [0.6, 0.6, 0.9]]))
    tensor([0.9000, 0.7500, 0.7000])
    """
    _check(matrix)
    return torch.stack([row[: i + 1].mean() for i, row in enumerate(matrix)])


def forgetting(matrix: Tensor) -> Tensor:
    """Mean over old tasks of how far accuracy at the end lies below its best before (Chaudhry et al. 2018).

    A task that has become better counts as negative. With one task there is nothing to forget: 0.

    Args:
        matrix: ``(tasks, tasks)``.

    Raises:
        ValueError: if the matrix is not square or empty.

    >>> forgetting(torch.tensor([[0.9, 0.0, 0.0], [0.8, 0.7, 0.0], [0.6, 0.6, 0.9]]))
    tensor(0.2000)
    """
    _check(matrix)
    old = range(len(matrix) - 1)
    return torch.stack([matrix[j:-1, j].max() - matrix[-1, j] for j in old]).mean() if old else matrix.new_zeros(())


def backward_transfer(matrix: Tensor) -> Tensor:
    """Mean over old tasks of accuracy at the end minus accuracy right after training (Lopez-Paz and Ranzato 2017).

    Negative where tasks are forgotten. With one task: 0.

    Args:
        matrix: ``(tasks, tasks)``.

    Raises:
        ValueError: if the matrix is not square or empty.

    >>> backward_transfer(torch.tensor([[0.9, 0.0, 0.0], [0.8, 0.7, 0.0], [0.6, 0.6, 0.9]]))
    tensor(-0.2000)
    """
    _check(matrix)
    old = range(len(matrix) - 1)
    return torch.stack([matrix[-1, j] - matrix[j, j] for j in old]).mean() if old else matrix.new_zeros(())


def forward_transfer(matrix: Tensor, baseline: Tensor) -> Tensor:
    """Mean over tasks but the first of accuracy just before their own training, less that of an untrained network.

    The entries right above the diagonal are used (Lopez-Paz and Ranzato 2017). With one task: 0.

    Args:
        matrix: ``(tasks, tasks)``.
        baseline: ``(tasks,)``: accuracy of each task before any training.

    Raises:
        ValueError: if the matrix is not square or empty, or the baseline has another length.

    >>> matrix = torch.tensor([[0.9, 0.6, 0.5], [0.8, 0.7, 0.7], [0.6, 0.6, 0.9]])
    >>> forward_transfer(matrix, torch.tensor([0.5, 0.5, 0.5]))
    tensor(0.1500)
    """
    _check(matrix)
    if baseline.shape != matrix.shape[:1]:
        raise ValueError(
            f"baseline has shape {tuple(baseline.shape)}, expected one accuracy per task: ({len(matrix)},)"
        )
    if len(matrix) == 1:
        return matrix.new_zeros(())
    return (matrix.diagonal(1) - baseline[1:].to(matrix)).mean()


class AccuracyMatrix(Metric):
    """The accuracy matrix as a metric: counts add up over batches and processes.

    Entries that were never updated are NaN.

    Args:
        tasks: how many.

    >>> matrix = AccuracyMatrix(2)
    >>> matrix.update(torch.tensor([[2.0, 1.0], [0.0, 1.0]]), torch.tensor([0, 0]), trained=0, task=0)
    >>> matrix.compute()
    tensor([[0.5000,    nan],
            [   nan,    nan]])
    """

    full_state_update = False
    correct: Tensor
    samples: Tensor

    def __init__(self, tasks: int, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.add_state("correct", torch.zeros(tasks, tasks, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("samples", torch.zeros(tasks, tasks, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, target: Tensor, trained: int, task: int, named: Tensor | None = None) -> None:
        """Count a batch of test data.

        Args:
            logits: ``(N, classes)``.
            target: as `anatomy.predict_checked` gives it.
            trained: index of the last task that was trained, from 0.
            task: index of the task that the batch belongs to.
            named: bool ``(N,)``: whether a sample's task was found: no answer is right without; None: it was told.

        Raises:
            IndexError: if there is no such entry.
        """
        if not (0 <= trained < len(self.correct) and 0 <= task < len(self.correct)):
            raise IndexError(f"entry [{trained}, {task}] is not in a matrix of {len(self.correct)} tasks")
        right = answers(logits, target)
        if named is not None:
            right = right & named.to(right.device).view(-1, *[1] * (right.ndim - 1))
        self.correct[trained, task] += right.sum()
        self.samples[trained, task] += right.numel()

    def compute(self) -> Tensor:
        """The matrix: ``(tasks, tasks)``, float32."""
        return self.correct / self.samples


class _OfMatrix(AccuracyMatrix):
    """A number that is read off the part of the matrix that belongs to the tasks trained so far."""

    def compute(self) -> Tensor:
        """The number; NaN before the first update."""
        matrix = super().compute()
        trained = int((self.samples.diagonal() > 0).cumprod(dim=0).sum())
        return self._number(matrix[:trained, :trained]) if trained else matrix.new_tensor(float("nan"))

    @abstractmethod
    def _number(self, matrix: Tensor) -> Tensor:
        """Of the tasks trained so far, at least one."""


class AverageAccuracy(_OfMatrix):
    """`average_accuracy` after the last task that was trained, as a metric; updated as `AccuracyMatrix`.

    >>> metric = AverageAccuracy(2)
    >>> metric.update(torch.tensor([[2.0, 1.0], [0.0, 1.0]]), torch.tensor([0, 0]), trained=0, task=0)
    >>> metric.compute()
    tensor(0.5000)
    """

    higher_is_better = True

    def _number(self, matrix: Tensor) -> Tensor:
        return average_accuracy(matrix)[-1]


class Forgetting(_OfMatrix):
    """`forgetting` as a metric; updated as `AccuracyMatrix`."""

    higher_is_better = False

    def _number(self, matrix: Tensor) -> Tensor:
        return forgetting(matrix)


class BackwardTransfer(_OfMatrix):
    """`backward_transfer` as a metric; updated as `AccuracyMatrix`."""

    higher_is_better = True

    def _number(self, matrix: Tensor) -> Tensor:
        return backward_transfer(matrix)


class ForwardTransfer(AccuracyMatrix):
    """`forward_transfer` as a metric; updated as `AccuracyMatrix`, also with tasks that are not trained yet.

    Args:
        baseline: ``(tasks,)``: accuracy of each task before any training.
    """

    higher_is_better = True
    baseline: Tensor

    def __init__(self, baseline: Tensor, **kwargs: object) -> None:
        super().__init__(len(baseline), **kwargs)
        self.register_buffer("baseline", baseline)

    def compute(self) -> Tensor:
        """The number; NaN while an entry right above the diagonal is missing."""
        return forward_transfer(super().compute(), self.baseline)


def _check(matrix: Tensor) -> None:
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
        raise ValueError(f"accuracy matrix has shape {tuple(matrix.shape)}, expected (tasks, tasks)")
