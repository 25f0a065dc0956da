#!/usr/bin/env bash
# lightning 2.6.6: a fit that is resumed from a checkpoint of an epoch's last step trains the next epoch without calling
# on_train_epoch_start for it.
#
# ModelCheckpoint(every_n_train_steps=1) saves after the last step of an epoch, too. Resumed from there, the fit has no
# batch left in that epoch and goes on with the next one, inside the same turn of its loop: all its batches are trained and
# their hooks run, but nobody is told that the epoch begins. What a callback does at the start of a certain epoch (unfreeze,
# change a rate, begin a phase) is left out, without a word. Seen, of four epochs of two steps, resumed from step 4:
#
#   epochs that were trained after the resume: [2, 3]
#   epochs of which on_train_epoch_start told:  [3]
#
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 lightning==2.6.6
cat > "$folder/resumed.py" << 'PYTHON'
import tempfile
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch):
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Epochs(Callback):
    def __init__(self):
        self.started, self.stepped = [], []

    def on_train_epoch_start(self, trainer, pl_module):
        self.started.append(trainer.current_epoch)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch not in self.stepped:
            self.stepped.append(trainer.current_epoch)


def fit(folder, *callbacks, **options):
    epochs = Epochs()
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=4, callbacks=[epochs, *callbacks], enable_checkpointing=bool(callbacks), **quiet
    )
    trainer.fit(Module(), DataLoader(TensorDataset(torch.randn(8, 2)), 4), **options)
    return epochs.started, epochs.stepped


with tempfile.TemporaryDirectory() as folder:
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    assert fit(folder, saver) == ([0, 1, 2, 3], [0, 1, 2, 3])
    started, stepped = fit(folder, ckpt_path=Path(folder) / "step=4.ckpt", weights_only=False)
print("epochs that were trained after the resume:", stepped)
print("epochs of which on_train_epoch_start told: ", started)
assert (started, stepped) == ([3], [2, 3]), "this has changed"
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/resumed.py"
