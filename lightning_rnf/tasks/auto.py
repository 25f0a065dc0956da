"""Settings that set themselves: how much of what is free a task may claim, and how long it trains inside of that."""

from __future__ import annotations

import os
from typing import Any

from lightning.pytorch import Trainer

SHARE = float(os.environ.get("RNF_SHARE", "0.25"))
SLACK = float(os.environ.get("RNF_SLACK", "0.1"))
RECOVERY = float(os.environ.get("RNF_RECOVERY", "0.5"))


def share_of(task: int, tasks: int | None) -> float:
    """The largest share of each layer's free units that a task may claim, in (0, 1].

    Args:
        task: how many have ended before.
        tasks: how many there will be in all; None: not known.
    """
    if tasks is None or tasks <= task:
        return SHARE
    return min(1.0, 2 / (tasks - task + 1))


def recovery_epochs(trainer: Trainer) -> int:
    """How many of a fit's last epochs train inside the sub-network; 0: nobody knows when the fit will end, or it is short."""
    options: Any = trainer
    if options.fast_dev_run or options.max_steps != -1 or trainer.max_epochs is None or trainer.max_epochs < 2:
        return 0
    return int(trainer.max_epochs * RECOVERY)
