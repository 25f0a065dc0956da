"""What `RelevanceFreezing` costs and keeps beside the peers in Avalanche, on two streams. No test: run it apart.

Avalanche is no dependency of this project, so the peers get an environment of their own, outside of the repository:

    python -m venv ../peers && ../peers/bin/pip install -r tests/benchmarks/peers_requirements.txt -e .
    PYTHONPATH=tests/support:examples ../peers/bin/python tests/benchmarks/peers.py --data FOLDER \
        --output tests/benchmarks/results/peers_cpu.json
    PYTHONPATH=tests/support:examples ../peers/bin/python tests/benchmarks/peers.py --data FOLDER \
        --stream cifar_random --tasks 4 --epochs 6 --seeds 1 --output tests/benchmarks/results/peers_zenke_cpu.json

MNIST-Split, or the tasks of CIFAR-100 in the stream of `cifar_random.py`, ten random classes each, with the network of
Zenke et al. All systems learn the same tasks in the same order from the same samples (a tenth of each task's is held
out: `RelevanceFreezing` has its reference data from there, nobody trains on it), with the same network and initial
weights, Adam 1e-3, batch 128, a new optimizer for each task and one thread. They run in turns in one process: each
learns a task, then each learns the next one. Evaluation is outside of all times; Avalanche runs without loggers and
metrics.

- A step goes from one batch's start to the next one's in the framework's own loop, data loading included: the median of
  each task but the first, over the framework's own naive step in the same turn.
- The task's end is all the rest from the first step to the return of the framework's call: between the last step and
  that return, and between epochs, where a sub-network or what is to be pruned is chosen before the last ones. Naive
  training has some of that, too.
- The state is what is kept because of finished tasks, besides the model: tensors of the plugin, of PackNet its masks;
  ours is the whole state in a checkpoint as it is written, and the file of masks apart.

PackNet and the recovery train a task's last epoch inside of what they keep. Both need an epoch before, so with
``--epochs 1`` they get two, and the table says so; with more than one, all systems train equally long.

Avalanche 0.6 as it is, but for this: on a CPU its Synaptic Intelligence keeps references to the weights in place of
copies, and all its importances are 0; a ``clone`` is put in. Heads are excluded there, since it fails on those without
a gradient. Its PackNet would prune the heads of tasks yet to come, so they are kept out of it, as in the paper.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import logging
import tempfile
import time
import warnings
from abc import ABC, abstractmethod
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import median

import cifar_random
import mnist_split
import torch
from avalanche.benchmarks import benchmark_from_datasets, with_classes_timeline, with_task_labels
from avalanche.benchmarks.utils import DataAttribute, TaskAwareSupervisedClassificationDataset, TaskLabels
from avalanche.models import MultiHeadClassifier, MultiTaskModule
from avalanche.models.packnet import PackNetModel, PackNetPlugin
from avalanche.training.plugins import EWCPlugin, LwFPlugin, SupervisedPlugin, SynapticIntelligencePlugin
from avalanche.training.supervised import Naive
from compared import mean_and_deviation
from experiment import environment
from images import Data
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from run import README, RESULTS, filled
from torch import Tensor, nn

from lightning_rnf import RelevanceFreezing
from lightning_rnf.metrics import AccuracyMatrix, average_accuracy, backward_transfer
from lightning_rnf.streams import TaskDataModule

BATCH_SIZE, FAST_SAMPLES = 128, 8000

# Strengths were chosen on held-out training data of one seed, at one epoch.
EWC_STRENGTH, SI_STRENGTH, LWF_STRENGTH = 1e6, 100.0, 1.0


@dataclass
class Clock:
    """When the steps of one task started and ended."""

    epochs: int
    called: float = field(default_factory=time.perf_counter)
    starts: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    returned: float = 0.0

    def start(self) -> None:
        self.starts.append(time.perf_counter())

    def end(self) -> None:
        self.ends.append(time.perf_counter())

    @property
    def steps(self) -> list[float]:
        """Seconds from start to start, within epochs."""
        length = len(self.starts) // self.epochs
        firsts = range(0, len(self.starts), length)
        return [after - before for first in firsts for before, after in pairwise(self.starts[first : first + length])]

    @property
    def at_end(self) -> float:
        """Seconds after the last step and between epochs."""
        length = len(self.starts) // self.epochs
        firsts = range(length, len(self.starts), length)
        return self.returned - self.ends[-1] + sum(self.starts[first] - self.ends[first - 1] for first in firsts)


class System(ABC):
    """A way to learn one task after the other.

    Args:
        initial: the network to start from, with a head for every task; it is copied.
        stream: the tasks.
        epochs: of each task.
    """

    least_epochs = 1

    def __init__(self, initial: LightningModule, stream: Sequence[TaskDataModule], epochs: int) -> None:
        self.stream = stream
        self.epochs = epochs
        self.model: nn.Module = self.build(deepcopy(initial))

    @abstractmethod
    def build(self, network: LightningModule) -> nn.Module:
        """The network as the framework wants it."""

    @abstractmethod
    def learn(self, task: int, clock: Clock) -> None:
        """Train one task and end it; the clock is told of each step."""

    @abstractmethod
    def tested(self, task: int) -> AbstractContextManager[Callable[[Tensor], Tensor]]:
        """A context that yields the way from images to the task's logits."""

    @abstractmethod
    def kept(self) -> dict[str, int]:
        """Bytes that are kept because of finished tasks."""


class PluginClock(SupervisedPlugin):
    """Avalanche's steps."""

    clock: Clock

    def before_training_iteration(self, strategy, **kwargs):
        self.clock.start()

    def after_training_iteration(self, strategy, **kwargs):
        self.clock.end()


class CallbackClock(Callback):
    """Lightning's steps."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_batch_start(self, *args):
        self.clock.start()

    def on_train_batch_end(self, *args):
        self.clock.end()


# -- Avalanche --------------------------------------------------------------------------------------------------------


def body_of(network: LightningModule) -> nn.Sequential:
    """All but the heads."""
    return network.hidden if hasattr(network, "hidden") else network.body


class MultiTask(MultiTaskModule):
    """The network with Avalanche's own heads."""

    def __init__(self, network: LightningModule, experiences: Iterable) -> None:
        super().__init__()
        self.body = body_of(network)
        self.heads = MultiHeadClassifier(network.heads.in_features, masking=False)
        self.heads.eval()  # so that it doesn't take the tasks for known yet
        for experience, head in zip(experiences, network.heads.tasks.values(), strict=True):
            self.heads.adaptation(experience)
            self.heads.classifiers[str(experience.task_label)].classifier = head.requires_grad_()

    def forward(self, x: Tensor, task_labels: Tensor | None) -> Tensor:
        return self.heads(self.body(x), task_labels)


class PackNetBody(PackNetModel):
    """The network with layers that are pruned and heads that are not."""

    def __init__(self, network: LightningModule) -> None:
        super().__init__(body_of(network))
        self.heads = nn.ModuleList(head.requires_grad_() for head in network.heads.tasks.values())

    def forward(self, x: Tensor, task_labels: Tensor) -> Tensor:
        return self.heads[int(task_labels[0])](super().forward(x, task_labels))


class Avalanche(System):
    """Avalanche's naive strategy, and with one plugin."""

    def __init__(self, initial: LightningModule, stream: Sequence[TaskDataModule], epochs: int) -> None:
        self.experiences = experiences(stream)
        super().__init__(initial, stream, epochs)
        self.plugin = self.method()
        self.steps = PluginClock()  # the last: what other plugins do after a step belongs to it
        self.strategy = Naive(
            model=self.model,
            optimizer=torch.optim.Adam(self.model.parameters(), lr=1e-3),
            train_mb_size=BATCH_SIZE,
            train_epochs=epochs,
            plugins=[plugin for plugin in (self.plugin, self.steps) if plugin is not None],
            evaluator=None,
        )

    def method(self) -> SupervisedPlugin | None:
        return None

    def build(self, network: LightningModule) -> nn.Module:
        return MultiTask(network, self.experiences)

    def learn(self, task: int, clock: Clock) -> None:
        self.steps.clock = clock
        self.strategy.train(self.experiences[task], eval_streams=[], reset_optimizer_state=True)

    @contextmanager
    def tested(self, task: int) -> Iterator[Callable[[Tensor], Tensor]]:
        self.model.eval()
        yield lambda x: self.model(x, torch.full((len(x),), task))

    def kept(self) -> dict[str, int]:
        return {"state": 0}


class ElasticWeightConsolidation(Avalanche):
    def method(self) -> SupervisedPlugin:
        return EWCPlugin(EWC_STRENGTH)

    def kept(self) -> dict[str, int]:
        of_tasks = [*self.plugin.saved_params.values(), *self.plugin.importances.values()]
        return {"state": size(one.data for of_task in of_tasks for one in of_task.values())}


class SynapticIntelligence(Avalanche):
    def method(self) -> SupervisedPlugin:
        return SynapticIntelligencePlugin(SI_STRENGTH, excluded_parameters=["heads"])

    def kept(self) -> dict[str, int]:
        parts = [*self.plugin.ewc_data, *self.plugin.syn_data.values()]
        return {"state": size(one.data for part in parts for one in part.values())}


class LearningWithoutForgetting(Avalanche):
    def method(self) -> SupervisedPlugin:
        return LwFPlugin(LWF_STRENGTH)

    def kept(self) -> dict[str, int]:
        before = self.plugin.lwf.prev_model
        return {"state": size([*before.parameters(), *before.buffers()])}


class PackNet(Avalanche):
    """Each task keeps an equal share of the weights."""

    least_epochs = 2

    def build(self, network: LightningModule) -> nn.Module:
        return PackNetBody(network)

    def method(self) -> SupervisedPlugin:
        return PackNetPlugin(post_prune_epochs=1, prune_proportion=lambda task: 1 - 1 / (len(self.stream) - task))

    def kept(self) -> dict[str, int]:
        return {"state": size(self.model.buffers())}


def experiences(stream: Sequence[TaskDataModule]) -> list:
    """The training data as Avalanche wants it; the samples come from the same data sets as Lightning's."""
    datasets = []
    for number, task in enumerate(stream):
        labels = [DataAttribute([y for _, y in task.train], "targets"), TaskLabels([number] * len(task.train))]
        datasets.append(TaskAwareSupervisedClassificationDataset([task.train], data_attributes=labels))
    benchmark = with_classes_timeline(with_task_labels(benchmark_from_datasets(train=datasets)))
    return list(benchmark.streams["train"])


def repair_synaptic_intelligence() -> None:
    """Let it keep copies of the weights: where they are on the CPU already, ``.cpu()`` makes none."""

    @torch.no_grad()
    def extract_weights(model, target, excluded_parameters):
        for name, parameter in SynapticIntelligencePlugin.allowed_parameters(model, excluded_parameters):
            target[name].data = parameter.detach().cpu().flatten().clone()

    SynapticIntelligencePlugin.extract_weights = staticmethod(extract_weights)


def size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# -- Lightning --------------------------------------------------------------------------------------------------------


class Lightning(System):
    """A Trainer without `RelevanceFreezing`, and with it."""

    def __init__(self, initial: LightningModule, stream: Sequence[TaskDataModule], epochs: int) -> None:
        super().__init__(initial, stream, epochs)
        self.callback = self.method()

    def method(self) -> RelevanceFreezing | None:
        return None

    def build(self, network: LightningModule) -> nn.Module:
        return network

    def learn(self, task: int, clock: Clock) -> None:
        steps = CallbackClock(clock)  # the last, as above
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=self.epochs,
            limit_val_batches=0,
            callbacks=[steps] if self.callback is None else [self.callback, steps],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        self.model.heads.activate(self.stream[task].task)
        clock.called = time.perf_counter()  # a Trainer's making is not its training
        trainer.fit(self.model, datamodule=self.stream[task])

    @contextmanager
    def tested(self, task: int) -> Iterator[Callable[[Tensor], Tensor]]:
        name = self.stream[task].task
        self.model.eval()
        self.model.heads.activate(name)
        with nullcontext() if self.callback is None else self.callback.recall(name, self.model):
            yield self.model

    def kept(self) -> dict[str, int]:
        if self.callback is None:
            return {"state": 0}
        state = io.BytesIO()
        torch.save(self.callback.state_dict(), state)
        with tempfile.TemporaryDirectory() as folder:
            masks = Path(folder) / "masks.safetensors"
            self.callback.save(masks)
            return {"state": len(state.getvalue()), "masks": masks.stat().st_size}


class Default(Lightning):
    def method(self) -> RelevanceFreezing:
        return RelevanceFreezing()


class Recovery(Lightning):
    least_epochs = 2

    def method(self) -> RelevanceFreezing:
        return RelevanceFreezing(recovery_epochs=1, recovery_criterion=0.1)


# -- all of them ------------------------------------------------------------------------------------------------------

SYSTEMS: dict[str, tuple[type[System], str]] = {  # and whose step is its framework's own naive one
    "Avalanche, naive": (Avalanche, "Avalanche, naive"),
    "Avalanche, EWC": (ElasticWeightConsolidation, "Avalanche, naive"),
    "Avalanche, SI": (SynapticIntelligence, "Avalanche, naive"),
    "Avalanche, LwF": (LearningWithoutForgetting, "Avalanche, naive"),
    "Avalanche, PackNet": (PackNet, "Avalanche, naive"),
    "Lightning, naive": (Lightning, "Lightning, naive"),
    "lightning_rnf, default": (Default, "Lightning, naive"),
    "lightning_rnf, recovery": (Recovery, "Lightning, naive"),
}


class Zenke(cifar_random.Zenke):
    """With images as they come: Avalanche runs the body by itself."""

    def forward(self, x: Tensor) -> Tensor:
        return self.heads(self.body(x))


def of_mnist(data: Data, seed: int) -> tuple[list[TaskDataModule], LightningModule]:
    return mnist_split.stream(data, seed), mnist_split.model(width=400, learning_rate=1e-3)


def of_cifar(data: Data, seed: int) -> tuple[list[TaskDataModule], LightningModule]:
    network = Zenke(learning_rate=1e-3).to(memory_format=torch.contiguous_format)
    return cifar_random.stream(data, seed)[1:], network


STREAMS: dict[str, tuple[str, Callable[[Data, int], tuple[list[TaskDataModule], LightningModule]]]] = {
    "mnist_split": ("MNIST-Split", of_mnist),
    "cifar_random": ("CIFAR-100, tasks of ten random classes, the network of Zenke et al.", of_cifar),
}
"""What a table calls it; tasks and a network without heads."""


def run(options: Namespace, seed: int) -> list[dict]:
    """All systems learn the stream in turns."""
    seed_everything(seed, verbose=False)
    _, of_stream = STREAMS[options.stream]
    stream, initial = of_stream(Data(options.data, samples=FAST_SAMPLES if options.fast else None), seed)
    stream = stream[: options.tasks]
    for task in stream:
        initial.heads.add(task.task, task.classes)
    epochs = {name: max(options.epochs, kind.least_epochs) for name, (kind, _) in SYSTEMS.items()}
    systems = {name: kind(initial, stream, epochs[name]) for name, (kind, _) in SYSTEMS.items()}
    matrices = {name: AccuracyMatrix(len(stream)) for name in systems}
    steps: dict[str, list[float]] = {name: [] for name in systems}  # the medians of the tasks
    found: dict[str, dict[str, list]] = {name: {} for name in systems}
    for task in range(len(stream)):
        for name, system in systems.items():
            seed_everything(seed + 1000 * task, verbose=False)  # so that no system draws from what another left
            gc.collect()
            clock = Clock(epochs[name])
            system.learn(task, clock)
            clock.returned = time.perf_counter()
            steps[name].append(median(clock.steps))
            measured = {
                "seconds_before_first_step": clock.starts[0] - clock.called,
                "seconds_at_end": clock.at_end,
                "seconds_in_all": clock.returned - clock.called,
                **{f"bytes_of_{what}": number for what, number in system.kept().items()},
            }
            for what, number in measured.items():
                found[name].setdefault(what, []).append(number)
            for seen in range(task + 1):
                with system.tested(seen) as logits, torch.no_grad():
                    for x, y in stream[seen].test_dataloader():
                        matrices[name].update(logits(x), y, trained=task, task=seen)
    rows = []
    for name, (_, naive) in SYSTEMS.items():
        matrix = matrices[name].compute()
        rows.append(
            {
                "system": name,
                "seed": seed,
                "epochs": epochs[name],
                "milliseconds_of_step": [1000 * seconds for seconds in steps[name]],
                "over_naive": [one / other for one, other in zip(steps[name], steps[naive], strict=True)],
                **found[name],
                "matrix": [[None if entry != entry else entry for entry in row] for row in matrix.tolist()],
                "average": float(average_accuracy(matrix)[-1]),
                "backward_transfer": float(backward_transfer(matrix)),
            }
        )
    return rows


def table(content: dict) -> str:
    """As Markdown: of times the median of seeds and tasks, of accuracies mean and standard deviation of the seeds."""
    lines = [
        "| system | epochs | a step, ms | over own naive (least to most) | the task's end, s | state a task, kB "
        "| state in all, kB | masks in all, kB | average, % | backward transfer, points |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in SYSTEMS:
        runs = [row for row in content["rows"] if row["system"] == name]
        tasks = len(runs[0]["matrix"])
        milliseconds, ratios = (
            [value for row in runs for value in row[key][1:]] for key in ("milliseconds_of_step", "over_naive")
        )
        end = median(sum(row["seconds_at_end"]) / tasks for row in runs)
        state = median(row["bytes_of_state"][-1] for row in runs) / 1000
        masks = median(row["bytes_of_masks"][-1] for row in runs) / 1000 if "bytes_of_masks" in runs[0] else None
        cells = [
            name,
            str(runs[0]["epochs"]),
            f"{median(milliseconds):.2f}",
            f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
            f"{end:.3f}",
            f"{state / tasks:,.1f}",
            f"{state:,.1f}",
            "" if masks is None else f"{masks:,.1f}",
            *(mean_and_deviation([100 * row[key] for row in runs]) for key in ("average", "backward_transfer")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    versions = ", ".join(f"{package} {number}" for package, number in content["versions"].items())
    samples = f", only {FAST_SAMPLES:,} samples" if content["options"]["fast"] else ""
    seeds = len({row["seed"] for row in content["rows"]})
    title, _ = STREAMS[content["options"]["stream"]]
    lines += [
        "",
        f"{title}{samples}, seeds: {seeds}, {content['device']}, threads: {content['threads']}; {versions}.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the data of the examples")
    parser.add_argument("--stream", choices=STREAMS, default="mnist_split", help="(%(default)s)")
    parser.add_argument("--tasks", type=int, help="only so many")
    parser.add_argument("--epochs", type=int, default=4, help="per task (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="how many (%(default)s)")
    parser.add_argument("--fast", action="store_true", help=f"only {FAST_SAMPLES:,} samples: to see that it runs")
    parser.add_argument("--output", type=Path, help="JSON; the table comes beside it, as Markdown")
    options = parser.parse_args()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    repair_synaptic_intelligence()

    content = {**environment("cpu"), "threads": torch.get_num_threads()}
    content["versions"]["avalanche-lib"] = version("avalanche-lib")
    content["options"] = {key: getattr(options, key) for key in ("stream", "tasks", "epochs", "seeds", "fast")}
    content["rows"] = rows = []
    for seed in range(options.seeds):
        rows += run(options, seed)
        if options.output:
            options.output.write_text(json.dumps(content, indent=1) + "\n")
            options.output.with_suffix(".md").write_text(table(content) + "\n")
    if options.output and options.output.resolve().parent == RESULTS.resolve():
        text = filled(README.read_text(encoding="utf-8"), options.output.stem, table(content))
        README.write_text(text, encoding="utf-8")
    print(table(content))


if __name__ == "__main__":
    main()
