#!/usr/bin/env bash
# lightning 2.6.6: where an epoch's batches don't divide by `accumulate_grad_batches`, its last step is too short.
#
# Each batch's loss is divided by `accumulate_grad_batches`, so that the gradients of a step add up to their mean. The last step
# of an epoch has what is left over, and its losses are divided by the same number: its gradient is not the mean of its
# batches but a fraction of it. One would expect the mean, or to read of it in the documentation of the option. Seen with six
# batches of gradient 1, four accumulated:
#
#   gradients of the steps: [1.0, 0.5]
#
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 lightning==2.6.6
cat > "$folder/accumulated.py" << 'PYTHON'
import logging
import warnings

warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
import lightning.pytorch as pl
import torch
from torch import nn


class Line(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight, self.seen = nn.Parameter(torch.zeros(1)), []

    def training_step(self, batch):
        return self.weight.sum()

    def on_before_optimizer_step(self, optimizer):
        self.seen.append(float(self.weight.grad))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
model = Line()
trainer = pl.Trainer(max_epochs=1, accumulate_grad_batches=4, accelerator="cpu", **quiet)
trainer.fit(model, torch.utils.data.DataLoader(torch.arange(6.0)))
print(f"gradients of the steps: {model.seen}")
assert model.seen == [1.0, 0.5]
PYTHON
"$folder/venv/bin/python" "$folder/accumulated.py"
