"""When pruning stops: criteria look at one candidate sub-network's score and say whether it will do.

A criterion is any callable ``SubnetworkScore -> bool``. The search looks for the largest cutoff that it accepts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class SubnetworkScore:
    """What was measured with ``cutoff`` of the least relevant units silenced.

    Attributes:
        cutoff: how many units are silenced.
        accuracy: of the sub-network on the reference data, in [0, 1].
        baseline: of the whole network, by the same loop on the same data.
        units: how many units the network has.
        relevant: how many of them the sub-network keeps.
        free: how many would be relevant to no task if this cutoff were taken.
        free_before: the same at the search's step before this one.
    """

    cutoff: int
    accuracy: float
    baseline: float
    units: int
    relevant: int
    free: int
    free_before: int


Criterion = Callable[[SubnetworkScore], bool]


@dataclass(frozen=True)
class AccuracyDrop:
    """Accept while accuracy has fallen by at most ``tolerance`` (the paper's pruning threshold, 2 %).

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
        # Two accuracies are quotients of integers; the slack only undoes the rounding of their difference.
        return score.baseline - score.accuracy <= self.tolerance + 1e-12

    def check_samples(self, samples: int) -> None:
        """Check that so many samples can tell a drop of the tolerance from none. A tolerance of 0 is meant, and fine.

        Raises:
            ValueError: if one sample weighs more than the tolerance.
        """
        if 0 < self.tolerance < 1 / samples:
            raise ValueError(
                f"reference data has {samples} samples, so one weighs {1 / samples:.1%}, more than the tolerance of "
                f"{self.tolerance:.1%}: give at least {math.ceil(1 / self.tolerance)} samples, a larger tolerance, "
                "or 0 for no loss"
            )


@dataclass(frozen=True)
class FreeCapacity:
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


def as_criterion(criterion: float | Criterion) -> Criterion:
    """A number is an `AccuracyDrop`; a callable is taken as it is.

    Raises:
        TypeError: if it is neither.
    """
    if isinstance(criterion, (int, float)) and not isinstance(criterion, bool):
        return AccuracyDrop(float(criterion))
    if callable(criterion):
        return criterion
    raise TypeError(f"criterion is {criterion!r}, expected a tolerance such as 0.02 or a callable(SubnetworkScore)")
