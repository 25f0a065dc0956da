"""What the experiments have in common: methods and seeds, and runs that go on where they were stopped."""

from __future__ import annotations

import argparse
import copy
import gc
import inspect
import logging
import platform
import shutil
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import settings as yaml_settings
import torch
from images import Data
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from numpy.random import SeedSequence
from result_files import Results, alone, begun
from results import table
from torch import Tensor

from lightning_rnf import MultiHead, RelevanceFreezing
from lightning_rnf.memory import TaskRecord, free_capacity_over_tasks
from lightning_rnf.metrics import average_accuracy, backward_transfer, forgetting
from lightning_rnf.streams import TaskDataModule, TrainerFactory, fit_stream


class Fit(Protocol):
    """Trains a stream and tests it: `fit_stream`, or an experiment's own."""

    def __call__(
        self,
        model: LightningModule,
        stream: list[TaskDataModule],
        callback: RelevanceFreezing | None,
        trainer_factory: TrainerFactory,
        *,
        folder: Path,
    ) -> Tensor | tuple[Tensor, dict[str, Any]]:
        """The accuracy matrix ``(tasks, tasks)``; with it, if there is more to keep, what JSON takes, by name.

        One that takes ``scenario``, too, as `fit_stream` does, can be run with ``--scenario class``.
        """


@dataclass(frozen=True)
class Experiment:
    """A stream of tasks and a network; settings and methods are in the YAML file beside the script.

    Keyword arguments of ``stream`` and ``model`` are the settings under ``stream``, and under ``network`` and
    ``training`` (without epochs and batch_size): a setting that they don't take is refused.

    Attributes:
        stream: ``(data, seed, *, …)`` to the tasks.
        model: ``(*, …)`` to a new network with a `MultiHead`; heads for all tasks are added here.
        fit: trains the stream and tests it.
        freezing: arguments of the callback that YAML can't hold.
        pretrained: ``(model, data)``: gives a new network weights that it starts from.
        is_packaged: the data come with a package: there is no folder to name.
        is_of_numbers: targets are numbers, which don't say whose a sample is where a callback does not.
    """

    stream: Callable[..., list[TaskDataModule]]
    model: Callable[..., LightningModule]
    fit: Fit = fit_stream
    freezing: Mapping[str, Any] = field(default_factory=dict)
    pretrained: Callable[[Any, Data], object] = lambda model, data: None
    is_packaged: bool = False
    is_of_numbers: bool = False

    def main(self, script: str, description: str | None, arguments: Sequence[str] | None = None) -> dict[str, Any]:
        """Run what is not in the JSON yet, and print the table.

        Args:
            script: the script's ``__file__``; its settings are beside it.
            description: for ``--help``.
            arguments: of the command line; None: the process's own.

        Returns:
            The content of the JSON.
        """
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument(
            "--data", type=Path, required=not self.is_packaged, default=Path(), help="folder with the data"
        )
        parser.add_argument("--download", action="store_true", help="fetch them if they are not there (torchvision)")
        parser.add_argument("--settings", type=Path, help="another YAML file than the script's own")
        parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="as in network.width=100")
        parser.add_argument("--method", nargs="+", help="those to run, of the settings'; none named: all")
        parser.add_argument("--seeds", type=counted, help="how many; none given: as the settings say")
        parser.add_argument(
            "--first-seed",
            type=partial(counted, least=0),
            help="the first of them; none given: as the settings say, else 0",
        )
        parser.add_argument("--fast", action="store_true", help="a reduced schedule on a slice of the data")
        parser.add_argument("--epochs", type=counted, help="per task, for all methods")
        parser.add_argument("--tasks", type=counted, help="only so many of the tasks")
        parser.add_argument("--samples", type=counted, help="only so many training and test samples")
        parser.add_argument("--on-validation", action="store_true", help="test on validation data: to choose by")
        parser.add_argument(
            "--scenario",
            choices=("task", "class"),
            default="task",
            help="are tests told the task? (%(default)s)",
        )
        parser.add_argument("--accelerator", default="auto", help="of the Trainer: cpu, gpu (%(default)s)")
        parser.add_argument("--precision", help="of the Trainer: bf16-mixed, …; none given: as the settings say")
        parser.add_argument("--output", type=Path, default=Path("results"), help="folder for the JSON (%(default)s)")
        parser.add_argument("--pages", action="store_true", help="write the report of each run as a page, too")
        options = parser.parse_args(arguments)
        path = options.settings or Path(script).with_suffix(".yaml")
        try:
            settings = self.settings(path, options)
            methods = options.method or list(settings["methods"])
            made_with = {method: self.made_with(settings, method, options, path.name) for method in methods}
            if options.scenario == "class" and "scenario" not in inspect.signature(self.fit).parameters:
                raise ValueError(
                    f"--scenario class: {Path(script).name} tests each task by its name, and not by samples whose task "
                    "could be found; leave --scenario out"
                )
        except (OSError, ValueError, TypeError) as error:
            parser.error(str(error))
        is_class = options.scenario == "class"
        name = path.stem + "-fast" * options.fast + "-validation" * options.on_validation + "-class" * is_class
        results = Results(options.output / f"{name}.json", about(settings, options))
        try:
            for method in methods:
                results.check(method, made_with[method])
        except ValueError as error:
            parser.error(str(error))

        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        for message in _EXPECTED:
            warnings.filterwarnings("ignore", message=f".*{message}.*")
        first = (settings.get("first_seed") or 0) if options.first_seed is None else options.first_seed
        for seed in range(first, first + (options.seeds or settings.get("seeds") or 1)):
            for method in methods:
                if results.has(method, seed):
                    continue
                folder = options.output / f"{name}-unfinished" / f"{method}-{seed}"
                with alone(folder):
                    if not results.has(method, seed):  # or another process has just ended it
                        run = self.run(made_with[method], seed, options, folder)
                        results.add(method, made_with[method], run)
                        print(
                            f"{method}, seed {seed}: average {100 * run['average']:.2f}, "
                            f"forgetting {100 * run['forgetting']:.2f}",
                            flush=True,
                        )
                    shutil.rmtree(folder)
                with suppress(OSError):  # other runs are in there
                    folder.parent.rmdir()
                gc.collect()  # Trainer, model and data refer to each other; several runs' data are too much
        summary = results.read()
        print(table(summary))
        return summary

    def settings(self, path: Path, options: argparse.Namespace) -> dict[str, Any]:
        """The file's settings, with what the command line changes in them."""
        settings = yaml_settings.read(path, fast=options.fast, changes=options.set)
        given = {key: getattr(options, key) for key in ("tasks", "samples") if getattr(options, key) is not None}
        settings |= given
        unknown = [method for method in options.method or () if method not in settings["methods"]]
        if unknown:
            raise ValueError(
                f"--method {', '.join(unknown)}: {path.name} has the methods {', '.join(settings['methods'])}"
            )
        return settings

    def made_with(
        self, settings: Mapping[str, Any], method: str, options: argparse.Namespace, where: str
    ) -> dict[str, Any]:
        """What decides the result of a method's runs, beside the seed; checked by making the callback once."""
        made_with = yaml_settings.of_method(settings, method)
        training = made_with["training"]
        if options.epochs is not None:
            training["epochs"] = options.epochs
        for key in ("epochs", "batch_size"):
            if type(training.get(key)) is not int or training[key] < 1:
                raise ValueError(f"{where}: training.{key} is {training.get(key)!r}, expected a number of at least 1")
        yaml_settings.check_arguments(self.stream, made_with["stream"], f"{where}: stream")
        yaml_settings.check_arguments(self.model, _of_model(made_with), f"{where}: network with training")
        if made_with.get("separate") and options.scenario == "class":
            raise ValueError(f"{where}: methods.{method}: whoever chooses one of several networks knows the task")
        try:
            callback = self.callback(made_with, options)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: methods.{method}: {error}") from error
        if self.is_of_numbers and callback is None and options.scenario == "class":
            raise ValueError(
                f"{where}: methods.{method}: a model's numbers don't say which task a sample is of; with --scenario "
                "class name methods that freeze by --method"
            )
        return {**made_with, "precision": options.precision or settings.get("precision") or "32-true"}

    def callback(self, made_with: Mapping[str, Any], options: argparse.Namespace) -> RelevanceFreezing | None:
        """A new one, which remembers what tasks' data look like if tests are not told the task; None: naive."""
        untold = {"portraits": True} if options.scenario == "class" else {}
        return yaml_settings.freezing(made_with, **self.freezing, **untold)

    def run(self, made_with: Mapping[str, Any], seed: int, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
        """Train the stream with one method and seed, going on from the checkpoints in the folder."""
        seed_everything(seed, verbose=False)
        data = Data(options.data, options.download, made_with["samples"])
        stream = self.stream(data, seed, **made_with["stream"])
        stream = stream[: made_with["tasks"]]
        for task in stream:
            task.batch_size = made_with["training"]["batch_size"]
            if options.on_validation:
                task.test = task.validation
                task.held_out = None  # test data, too, of the one task that has some
        model = self.model(**_of_model(made_with))
        add_heads(model, stream)
        self.pretrained(model, data)
        untold = {"scenario": "class"} if options.scenario == "class" else {}
        callback = self.callback(made_with, options)
        trainer = partial(
            _trainer,
            seed,
            {task.task: index for index, task in enumerate(stream)},
            accelerator=options.accelerator,
            devices=1,
            precision=made_with["precision"],
            max_epochs=made_with["training"]["epochs"],
            num_sanity_val_steps=0,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer(callbacks=[])  # what it refuses, it refuses before the run has begun
        is_resumed = begun(folder, made_with)
        started = time.perf_counter()
        fit = partial(separately, self.fit) if made_with.get("separate") else self.fit
        found = fit(model, stream, callback, trainer, folder=folder, **untold)
        seconds = time.perf_counter() - started
        matrix, more = found if isinstance(found, tuple) else (found, {})
        if callback is not None and options.pages:
            page = callback.report(matrix=matrix).to_html()
            (options.output / f"{folder.parent.name.removesuffix('-unfinished')}-{folder.name}.html").write_text(
                page, encoding="utf-8"
            )
        records = list(callback.state.tasks.values()) if callback else []
        free = free_capacity_over_tasks(callback.state) if callback else []
        return {
            "seed": seed,
            "device": device(options.accelerator),
            "versions": versions(),
            "data": dict(sorted(data.altered.items())),
            "tasks": [task.task for task in stream],
            "matrix": [[None if entry != entry else round(entry, 6) for entry in row] for row in matrix.tolist()],
            "average": round(float(average_accuracy(matrix)[-1]), 6),
            "forgetting": round(float(forgetting(matrix)), 6),
            "backward_transfer": round(float(backward_transfer(matrix)), 6),
            "free_capacity": [round(share, 6) for share in free],
            "capacity": [record.capacity for record in records],
            "reference_accuracy": [[record.accuracy, record.subnetwork_accuracy] for record in records],
            "accepted": [record.accepted for record in records],
            **(of_untold(records) if untold else {}),
            "evaluations": [len(record.evaluations) + len(record.recovery) for record in records],
            **more,
            "seconds": None if is_resumed else round(seconds, 1),  # what came before the stop was not kept
            "task_end_seconds": [record.seconds for record in records],
        }


def separately(
    fit: Fit,
    model: LightningModule,
    stream: list[TaskDataModule],
    callback: RelevanceFreezing | None,
    trainer_factory: TrainerFactory,
    *,
    folder: Path,
) -> Tensor:
    """A network for each task, all from the weights of this one: what could be reached if nothing had to be shared.

    Returns:
        The accuracy matrix ``(tasks, tasks)``: what a task has reached stays, in a network of its own.
    """
    matrix = torch.full((len(stream), len(stream)), torch.nan)
    for index, task in enumerate(stream):
        found = fit(copy.deepcopy(model), [task], callback, trainer_factory, folder=folder / str(index))
        matrix[index:, index] = (found[0] if isinstance(found, tuple) else found).item()
    return matrix


class SeedEpochs(Callback):
    """Every whole epoch has seeds of its own: checkpoints hold no random states, and methods see the same batches.

    Args:
        seed: of the run.
        tasks: each task's place in the stream, by name.
    """

    def __init__(self, seed: int, tasks: Mapping[str, int]) -> None:
        self.seed = seed
        self.tasks = tasks

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        task = self.tasks[trainer.datamodule.task]
        seeds = SeedSequence([self.seed, task, trainer.current_epoch]).generate_state(3).tolist()
        seed_everything(seeds[0], verbose=False)
        # A loader draws before or after this, as the fit was resumed or not: it must not draw from the same source.
        loader = trainer.train_dataloader
        loader.generator, loader.sampler.generator = (torch.Generator().manual_seed(seed) for seed in seeds[1:])
        loop = trainer.fit_loop
        if trainer.current_epoch == 0 or getattr(loop, "is_resuming", False) or loop.epoch_loop.restarting:
            # Lightning makes an iterator for every other epoch after this hook; this one's is older, and its workers
            # have had seeds and indices already.
            iter(loop._data_fetcher)


def about(settings: Mapping[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """What stands above the runs: title, stand-in, and every way in which the runs are not the whole experiment."""
    reduced = [settings["reduced"]] if settings.get("reduced") else []
    reduced += ["a reduced schedule on a slice of the data (--fast)"] if options.fast else []
    given = [f"--{key} {getattr(options, key)}" for key in ("epochs", "tasks", "samples") if getattr(options, key)]
    given += [f"--set {' '.join(options.set)}"] if options.set else []
    aim = settings if options.scenario == "task" else {}  # goals are of tests that are told the task
    return {
        "title": settings["title"],
        "stand_in": settings.get("stand_in"),
        "reduced": "; ".join(reduced) or None,
        "run_with": " ".join(given) or None,
        "tested_on": ("validation data" if options.on_validation else "test data")
        + (", of all tasks as one label space" if options.scenario == "class" else ""),
        "tuning": settings.get("tuning"),
        "goal": aim.get("goal"),
        "published": aim.get("published"),
    }


def at_the_end(records: Sequence[TaskRecord], metric: str) -> list[float]:
    """What the last task's tests have found of each task under this name; without a callback: nothing."""
    last = records[-1].tests if records else {}
    return [round(logged[metric], 6) for logged in last.values() if metric in logged]


def of_untold(records: Sequence[TaskRecord]) -> dict[str, list[float]]:
    """Of each task how often it is found, and how well it does where it is told: of numbers R² stands for accuracy."""
    told = at_the_end(records, "accuracy_told") or at_the_end(records, "r_squared_told")
    return {"tasks_found": at_the_end(records, "tasks_found"), "accuracy_told": told}


def add_heads(model: LightningModule, stream: Sequence[TaskDataModule]) -> None:
    """A head for each task, before any training: so their initial weights don't depend on what was trained when."""
    for module in model.modules():
        if isinstance(module, MultiHead):
            for task in stream:
                if task.task not in module.tasks:
                    module.add(task.task, task.classes)


def versions() -> dict[str, str]:
    """Of the packages that a result depends on."""
    return {package: version(package) for package in ("torch", "lightning", "torchmetrics", "zennit", "lightning-rnf")}


def environment(accelerator: str = "auto") -> dict[str, Any]:
    """Versions and device."""
    return {"versions": versions(), "device": device(accelerator)}


def device(accelerator: str) -> str:
    """What a Trainer with this accelerator runs on."""
    on_gpu = accelerator in {"auto", "gpu", "cuda"} and torch.cuda.is_available()
    return torch.cuda.get_device_name() if on_gpu else f"CPU ({platform.machine()})"


def counted(text: str, least: int = 1) -> int:
    """A number from the command line, of at least so many."""
    number = int(text)
    if number < least:
        raise argparse.ArgumentTypeError(f"{text} is less than {least}")
    return number


def _trainer(seed: int, tasks: Mapping[str, int], *, callbacks: list[Callback], **options: Any) -> Trainer:
    return Trainer(callbacks=[SeedEpochs(seed, tasks), *callbacks], **options)


def _of_model(made_with: Mapping[str, Any]) -> dict[str, Any]:
    training = {key: value for key, value in made_with["training"].items() if key not in {"epochs", "batch_size"}}
    return {**made_with["network"], **training}


_EXPECTED = (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    "does not have many workers",
    "have no `validation_step`",
    "overridden `on_after_batch_transfer`",
    "checkpoint directory .* exists and is not empty",
    "smaller than the logging interval",
)
"""Warnings that say nothing new to who runs an experiment."""
