"""Avalanche's methods where tests are told the task, on streams of the examples. No test: run it apart.

In the environment of `peers.py`, with ``-e '.[examples]'``:

    PYTHONPATH=tests/support:examples ../peers/bin/python tests/benchmarks/peers_told.py --data FOLDER \
        --streams mnist_permuted cifar_resnet_narrow --output tests/benchmarks/results/peers_told_cpu.json

Tasks, samples, order of classes, body, optimizer, epochs and batch size are those of the example; a tenth of the
training data is held out there, and here, too. Each task has a head of its own; float32. Strengths are those of
`peers.py`, which were chosen for MNIST-Split; EWC's makes the training of the ResNet diverge, so where SGD has a cycle
of the learning rate it gets a weaker one. Nothing else was chosen for these streams. `joint` learns all
tasks at once, in as many steps as all tasks take elsewhere. PackNet keeps an equal share of the weights for each task,
and trains the second half of a task's epochs inside of what it keeps, as the defaults of `RelevanceFreezing` do; unlike
these it is told how many tasks there will be. With `whole kernels` it keeps the kernels of the largest norm, all
weights between two channels, and gives the others away (but for the one at the cut): so one sees what it gains by
choosing weights one by one.

Avalanche 0.6 as it is, but for Synaptic Intelligence, as in `peers.py`, and PackNet in the ResNet, which without these
would not run or would forget: a bias that is None is none, each task has norms of its own (with those of the first
task the second one's training diverged at this learning rate, in the one seed that was run), and frozen weights are put
back after each step, since weight decay moves them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial

import torch
from avalanche.models.packnet import PackNetModule, PackNetPlugin, WeightAndBiasPackNetModule
from avalanche.training.plugins import EWCPlugin, LwFPlugin, SupervisedPlugin, SynapticIntelligencePlugin
from avalanche.training.supervised import JointTraining, Naive
from compared import mean_and_deviation
from experiment import add_heads
from lightning.pytorch import seed_everything
from peers import (
    EWC_STRENGTH,
    LWF_STRENGTH,
    SI_STRENGTH,
    MultiTask,
    PackNetBody,
    experiences,
    repair_synaptic_intelligence,
    size,
)
from peers_streams import Rows, Stream, main, prepared
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_rnf.metrics import AccuracyMatrix, average_accuracy, forgetting

WHOLE_KERNELS = "PackNet, whole kernels"
METHODS: dict[str, Callable[[Stream], list[SupervisedPlugin]]] = {
    "naive": lambda stream: [],
    "joint": lambda stream: [],
    "EWC": lambda stream: [EWCPlugin(1e3 if stream.has_cycle else EWC_STRENGTH)],
    "SI": lambda stream: [SynapticIntelligencePlugin(SI_STRENGTH, excluded_parameters=["heads"])],
    "LwF": lambda stream: [LwFPlugin(LWF_STRENGTH)],
    "PackNet": lambda stream: [
        PackNetPlugin(max(1, stream.training["epochs"] // 2), lambda task: 1 - 1 / (len(stream.tasks) - task)),
        KeptInPlace(),
    ],
}
METHODS[WHOLE_KERNELS] = METHODS["PackNet"]


class Joint(JointTraining):
    """With batches of all tasks as they come: its own loader gives each task the same share, and repeats small ones."""

    def make_train_dataloader(self, shuffle: bool = True, **kwargs) -> None:
        data = self.adapted_dataset
        self.dataloader = DataLoader(data, self.train_mb_size, shuffle=shuffle, collate_fn=data.collate_fn)


class OwnNorms(PackNetModule):
    """A batch norm for each task."""

    def __init__(self, norm: nn.BatchNorm2d, tasks: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(deepcopy(norm) for _ in range(tasks))

    def forward(self, x: Tensor) -> Tensor:
        return self.norms[self.active_task](x)

    def _prune(self, prune_proportion: float) -> None:
        pass

    def _freeze_pruned(self) -> None:
        pass

    def _activate_task(self, task_id: int) -> None:
        pass


class KeptInPlace(SupervisedPlugin):
    """Puts the weights of finished tasks back after each step."""

    def before_training_epoch(self, strategy, **kwargs):
        self.before = [
            (layer, layer.wrappee.weight.detach().clone(), layer.task_index < layer.task_count)
            for layer in strategy.model.modules()
            if isinstance(layer, WeightAndBiasPackNetModule)
        ]

    @torch.no_grad()
    def after_update(self, strategy, **kwargs):
        for layer, weight, is_frozen in self.before:
            layer.wrappee.weight.copy_(torch.where(is_frozen, weight, layer.wrappee.weight))


def by_kernels(layer: WeightAndBiasPackNetModule) -> Tensor:
    """Places of the weights that may be given away, in the flattened weight, the smallest kernels first."""
    weight = layer.wrappee.weight.detach()
    squares = weight.square().flatten(2).sum(2) if weight.ndim > 2 else weight.square()
    norms = squares.view(*squares.shape, *[1] * (weight.ndim - 2)).expand_as(weight)
    order = torch.argsort(norms.flatten(), stable=True)
    return order[layer.unfrozen_mask.flatten()[order]]


def of_packnet(stream: Stream, *, whole_kernels: bool) -> PackNetBody:
    """The network with layers that are pruned."""
    norms = [name for name, module in stream.body.named_modules() if isinstance(module, nn.BatchNorm2d)]
    for name in norms:
        stream.body.set_submodule(name, OwnNorms(stream.body.get_submodule(name), len(stream.tasks)))
    model = PackNetBody(stream.network)
    for layer in model.modules():
        if isinstance(layer, WeightAndBiasPackNetModule):
            layer.has_bias = layer.wrappee.bias is not None
            if whole_kernels:
                layer._rank_prunable = partial(by_kernels, layer)
    return model


def kept(method: str, strategy: Naive, plugin: SupervisedPlugin | None) -> int:
    """Bytes that are kept because of finished tasks, besides the model."""
    if method == "EWC":
        of_tasks = [*plugin.saved_params.values(), *plugin.importances.values()]
        return size(one.data for of_task in of_tasks for one in of_task.values())
    if method == "SI":
        return size(one.data for part in (*plugin.ewc_data, *plugin.syn_data.values()) for one in part.values())
    if method == "LwF":
        before = plugin.lwf.prev_model
        return size([*before.parameters(), *before.buffers()])
    if method.startswith("PackNet"):
        masks = (layer for layer in strategy.model.modules() if isinstance(layer, WeightAndBiasPackNetModule))
        norms = (layer for layer in strategy.model.modules() if isinstance(layer, OwnNorms))
        return size(
            [*(layer.task_index for layer in masks), *(value for one in norms for value in one.state_dict().values())]
        )
    return 0


def run(name: str, method: str, seed: int, options: argparse.Namespace) -> dict:
    """One method on one stream."""
    stream = prepared(name, seed, options.data, fast=options.fast)
    add_heads(stream.network, stream.tasks)
    tasks = experiences(stream.tasks)
    if method.startswith("PackNet"):
        model: nn.Module = of_packnet(stream, whole_kernels=method == WHOLE_KERNELS)
    else:
        model = MultiTask(stream.network, tasks)
    own = METHODS[method](stream)
    strategy = (Joint if method == "joint" else Naive)(
        model=model,
        optimizer=stream.optimizer(model),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=stream.training["batch_size"],
        train_epochs=stream.training["epochs"],
        plugins=[*own, *stream.plugins()],
        evaluator=None,
    )
    matrix = AccuracyMatrix(len(tasks))
    seconds = 0.0
    for number, task in enumerate(tasks):
        seed_everything(seed + 1000 * number, verbose=False)
        started = time.perf_counter()
        if method != "joint":
            strategy.train(task, eval_streams=[], reset_optimizer_state=True)
        elif number == 0:  # then it has learned all of them
            strategy.train(tasks, eval_streams=[])
        seconds += time.perf_counter() - started
        model.eval()
        with torch.no_grad():
            for seen in range(number + 1):
                for x, y in stream.tasks[seen].test_dataloader():
                    matrix.update(model(x, torch.full((len(x),), seen)), y, trained=number, task=seen)
    found = matrix.compute()
    return {
        "stream": name,
        "method": method,
        "seed": seed,
        "epochs": stream.training["epochs"],
        "seconds": round(seconds, 1),
        "bytes": kept(method, strategy, own[0] if own else None),
        "matrix": [[None if entry != entry else round(entry, 6) for entry in row] for row in found.tolist()],
        "average": float(average_accuracy(found)[-1]),
        "forgetting": float(forgetting(found)),
    }


def mean_of(key: str) -> Callable[[Rows], str]:
    return lambda rows: mean_and_deviation([100 * row[key] for row in rows])


def minutes(seconds: Sequence[float]) -> str:
    """The mean; runs that were paused have none."""
    return f"{sum(seconds) / len(seconds) / 60:.0f}" if seconds else ""


COLUMNS: dict[str, Callable[[Rows], str]] = {
    "average, %": mean_of("average"),
    "forgetting, points": mean_of("forgetting"),
    "bytes a task, kB": lambda rows: f"{rows[0]['bytes'] / len(rows[0]['matrix']) / 1000:,.0f}",
    "minutes": lambda rows: minutes([row["seconds"] for row in rows if row["seconds"]]),
}

if __name__ == "__main__":
    repair_synaptic_intelligence()
    main(__doc__, METHODS, run, COLUMNS, seeds=(1, 2, 3))
