"""The examples' streams as the scripts of the peers take them: tasks, network and training of a file of settings."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import settings as yaml_settings
import torch
from avalanche.training.plugins import SupervisedPlugin
from cifar_resnet import OneCycle
from experiment import environment
from images import Data, crop_and_flip
from lightning.pytorch import LightningModule, seed_everything
from torch import nn

from lightning_rnf.streams import TaskDataModule

EXAMPLES = Path(__file__).parents[2] / "examples"
STREAMS = {
    "mnist_split": "default",
    "mnist_permuted": "default",
    "cifar_split": "naive",
    "cifar_random_short": "naive",
    "cifar_resnet_narrow": "naive",
    "cifar_alexnet_short": "naive",
}
"""Files of settings, and the method whose training it is."""


class Cycle(SupervisedPlugin):
    """A cycle of the learning rate for each task, and augmented images, as in `OneCycle` of the examples.

    Args:
        learning_rate: the largest.
        augment: crop and mirror.
    """

    def __init__(self, learning_rate: float, *, augment: bool) -> None:
        super().__init__()
        self.learning_rate, self.augment = learning_rate, augment

    def before_training_epoch(self, strategy, **kwargs):  # PackNet has made a new optimizer by then
        if strategy.clock.train_exp_epochs == 0:
            self.left = strategy.train_epochs * len(strategy.dataloader)
            self.schedule = torch.optim.lr_scheduler.OneCycleLR(
                strategy.optimizer, self.learning_rate, total_steps=self.left
            )

    def before_forward(self, strategy, **kwargs):
        if self.augment:
            strategy.mbatch[0] = crop_and_flip(strategy.mbatch[0])

    def after_update(self, strategy, **kwargs):
        self.left -= 1
        if self.left > 0:
            self.schedule.step()


@dataclass(frozen=True)
class Stream:
    """One of the streams, for one seed.

    Attributes:
        tasks: with training and test data.
        network: new, without heads.
        training: its settings: epochs, batch_size, learning_rate.
    """

    tasks: list[TaskDataModule]
    network: LightningModule
    training: dict[str, Any]

    @property
    def has_cycle(self) -> bool:
        """SGD with a cycle of the learning rate for each task, instead of Adam?"""
        return isinstance(self.network, OneCycle)

    @property
    def body(self) -> nn.Sequential:
        """All but the heads."""
        return self.network.body if hasattr(self.network, "body") else self.network.hidden

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The example's."""
        rate = self.training["learning_rate"]
        if self.has_cycle:
            return torch.optim.SGD(model.parameters(), rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
        return torch.optim.Adam(model.parameters(), rate)

    def plugins(self) -> list[SupervisedPlugin]:
        """What the example's training has besides."""
        return [Cycle(self.training["learning_rate"], augment=self.network.augment)] if self.has_cycle else []


def prepared(name: str, seed: int, folder: Path, *, fast: bool = False) -> Stream:
    """The example's stream of this seed, and a network from the same seed.

    Args:
        name: of a file of settings in `STREAMS`.
        seed: of order, held-out samples and weights.
        folder: with the data.
        fast: the example's reduced schedule.
    """
    script = importlib.import_module(name.removesuffix("_narrow").removesuffix("_short"))
    made_with = yaml_settings.of_method(yaml_settings.read(EXAMPLES / f"{name}.yaml", fast=fast), STREAMS[name])
    training = dict(made_with["training"])
    seed_everything(seed, verbose=False)
    data = Data(folder, samples=made_with["samples"])
    tasks = script.EXPERIMENT.stream(data, seed, **made_with["stream"])[: made_with["tasks"]]
    of_network = {key: value for key, value in training.items() if key not in {"epochs", "batch_size"}}
    network = script.EXPERIMENT.model(**made_with["network"], **of_network)
    # Avalanche's PackNet prunes nothing of a weight that isn't contiguous, without a word.
    return Stream(tasks, network.to(memory_format=torch.contiguous_format), training)


def begun(path: Path | None) -> dict[str, Any]:
    """What runs are added to: the content of a file that was begun with the same builds, or a new one.

    Raises:
        ValueError: if its rows are of other versions.
    """
    content: dict[str, Any] = {**environment("cpu"), "rows": []}
    content["versions"]["avalanche-lib"] = version("avalanche-lib")
    if path is not None and path.exists():
        found = json.loads(path.read_text())
        for package in ("torch", "avalanche-lib"):
            theirs, ours = found["versions"][package], content["versions"][package]
            if theirs != ours:
                raise ValueError(f"{path} is of {package} {theirs}, and here is {ours}: name another file")
        content["rows"] = found["rows"]
    return content
