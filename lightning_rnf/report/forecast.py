"""About how many more tasks a network has room for."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_rnf.memory import FreezeState, masks


@dataclass(frozen=True)
class Forecast:
    """About how many more tasks of this kind fit, if each claims as many units as those before did on average.

    The first task is left out of the average if there are others: it claims what they can reuse.

    Attributes:
        tasks: until no unit is free anywhere; infinite if nothing is claimed any more.
        units_per_task: the average.
        layer: the one that is full first; None: no layer is filling.
        tasks_until_full: until that layer has no free unit.
    """

    tasks: float
    units_per_task: float
    layer: str | None
    tasks_until_full: float

    @classmethod
    def of(cls, state: FreezeState) -> Forecast | None:
        """The forecast after the last finished task; None: there is none."""
        if not state.tasks:
            return None
        claims = masks.claims(state)
        counted = range(1, len(state.tasks)) if len(state.tasks) > 1 else range(1)
        rate = {
            name: sum(int((units == index).sum()) for index in counted) / len(counted) for name, units in claims.items()
        }
        free = {name: int((units < 0).sum()) for name, units in claims.items()}
        left = {name: free[name] / rate[name] for name in rate if rate[name] > 0}
        first = min(left, key=lambda name: left[name]) if left else None
        per_task = sum(rate.values())
        tasks = sum(free.values()) / per_task if per_task else math.inf
        return cls(tasks, per_task, first, math.inf if first is None else left[first])

    def __str__(self) -> str:
        if self.layer is None:
            return "the last tasks have claimed no new unit: as many more as can reuse what is there"
        return (
            f"about {self.tasks:.1f} more tasks that claim {self.units_per_task:.0f} new units each; "
            f"{self.layer} is full after about {self.tasks_until_full:.1f}, and later tasks can only reuse it"
        )
