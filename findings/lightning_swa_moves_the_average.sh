#!/usr/bin/env bash
# lightning 2.6.6: `StochasticWeightAveraging` on a network with batch norm ends with weights that are not the average.
#
# After the last epoch the averaged weights are put into the model, and one more pass over the data estimates the batch norms'
# statistics for them; its docstring and comments say that nothing is trained in it. But at the pass's last batch the
# optimizer steps, with the gradients of the last real batch and the momentum of weights that are no longer there: fit ends
# with weights one step from the average, and statistics from before that step. Without batch norm there is no such pass.
# Seen with two batches an epoch, three epochs, SGD with momentum, from the second epoch's weights on:
#
#   with batch norm: steps 7 of 6, the model is one step away from the average
#   without: steps 6 of 6, the model is the average
#
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 lightning==2.6.6
cat > "$folder/averaged.py" << 'PYTHON'
import logging
import warnings

warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import nn
from torch.utils.data import DataLoader


class Net(pl.LightningModule):
    def __init__(self, norm):
        super().__init__()
        self.layer, self.norm, self.after = nn.Linear(2, 2), norm, []

    def training_step(self, batch):
        return self.norm(self.layer(batch)).pow(3).sum()

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)
        optimizer.register_step_post_hook(lambda *_: self.after.append(self.layer.weight.detach().clone()))
        return optimizer


class Swa(StochasticWeightAveraging):
    """Notes the average when it is put into the model."""

    def transfer_weights(self, source, target):
        self.average = source.layer.weight.detach().clone()
        super().transfer_weights(source, target)


quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
seen = []
for name, norm in (("with batch norm", nn.BatchNorm1d(2)), ("without", nn.Identity())):
    torch.manual_seed(0)
    model, swa = Net(norm), Swa(0.01, swa_epoch_start=2)
    trainer = pl.Trainer(max_epochs=3, accelerator="cpu", callbacks=[swa], **quiet)
    trainer.fit(model, DataLoader(torch.randn(8, 2), batch_size=4))
    moved = not torch.equal(model.layer.weight, swa.average)
    assert not moved or torch.equal(model.layer.weight, model.after[-1])  # it is what the last step has left
    seen.append((name, len(model.after), moved))
    print(f"{name}: steps {len(model.after)} of 6, the model is {'one step away from ' if moved else ''}the average")
assert seen == [("with batch norm", 7, True), ("without", 6, False)]
PYTHON
"$folder/venv/bin/python" "$folder/averaged.py"
