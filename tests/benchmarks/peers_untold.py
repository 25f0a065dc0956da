"""Avalanche's methods where nobody says which task a sample is of, on streams of the examples. No test: run it apart.

In the environment of `peers.py`, with ``-e '.[examples]'``:

    PYTHONPATH=tests/support:examples ../peers/bin/python tests/benchmarks/peers_untold.py --data FOLDER \
        --streams mnist_split cifar_split --output tests/benchmarks/results/peers_untold_cpu.json

Tasks, samples, order of classes, body, optimizer, epochs and batch size are those of the example; a tenth of the
training data is held out there, and here, too. The network has one output layer for all classes, as is usual for these
methods, which tell tasks apart by its logits alone; float32. After the last task, of all test data: how often the
largest of all logits is right (untold), how often the largest is of the sample's task (found), and how often the
largest of its own task's logits is right (told). Strengths of EWC and LwF are those of `peers.py`, which were chosen
for MNIST-Split with the task told, but for EWC's in the ResNet, whose training that one makes diverge; replay keeps 200
samples of each class. Nothing was chosen for these streams.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import settings as yaml_settings
import torch
from avalanche.benchmarks import benchmark_from_datasets, with_classes_timeline, with_task_labels
from avalanche.benchmarks.utils import DataAttribute, TaskAwareSupervisedClassificationDataset, TaskLabels
from avalanche.training.plugins import EWCPlugin, LwFPlugin, ReplayPlugin, SupervisedPlugin
from avalanche.training.supervised import Naive
from experiment import environment
from images import Data, crop_and_flip
from lightning.pytorch import seed_everything
from peers import EWC_STRENGTH, LWF_STRENGTH
from results import mean_and_deviation
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_rnf.streams import TaskDataModule

EXAMPLES = Path(__file__).parents[2] / "examples"
STREAMS = {
    "mnist_split": "default",
    "mnist_permuted": "default",
    "cifar_split": "naive",
    "cifar_resnet_narrow": "naive",
}
"""Files of settings, and the method whose training it is."""
REPLAYED = 200


class OneHead(nn.Module):
    """An example's body, and one output layer for the classes of all tasks."""

    def __init__(self, network: nn.Module, classes: int) -> None:
        super().__init__()
        self.body = network.body if hasattr(network, "body") else network.hidden
        self.head = nn.Linear(network.heads.in_features, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class OfTheResNet(SupervisedPlugin):
    """A cycle of the learning rate for each task, and augmented images, as in the example."""

    def __init__(self, learning_rate: float, steps: Sequence[int]) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.steps = iter(steps)

    def before_training_exp(self, strategy, **kwargs):
        self.left = next(self.steps)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            strategy.optimizer, self.learning_rate, total_steps=self.left
        )

    def before_forward(self, strategy, **kwargs):
        strategy.mbatch[0] = crop_and_flip(strategy.mbatch[0])

    def after_update(self, strategy, **kwargs):
        self.left -= 1
        if self.left > 0:
            self.schedule.step()


METHODS = {
    "naive": lambda classes, is_resnet: [],
    "EWC": lambda classes, is_resnet: [EWCPlugin(1e3 if is_resnet else EWC_STRENGTH)],
    "LwF": lambda classes, is_resnet: [LwFPlugin(LWF_STRENGTH)],
    "replay": lambda classes, is_resnet: [ReplayPlugin(mem_size=REPLAYED * classes)],
}


def of_all_classes(part, first: int) -> TensorDataset:
    """A task's part with labels that begin at this class."""
    pairs = [part[index] for index in range(len(part))]
    return TensorDataset(torch.stack([x for x, _ in pairs]), torch.tensor([int(y) + first for _, y in pairs]))


def experiences(tasks: Sequence[TensorDataset]) -> list:
    datasets = []
    for task in tasks:
        labels = [DataAttribute(task.tensors[1].tolist(), "targets"), TaskLabels([0] * len(task))]
        datasets.append(TaskAwareSupervisedClassificationDataset([task], data_attributes=labels))
    return list(with_classes_timeline(with_task_labels(benchmark_from_datasets(train=datasets))).streams["train"])


def run(name: str, method: str, seed: int, options: argparse.Namespace) -> dict:
    """One method on one stream."""
    script = importlib.import_module(name.removesuffix("_narrow"))
    settings = yaml_settings.read(EXAMPLES / f"{name}.yaml", fast=options.fast)
    made_with = yaml_settings.of_method(settings, STREAMS[name])
    training = made_with["training"]
    epochs, batch_size = training.pop("epochs"), training.pop("batch_size")
    seed_everything(seed, verbose=False)
    data = Data(options.data, samples=made_with["samples"])
    stream: list[TaskDataModule] = script.EXPERIMENT.stream(data, seed, **made_with["stream"])[: made_with["tasks"]]
    network = script.EXPERIMENT.model(**made_with["network"], **training)
    firsts = [sum(task.classes for task in stream[:number]) for number in range(len(stream) + 1)]
    train, test = (
        [of_all_classes(getattr(task, part), first) for task, first in zip(stream, firsts, strict=False)]
        for part in ("train", "test")
    )
    model = OneHead(network, firsts[-1])
    rate, is_resnet = training["learning_rate"], hasattr(network, "body")
    optimizer = (
        torch.optim.SGD(model.parameters(), rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
        if is_resnet
        else torch.optim.Adam(model.parameters(), rate)
    )
    own = OfTheResNet(rate, [epochs * -(-len(task) // batch_size) for task in train])
    strategy = Naive(
        model=model,
        optimizer=optimizer,
        train_mb_size=batch_size,
        train_epochs=epochs,
        plugins=[*METHODS[method](firsts[-1], is_resnet), *([own] if is_resnet else [])],
        evaluator=None,
    )
    for number, experience in enumerate(experiences(train)):
        seed_everything(seed + 1000 * number, verbose=False)
        strategy.train(experience, eval_streams=[], reset_optimizer_state=True)
    model.eval()
    found = {"told": [], "found": [], "untold": []}
    with torch.no_grad():
        for number, task in enumerate(test):
            x, y = task.tensors
            logits = torch.cat([model(part) for part in x.split(500)])
            own_classes = slice(firsts[number], firsts[number + 1])
            answer = logits.argmax(1)
            of_task = (answer >= own_classes.start) & (answer < own_classes.stop)
            told = logits[:, own_classes].argmax(1) + own_classes.start
            for key, right in (("told", told == y), ("found", of_task), ("untold", answer == y)):
                found[key].append(float(right.float().mean()))
    return {"stream": name, "method": method, "seed": seed, "epochs": epochs, **found}


def table(content: dict) -> str:
    """Means over tasks, with the deviation over seeds, as Markdown."""
    lines = [
        "| stream | method | told, % | task found, % | untold, % | seeds |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    pairs = {(row["stream"], row["method"]): None for row in content["rows"]}
    for stream, method in pairs:
        rows = [row for row in content["rows"] if (row["stream"], row["method"]) == (stream, method)]
        cells = [
            mean_and_deviation([100 * sum(row[key]) / len(row[key]) for row in rows])
            for key in ("told", "found", "untold")
        ]
        lines.append(f"| {stream} | {method} | {' | '.join(cells)} | {', '.join(str(row['seed']) for row in rows)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the data of the examples")
    parser.add_argument("--streams", nargs="+", choices=STREAMS, default=list(STREAMS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--fast", action="store_true", help="the examples' reduced schedules: to see that it runs")
    parser.add_argument("--output", type=Path, help="JSON; runs that are in it are not made again")
    options = parser.parse_args()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)

    content = {**environment("cpu"), "rows": []}
    content["versions"]["avalanche-lib"] = version("avalanche-lib")
    if options.output and options.output.exists():
        content["rows"] = json.loads(options.output.read_text())["rows"]
    made = {(row["stream"], row["method"], row["seed"]) for row in content["rows"]}
    for seed in options.seeds:
        for stream in options.streams:
            for method in options.methods:
                if (stream, method, seed) in made:
                    continue
                content["rows"].append(run(stream, method, seed, options))
                print(stream, method, seed, *(sum(content["rows"][-1][key]) for key in ("told", "untold")), flush=True)
                if options.output:
                    options.output.write_text(json.dumps(content, indent=1) + "\n")
    print(table(content))


if __name__ == "__main__":
    main()
