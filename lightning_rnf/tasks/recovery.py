"""How a task's last epochs train inside its sub-network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from lightning_rnf.packages import Trainer
from lightning_rnf.runtime import arguments
from lightning_rnf.search import Criterion, SubnetworkScore, as_criterion
from lightning_rnf.tasks import auto

CriterionOption = float | Criterion | Callable[[SubnetworkScore], bool]
"""A number is the absolute drop of accuracy to tolerate."""


@dataclass(frozen=True)
class Recovery:
    """How a task's last epochs train inside its sub-network.

    Attributes:
        epochs: so many; 0: there is no recovery. ``"auto"``: see `auto.recovery_epochs`.
        criterion: what the search before them may take; None: a drop of 0.1.
        search: if the recovery falls short of the task's criterion, try milder cutoffs.

    Raises:
        TypeError, ValueError: if an option is out of its range, or of no use.
    """

    epochs: int | Literal["auto"] = 0
    criterion: CriterionOption | None = None
    search: bool = False

    def __post_init__(self) -> None:
        if self.epochs != "auto":
            arguments.at_least("recovery_epochs", self.epochs, 0)
        arguments.of_type("recovery_search", self.search, bool, "True or False")
        before = self.before  # raises if it is none
        if not self.epochs and (self.criterion is not None or self.search):
            raise ValueError("recovery_criterion and recovery_search are of use with recovery_epochs only: it is 0")
        object.__setattr__(self, "criterion", before)

    def epochs_of(self, trainer: Trainer, *, several: bool = False, begun: int = 0) -> int:
        """How many of a fit's last epochs are a recovery.

        Args:
            trainer: of the fit.
            several: whether a task has ended inside the fit already.
            begun: the epoch that the fit began with.
        """
        if self.epochs != "auto":
            return self.epochs
        # When the next task has begun nobody has said: its recovery might begin with it.
        return 0 if several else auto.recovery_epochs(trainer, begun)

    @property
    def before(self) -> Criterion | None:
        """What the search before the recovery may take; None: the same as after it."""
        if self.epochs == "auto" and self.criterion is None:
            return None
        return as_criterion(0.1 if self.criterion is None else self.criterion)
