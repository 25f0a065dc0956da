"""What the scripts of the peers share: the examples' streams as they take them, and runs that go on where they were."""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import product
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

Rows = Sequence[Mapping[str, Any]]

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


def main(
    description: str | None,
    methods: Collection[str],
    run: Callable[[str, str, int, argparse.Namespace], dict[str, Any]],
    columns: Mapping[str, Callable[[Rows], str]],
    seeds: Sequence[int],
) -> None:
    """Run what the command line names and the file has not, and print a table.

    Args:
        description: for ``--help``.
        methods: to choose from.
        run: of a stream, a method and a seed, with the command line's options: a row.
        columns: of the table: what each says of the rows of a stream and method.
        seeds: if none are named.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the data of the examples")
    parser.add_argument("--streams", nargs="+", choices=STREAMS, default=list(STREAMS))
    parser.add_argument("--methods", nargs="+", choices=methods, default=list(methods))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(seeds))
    parser.add_argument("--fast", action="store_true", help="the examples' reduced schedules: to see that it runs")
    parser.add_argument("--output", type=Path, help="JSON; runs that are in it are not made again")
    options = parser.parse_args()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)

    if options.fast and options.output:
        parser.error("--fast only shows that it runs: it writes no --output")
    content = begun(options.output)
    made = {(row["stream"], row["method"], row["seed"]) for row in content["rows"]}
    for seed, stream, method in product(options.seeds, options.streams, options.methods):
        if (stream, method, seed) in made:
            continue
        content["rows"].append(run(stream, method, seed, options))
        print(table({"rows": content["rows"][-1:]}, columns).splitlines()[-1], flush=True)
        if options.output:
            options.output.write_text(json.dumps(content, indent=1) + "\n")
    print(table(content, columns))


def table(content: Mapping[str, Any], columns: Mapping[str, Callable[[Rows], str]]) -> str:
    """A line for each method of each stream, as Markdown."""
    titles = ["stream", "method", *columns, "seeds"]
    lines = [f"| {' | '.join(titles)} |", f"|{' --- |' * len(titles)}"]
    pairs = {(row["stream"], row["method"]): None for row in content["rows"]}
    for stream, method in pairs:
        rows = [row for row in content["rows"] if (row["stream"], row["method"]) == (stream, method)]
        seeds = ", ".join(str(row["seed"]) for row in rows)
        lines.append(f"| {' | '.join([stream, method, *(cell(rows) for cell in columns.values()), seeds])} |")
    return "\n".join(lines)
