"""One program that stands on `lightning.pytorch` or on `pytorch_lightning`, and what comes of it.

``python packaged.py PACKAGE FOLDER`` runs it where nothing else has been imported, and `rnf fit` behind it.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

LIGHTNING, OTHER = "lightning.pytorch", "pytorch_lightning"
DIGITS = ("digits-01", "digits-23")


def ours(package: str) -> Any:
    """What is imported from `lightning_rnf` in a project of the package."""
    if package == OTHER:
        return import_module("lightning_rnf.pytorch_lightning")
    names = import_module("lightning_rnf"), import_module("lightning_rnf.streams")
    return SimpleNamespace(**{name: value for module in names for name, value in vars(module).items()})


def module_of(pl: Any) -> Any:
    """A classifier that is a `LightningModule` of this package."""
    from lightning_rnf import MultiHead

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Dropout(0.1), nn.Linear(40, 40), nn.ReLU())
            self.heads = MultiHead(40, dict.fromkeys(DIGITS, 2))
            self.is_set_up = self.is_restored = False

        def setup(self, stage):
            self.is_set_up = True

        def on_load_checkpoint(self, checkpoint):
            self.is_restored = True

        def on_after_batch_transfer(self, batch, dataloader_idx):
            assert not self.trainer.predicting or self.is_set_up  # a Trainer is there, or what stands in its place
            return batch[0] ** 3, batch[1]  # without it other units would be relevant

        def forward(self, x):
            return self.heads(self.body(x))

        def training_step(self, batch):
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch):
            self.log("accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean(), batch_size=len(batch[0]))

        test_step = validation_step

        def predict_step(self, batch):
            return self(batch[0])

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), 1e-2)

    torch.manual_seed(0)
    return Module()


def logger_of(pl: Any) -> Any:
    """A logger that keeps what this package hands it."""

    class Recorder(pl.loggers.Logger):
        name, version = "recorder", "0"

        def __init__(self) -> None:
            super().__init__()
            self.numbers: dict[str, float] = {}

        def log_metrics(self, metrics, step=None):
            self.numbers |= {key: value for key, value in metrics.items() if "seconds" not in key}

        def log_hyperparams(self, *args, **kwargs): ...

    return Recorder()


def stream(split_by_class: Callable[..., list[Any]]) -> list[Any]:
    """Two tasks of two classes each, by a function of `ours`."""
    generator = torch.Generator().manual_seed(0)
    centres = 2 * torch.randn(4, 6, generator=generator)

    def drawn(samples: int) -> TensorDataset:
        labels = torch.arange(samples) % 4
        return TensorDataset(centres[labels] + torch.randn(samples, 6, generator=generator), labels)

    return split_by_class(drawn(640), drawn(240), [(0, 1), (2, 3)], name="digits", validation=0.3, batch_size=32)


def data_of(pl: Any, task: Any, *, held_out: bool = True) -> Any:
    """A data module of the user's own, with a task's data, and its training data for validation if none is held out."""

    class Data(pl.LightningDataModule):
        def setup(self, stage):
            self.task = task.task

        def train_dataloader(self):
            return task.train_dataloader()

        def val_dataloader(self):
            assert self.task == task.task  # it is set up
            return DataLoader(task.validation if held_out else task.train, batch_size=50)

        def test_dataloader(self):
            return task.test_dataloader()

    return Data()


def assert_imported(present: str, absent: str) -> None:
    """That only one of two modules has been imported in this process."""
    assert present in sys.modules
    assert absent not in sys.modules


class KilledError(Exception):
    """In the middle of a fit."""


def program(package: str, folder: Path, callback: Callable[[], Any] | None = None) -> dict[str, Any]:
    """Two tasks, the second killed and resumed; tests that recall; the first task's checkpoint in a new model.

    Reference data of the second are those of a data module of their own.

    Args:
        package: whose Trainer, module, data modules, callbacks and logger these are.
        folder: for checkpoints.
        callback: makes it; None: what `ours` has.

    Returns:
        Tensors and plain values: all but paths and seconds.
    """
    pl, own = import_module(package), ours(package)
    model, rnf, logger = module_of(pl), (callback or own.RelevanceFreezing)(), logger_of(pl)
    tasks = stream(own.split_by_class)
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
    quiet = {"accelerator": "cpu", "log_every_n_steps": 1, "enable_progress_bar": False}
    summaries: list[list[str]] = []

    class Kill(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 2:
                raise KilledError

    def trainer(*more: Any) -> Any:
        saver = pl.callbacks.ModelCheckpoint(folder / "saved", save_last=True, enable_version_counter=False)
        made = pl.Trainer(max_epochs=4, callbacks=[rnf, own.UnitSummary(), *more, saver], logger=logger, **quiet)
        summaries.append([type(one).__name__ for one in made.callbacks if isinstance(one, pl.callbacks.ModelSummary)])
        return made

    def fit(task: Any, *more: Any, **options: Any) -> None:
        torch.manual_seed(len(rnf.state.tasks))
        model.heads.activate(task.task)
        trainer(*more).fit(model, datamodule=data_of(pl, task), **options)

    def recalled() -> torch.Tensor:
        with torch.no_grad(), rnf.recall(DIGITS[0], model):
            return model(x)

    def tested(task: Any) -> dict[str, float]:
        return trainer().test(model, datamodule=task, verbose=False)[0]

    fit(tasks[0])
    found: dict[str, Any] = {"then": recalled(), "tests": [tested(tasks[0])]}
    try:
        fit(tasks[1], Kill())
    except KilledError:
        model, rnf = module_of(pl), (callback or own.RelevanceFreezing)()
        rnf.reference = data_of(pl, tasks[1], held_out=False)
        fit(tasks[1], ckpt_path=folder / "saved" / "last.ckpt")
    model.heads.activate(DIGITS[0])
    found["tests"] += [tested(task) for task in tasks]
    one = trainer()
    found["validated"] = one.validate(model, tasks[0].val_dataloader(), verbose=False)[0]
    found["predicted"] = torch.cat(one.predict(model, tasks[0].test_dataloader()))
    new, restored = module_of(pl), (callback or own.RelevanceFreezing)()
    restored.restore(folder / "saved" / f"{DIGITS[0]}-ended.ckpt", new)
    with torch.no_grad(), restored.recall(DIGITS[0], new):
        found["restored"] = new(x)
    protected = (callback or own.RelevanceFreezing)()
    protected.protect(new, data_of(pl, tasks[0], held_out=False), name="pretrained")
    for each, one in (("masks", rnf), ("protected", protected)):
        found[each] = {task: record.relevant for task, record in one.state.tasks.items()}
    return found | {
        "now": recalled(),
        "weights": model.state_dict(),
        "numbers": logger.numbers,
        "report": {name: one.tests for name, one in rnf.state.tasks.items()},
        "sound": rnf.report(model).is_sound,
        "files": sorted(path.name for path in (folder / "saved").iterdir()),
        "summaries": summaries,
        "hooks": [model.is_set_up, new.is_restored],
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    result = program(sys.argv[1], Path(sys.argv[2]))
    torch.save(result | {"imported": sorted(sys.modules)}, Path(sys.argv[2]) / "found.pt")
    main = import_module("lightning_rnf.commands.cli").main
    main(["fit"])
