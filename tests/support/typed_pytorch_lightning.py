"""What a user types in a project of the package `pytorch_lightning`: checked as `typed_project.py` is."""

from __future__ import annotations

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_rnf import MultiHead
from lightning_rnf.pytorch_lightning import RelevanceFreezing, TaskDataModule, UnitSummary, split_by_class


class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 24), nn.ReLU())
        self.heads = MultiHead(24, {"digits-01": 2, "digits-23": 2})

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.heads(self.body(x))
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-2)


def main(data: TensorDataset) -> None:
    model, rnf = Classifier(), RelevanceFreezing(tasks=2)
    stream: list[TaskDataModule] = split_by_class(data, data, [(0, 1), (2, 3)], name="digits", batch_size=32)
    for datamodule in stream:
        model.heads.activate(datamodule.task)
        Trainer(max_epochs=2, callbacks=[rnf, UnitSummary()]).fit(model, datamodule=datamodule)
    with rnf.recall("digits-01", model):
        print(model(torch.randn(8, 6)))
