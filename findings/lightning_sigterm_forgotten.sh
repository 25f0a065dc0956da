#!/usr/bin/env bash
# lightning 2.6.6: a SIGTERM that comes in `on_train_end` is noted and forgotten: `fit` returns as finished, and the program goes on.
#
# During `fit` Lightning takes SIGTERM for itself: its handler notes it (`trainer.received_sigterm`), and its loops look at the note
# after a batch and after an epoch. What callbacks do at the end of training (averaging, exporting, uploading) comes after the
# last look. One would expect the fit to end there, or the signal to be raised again when Lightning puts the old handler
# back; the program goes on until it is killed. Seen:
#
#   in on_train_epoch_end: exit status 0, the program went on after the fit: no
#   in on_train_end: exit status 0, the program went on after the fit: yes, state finished, received True
#
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 lightning==2.6.6
cat > "$folder/forgotten.py" << 'PYTHON'
import logging
import os
import signal
import sys
import warnings

warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
import lightning.pytorch as pl
import torch
from torch import nn


class Line(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def training_step(self, batch):
        return self.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Asked(pl.Callback):
    pass


setattr(Asked, sys.argv[1], lambda *args: os.kill(os.getpid(), signal.SIGTERM))
quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
trainer = pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=[Asked()], **quiet)
trainer.fit(Line(), torch.utils.data.DataLoader(torch.arange(4.0)))
print(f"yes, state {trainer.state.status.value}, received {trainer.received_sigterm}")
PYTHON
seen=""
for hook in on_train_epoch_end on_train_end; do
    status=0
    said=$("$folder/venv/bin/python" "$folder/forgotten.py" "$hook" 2> /dev/null) || status=$?
    seen+="in $hook: exit status $status, the program went on after the fit: ${said:-no}"$'\n'
done
printf '%s' "$seen"
grep -qx "in on_train_epoch_end: exit status 0, the program went on after the fit: no" <<< "$seen"
grep -qx "in on_train_end: exit status 0, the program went on after the fit: yes, state finished, received True" <<< "$seen"
