"""What the model says about a batch, and how often it is right."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.text import Perplexity

from lightning_rnf.anatomy.explained import Explained
from lightning_rnf.anatomy.targets import Layout, flattened, ignored_by, is_numbers
from lightning_rnf.runtime import ALONE, Ranks, joined
from lightning_rnf.search import EXPLAINED, Measured

Predict = Callable[[nn.Module, Any], tuple[Any, Any]]
"""``(module, batch) -> (logits, target)``.

Classes: logits ``(N, classes)`` and indices ``(N,)``; at positions (pixels, tokens) logits ``(N, classes, …)`` or
``(N, …, classes)`` and indices ``(N, …)``, below 0 where a position does not count. Several labels: 0 and 1 in the
logits' shape. Numbers: floats in the output's shape. Several heads at once: dicts of logits and of indices, by the same
keys. See `targets.flattened`."""


@dataclass(frozen=True)
class Flat:
    """A `Predict` whose logits and targets are rows, one for each target that counts; see `targets.flattened`.

    Attributes:
        predict: returns any form.
        layout: what the task's first batch has shown.
    """

    predict: Predict
    layout: Layout | None = None

    def __call__(self, module: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """Logits ``(rows, classes)``; class indices ``(rows,)``, 0 and 1 ``(rows, classes)``, or numbers."""
        return flattened(*self.predict(module, batch), self.layout, ignored_by(module))

    @classmethod
    def like(cls, other: Predict, predict: Predict) -> Flat:
        """One that calls ``predict``, with what is known of another."""
        return cls(predict, other.layout if isinstance(other, Flat) else None)


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
        Logits ``(rows, classes)``, and integers: class indices ``(rows,)``, or 0 and 1 of ``(rows, classes)``; or
        outputs and numbers ``(rows, columns)``. A row is a target that counts: see `targets.flattened`.

    Raises:
        TypeError: if logits or target are no tensors of floats and of labels.
        ValueError: if their shapes disagree, a label lies outside the head, or a logit is not finite.
    """
    logits, target = Flat.like(predict, predict)(module, batch)
    if finite:
        check_finite(logits)
    return logits, target


def logits_of(predict: Predict, module: nn.Module, batch: Any) -> Tensor:
    """Logits in the form in which ``predict`` returns them, with those that don't count; of several heads rows."""
    logits, target = predict(module, batch)
    return flattened(logits, target, None, ignored_by(module))[0] if isinstance(logits, Mapping) else logits


def check_finite(logits: Tensor) -> None:
    """Check that all are numbers.

    Raises:
        ValueError: if not.
    """
    if not logits.isfinite().all():
        raise ValueError("logits on the reference data are not finite (NaN or infinity): the training has diverged")


def true_labels(logits: Tensor, target: Tensor) -> Tensor:
    """1 for each label that a row has, 0 for the others: ``(rows, classes)``, in the logits' dtype.

    Of numbers, what is true of them is what was said, above zero or below: the sign of each output.
    """
    if is_numbers(target):
        return logits.sign()
    return (nn.functional.one_hot(target, logits.shape[1]) if target.ndim == 1 else target).to(logits)


def answers(logits: Tensor, target: Tensor) -> Tensor:
    """Which answers are right: bool ``(N,)``, or ``(N, classes)`` where a sample may have several labels.

    A class is right where its logit is the largest of all.
    A label is given where its logit is above 0, a probability of one half. What is not finite is wrong.

    Raises:
        ValueError: if targets are numbers, which are nearer or farther but not right.

    >>> answers(torch.tensor([[2.0, 1.0]]), torch.tensor([1]))
    tensor([False])
    >>> answers(torch.tensor([[2.0, 1.0]]), torch.tensor([[1, 0]]))
    tensor([[ True, False]])
    """
    if is_numbers(target):
        raise ValueError("targets are numbers, of which none is right or wrong: there is no accuracy of a regression")
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
        metrics: of logits and labels, as rows; copies of them are updated. Of one column of numbers they get
            ``(rows,)``, torchmetrics' perplexity gets ``(1, rows, classes)``.
        finite: whether all logits have to be; if not, samples whose aren't count as wrong, and metrics get zeros.
        ranks: that measure together, each on its share; they all get the same.
        lowest: stop when this accuracy can't be reached any more. Several ranks go on to the end, but count as far as
            one would have gone. None: go on to the end.
        expected: how many targets ``predict`` returns for all batches of all ranks, for ``lowest`` to go by. What a
            batch shows can't tell: ``predict`` may flatten, mask, repeat and drop. None: not known, go on to the end.

    Returns:
        The share of right `answers`, and the metrics' values by name, on the samples that were seen: those are targets.
        Of numbers, the share of their variance that is explained: see `Explained`.

    Raises:
        ValueError: if there is no sample, a metric computes several numbers, some batches have labels and others
            numbers, or as `predict_checked`.
    """
    copies = {name: _cleared(metric) for name, metric in (metrics or {}).items()}

    def update(logits: Tensor, target: Tensor) -> None:
        if is_numbers(target) and target.shape[1] == 1:
            logits, target = logits.squeeze(1), target.squeeze(1)
        for copy in copies.values() if len(target) else ():
            several = isinstance(copy, Perplexity)  # it wants to be shown sequences
            given = (logits.unsqueeze(0), target.unsqueeze(0)) if several else (_shown(copy, logits, target), target)
            copy.to(logits.device).update(*given)

    def is_certain(right: int, given: int, samples: int) -> bool:
        if (
            lowest is None or expected is None or not given
        ):  # numbers are nearer or farther, each by as much as it likes
            return False
        to_come = max(0, expected - samples) * given // samples  # each sample has as many answers
        return right + to_come < lowest * (given + to_come) - 1e-6

    def of_share() -> list[_Counted]:
        found: list[_Counted] = []
        counts = (0, 0, 0)
        for batch in batches:
            with forward_context():
                logits, target = predict_checked(predict, module, batch, finite=finite)
            explained = Explained.of(logits, target) if is_numbers(target) else None
            right = answers(logits, target) if explained is None else target.new_zeros(0, dtype=torch.bool)
            counted = int(right.sum()), right.numel(), len(target)
            logits = logits.nan_to_num(posinf=0.0, neginf=0.0)
            if copies and ranks.size == 1:
                update(logits, target)
            kept = (logits.cpu(), target.cpu()) if copies and ranks.size > 1 else None
            found.append((counted, kept, explained))
            counts = _added(counts, counted)
            if ranks.size == 1 and counts[2] and is_certain(*counts):
                break
        return found

    # Ranks end no sooner, but count no more than one process would.
    seen: list[_Counted] = []
    right = given = samples = 0
    for counted, kept, explained in joined(ranks.each(of_share)):
        right, given, samples = _added((right, given, samples), counted)
        seen.append((counted, kept, explained))
        if samples and is_certain(right, given, samples):
            break

    def values() -> dict[str, float]:
        # Metrics see in one rank what one process would show them: merging states would need those of every metric to
        # have a form that merges, and ranks without a sample break the collectives of torchmetrics' own.
        for _, kept, _ in seen:
            if kept is not None:
                update(*kept)
        return {name: _one_number(name, copy.compute()) for name, copy in copies.items()}

    if samples == 0:
        raise ValueError("no sample to measure accuracy on")
    numbers = [explained for _, _, explained in seen if explained is not None]
    if numbers and given:
        raise ValueError(
            "some batches of the reference data have numbers for targets, others labels: numbers are floats, labels "
            "are integers"
        )
    of_metrics = ranks.decided(values) if copies else {}
    if numbers:
        return Measured(reduce(add, numbers).share, of_metrics, samples, EXPLAINED)
    return Measured(right / given, of_metrics, samples)


_Counts = tuple[int, int, int]
"""Right answers, answers, samples."""

_Counted = tuple[_Counts, tuple[Tensor, Tensor] | None, Explained | None]
"""Counts of a batch, logits and target if a metric is to see them, and sums of numbers."""


def _added(one: _Counts, other: _Counts) -> _Counts:
    return one[0] + other[0], one[1] + other[1], one[2] + other[2]


def _cleared(metric: Metric) -> Metric:
    copy = metric.clone()
    copy.reset()
    for part in copy.modules():
        if isinstance(part, Metric):
            part.distributed_available_fn = _not_at_all  # one rank computes alone
    return copy


def _shown(metric: Metric, logits: Tensor, target: Tensor) -> Tensor:
    """What a metric of classes sees of a batch's logits, so that it does not take them for probabilities.

    Torchmetrics (1.9) takes scores for probabilities where all of a batch are in [0, 1], and makes probabilities of
    others. Logits of a batch may all be there by chance: then it gets their probabilities from here. They are doubles,
    so that no two of them are made equal.
    """
    is_of_classes = type(metric).__module__.startswith("torchmetrics.classification.")
    if not is_of_classes or is_numbers(target) or bool(((logits < 0) | (logits > 1)).any()):
        return logits
    return logits.double().sigmoid() if target.shape == logits.shape else logits.double().softmax(dim=1)


def _not_at_all() -> bool:
    return False


def _one_number(name: str, value: object) -> float:
    if not isinstance(value, Tensor) or value.numel() != 1:
        numbers = f"{value.numel()} numbers" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise ValueError(f"metric {name!r} computed {numbers}, expected one: average='macro' makes one of several")
    return float(value)
