"""A task that goes on in a new domain, under a head that begins as the old one."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from training import trainer

from lightning_rnf import MultiHead, RelevanceFreezing
from lightning_rnf.streams import TaskDataModule

pytestmark = pytest.mark.filterwarnings("ignore:no free units are left:UserWarning")


class Digits(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU())
        self.heads = MultiHead(256, {"day": 10})

    def forward(self, x: Tensor) -> Tensor:
        return self.heads(self.body(x))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-3)


def right(model: Digits, x: Tensor, y: Tensor) -> float:
    return float((model(x).argmax(1) == y).float().mean())


def test_a_new_domain_is_learned_under_the_old_classes_and_the_old_one_stays_bit_for_bit():
    sklearn = pytest.importorskip("sklearn.datasets")
    pl.seed_everything(0, verbose=False)
    x, y = (torch.from_numpy(part) for part in sklearn.load_digits(return_X_y=True))
    x, y = x.float() / 16, y.long()
    domains = {"day": x, "night": 1 - x}  # white on black
    order = torch.randperm(len(x))
    parts = order[:1200], order[1200:1400], order[1400:]

    def data(domain: str) -> TaskDataModule:
        sets = (TensorDataset(domains[domain][part], y[part]) for part in parts)
        return TaskDataModule(domain, 10, *sets, batch_size=32)

    model, rnf = Digits(), RelevanceFreezing(portraits=True)
    model.heads.activate("day")
    trainer(rnf, max_epochs=10).fit(model, datamodule=data("day"))
    test = parts[2]
    with torch.no_grad(), rnf.recall("day", model):
        before, blind = model(x[test]), right(model, domains["night"][test], y[test])
    model.heads.add("night", continues="day")
    model.heads.activate("night")
    trainer(rnf, max_epochs=10).fit(model, datamodule=data("night"))
    with torch.no_grad():
        with rnf.recall("day", model):
            assert torch.equal(model(x[test]), before)
        with rnf.recall("night", model):
            seen = right(model, domains["night"][test], y[test])
    assert blind < 0.5 < 0.9 < seen
    for domain in domains:
        found = rnf.infer_task(domains[domain][test], model)
        assert sum(name == domain for name in found.names) >= 0.98 * len(test), domain
        assert (found.logits.argmax(1) == y[test]).float().mean() > 0.9
