"""What the end of a task costs, as a share of one training epoch. No test: run it apart.

    PYTHONPATH=tests/support:examples python tests/benchmarks/task_end.py --networks mlp --accelerator cpu

Each network has a task of a size of its own (`SIZES`): 50,000 samples and 5,000 for accuracy for the MLP, 4,500 and
500 where images have 32 × 32 pixels, a few hundred where they have 224 × 224. A fit has two epochs: the search comes
between them, the second one is the recovery, and after it the sub-network is settled. The data are clusters that can be
learned, so that the search has something to find. Forward passes are counted in samples and compared with the paper's
linear procedure; the state's size is that of the task's record in a checkpoint.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
from benchmark import Benchmark, Rows, add_data, markdown, spread, trainer
from lightning.pytorch import Callback, LightningModule, seed_everything
from measured import NETWORKS, SIZES, TASKS
from peak_memory import PeakMemory
from time_split import METHODS, REST, TimeSplit
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_rnf import RelevanceFreezing
from lightning_rnf.memory.maskfiles import save
from lightning_rnf.search.cutoff import about
from lightning_rnf.search.ranking import rank
from lightning_rnf.tasks.selection import Selection


def clusters(samples: int, shape: tuple[int, ...], seed: int, task: int = 0) -> TensorDataset:
    """Ten classes, each a direction of its own in much noise; other directions in each task.

    Those of images in colour are of 4 × 4 plain fields: convolutions and pooling lose what single pixels say.
    """
    generator, of_task = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(1000 * task)
    y = torch.randint(10, (samples,), generator=generator)
    x = torch.randn(samples, *shape, generator=generator)
    if shape[0] == 3:
        fields = torch.randn(10, 3, 4, 4, generator=of_task)
        centres = 0.2 * nn.functional.interpolate(fields, size=shape[1:])
    else:
        centres = torch.randn(10, *shape, generator=of_task)
        centres *= 6 / centres[0].numel() ** 0.5
    for number in range(10):  # class by class: the centres of all samples at once take as much room as the data
        x[y == number] += centres[number]
    return TensorDataset(x, y)


SECONDS = ("attribution", "search", "settling")


class EpochClock(Callback):
    """Seconds of the first training epoch: of the whole network."""

    epoch = 0.0

    def on_train_epoch_start(self, *args):
        self.started = time.perf_counter()

    def on_train_epoch_end(self, *args):
        self.epoch = self.epoch or time.perf_counter() - self.started


class Counting(RelevanceFreezing):
    """Times its task's end, the search before a recovery included, and counts the samples that go forward in it.

    Attributes:
        split: seconds by part, of the last task.
        forwards: samples.
        watch: makes a context for the end of a task of this module, and for what comes before its recovery.
    """

    split: TimeSplit
    forwards = 0
    watch: Callable[[LightningModule], AbstractContextManager] = staticmethod(nullcontext)

    @property
    def end(self) -> float:
        """Seconds in all."""
        return sum(self.split.seconds.values())

    def on_train_start(self, trainer, module: LightningModule):
        super().on_train_start(trainer, module)
        self.split, self.forwards = TimeSplit(), 0

    def on_train_epoch_start(self, trainer, module: LightningModule):
        with self.counted(module):
            super().on_train_epoch_start(trainer, module)

    def on_train_end(self, trainer, module: LightningModule):
        with self.counted(module):
            super().on_train_end(trainer, module)

    @contextmanager
    def counted(self, module: LightningModule):
        def count(part, args):
            self.forwards += len(args[0])

        with module.register_forward_pre_hook(count), self.watch(module), self.split:
            yield


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
    options: argparse.Namespace,
    network: str,
    seed: int,
    watch: Callable[[LightningModule], AbstractContextManager],
    **changes: int,
) -> tuple[LightningModule, Counting, float]:
    """Train two epochs and end the task: the model, the callback, and the seconds of the first epoch.

    Args:
        options: with samples of the network's own number where they are None.
        network: its name.
        seed: of weights and order.
        watch: see `Counting`.
        changes: of the Trainer.
    """
    seed_everything(seed, verbose=False)
    options = sized(options, SIZES[network])
    make, shape = NETWORKS[network]
    model, clock = make(), EpochClock()
    model.heads.activate(TASKS[0])
    reference = DataLoader(clusters(options.reference, shape, 2), batch_size=options.batch_size)
    rnf = Counting(reference, reference_samples=options.reference, attribution_samples=options.attributed)
    rnf.watch = watch
    train = DataLoader(clusters(options.samples, shape, 1), batch_size=options.batch_size, shuffle=True)
    trainer(options, [clock, rnf], max_epochs=2, **changes).fit(model, train)
    return model, rnf, clock.epoch


def sized(options: argparse.Namespace, sizes: argparse.Namespace) -> argparse.Namespace:
    """With numbers of samples, those that the command line leaves open of a network's own task."""
    given = {key: value for key, value in vars(options).items() if value is not None}
    return argparse.Namespace(**vars(sizes) | given)


def peak_of_end(options: argparse.Namespace, network: str) -> dict:
    """In a run of its own, with little training: on a CPU what counts memory takes time."""
    watches = []

    def watch(module: LightningModule) -> Watched:
        of_weights = sum(parameter.nbytes for parameter in module.parameters())
        watches.append(Watched(module.device, resident=of_weights > 1e9))
        return watches[-1]

    ended(options, network, 0, watch, limit_train_batches=2)
    peaks = {"attribution": max(one.before for one in watches), "search": max(one.after for one in watches)}
    return {"peak_bytes": peaks, "peak_by": watches[0].by}


def timed(options: argparse.Namespace, network: str, seed: int) -> dict:
    """Train two epochs and end the task."""
    model, rnf, epoch = ended(options, network, seed, nullcontext)
    options = sized(options, SIZES[network])
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
        "seconds_of_parts": rnf.split.seconds,
        "over_epoch": rnf.end / epoch,
        "evaluations": len(record.evaluations),
        "cutoff": record.cutoff,
        "accuracy": record.accuracy,
        "subnetwork_accuracy": record.subnetwork_accuracy,
        "forward_samples": rnf.forwards,
        "reference_epochs": rnf.forwards / options.reference,
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
    for network in options.networks if options.peaks else ():
        peak = peak_of_end(options, network)
        for row in rows:
            if row["network"] == network:
                row |= peak
    return rows


def table(rows: Rows) -> str:
    """Two, with a row for each network, of all seeds: the whole, and where its time goes."""
    of_networks = {row["network"]: [one for one in rows if one["network"] == row["network"]] for row in rows}
    in_all = markdown(
        [
            "network",
            "epoch, s",
            "end, s",
            "end / epoch",
            "attribution, s",
            "search, s",
            "settling, s",
            "evaluations",
            "forward passes, in epochs of the reference data",
            "paper's forward passes / ours",
            "peak of attribution, MB",
            "peak of search, MB",
        ],
        (
            [
                network,
                spread([row["seconds_of_epoch"] for row in runs]),
                spread([row["seconds_of_end"] for row in runs]),
                spread([row["over_epoch"] for row in runs], 3),
                *(spread([row["seconds"].get(part, 0.0) for row in runs]) for part in SECONDS),
                spread([row["evaluations"] for row in runs], 0),
                spread([row["reference_epochs"] for row in runs], 1),
                spread([row["paper_over_ours"] for row in runs], 0),
                *(
                    f"{runs[0]['peak_bytes'][part] / 1e6:.1f}" if "peak_bytes" in runs[0] else "–"
                    for part in ("attribution", "search")
                ),
            ]
            for network, runs in of_networks.items()
        ),
    )
    parts = (*METHODS, REST)
    by_part = markdown(
        ["network", *(f"{part}, s" for part in parts)],
        (
            [network, *(spread([row["seconds_of_parts"].get(part, 0.0) for row in runs]) for part in parts)]
            for network, runs in of_networks.items()
        ),
    )
    return f"{in_all}\n\n{by_part}"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["mlp", "zenke", "resnet18-narrow"])
    add_data(parser, samples=None, reference=None, attributed=None)
    parser.set_defaults(batch_size=None)
    parser.add_argument("--seeds", type=int, default=3, help="how many (%(default)s)")
    parser.add_argument("--no-peaks", dest="peaks", action="store_false", help="times only: memory takes a fit more")


TASK_END = Benchmark(
    name="task_end",
    title="The end of a task",
    columns=(
        "Seconds of a training epoch and of the task's end: attribution and search before the recovery of one epoch, "
        "settling after it, and the rest. Then measured cutoffs, samples that went forward over those of the reference "
        "data, and forward passes of the paper's linear procedure over those that were made, both in samples: the "
        "median of the seeds (the least to the most). Peaks, in a run apart from the times, after four steps: bytes of "
        "tensors that were made during the end and alive at once, until relevance was there and from there on. On a "
        "CPU torch's profiler counts them (the process's own peak would say nothing: it has the training's memory "
        "still), on a GPU torch's allocator. The second table has the same seconds by what is done in them: relevance; "
        "statistics of norms, where they are not found with the head; fits of heads and of rows; accuracy; the audit "
        "of what earlier tasks left; and the rest. A part inside another one is not counted twice."
    ),
    arguments=arguments,
    quick=["--networks", "mlp", "--samples", "256", "--reference", "64", "--attributed", "32", "--seeds", "1"],
    of_row=["network"],
    once=["--seeds", "1", "--no-peaks"],
    measure=measure,
    table=table,
)

if __name__ == "__main__":
    TASK_END.main(__doc__)
