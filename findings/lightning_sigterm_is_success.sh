#!/usr/bin/env bash
# lightning 2.6.6: a program whose training is ended by SIGTERM exits with 0, as if it had been trained to its end.
#
# Clusters, containers and `timeout` send SIGTERM before they take a machine away. Without a handler a program that gets it exits
# with 143, and whoever started it knows; so does one that gets it before or after `fit`. During `fit` Lightning notes the signal and
# ends after the batch by an exception that is a `SystemExit` without a code, which Python turns into 0: `python train.py && publish`
# publishes what is half trained, and a job that should be started again counts as done. Seen with a signal in the second batch of
# eight (and, for comparison, before the fit):
#
#   before the fit: exit status 143, batches trained: 0
#   in the fit: exit status 0, batches trained: 2
#
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 lightning==2.6.6
cat > "$folder/asked.py" << 'PYTHON'
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

trained = open(sys.argv[2], "a", buffering=1)


class Line(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def training_step(self, batch, index):
        trained.write("batch\n")
        if index == 1 and sys.argv[1] == "in the fit":
            os.kill(os.getpid(), signal.SIGTERM)
        return self.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
trainer = pl.Trainer(max_epochs=1, accelerator="cpu", **quiet)
if sys.argv[1] == "before the fit":
    os.kill(os.getpid(), signal.SIGTERM)
trainer.fit(Line(), torch.utils.data.DataLoader(torch.arange(8.0)))
PYTHON
seen=""
for moment in "before the fit" "in the fit"; do
    : > "$folder/trained"
    status=0
    "$folder/venv/bin/python" "$folder/asked.py" "$moment" "$folder/trained" > /dev/null 2>&1 || status=$?
    seen+="$moment: exit status $status, batches trained: $(wc -l < "$folder/trained" | tr -d ' ')"$'\n'
done
printf '%s' "$seen"
[ "$seen" = $'before the fit: exit status 143, batches trained: 0\nin the fit: exit status 0, batches trained: 2\n' ]
