#!/usr/bin/env bash
# avalanche-lib 0.6.0 with torch 2.14.1: an epoch of joint training sees samples of small tasks several times.
#
# `JointTraining` is the upper bound that other methods are held against: all tasks at once. One would expect an epoch of
# it to be one pass over the samples of all of them. If samples have task labels, each batch is made of equal shares of
# the tasks, and a task that has fewer samples starts anew until the largest one is through. So tasks weigh the same
# whatever their size, and an epoch has as many samples as the largest task times the number of tasks. Without task labels
# the same data are seen once each. The strategies that train on one task at a time have the same loader, which shows
# there only if an experience has several labels.
# Seen, of two tasks with 1,000 and 100 samples, in batches of 50, in one epoch:
#
#   without task labels: 1100 samples, of the small task 100; with them: 2000 samples, of the small task 1000
#
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 avalanche-lib==0.6.0
cat > "$folder/joint.py" << 'PYTHON'
import warnings

warnings.filterwarnings("ignore")
import torch
from avalanche.benchmarks import benchmark_from_datasets, task_incremental_benchmark
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.training.plugins import SupervisedPlugin
from avalanche.training.supervised import JointTraining
from torch import nn
from torch.utils.data import TensorDataset

SIZES = (1000, 100)


class Samples(TensorDataset):
    """Numbered; the second task's have numbers from 1,000 on."""

    def __init__(self, size, first):
        super().__init__(torch.arange(first, first + size).float()[:, None])
        self.targets = [0] * size

    def __getitem__(self, index):
        return super().__getitem__(index)[0], 0


class Seen(SupervisedPlugin):
    def __init__(self):
        super().__init__()
        self.numbers = []

    def before_forward(self, strategy, **kwargs):
        self.numbers += strategy.mb_x.flatten().tolist()


def one_epoch(is_labelled):
    """How many samples it saw, and how many of the second task."""
    data = [as_classification_dataset(Samples(size, 1000 * index)) for index, size in enumerate(SIZES)]
    benchmark = benchmark_from_datasets(train=data, test=data)
    if is_labelled:
        benchmark = task_incremental_benchmark(benchmark)
    network, seen = nn.Linear(1, 2), Seen()
    JointTraining(
        model=network,
        optimizer=torch.optim.SGD(network.parameters(), 1e-6),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=50,
        train_epochs=1,
        plugins=[seen],
        evaluator=None,
    ).train(benchmark.train_stream)
    return len(seen.numbers), sum(number >= 1000 for number in seen.numbers)


without, labelled = one_epoch(False), one_epoch(True)
print(
    f"without task labels: {without[0]} samples, of the small task {without[1]}; "
    f"with them: {labelled[0]} samples, of the small task {labelled[1]}"
)
assert without == (1100, 100)
assert labelled == (2000, 1000)
PYTHON
"$folder/venv/bin/python" "$folder/joint.py"
