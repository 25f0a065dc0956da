"""Lightning's model summary with two more columns: units, and how many of them are free."""

from __future__ import annotations

from typing import Any

from lightning_rnf.memory import FreezeState
from lightning_rnf.packages import LightningModule, Trainer, callbacks
from lightning_rnf.tasks.finished import FinishedTasks


class UnitSummary(callbacks.ModelSummary):
    """``ModelSummary`` with units and free capacity of every module, from the second task on.

    Example::

        Trainer(callbacks=[rnf, UnitSummary(max_depth=2)])
    """

    _state = FreezeState()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the summary."""
        found = [one for one in trainer.callbacks if isinstance(one, FinishedTasks)]  # type: ignore[attr-defined]
        self._state = found[0].state if found else FreezeState()
        super().on_fit_start(trainer, pl_module)

    def summarize(  # type: ignore[override]  # a static method there: it is called as self.summarize
        self, summary_data: list[tuple[str, list[str]]], *numbers: Any, **options: Any
    ) -> None:
        """Print the summary's columns, and the units' if a task has ended: before, they are not known."""
        if self._state.tasks:
            frozen = self._state.frozen()
            units, free = [], []
            for name in dict(summary_data)["Name"]:
                inside = [mask for layer, mask in frozen.items() if f"{layer}.".startswith(f"{name}.")]
                total = sum(len(mask) for mask in inside)
                left = total - sum(int(mask.sum()) for mask in inside)
                units.append(f"{total} units" if total else "")  # Rich's table has no headers for other columns
                free.append(f"{left / total:.0%} free" if total else "")
            summary_data = [*summary_data, ("Units", units), ("Free", free)]
        super().summarize(summary_data, *numbers, **options)


class RichUnitSummary(UnitSummary, callbacks.RichModelSummary):
    """The same as a table of rich."""
