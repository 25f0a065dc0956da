"""What the end of a task costs, as a share of one training epoch over 50,000 samples. No test: run it apart.

    PYTHONPATH=tests/support:examples python tests/benchmarks/task_end.py --networks mlp --accelerator cpu

An MLP of 2 × 1,000 units by default, relevance on 1,000 reference samples, accuracy on 5,000. The data are clusters
that can be learned, so that the search has something to find. Forward passes are counted in samples and compared with
the paper's linear procedure; the state's size is that of the task's record in a checkpoint.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
from benchmark import Benchmark, Rows, add_data, markdown, spread, trainer
from lightning.pytorch import Callback, LightningModule, seed_everything
from measured import NETWORKS, TASKS
from peak_memory import PeakMemory
from torch.utils.data import DataLoader, TensorDataset

from lightning_rnf import RelevanceFreezing
from lightning_rnf.memory.maskfiles import save
from lightning_rnf.search.cutoff import about
from lightning_rnf.search.ranking import rank
from lightning_rnf.tasks.selection import Selection


def clusters(samples: int, shape: tuple[int, ...], seed: int, task: int = 0) -> TensorDataset:
    """Ten classes, each a direction of its own in much noise; other directions in each task."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(10, *shape, generator=torch.Generator().manual_seed(1000 * task))
    y = torch.randint(10, (samples,), generator=generator)
    noise = torch.randn(samples, *shape, generator=generator)
    return TensorDataset(noise + 6 * centres[y] / centres[0].numel() ** 0.5, y)


class EpochClock(Callback):
    """Seconds of the training epoch."""

    def on_train_epoch_start(self, *args):
        self.started = time.perf_counter()

    def on_train_epoch_end(self, *args):
        self.epoch = time.perf_counter() - self.started


class Counting(RelevanceFreezing):
    """Times its task's end, and counts the samples that go forward in it.

    Attributes:
        end: seconds.
        forwards: samples.
        watch: makes a context for the end of a task of this module.
    """

    end = 0.0
    forwards = 0
    watch: Callable[[LightningModule], AbstractContextManager] = staticmethod(nullcontext)

    def on_train_end(self, trainer, module: LightningModule):
        self.forwards = 0

        def count(part, args):
            self.forwards += len(args[0])

        with module.register_forward_pre_hook(count), self.watch(module):
            started = time.perf_counter()
            super().on_train_end(trainer, module)
            self.end = time.perf_counter() - started


class Watched(PeakMemory):
    """The peak of a task's end, with a mark where relevance is there."""

    def __enter__(self):
        attribute = Selection.attribute

        def marked(*args, **kwargs):
            found = attribute(*args, **kwargs)
            self.mark()
            return found

        self.patched = patch.object(Selection, "attribute", marked)
        self.patched.start()
        return super().__enter__()

    def __exit__(self, *args):
        super().__exit__(*args)
        self.patched.stop()


def ended(
    options: argparse.Namespace, network: str, seed: int, watch: Callable[[LightningModule], AbstractContextManager]
) -> tuple[LightningModule, Counting, float]:
    """Train one epoch and end the task: the model, the callback, and the seconds of the epoch."""
    seed_everything(seed, verbose=False)
    make, shape = NETWORKS[network]
    model, clock = make(), EpochClock()
    model.heads.activate(TASKS[0])
    reference = DataLoader(clusters(options.reference, shape, 2), batch_size=options.batch_size)
    rnf = Counting(reference, reference_samples=options.reference, attribution_samples=options.attributed)
    rnf.watch = watch
    train = DataLoader(clusters(options.samples, shape, 1), batch_size=options.batch_size, shuffle=True)
    trainer(options, [clock, rnf]).fit(model, train)
    return model, rnf, clock.epoch


def peak_of_end(options: argparse.Namespace, network: str) -> PeakMemory:
    """In a run of its own: on a CPU what counts memory takes time."""
    watches = []

    def watch(module: LightningModule) -> Watched:
        watches.append(Watched(module.device))
        return watches[0]

    ended(options, network, 0, watch)
    return watches[0]


def timed(options: argparse.Namespace, network: str, seed: int) -> dict:
    """Train one epoch and end the task."""
    model, rnf, epoch = ended(options, network, seed, nullcontext)
    (record,) = rnf.state.tasks.values()
    linear = about(rank(record.relevance, {}), "linear") if record.cutoff else 0
    of_paper = min(record.cutoff + 2, linear) * options.reference + options.attributed
    return {
        "network": network,
        "seed": seed,
        "units": sum(layer.units for layer in rnf.state.layers),
        "seconds_of_epoch": epoch,
        "seconds_of_end": rnf.end,
        "seconds": record.seconds,
        "over_epoch": rnf.end / epoch,
        "evaluations": len(record.evaluations),
        "cutoff": record.cutoff,
        "accuracy": [record.accuracy, record.subnetwork_accuracy],
        "forward_samples": rnf.forwards,
        "paper_over_ours": of_paper / rnf.forwards,
        **sizes(rnf, model),
    }


def sizes(rnf: RelevanceFreezing, model: LightningModule) -> dict[str, int]:
    """Bytes of the state in a checkpoint, of the file of masks, of its bits alone, and of the model."""
    file = io.BytesIO()
    torch.save(rnf.state_dict(), file)
    with tempfile.TemporaryDirectory() as folder:
        save(rnf.state, Path(folder) / "masks.safetensors")
        masks = (Path(folder) / "masks.safetensors").stat().st_size
    return {
        "bytes_of_state": len(file.getvalue()),
        "bytes_of_masks": masks,
        "bytes_of_bits": -(-sum(layer.units for layer in rnf.state.layers) // 8) * len(rnf.state.tasks),
        "bytes_of_weights": sum(parameter.nbytes for parameter in model.parameters()),
    }


def measure(options: argparse.Namespace) -> Rows:
    """Each network with each seed; the memory once for each network."""
    rows = [timed(options, network, seed) for seed in range(options.seeds) for network in options.networks]
    for network in options.networks:
        peak = peak_of_end(options, network)
        for row in rows:
            if row["network"] == network:
                row |= {"peak_bytes": {"attribution": peak.before, "search": peak.after}, "peak_by": peak.by}
    return rows


def table(rows: Rows) -> str:
    """A row for each network: of all seeds."""
    header = [
        "network",
        "epoch, s",
        "end, s",
        "end / epoch",
        "attribution, s",
        "search, s",
        "evaluations",
        "paper's forward passes / ours",
        "peak of attribution, MB",
        "peak of search, MB",
    ]
    of_networks = {row["network"]: [one for one in rows if one["network"] == row["network"]] for row in rows}
    return markdown(
        header,
        (
            [
                network,
                spread([row["seconds_of_epoch"] for row in runs]),
                spread([row["seconds_of_end"] for row in runs]),
                spread([row["over_epoch"] for row in runs], 3),
                *(spread([row["seconds"][part] for row in runs]) for part in ("attribution", "search")),
                spread([row["evaluations"] for row in runs], 0),
                spread([row["paper_over_ours"] for row in runs], 0),
                *(f"{runs[0]['peak_bytes'][part] / 1e6:.1f}" for part in ("attribution", "search")),
            ]
            for network, runs in of_networks.items()
        ),
    )


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["mlp"])
    add_data(parser, samples=50_000, reference=5000, attributed=1000)
    parser.add_argument("--seeds", type=int, default=3, help="how many (%(default)s)")


TASK_END = Benchmark(
    name="task_end",
    title="The end of a task",
    columns=(
        "Seconds of a training epoch and of the task's end after it, the end's two parts, measured cutoffs, and "
        "forward passes of the paper's linear procedure over those that were made, both in samples: the median of the "
        "seeds (the least to the most). Peaks, in a run apart from the times: bytes of tensors that were made during "
        "the end and alive at once, until relevance was there and from there on. On a CPU torch's profiler counts them "
        "(the process's own peak would say nothing: it has the training's memory still), on a GPU torch's allocator."
    ),
    arguments=arguments,
    quick=["--samples", "256", "--reference", "64", "--attributed", "32", "--seeds", "1"],
    measure=measure,
    table=table,
)

if __name__ == "__main__":
    TASK_END.main(__doc__)
