"""Settings that set themselves: what a task may claim, what of that it does claim, and how long it trains inside of it.

Every number here was found on validation data of seeds that are not reported; `docs/auto.md` says how they decide.
"""

from __future__ import annotations

import math
from typing import Any, TypeGuard

from lightning_rnf.packages import Trainer, callbacks, either
from lightning_rnf.search import AccuracyDrop, Criterion, SubnetworkScore

SHARES = (0.1, 0.25, 0.5, 0.7, 0.9, 1.0)
"""Of each layer's free units one task may claim so much: the first share that is enough for it, else the last one."""

NEEDED = 0.7
"""A share beyond it is for tasks whose criterion does not accept this one."""

MOST = 0.5
"""A task that recovers claims so much where no share is enough: what it lacks it learns, and as much is left."""

PARTS = (0.15, 0.5)
"""Of the tolerance: so much less accuracy, at least and at most, is as good as all; between them a standard error."""

PRECISION = 1 / 16
"""How few units are enough is found to so small a share of them: accuracy can't tell more."""

RECOVERY = 0.5
"""Of a fit's epochs, the last, train inside the sub-network."""


def shares_of(task: int, tasks: int | None, *, recovers: bool) -> tuple[float, ...]:
    """The shares of each layer's free units that a task may claim, in (0, 1], to be tried in this order.

    Args:
        task: how many have ended before.
        tasks: how many there will be in all; None: not known. The last of them may claim all that is left.
        recovers: whether it trains on inside of what it claims: what the last share lacks then, it learns.
    """
    if tasks is not None and task + 1 >= tasks:
        return (1.0,)
    return (*(share for share in SHARES if share <= NEEDED), MOST) if recovers else SHARES


def slack(criterion: AccuracyDrop, score: SubnetworkScore) -> float:
    """Less accuracy that can't be told from no loss: a standard error, within `PARTS` of the tolerance.

    Args:
        criterion: of the task.
        score: measured on all targets of the reference data.
    """
    error = math.sqrt(score.baseline * (1 - score.baseline) / max(score.samples, 1))
    least, most = (part * criterion.tolerance for part in PARTS)
    return min(max(error, least), most)


def is_enough(criterion: AccuracyDrop, score: SubnetworkScore, share: float) -> bool:
    """Whether a task needs no larger share: with this one no loss can be told.

    From `NEEDED` on it is enough if the criterion accepts it.
    """
    does = score.accuracy >= score.baseline - slack(criterion, score) - 1e-12
    return does or (share >= NEEDED and criterion(score))


def recovery_epochs(trainer: Trainer, begun: int = 0) -> int:
    """How many of a fit's last epochs train inside the sub-network.

    None of one that has less than two epochs, or whose end is not a number of epochs.

    Args:
        trainer: of the fit.
        begun: the epoch that the fit began with, if it is not the Trainer's first.
    """
    options: Any = trainer
    epochs = None if trainer.max_epochs is None else trainer.max_epochs - begun
    # max_time makes one, too
    timers = [callback for callback in options.callbacks if isinstance(callback, either(callbacks.Timer))]
    is_timed = any(timer.time_remaining() is not None for timer in timers)
    if options.fast_dev_run or options.max_steps != -1 or is_timed or epochs is None or epochs < 2:
        return 0
    return max(1, int(epochs * RECOVERY))


def settled(
    ration: Any, recovery_epochs: Any, reset_free: Any, retention: str, criterion: Criterion
) -> tuple[Any, Any, Any]:
    """The three options, without ``"auto"`` where nothing sets itself: in the paper, by other kinds of criteria."""
    if ration == "auto" and (retention == "paper" or not takes(criterion)):
        ration = None
    if retention == "paper":
        recovery_epochs = 0 if recovery_epochs == "auto" else recovery_epochs
        reset_free = False if reset_free == "auto" else reset_free
    return ration, recovery_epochs, reset_free


def takes(criterion: Criterion) -> TypeGuard[AccuracyDrop]:
    """Whether a criterion leaves it open how much is claimed: others name an end of the pruning, and are followed."""
    return isinstance(criterion, AccuracyDrop)


class Enough:
    """Says of sub-networks inside a budget whether they do as well as all of it, as far as can be told.

    Accuracy falls long before the tolerance is reached, and with room left there is no need to give it up.

    Args:
        criterion: of the task.
        budget: the cutoff that leaves all that the task may claim: the first that is asked about.
        nothing: the cutoff that leaves none of it, for a task that recovers. Where the budget falls short of the
            criterion and this one does as well, accuracy does not tell which units the task needs (a head that can't
            be fitted hears too little of them to say anything): `is_flat`, and it recovers inside the whole budget.
            None: never.
    """

    def __init__(self, criterion: AccuracyDrop, budget: int, nothing: int | None = None) -> None:
        self.criterion = criterion
        self.budget = budget
        self.nothing = nothing
        self.floor: float | None = None
        self.is_met = True
        self.is_flat = False

    def __call__(self, score: SubnetworkScore) -> bool:
        """Whether the search may take it; the first score has to be the budget's, or the budget is all there is."""
        accepted = self.criterion(score)
        if self.floor is None:
            is_budget = score.cutoff == self.budget
            self.floor = (score.accuracy if is_budget else score.baseline) - slack(self.criterion, score) - 1e-12
            self.is_met = accepted or not is_budget
        does = score.accuracy >= self.floor and (accepted or not self.is_met)
        if does and not self.is_met and score.cutoff == self.nothing != self.budget:
            self.is_flat, self.floor = True, math.inf
        return does and not self.is_flat
