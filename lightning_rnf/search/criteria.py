"""When pruning stops: criteria look at one candidate sub-network's score and say whether it will do.

The search looks for the largest cutoff that its criterion accepts. Criteria are combined by ``&``; any callable
``SubnetworkScore -> bool`` is one. The paper (section 3) names performance, the number of free units, and energy.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torchmetrics import Metric

EXPLAINED = "R²"
"""What stands for accuracy where targets are numbers: the share of their variance that is explained, in [0, 1]."""


@dataclass(frozen=True)
class Measured:
    """What was found: accuracy in [0, 1], the values that the criterion asked for, and on how many targets.

    Attributes:
        scored: what ``accuracy`` is: empty for the share of right answers, `EXPLAINED` of numbers.
    """

    accuracy: float
    values: Mapping[str, float] = field(default_factory=dict)
    samples: int = 0
    scored: str = ""


@dataclass(frozen=True)
class SubnetworkScore:
    """What was measured with ``cutoff`` of the least relevant units silenced.

    Attributes:
        cutoff: how many units are silenced.
        accuracy: of the sub-network on the reference data, in [0, 1]; where targets are numbers, the share of their
            variance that is explained (R²).
        baseline: of the whole network, by the same loop on the same data.
        units: how many units the network has.
        relevant: how many of them the sub-network keeps.
        free: how many would be relevant to no task if this cutoff were taken.
        free_before: the same at the search's step before this one.
        samples: on how many targets of the reference data accuracy and values were measured: all of them, or fewer
            where too many answers were wrong already for any verdict but no. 0: not known.
        values: what else the criterion asked for, by name: metrics, ``"flops"`` of one sample and ``"flops_before"``.
        baseline_values: the same of the whole network.
    """

    cutoff: int
    accuracy: float
    baseline: float
    units: int
    relevant: int
    free: int
    free_before: int
    samples: int = 0
    values: Mapping[str, float] = field(default_factory=dict)
    baseline_values: Mapping[str, float] = field(default_factory=dict)


class Criterion(ABC):
    """Says of one score whether pruning may go so far. Subclasses say what they want measured, too."""

    counts_flops: bool = False
    """Whether scores need ``values["flops"]``."""

    @property
    def metrics(self) -> dict[str, Metric]:
        """Metrics to be measured on the reference data, by their name in ``values``."""
        return {}

    @abstractmethod
    def __call__(self, score: SubnetworkScore) -> bool:
        """Whether the sub-network will do."""

    def accuracy_limit(self, baseline: float) -> float | None:
        """The accuracy that has to be kept if the whole network's is ``baseline``; None: it goes by something else.

        An evaluation ends as soon as it can't be reached any more.
        """
        return None

    @property
    def by_metrics(self) -> bool:
        """Whether it goes by metrics and not by accuracy."""
        return bool(self.metrics) and self.accuracy_limit(1.0) is None

    def worth(self, measured: Measured) -> tuple[float, ...]:
        """What to choose by between two heads of a network, the larger is the better one; by default accuracy."""
        return (measured.accuracy,)

    def met(self, score: SubnetworkScore) -> bool:
        """Whether a sub-network that is taken is what was asked for; by default, whether the search may take it."""
        return self(score)

    def check_samples(self, samples: int) -> None:  # noqa: B027 - most criteria have nothing to check
        """Check that so many targets of the reference data can tell; does nothing by default.

        Raises:
            ValueError: if they can't.
        """

    def __and__(self, other: Callable[[SubnetworkScore], bool]) -> Criterion:
        """Accept what both accept: pruning goes on until either says stop."""
        return _Both(self, as_criterion(other))

    def __rand__(self, other: Callable[[SubnetworkScore], bool]) -> Criterion:
        return _Both(as_criterion(other), self)


@dataclass(frozen=True)
class _Both(Criterion):
    first: Criterion
    second: Criterion

    @property
    def counts_flops(self) -> bool:  # type: ignore[override]
        return self.first.counts_flops or self.second.counts_flops

    @property
    def metrics(self) -> dict[str, Metric]:
        first, second = self.first.metrics, self.second.metrics
        for name in first.keys() & second.keys():
            if first[name] is not second[name]:
                raise ValueError(f"two different metrics are both called {name!r}: give one MetricDrop(..., name=...)")
        return {**first, **second}

    def __call__(self, score: SubnetworkScore) -> bool:
        return self.first(score) and self.second(score)

    def worth(self, measured: Measured) -> tuple[float, ...]:
        asked = [one for one in (self.first, self.second) if one.metrics] if self.by_metrics else []
        return tuple(value for one in asked for value in one.worth(measured)) or super().worth(measured)

    def met(self, score: SubnetworkScore) -> bool:
        return self.first.met(score) and self.second.met(score)

    def accuracy_limit(self, baseline: float) -> float | None:
        both = [limit for one in (self.first, self.second) if (limit := one.accuracy_limit(baseline)) is not None]
        return max(both, default=None)

    def check_samples(self, samples: int) -> None:
        self.first.check_samples(samples)
        self.second.check_samples(samples)


@dataclass(frozen=True)
class _Custom(Criterion):
    function: Callable[[SubnetworkScore], bool]

    def __call__(self, score: SubnetworkScore) -> bool:
        return bool(self.function(score))


@dataclass(frozen=True)
class AccuracyDrop(Criterion):
    """Accept while accuracy has fallen by at most ``tolerance`` (the paper's pruning threshold, 2 %).

    Where targets are numbers it is of their variance that so much less may be explained: at 0.02 the squared error may
    grow by 2 % of what the mean alone would leave.

    Attributes:
        tolerance: absolute, in [0, 1]: at 0.02 an accuracy of 0.95 may fall to 0.93. 0 means no loss at all.

    Raises:
        ValueError: if the tolerance is outside [0, 1].
    """

    tolerance: float = 0.02

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance <= 1:
            raise ValueError(f"tolerance is {self.tolerance}, expected a share in [0, 1]: two per cent is 0.02")

    def __call__(self, score: SubnetworkScore) -> bool:
        """Whether the drop is within the tolerance."""
        return score.baseline - score.accuracy <= self.tolerance + _SLACK

    def accuracy_limit(self, baseline: float) -> float:
        """The baseline less the tolerance."""
        return baseline - self.tolerance

    def check_samples(self, samples: int) -> None:
        """Check that so many targets can tell a drop of the tolerance from none. A tolerance of 0 is meant, and fine.

        Raises:
            ValueError: if one target weighs more than the tolerance.
        """
        if 0 < self.tolerance < 1 / samples:
            raise ValueError(
                f"reference data has {samples} samples, so one weighs {1 / samples:.1%}, more than the tolerance of "
                f"{self.tolerance:.1%}: give at least {math.ceil(1 / self.tolerance)} samples, a larger tolerance, "
                "or 0 for no loss"
            )


@dataclass(frozen=True)
class FreeCapacity(Criterion):
    """Prune until the given share of all units is free, whatever the accuracy (the paper, section 3, names this).

    The search stops at its first step that leaves so many free. They can't be had where frozen units take more already.

    Attributes:
        minimum: share of the network's units to leave free, in [0, 1].

    Raises:
        ValueError: if the share is outside [0, 1].
    """

    minimum: float

    def __post_init__(self) -> None:
        if not 0 <= self.minimum <= 1:
            raise ValueError(f"minimum is {self.minimum}, expected a share in [0, 1]: thirty per cent is 0.3")

    def __call__(self, score: SubnetworkScore) -> bool:
        """Whether the step before left too few free."""
        return score.free_before < self.minimum * score.units - 1e-9  # 0.07 × 100 is 7.000000000000001

    def met(self, score: SubnetworkScore) -> bool:
        """Whether the share is free."""
        return score.free >= self.minimum * score.units - 1e-9


@dataclass(frozen=True)
class MetricDrop(Criterion):
    """Accept while a torchmetrics metric has worsened by at most ``tolerance``.

    Attributes:
        metric: takes ``(logits, target)``, a row for each target that counts, and computes one number; it is cloned,
            never updated itself. Of pixels and tokens it sees ``(rows, classes)`` and ``(rows,)``, of numbers
            ``(rows, columns)`` twice, of one column ``(rows,)``.
        tolerance: absolute, of at least 0, in the metric's own unit.
        higher_is_better: its direction; None: as the metric says itself.
        name: of its value in a score; None: the metric's class.

    Raises:
        ValueError: if the tolerance is below 0 or the direction is not known.
        TypeError: if it is no metric.

    Example::

        MetricDrop(MulticlassF1Score(num_classes=10), tolerance=0.01)
        MetricDrop(MeanSquaredError(), tolerance=0.5)  # of numbers: it may grow by half of their unit, squared
    """

    metric: Metric
    tolerance: float = 0.02
    higher_is_better: bool | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.metric, Metric):
            raise TypeError(f"metric is {self.metric!r}, expected a torchmetrics.Metric")
        if not 0 <= self.tolerance < math.inf:
            raise ValueError(f"tolerance is {self.tolerance}, expected at least 0, in the metric's unit")
        if self._direction is None:
            raise ValueError(
                f"{self._key} does not say whether more is better: pass higher_is_better=True or higher_is_better=False"
            )

    @property
    def metrics(self) -> dict[str, Metric]:
        """The metric, by its name."""
        return {self._key: self.metric}

    @property
    def _key(self) -> str:
        return self.name or type(self.metric).__name__

    @property
    def _sign(self) -> int:
        return 1 if self._direction else -1

    @property
    def _direction(self) -> bool | None:
        return self.metric.higher_is_better if self.higher_is_better is None else self.higher_is_better

    def worth(self, measured: Measured) -> tuple[float, ...]:
        """The metric in the direction in which more is better, then accuracy."""
        return (measured.values[self._key] * self._sign, measured.accuracy)

    def __call__(self, score: SubnetworkScore) -> bool:
        """Whether the metric has worsened by no more than the tolerance."""
        gain = score.values[self._key] - score.baseline_values[self._key]
        return -gain * self._sign <= self.tolerance + _SLACK


@dataclass(frozen=True)
class ComputeBudget(Criterion):
    """Prune until the sub-network needs at most so many floating point operations for one sample.

    The stand-in for the paper's energy (section 3). Operations are counted by torch's own counter on the sub-network
    as `export` would build it. The search stops at its first step within the budget.

    Attributes:
        flops: the budget: above 1 a number of operations, up to 1 a share of the whole network's.

    Raises:
        ValueError: if it is not above 0.
    """

    flops: float

    counts_flops = True

    def __post_init__(self) -> None:
        if not 0 < self.flops < math.inf:
            raise ValueError(f"flops is {self.flops}, expected operations per sample, or a share in (0, 1]")

    def __call__(self, score: SubnetworkScore) -> bool:
        """Whether the step before was above the budget."""
        return score.values["flops_before"] > self._budget(score)

    def met(self, score: SubnetworkScore) -> bool:
        """Whether the sub-network is within the budget."""
        return score.values["flops"] <= self._budget(score)

    def _budget(self, score: SubnetworkScore) -> float:
        return self.flops * score.baseline_values["flops"] if self.flops <= 1 else self.flops


def as_criterion(criterion: float | Callable[[SubnetworkScore], bool]) -> Criterion:
    """A number is an `AccuracyDrop`; a `Criterion` is taken as it is, any other callable by its verdict.

    Raises:
        TypeError: if it is none of these.
    """
    if isinstance(criterion, Criterion):
        return criterion
    if isinstance(criterion, (int, float)) and not isinstance(criterion, bool):
        return AccuracyDrop(float(criterion))
    if callable(criterion):
        return _Custom(criterion)
    raise TypeError(f"criterion is {criterion!r}, expected a tolerance such as 0.02 or a callable(SubnetworkScore)")


_SLACK = 1e-12
# Accuracies are quotients of integers; the slack only undoes the rounding of their difference.
