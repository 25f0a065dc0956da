#!/usr/bin/env bash
# lightning 2.6.6 with pytorch-lightning 2.6.6: a data module of the one package in a Trainer of the other.
#
# Lightning has a check for mixed imports that would name both packages, and it is called here. But it looks at where the
# object's own class was defined, and a user's data module is a subclass, defined in the user's file: the check passes it,
# and what is raised names neither the data module nor what to do. No callback has run by then that could say more. Seen:
#
#   ValueError: Expected a parent
#
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 lightning==2.6.6 pytorch-lightning==2.6.6
cat > "$folder/mixed.py" << 'PYTHON'
import lightning.pytorch as pl
import pytorch_lightning as other
import torch
from torch.utils.data import DataLoader, TensorDataset


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch):
        return self.layer(batch[0]).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Data(other.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(8, 2)), 4)


quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
try:
    pl.Trainer(max_epochs=1, accelerator="cpu", **quiet).fit(Module(), datamodule=Data())
except ValueError as error:
    print(f"ValueError: {error}")
    assert str(error) == "Expected a parent"
else:
    raise SystemExit("it works now")
PYTHON
"$folder/venv/bin/python" "$folder/mixed.py"
