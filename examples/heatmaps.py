"""What a network looks at, right after its first task and after later ones (the paper's Figure 5), on CIFAR-10.

    python examples/heatmaps.py --data FOLDER                             # shards as in FOLDER/cifar10/train_00.avif
    python examples/heatmaps.py --data FOLDER --torchvision --download    # torchvision's layout

Five tasks of two classes; a small convolutional network without norms, Adam. Test images of the first task are shown
to the network after every task, and the relevance of their pixels for the true class is compared with what it was
right after that task: naive fine-tuning, the paper's freezing, and exact retention with recall.
"""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from experiment import environment
from images import cifar
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn

from lightning_rnf import MultiHead, RelevanceFreezing, UnitMap
from lightning_rnf.heatmaps import Drift, draw, heatmaps
from lightning_rnf.streams import split_by_class

METHODS = {"naive": lambda: None, "paper": RelevanceFreezing.paper, "exact": RelevanceFreezing}
GROUPS = [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]


class Network(LightningModule):
    """Four convolutions and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, channels in ((3, 32), (32, 64), (64, 64), (64, 128)):
            layers += [nn.Conv2d(before, channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 4, 256), nn.ReLU())
        self.heads = MultiHead(256)

    def forward(self, x: Tensor) -> Tensor:
        return self.heads(self.body(x))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def run(callback: RelevanceFreezing | None, options: argparse.Namespace) -> tuple[list[Tensor], list[float]]:
    """Heatmaps of the first task's test images, and its test accuracy, after every task."""
    seed_everything(options.seed, verbose=False)
    train, test = (cifar(options.data, 10, is_train, options) for is_train in (True, False))
    stream = split_by_class(train, test, GROUPS[: options.tasks], name="cifar", seed=options.seed)
    first, model = stream[0], Network()
    batch = next(iter(first.test_dataloader()))
    maps, accuracies = [], []
    for task in stream:
        model.heads.add(task.task, task.classes)
        model.heads.activate(task.task)
        trainer = Trainer(
            accelerator=options.accelerator,
            devices=1,
            max_epochs=options.epochs,
            callbacks=[callback] if callback else [],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, datamodule=task)
        model.heads.activate(first.task)
        units = UnitMap.of(model, batch)
        with nullcontext() if callback is None else callback.recall(first.task, model):
            maps.append(heatmaps(model, units.layers, batch))
            with torch.no_grad():
                right = [(model(x).argmax(1) == y).sum().item() for x, y in first.test_dataloader()]
        accuracies.append(sum(right) / len(first.test))
    return maps, accuracies


def main(arguments: Sequence[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the data")
    parser.add_argument("--torchvision", action="store_true", help="the data are in torchvision's layout")
    parser.add_argument("--download", action="store_true", help="fetch them if they are not there (torchvision)")
    parser.add_argument("--tasks", type=int, default=5, help="(%(default)s)")
    parser.add_argument("--epochs", type=int, default=6, help="per task (%(default)s)")
    parser.add_argument("--samples", type=int, help="only so many training and test samples: for a quick look")
    parser.add_argument("--shown", type=int, default=4, help="images in the figure (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--accelerator", default="auto", help="of the Trainer: cpu, gpu (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("heatmaps"), help="folder for JSON and figure")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in ("does not have many workers", "have no `validation_step`"):
        warnings.filterwarnings("ignore", message=f".*{message}.*")

    columns: dict[str, Tensor] = {}
    summary: dict = {"experiment": "CIFAR-10 in 5 tasks", "seed": options.seed, "epochs": options.epochs, "methods": {}}
    summary |= environment(options.accelerator)
    for method, make in METHODS.items():
        maps, accuracies = run(make(), options)
        drifts = [Drift.between(maps[0], later) for later in maps]
        summary["methods"][method] = {"first task's accuracy": accuracies, "drift": [vars(drift) for drift in drifts]}
        summary["images compared"] = len(maps[0])
        columns[f"{method}\nafter its task"] = maps[0]
        columns[f"{method}\nafter {len(maps) - 1} more"] = maps[-1]
        print(
            f"{method}: cosine {drifts[-1].cosine:.3f}, same sign {drifts[-1].signs:.1%}, "
            f"accuracy of the first task {accuracies[0]:.3f} -> {accuracies[-1]:.3f}",
            flush=True,
        )
    (options.output / "heatmaps.json").write_text(json.dumps(summary, indent=1) + "\n")
    test = cifar(options.data, 10, False, options)
    images = torch.stack([x for x, y in test if y in GROUPS[0]][: options.shown])
    draw(images, columns).savefig(options.output / "heatmaps.png", dpi=110)
    return summary


if __name__ == "__main__":
    main()
