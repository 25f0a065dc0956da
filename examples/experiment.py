"""What the experiments have in common: methods and seeds, results kept as JSON while they come, table and figure."""

from __future__ import annotations

import argparse
import gc
import json
import logging
import platform
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything

from lightning_rnf import RelevanceFreezing
from lightning_rnf.figures import StreamResult, plot_retention
from lightning_rnf.masks import free_capacity_over_tasks
from lightning_rnf.metrics import average_accuracy, backward_transfer, forgetting
from lightning_rnf.streams import TaskDataModule, fit_stream

Method = Callable[[], RelevanceFreezing | None]


@dataclass(frozen=True)
class Experiment:
    """A stream of tasks, a network, and the methods to compare on them.

    Attributes:
        title: as in tables and figures; a reduced or stand-in set-up says so.
        methods: by name; the first is drawn dashed.
        stream: ``(options, seed)`` to the tasks.
        model: ``(options)`` to a new network.
        epochs: per task.
        default_methods: those that run if none are named.
        seeds: how many, if no number is given.
        drawn: methods in the figure, at most four; none named: the first four.
        setup: what else a reader has to know, for the JSON.
        arguments: adds options of the experiment's own.
    """

    title: str
    methods: Mapping[str, Method]
    stream: Callable[[argparse.Namespace, int], list[TaskDataModule]]
    model: Callable[[argparse.Namespace], LightningModule]
    epochs: int
    default_methods: Sequence[str]
    seeds: int = 1
    drawn: Sequence[str] = ()
    setup: Mapping[str, Any] = field(default_factory=dict)
    arguments: Callable[[argparse.ArgumentParser], object] = lambda parser: None

    def main(self, name: str, description: str | None, arguments: Sequence[str] | None = None) -> dict:
        """Run what is not in the JSON yet; print the table. Returns the content of the JSON."""
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--data", type=Path, required=True, help="folder with the data")
        parser.add_argument("--methods", nargs="+", choices=self.methods, default=list(self.default_methods))
        parser.add_argument("--seeds", type=int, default=self.seeds, help="how many (%(default)s)")
        parser.add_argument("--first-seed", type=int, default=0, help="the first of them (%(default)s)")
        parser.add_argument("--epochs", type=int, default=self.epochs, help="per task (%(default)s)")
        parser.add_argument("--tasks", type=int, help="only so many of the tasks")
        parser.add_argument("--samples", type=int, help="only so many training and test samples: for a quick look")
        parser.add_argument("--on-validation", action="store_true", help="report validation accuracy: to choose by")
        parser.add_argument("--accelerator", default="auto", help="of the Trainer: cpu, gpu (%(default)s)")
        parser.add_argument("--precision", default="32-true", help="of the Trainer: bf16-mixed, … (%(default)s)")
        parser.add_argument("--output", type=Path, default=Path(name), help="folder for JSON and figure")
        parser.add_argument("--pages", action="store_true", help="write the report of each run as a page, too")
        self.arguments(parser)
        options = parser.parse_args(arguments)

        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        options.output.mkdir(parents=True, exist_ok=True)
        path = options.output / f"{name}.json"
        summary = json.loads(path.read_text()) if path.exists() else {"runs": {}}
        chosen = {key: str(value) for key, value in vars(options).items() if key not in _NOT_OF_THE_RESULT}
        defaults = {key: str(parser.get_default(key)) for key in chosen}  # of options younger than the file
        if defaults | summary.get("options", chosen) != chosen:
            parser.error(f"{path} was made with other options, {summary['options']}: give another --output")
        summary |= {"experiment": self.title, "options": chosen, **self.setup, **environment(options.accelerator)}
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            for method in options.methods:
                runs = summary["runs"].setdefault(method, [])
                if any(run["seed"] == seed for run in runs):
                    continue
                runs.append(self.run(method, seed, options))
                gc.collect()  # Trainer, model and data refer to each other; several runs' data are too much
                path.write_text(json.dumps(summary, indent=1) + "\n")
                last = runs[-1]
                print(
                    f"{method}, seed {seed}: average {100 * last['average']:.2f}, "
                    f"forgetting {100 * last['forgetting']:.2f}",
                    flush=True,
                )
        drawn = [method for method in self.drawn or self.methods if method in summary["runs"]][:4]
        results = [stream_result(method, summary["runs"][method][0]) for method in drawn or summary["runs"]]
        plot_retention(results, options.output / f"{name}.png")
        print(table(summary["runs"]))
        return summary

    def run(self, method: str, seed: int, options: argparse.Namespace) -> dict:
        """Train the stream with one method and seed."""
        seed_everything(seed, verbose=False)
        stream = self.stream(options, seed)[: options.tasks]
        if options.on_validation:
            for task in stream:
                task.test = task.validation
        callback = self.methods[method]()
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = partial(
            Trainer,
            accelerator=options.accelerator,
            devices=1,
            precision=options.precision,
            max_epochs=options.epochs,
            num_sanity_val_steps=0,
            enable_model_summary=False,
            **quiet,
        )
        started = time.perf_counter()
        matrix = fit_stream(self.model(options), stream, callback, trainer)
        if callback is not None and options.pages:
            page = callback.report(matrix=matrix).to_html()
            (options.output / f"{options.output.name}-{method}-{seed}.html").write_text(page, encoding="utf-8")
        records = list(callback.state.tasks.values()) if callback else []
        return {
            "seed": seed,
            "device": device(options.accelerator),
            "tasks": [task.task for task in stream],
            "matrix": [[None if entry != entry else entry for entry in row] for row in matrix.tolist()],
            "average": float(average_accuracy(matrix)[-1]),
            "forgetting": float(forgetting(matrix)),
            "backward_transfer": float(backward_transfer(matrix)),
            "free_capacity": free_capacity_over_tasks(callback.state) if callback else [],
            "capacity": [record.capacity for record in records],
            "reference_accuracy": [[record.accuracy, record.subnetwork_accuracy] for record in records],
            "accepted": [record.accepted for record in records],
            "evaluations": [len(record.evaluations) + len(record.recovery) for record in records],
            "seconds": [record.seconds for record in records],
            "seconds_in_all": time.perf_counter() - started,
        }


_NOT_OF_THE_RESULT = {"data", "output", "methods", "seeds", "first_seed", "download", "accelerator", "pages"}


def stream_result(method: str, run: dict) -> StreamResult:
    """A run as figures and tables take it."""
    matrix = torch.tensor([[float("nan") if entry is None else entry for entry in row] for row in run["matrix"]])
    return StreamResult(method, run["tasks"], matrix, run["free_capacity"])


def environment(accelerator: str = "auto") -> dict:
    """Versions and device."""
    packages = ("torch", "lightning", "torchmetrics", "zennit", "lightning-rnf")
    return {"versions": {package: version(package) for package in packages}, "device": device(accelerator)}


def device(accelerator: str) -> str:
    """What a Trainer with this accelerator runs on."""
    on_gpu = accelerator in {"auto", "gpu", "cuda"} and torch.cuda.is_available()
    return torch.cuda.get_device_name() if on_gpu else f"CPU ({platform.machine()})"


def table(runs: Mapping[str, list[dict]]) -> str:
    """Means and standard deviations over the seeds, as Markdown."""
    lines = [
        "| method | average, % | forgetting, points | task 1 at the end, % | free units after each task, % | seeds |"
    ]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for method, results in runs.items():
        columns = [
            [100 * result["average"] for result in results],
            [100 * result["forgetting"] for result in results],
            [100 * result["matrix"][-1][0] for result in results],
        ]
        free = torch.tensor([result["free_capacity"] for result in results])
        shares = ", ".join(f"{100 * share:.0f}" for share in free.mean(dim=0).tolist()) if free.numel() else "100"
        lines.append(f"| {method} | {' | '.join(map(mean_and_deviation, columns))} | {shares} | {len(results)} |")
    return "\n".join(lines)


def mean_and_deviation(values: list[float]) -> str:
    """``"97.71 ± 0.29"``."""
    deviation = f" ± {torch.tensor(values).std().item():.2f}" if len(values) > 1 else ""
    return f"{sum(values) / len(values):.2f}{deviation}"
