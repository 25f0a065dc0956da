"""What is killed: two tasks that keep their checkpoints in a folder, and go on from what is there; any script."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import lightning.pytorch as pl
import torch
from launched import run_script
from lightning.pytorch.callbacks import ModelCheckpoint
from training import ConvClassifier, task_data, trainer

from lightning_rnf import RelevanceFreezing
from lightning_rnf.memory.state import FreezeState
from lightning_rnf.tasks import checkpoints, selection

EPOCHS = 3
MOMENTS = ("training", "attribution", "search", "record", "nothing left to train", "kept")
ASKED = "asked to end in the search"


class SeedEpochs(pl.Callback):
    """Lightning's checkpoints hold no random states: dropout of an epoch is that of its number."""

    def on_train_epoch_start(self, trainer, pl_module):
        torch.manual_seed(1000 + trainer.current_epoch)


class Die(pl.Callback):
    """Dies in the middle of the second task's second epoch."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if pl_module.heads.active == "b" and trainer.current_epoch == 1 and batch_idx == 3:
            die()


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def ask():
    """As a cluster does some time before it takes the machine away."""
    os.kill(os.getpid(), signal.SIGTERM)


def script_until(checkpoint: str, path: Path, *options: str) -> None:
    """Run a script, and die as soon as a Trainer has written a checkpoint whose path ends like this."""
    save = pl.Trainer.save_checkpoint

    def save_once(self, filepath, *args, **kwargs):
        save(self, filepath, *args, **kwargs)
        if Path(filepath).as_posix().endswith(checkpoint):
            die()

    pl.Trainer.save_checkpoint = save_once
    run_script(path, *options)


def run(folder: Path, moment: str | None = None, recovery_epochs: int = 0) -> None:
    """Train both tasks, or what is left of them, and write the result; die at a moment of the second."""
    torch.set_num_threads(1)
    pl.seed_everything(0, verbose=False)
    model, rnf = ConvClassifier(), RelevanceFreezing(criterion=0.05, recovery_epochs=recovery_epochs)
    for task in "ab":
        pl.seed_everything(7, verbose=False)
        data = task_data(task)
        data.train_dataloader = data.val_dataloader  # in one order
        model.heads.activate(task)
        saver = ModelCheckpoint(folder / task, save_last=True)
        last = folder / task / "last.ckpt"
        if task == "b":
            _prepare(moment)
        options = {"max_epochs": EPOCHS, "enable_checkpointing": True}
        killers = [Die()] if moment == "training" else []
        trainer(rnf, saver, SeedEpochs(), *killers, **options).fit(
            model, datamodule=data, ckpt_path=last if last.exists() else None
        )
    torch.save({"weights": model.state_dict(), "state": rnf.state_dict()}, folder / "result.pt")


def _prepare(moment):
    if moment == "attribution":
        attribute, calls = selection.attribute, []

        def attribute_once(*args, **kwargs):  # the first time is the rehearsal, before the training
            calls.append(args)
            return attribute(*args, **kwargs) if len(calls) == 1 else die()

        selection.attribute = attribute_once
    elif moment == ASKED:
        search = selection.search_cutoff
        selection.search_cutoff = lambda *args, **kwargs: (ask(), search(*args, **kwargs))[1]
    elif moment == "search":
        selection.search_cutoff = die
    elif moment == "record":  # between the record and the checkpoint
        checkpoints.keep = die
    elif moment == "kept":
        keep = checkpoints.keep
        checkpoints.keep = lambda *args: die(keep(*args))
    elif moment == "nothing left to train":
        FreezeState.add = die
