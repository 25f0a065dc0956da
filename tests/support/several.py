"""Processes that together fit a task under each of Lightning's packages: ``several.py folder``, by ``launched``."""

from __future__ import annotations

import os
import sys
import warnings
from importlib import import_module
from pathlib import Path

import torch
from packaged import LIGHTNING, OTHER, module_of, ours, stream


def fitted(package: str):
    """Masks of a task whose validation data was given as Lightning's loader of loaders and never runs."""
    pl, own = import_module(package), ours(package)
    model, rnf, task = module_of(pl), own.RelevanceFreezing(), stream(own.split_by_class)[0]
    model.heads.activate(task.task)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    spread = {"strategy": "ddp", "accelerator": "cpu", "devices": 2}
    trainer = pl.Trainer(max_epochs=2, callbacks=[rnf], limit_val_batches=0, **quiet, **spread)
    trainer.fit(model, task.train_dataloader(), pl.utilities.CombinedLoader([task.val_dataloader()]))
    return {name: record.relevant for name, record in rnf.state.tasks.items()}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder, rank = Path(sys.argv[1]), os.environ["RANK"]
    torch.save({package: fitted(package) for package in (LIGHTNING, OTHER)}, folder / f"{rank}.pt")
