"""Finished tasks in Lightning's checkpoints: a file of its own for every task that ends."""

from __future__ import annotations

import os
import re

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


def keep(trainer: Trainer, task: str) -> str | None:
    """Save a task that has just ended, where the Trainer saves checkpoints at all; every rank has to call it.

    ``ModelCheckpoint`` has saved before: its files know nothing of the task. So ``<task>-ended.ckpt`` is written beside
    them, and ``last.ckpt``, where it is asked for, again. Those of certain epochs (the best, say) stay as they are:
    they hold other weights than those that were attributed.

    Returns:
        The path of the first of them; None: nothing is saved.
    """
    savers = [
        callback
        for callback in trainer.checkpoint_callbacks
        if isinstance(callback, ModelCheckpoint)
        and callback.dirpath
        and (callback.save_top_k != 0 or callback.save_last)
    ]
    if not savers:
        return None
    path = os.path.join(str(savers[0].dirpath), re.sub(r"[^\w.=+-]+", "_", task) + "-ended.ckpt")
    for each in dict.fromkeys([path, *(saver.last_model_path for saver in savers if saver.last_model_path)]):
        trainer.save_checkpoint(each)
    return path
