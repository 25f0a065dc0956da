"""A small classifier, small tasks and a silent Trainer, for the tests that train."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import Logger
from records import bare_record
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_rnf import MultiHead, RelevanceFreezing, UnitMap
from lightning_rnf.freezing import elasticities, frozen_connections, heard
from lightning_rnf.streams import TaskDataModule

TASKS = ("a", "b", "c")

PLAIN: dict[str, Any] = {
    "recovery_epochs": 0,
    "ration": None,
    "reset_free": False,
    "fit_head": False,
    "freeze": "units",
    "search": "bisect",
}
"""A search and nothing else, for tests of what comes before and after it: no head is fitted, nothing sets itself."""

plain = partial(RelevanceFreezing, **PLAIN)


class Classifier(pl.LightningModule):
    """Two hidden layers of 40 units; dropout, so that random states matter."""

    def __init__(self, optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW, **options: Any) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Dropout(0.1), nn.Linear(40, 40), nn.ReLU())
        self.heads = MultiHead(40, dict.fromkeys(TASKS, 2))
        self.optimizer, self.options = optimizer, {"lr": 1e-2, **options}

    def forward(self, x):
        return self.heads(self.body(x))

    def training_step(self, batch):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch):
        self._log_accuracy(batch, "val_accuracy")

    def test_step(self, batch):
        self._log_accuracy(batch, "test_accuracy")

    def predict_step(self, batch):
        return self(batch[0])

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), **self.options)

    def _log_accuracy(self, batch, name):
        self.log(name, (self(batch[0]).argmax(1) == batch[1]).float().mean(), batch_size=len(batch[0]))


class ConvClassifier(Classifier):
    """Two convolutions, the second with a batch norm, and a linear layer."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.body = nn.Sequential(
            nn.Unflatten(1, (1, 1, 6)),
            nn.Conv2d(1, 16, (1, 3)),
            nn.ReLU(inplace=True),
            nn.Conv2d(16, 16, (1, 2), bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(48, 40),
            nn.ReLU(),
        )


class OwnHeads(Classifier):
    """Heads that nobody but the model itself switches."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({task: nn.Linear(40, 2) for task in TASKS})
        self.active = "a"

    def forward(self, x):
        return self.heads[self.active](self.body(x))


def clusters(task: str, samples: int, seed: int = 0) -> TensorDataset:
    """Two classes that differ in the sign of a direction of the task's own."""
    generator = torch.Generator().manual_seed(100 * TASKS.index(task) + seed)
    x = torch.randn(samples, 6, generator=generator)
    direction = torch.randn(6, generator=torch.Generator().manual_seed(TASKS.index(task)))
    return TensorDataset(x, (x @ direction > 0).long())


def task_data(task: str, samples: int = 320) -> TaskDataModule:
    return TaskDataModule(task, 2, *(clusters(task, samples, seed) for seed in range(3)), batch_size=32)


def loader(task: str, samples: int = 320) -> DataLoader:
    return DataLoader(clusters(task, samples), batch_size=32)


def trainer(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    defaults = {"max_epochs": 3, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(callbacks=list(callbacks), **{**defaults, **quiet, **options})


def train(model: pl.LightningModule, callback: RelevanceFreezing | None, *tasks: str, **options: Any) -> None:
    """Fit the tasks one after the other, with a new Trainer for each."""
    for task in tasks:
        model.heads.activate(task)
        trainer(*([callback] if callback else []), **options).fit(model, datamodule=task_data(task))


def frozen_entries(rnf: RelevanceFreezing, model: pl.LightningModule) -> dict[str, torch.Tensor]:
    """What finished tasks hold, by parameter: a mask over its rows, or over rows and columns."""
    connections = frozen_connections(model, rnf.state, heard(model, rnf.state))
    factors = elasticities(rnf.state, 0.0, 1.0, None, connections)
    return {name: factor == 0 for name, factor in factors.items() if factor.ndim}


class Allocated(pl.Callback):
    """After each step: names of the parameters that have a gradient, and of those that have an optimizer state."""

    def __init__(self) -> None:
        self.gradients: list[set[str]] = []
        self.states: list[set[str]] = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        named = dict(pl_module.named_parameters())
        states = [optimizer.state for optimizer in trainer.optimizers]
        self.gradients.append({name for name, parameter in named.items() if parameter.grad is not None})
        self.states.append({name for name, parameter in named.items() if any(parameter in one for one in states)})


def allocated(
    options: Callable[[], dict[str, Any]] = dict, *, learning_only: bool = False
) -> tuple[Allocated, set[str], set[str]]:
    """Two tasks, the first of which freezes the first layer whole and half of the second.

    Args:
        options: makes those of each Trainer.
        learning_only: the optimizer is given what requires gradients.

    Returns:
        What was there in the second fit, and the names of parameters that should be and that should not.
    """

    class Two(RelevanceFreezing):
        def on_train_end(self, trainer, pl_module):
            if not self.state.tasks:
                units = UnitMap.of(pl_module, clusters("a", 8).tensors)
                relevant = {"body.0": torch.ones(40) > 0, "body.3": torch.arange(40) < 20}
                self.state.add(bare_record(units, relevant, {}), units)

    class Learning(Classifier):
        def configure_optimizers(self):
            chosen = [one for one in self.parameters() if one.requires_grad or not learning_only]
            return torch.optim.Adam(chosen, weight_decay=0.1)

    model, rnf, found = Learning(), Two(), Allocated()
    for task, callbacks in (("a", [rnf]), ("b", [found, rnf])):
        model.heads.activate(task)
        trainer(*callbacks, **options()).fit(model, datamodule=task_data(task))
    idle = {f"heads.tasks.{task}.{kind}" for task in ("a", "c") for kind in ("weight", "bias")}
    frozen = {"body.0.weight", "body.0.bias", *idle}
    return found, {name for name, _ in model.named_parameters()} - frozen, frozen


def inputs(samples: int = 64) -> torch.Tensor:
    return torch.randn(samples, 6, generator=torch.Generator().manual_seed(7))


def frozen_rows(model, callback):
    """Every row of a unit that is relevant to a finished task, by parameter."""
    parameters = dict(model.named_parameters())
    return {
        name: parameters[name].detach()[callback.state.frozen()[layer.name]].clone()
        for layer in callback.state.layers
        for name in layer.parameters
    }


class Recorder(Logger):
    """Keeps what it is given."""

    name, version = "recorder", "0"

    def __init__(self, experiment=None):
        self.numbers, self._experiment = [], experiment

    @property
    def experiment(self):
        return self._experiment

    def log_metrics(self, metrics, step=None):
        self.numbers += [(step, metrics)] if any(name.startswith("rnf/") for name in metrics) else []

    def log_hyperparams(self, *args, **kwargs): ...
