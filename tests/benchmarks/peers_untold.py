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
from collections.abc import Callable, Sequence

import torch
from avalanche.benchmarks import benchmark_from_datasets, with_classes_timeline, with_task_labels
from avalanche.benchmarks.utils import DataAttribute, TaskAwareSupervisedClassificationDataset, TaskLabels
from avalanche.training.plugins import EWCPlugin, LwFPlugin, ReplayPlugin
from avalanche.training.supervised import Naive
from compared import mean_and_deviation
from lightning.pytorch import seed_everything
from peers import EWC_STRENGTH, LWF_STRENGTH
from peers_streams import Rows, Stream, main, prepared
from torch import Tensor, nn
from torch.utils.data import TensorDataset

REPLAYED = 200


class OneHead(nn.Module):
    """An example's body, and one output layer for the classes of all tasks."""

    def __init__(self, stream: Stream, classes: int) -> None:
        super().__init__()
        self.body = stream.body
        self.head = nn.Linear(stream.network.heads.in_features, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


METHODS = {
    "naive": lambda classes, has_cycle: [],
    "EWC": lambda classes, has_cycle: [EWCPlugin(1e3 if has_cycle else EWC_STRENGTH)],
    "LwF": lambda classes, has_cycle: [LwFPlugin(LWF_STRENGTH)],
    "replay": lambda classes, has_cycle: [ReplayPlugin(mem_size=REPLAYED * classes)],
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
    stream = prepared(name, seed, options.data, fast=options.fast)
    firsts = [sum(task.classes for task in stream.tasks[:number]) for number in range(len(stream.tasks) + 1)]
    train, test = (
        [of_all_classes(getattr(task, part), first) for task, first in zip(stream.tasks, firsts, strict=False)]
        for part in ("train", "test")
    )
    model = OneHead(stream, firsts[-1])
    strategy = Naive(
        model=model,
        optimizer=stream.optimizer(model),
        train_mb_size=stream.training["batch_size"],
        train_epochs=stream.training["epochs"],
        plugins=[*METHODS[method](firsts[-1], stream.has_cycle), *stream.plugins()],
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
    return {"stream": name, "method": method, "seed": seed, "epochs": stream.training["epochs"], **found}


def mean_of(key: str) -> Callable[[Rows], str]:
    """Over tasks and seeds, with the deviation over seeds."""
    return lambda rows: mean_and_deviation([100 * sum(row[key]) / len(row[key]) for row in rows])


COLUMNS = {"told, %": mean_of("told"), "task found, %": mean_of("found"), "untold, %": mean_of("untold")}

if __name__ == "__main__":
    main(__doc__, METHODS, run, COLUMNS, seeds=(0, 1, 2))
