"""What the model says about a batch, and how often it is right."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_rnf.runtime import ALONE, Ranks, joined
from lightning_rnf.search import Measured

Predict = Callable[[nn.Module, Any], tuple[Tensor, Tensor]]
"""``(module, batch) -> (logits, target)``.

Logits ``(N, classes)``. Target ``(N,)`` of class indices; or, if a sample may have several labels, ``(N, classes)`` of
0 and 1."""


def supervised(module: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """The default `Predict`, for batches of the form ``(x, y)``: calls ``module(x)``.

    Raises:
        TypeError: if the batch has another form.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        found = f"{type(batch).__name__} of {len(batch)}" if hasattr(batch, "__len__") else type(batch).__name__
        raise TypeError(
            f"a reference batch is a {found}, not (x, y): reference data needs labels; "
            "for another form of batch pass predict=(module, batch) -> (logits, target)"
        )
    x, y = batch
    return module(x), y


def predict_checked(predict: Predict, module: nn.Module, batch: Any, *, finite: bool = True) -> tuple[Tensor, Tensor]:
    """Call ``predict`` and check what it returns, and, if asked to, that it is ``finite``.

    Returns:
        Logits ``(N, classes)``, and integers: class indices ``(N,)``, or 0 and 1 of ``(N, classes)``.

    Raises:
        TypeError: if logits or target are no tensors of floats and of labels.
        ValueError: if their shapes disagree, a label lies outside the head, or a logit is not finite.
    """
    logits, target = predict(module, batch)
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise TypeError(f"logits are {_described(logits)}, expected a floating point tensor (N, classes)")
    if not isinstance(target, Tensor) or target.is_complex() or (target.is_floating_point() and target.ndim < 2):
        raise TypeError(f"labels are {_described(target)}, expected an integer tensor (N,) of class indices")
    if logits.ndim != 2 or target.shape not in (logits.shape[:1], logits.shape):
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} and labels of shape {tuple(target.shape)}, expected (N, classes) "
            "and (N,) of class indices, or (N, classes) of 0 and 1 for several labels a sample"
        )
    lowest, highest = (target.min().item(), target.max().item()) if target.numel() else (0, 0)
    if target.ndim == 2 and not ((target == 0) | (target == 1)).all():
        raise ValueError(f"labels (N, classes) range from {lowest} to {highest}, expected 0 and 1 alone")
    if target.ndim == 1 and not 0 <= lowest <= highest < logits.shape[1]:
        binary = "; two classes of one logit are labels (N, 1)" if logits.shape[1] == 1 else ""
        raise ValueError(
            f"labels range from {lowest} to {highest}, but the head has {logits.shape[1]} outputs: labels of a task "
            f"are 0 to {logits.shape[1] - 1}{binary}"
        )
    if finite and not logits.isfinite().all():
        raise ValueError("logits on the reference data are not finite (NaN or infinity): the training has diverged")
    return logits, target.long()


def true_labels(logits: Tensor, target: Tensor) -> Tensor:
    """1 for each label that a sample has, 0 for the others: ``(N, classes)``, in the logits' dtype."""
    return (nn.functional.one_hot(target, logits.shape[1]) if target.ndim == 1 else target).to(logits)


def answers(logits: Tensor, target: Tensor) -> Tensor:
    """Which answers are right: bool ``(N,)``, or ``(N, classes)`` where a sample may have several labels.

    A class is right where its logit is the largest of all.
    A label is given where its logit is above 0, a probability of one half. What is not finite is wrong.

    >>> answers(torch.tensor([[2.0, 1.0]]), torch.tensor([1]))
    tensor([False])
    >>> answers(torch.tensor([[2.0, 1.0]]), torch.tensor([[1, 0]]))
    tensor([[ True, False]])
    """
    finite = logits.isfinite().all(dim=1)
    if target.ndim == 1:
        return (logits.argmax(dim=1) == target) & finite
    return ((logits > 0) == target.bool()) & finite.unsqueeze(1)


@torch.no_grad()
def measure(
    module: nn.Module,
    batches: Iterable[Any],
    predict: Predict = supervised,
    forward_context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    metrics: Mapping[str, Metric] | None = None,
    *,
    finite: bool = True,
    ranks: Ranks = ALONE,
    lowest: float | None = None,
    expected: int | None = None,
) -> Measured:
    """Accuracy and metrics of a module, which should be in eval mode, on labelled batches.

    Args:
        module: the model.
        batches: on the module's device; of several ranks, this one's share.
        predict: how to get logits and labels of a batch.
        forward_context: entered around each forward, for autocast.
        metrics: of logits and labels; copies of them are updated.
        finite: whether all logits have to be; if not, samples whose aren't count as wrong, and metrics get zeros.
        ranks: that measure together, each on its share; they all get the same.
        lowest: stop when this accuracy can't be reached any more. Several ranks go on to the end, but count as far as
            one would have gone. None: go on to the end.
        expected: how many targets ``predict`` returns for all batches of all ranks, for ``lowest`` to go by. What a
            batch shows can't tell: ``predict`` may flatten, mask, repeat and drop. None: not known, go on to the end.

    Returns:
        The share of right `answers`, and the metrics' values by name, on the samples that were seen: those are targets.

    Raises:
        ValueError: if there is no sample, a metric computes several numbers, or as `predict_checked`.
    """
    copies = {name: _cleared(metric) for name, metric in (metrics or {}).items()}

    def update(logits: Tensor, target: Tensor) -> None:
        for copy in copies.values():
            copy.to(logits.device).update(logits, target)

    def is_certain(right: int, given: int, samples: int) -> bool:
        if lowest is None or expected is None:
            return False
        to_come = max(0, expected - samples) * given // samples  # each sample has as many answers
        return right + to_come < lowest * (given + to_come) - 1e-6

    def of_share() -> list[_Counted]:
        found: list[_Counted] = []
        counts = (0, 0, 0)
        for batch in batches:
            with forward_context():
                logits, target = predict_checked(predict, module, batch, finite=finite)
            right = answers(logits, target)
            counted = int(right.sum()), right.numel(), len(target)
            logits = logits.nan_to_num(posinf=0.0, neginf=0.0)
            if copies and ranks.size == 1:
                update(logits, target)
            kept = (logits.cpu(), target.cpu()) if copies and ranks.size > 1 else None
            found.append((counted, kept))
            counts = _added(counts, counted)
            if ranks.size == 1 and counts[2] and is_certain(*counts):
                break
        return found

    # Ranks end no sooner, but count no more than one process would.
    seen: list[_Counted] = []
    right = given = samples = 0
    for counted, kept in joined(ranks.each(of_share)):
        right, given, samples = _added((right, given, samples), counted)
        seen.append((counted, kept))
        if samples and is_certain(right, given, samples):
            break

    def values() -> dict[str, float]:
        # Metrics see in one rank what one process would show them: merging states would need those of every metric to
        # have a form that merges, and ranks without a sample break the collectives of torchmetrics' own.
        for _, kept in seen:
            if kept is not None:
                update(*kept)
        return {name: _one_number(name, copy.compute()) for name, copy in copies.items()}

    if given == 0:
        raise ValueError("no sample to measure accuracy on")
    return Measured(right / given, ranks.decided(values) if copies else {}, samples)


_Counts = tuple[int, int, int]
"""Right answers, answers, samples."""

_Counted = tuple[_Counts, tuple[Tensor, Tensor] | None]
"""Counts of a batch, and logits and target if a metric is to see them."""


def _added(one: _Counts, other: _Counts) -> _Counts:
    return one[0] + other[0], one[1] + other[1], one[2] + other[2]


def _cleared(metric: Metric) -> Metric:
    copy = metric.clone()
    copy.reset()
    for part in copy.modules():
        if isinstance(part, Metric):
            part.distributed_available_fn = _not_at_all  # one rank computes alone
    return copy


def _not_at_all() -> bool:
    return False


def _one_number(name: str, value: object) -> float:
    if not isinstance(value, Tensor) or value.numel() != 1:
        numbers = f"{value.numel()} numbers" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise ValueError(f"metric {name!r} computed {numbers}, expected one: average='macro' makes one of several")
    return float(value)


def _described(value: object) -> str:
    return f"a {value.dtype} tensor" if isinstance(value, Tensor) else f"of type {type(value).__name__}"
