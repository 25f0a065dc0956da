"""What test_coming_back runs in processes of their own: a task is trained and kept, later one more is added."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from training import Classifier, inputs, task_data, trainer

from lightning_rnf import MultiHead, RelevanceFreezing


class OwnHeads(LightningModule):
    """Heads of one's own: as they come, one is trained and run."""

    def __init__(self, *tasks: str) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU())
        self.heads = nn.ModuleDict({task: nn.Linear(40, 2) for task in tasks})
        self.active = tasks[0]

    def forward(self, x):
        return self.heads[self.active](self.body(x))

    training_step = Classifier.training_step

    def validation_step(self, batch):
        pass

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2, weight_decay=0.1)


class GrownHeads(Classifier):
    """A `MultiHead` of these tasks."""

    def __init__(self, *tasks: str) -> None:
        super().__init__(weight_decay=0.1)
        self.heads = MultiHead(40, dict.fromkeys(tasks, 2))


class AttributeHeads(OwnHeads):
    """Heads that are attributes of the model, beside its body."""

    def __init__(self, *tasks: str) -> None:
        super().__init__(*tasks)
        del self.heads
        for task in tasks:
            setattr(self, f"head_{task}", nn.Linear(40, 2))

    def forward(self, x):
        return getattr(self, f"head_{self.active}")(self.body(x))


def activate(model, task: str) -> None:
    if isinstance(model, GrownHeads):
        model.heads.activate(task)
    else:
        model.active = task


def logits(rnf, model, task: str):
    activate(model, task)
    with rnf.recall(task, model), torch.no_grad():
        return model(inputs())


CASES = {  # a model's kind, and the heads that it has from the start
    "grown": (GrownHeads, ["a"]),
    "declared": (GrownHeads, ["a", "b"]),
    "own": (OwnHeads, ["a"]),
    "attributes": (AttributeHeads, ["a"]),
}
WAYS = ("restore", "by hand", "ckpt_path", "masks only")


def first(folder: Path) -> None:
    """Train task a of each model."""
    torch.set_num_threads(1)
    seed_everything(0, verbose=False)
    for case, (kind, tasks) in CASES.items():
        model, rnf = kind(*tasks), RelevanceFreezing(criterion=0.05)
        trainer(rnf, ModelCheckpoint(folder / case), enable_checkpointing=True).fit(model, datamodule=task_data("a"))
        rnf.save(folder / case / "a.safetensors")
        torch.save(logits(rnf, model, "a"), folder / case / "a.pt")


def second(folder: Path) -> None:
    """Add task b and its head to what `first` has left, in each way, and say how task a is recalled then."""
    torch.set_num_threads(1)
    seed_everything(1, verbose=False)
    found = {case: {way: _added(folder / case, kind, way) for way in WAYS} for case, (kind, _) in CASES.items()}
    torch.save(found, folder / "found.pt")


def _added(folder: Path, kind: type, way: str) -> dict:
    model, rnf = kind("a", "b"), RelevanceFreezing(criterion=0.05)
    options = {}
    if way == "restore":
        rnf.restore(folder / "a-ended.ckpt", model)
    elif way == "ckpt_path":
        options = {"ckpt_path": folder / "a-ended.ckpt"}
    elif way == "by hand":
        model.load_state_dict(torch.load(folder / "a-ended.ckpt", weights_only=True)["state_dict"], strict=False)
        rnf.load(folder / "a.safetensors", model)
    elif way == "masks only":
        rnf.load(folder / "a.safetensors", model)
    activate(model, "b")
    try:
        trainer(rnf, max_epochs=6).fit(model, datamodule=task_data("b"), **options)
    except ValueError as error:
        return {"error": str(error)}
    changed = [name for names in rnf.report(model).changed.values() for name in names]
    return {"a": logits(rnf, model, "a"), "tasks": list(rnf.state.tasks), "changed": changed}
