"""MNIST-Split (section 4.1 of the paper): five tasks of two digits, an MLP 2 × 400, Adam 1e-3, batch 128, 4 epochs.

    python examples/split_mnist.py --data FOLDER              # torchvision's layout: FOLDER/MNIST/raw/...
    python examples/split_mnist.py --data FOLDER --download

Prints one table per method, means and standard deviations over the seeds; writes them with versions as JSON, and the
figure of the first seed. A tenth of each task's training data is held out: reference data comes from there, the test
set is only for the report.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import warnings
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from torch.utils.data import Dataset, Subset, TensorDataset
from torchvision.datasets import MNIST

from lightning_rnf import RelevanceFreezing
from lightning_rnf.demo import MLP
from lightning_rnf.importance import IMPORTANCES
from lightning_rnf.metrics import average_accuracy, backward_transfer, forgetting
from lightning_rnf.report import StreamResult, free_capacity_over_tasks, plot_retention
from lightning_rnf.streams import fit_stream, split_by_class

METHODS = {
    "naive": lambda: None,
    "default": RelevanceFreezing,
    "paper": RelevanceFreezing.paper,
    **{name: partial(RelevanceFreezing, importance=name) for name in IMPORTANCES},
}


def main(arguments: Sequence[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with MNIST in torchvision's layout")
    parser.add_argument("--download", action="store_true", help="fetch MNIST into the folder if it is not there")
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 0 on (%(default)s)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS)[:3])
    parser.add_argument("--epochs", type=int, default=4, help="per task (%(default)s)")
    parser.add_argument("--samples", type=int, help="use so many training and test images only: for a quick look")
    parser.add_argument("--output", type=Path, default=Path("split_mnist"), help="folder for JSON and figure")
    options = parser.parse_args(arguments)

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    train, test = (load(options.data, is_train, options.download, options.samples) for is_train in (True, False))
    runs = {method: [] for method in options.methods}
    for seed in range(options.seeds):
        for method in options.methods:
            runs[method].append(run(method, seed, train, test, options.epochs))
            last = runs[method][-1]
            print(
                f"{method}, seed {seed}: average {100 * last['average']:.2f}, forgetting {100 * last['forgetting']:.2f}"
            )
    options.output.mkdir(parents=True, exist_ok=True)
    summary = {"experiment": "MNIST-Split", "epochs": options.epochs, **environment(), "runs": runs}
    (options.output / "split_mnist.json").write_text(json.dumps(summary, indent=1) + "\n")
    plot_retention([stream_result(method, runs[method][0]) for method in runs], options.output / "split_mnist.png")
    print(table(runs))
    return summary


def load(folder: Path, is_train: bool, download: bool, samples: int | None) -> Dataset:
    images = MNIST(folder, train=is_train, download=download)
    dataset = TensorDataset(images.data.float() / 255, images.targets)
    return dataset if samples is None else FirstSamples(dataset, samples)


class FirstSamples(Subset):
    """The first samples of a data set, with their labels to read."""

    def __init__(self, dataset: TensorDataset, samples: int) -> None:
        super().__init__(dataset, range(samples))
        self.targets = dataset.tensors[1][:samples]


def run(method: str, seed: int, train: Dataset, test: Dataset, epochs: int) -> dict:
    seed_everything(seed, verbose=False)
    stream = split_by_class(train, test, [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)], name="mnist", seed=seed)
    callback = METHODS[method]()
    trainer = partial(
        Trainer,
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    matrix = fit_stream(MLP(28 * 28, 400), stream, callback, trainer)
    records = list(callback.state.tasks.values()) if callback else []
    return {
        "seed": seed,
        "tasks": [task.task for task in stream],
        "matrix": [[None if entry != entry else entry for entry in row] for row in matrix.tolist()],
        "average": float(average_accuracy(matrix)[-1]),
        "forgetting": float(forgetting(matrix)),
        "backward_transfer": float(backward_transfer(matrix)),
        "free_capacity": free_capacity_over_tasks(callback.state) if callback else [],
        "reference_accuracy": [[record.accuracy, record.subnetwork_accuracy] for record in records],
        "evaluations": [len(record.evaluations) for record in records],
        "seconds": [record.seconds for record in records],
    }


def stream_result(method: str, run: dict) -> StreamResult:
    matrix = torch.tensor([[float("nan") if entry is None else entry for entry in row] for row in run["matrix"]])
    return StreamResult(method, run["tasks"], matrix, run["free_capacity"])


def environment() -> dict:
    packages = ("torch", "lightning", "torchmetrics", "zennit", "lightning-rnf")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    return {"versions": {package: version(package) for package in packages}, "device": device}


def table(runs: dict) -> str:
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
    deviation = f" ± {torch.tensor(values).std().item():.2f}" if len(values) > 1 else ""
    return f"{sum(values) / len(values):.2f}{deviation}"


if __name__ == "__main__":
    main()
