"""What the end of a task costs, as a share of one training epoch over 50,000 samples. No test: run it apart.

    PYTHONPATH=tests:examples python tests/benchmarks/task_end.py --networks mlp --accelerator cpu

An MLP of 2 × 1,000 units by default, relevance on 1,000 reference samples, accuracy on 5,000. The data are clusters
that can be learned, so that the search has something to find. Forward passes are counted in samples and compared with
the paper's linear procedure; the state's size is that of the task's record in a checkpoint.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import time
import warnings
from pathlib import Path

import torch
from experiment import environment
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from measured import NETWORKS, TASKS
from torch.utils.data import DataLoader, TensorDataset

from lightning_rnf import RelevanceFreezing
from lightning_rnf.maskfiles import save
from lightning_rnf.search import about, rank


def clusters(samples: int, shape: tuple[int, ...], seed: int) -> TensorDataset:
    """Ten classes, each a direction of its own in much noise."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(10, *shape, generator=torch.Generator().manual_seed(0))
    y = torch.randint(10, (samples,), generator=generator)
    noise = torch.randn(samples, *shape, generator=generator)
    return TensorDataset(noise + 6 * centres[y] / centres[0].numel() ** 0.5, y)


class Clock(Callback):
    """Seconds of the training epoch, and of what comes after it."""

    def on_train_epoch_start(self, *args):
        self.started = time.perf_counter()

    def on_train_epoch_end(self, *args):
        self.epoch = time.perf_counter() - self.started


class Counting(RelevanceFreezing):
    """Times its task's end, and counts the samples that go forward in it."""

    forwards = 0
    end = 0.0

    def on_train_end(self, trainer, module: LightningModule):
        def count(part, args):
            self.forwards += len(args[0])

        with module.register_forward_pre_hook(count):
            started = time.perf_counter()
            super().on_train_end(trainer, module)
            self.end = time.perf_counter() - started


def measure(options: argparse.Namespace, network: str, seed: int) -> dict:
    """Train one epoch and end the task."""
    seed_everything(seed, verbose=False)
    make, shape = NETWORKS[network]
    model, clock = make(), Clock()
    model.heads.activate(TASKS[0])
    reference = DataLoader(clusters(options.reference, shape, 2), batch_size=options.batch_size)
    rnf = Counting(reference, reference_samples=options.reference, attribution_samples=options.attributed)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(
        accelerator=options.accelerator,
        devices=1,
        precision=options.precision,
        max_epochs=1,
        callbacks=[clock, rnf],
        **quiet,
    )
    train = DataLoader(clusters(options.samples, shape, 1), batch_size=options.batch_size, shuffle=True)
    trainer.fit(model, train)
    (record,) = rnf.state.tasks.values()
    units = sum(layer.units for layer in rnf.state.layers)
    file = io.BytesIO()
    torch.save(rnf.state_dict(), file)
    save(rnf.state, options.masks)
    linear = about(rank(record.relevance, {}), "linear") if record.cutoff else 0
    of_paper = min(record.cutoff + 2, linear) * options.reference + options.attributed
    return {
        "network": network,
        "units": units,
        "seconds_of_epoch": clock.epoch,
        "seconds_of_end": rnf.end,
        "seconds": record.seconds,
        "over_epoch": rnf.end / clock.epoch,
        "evaluations": len(record.evaluations),
        "cutoff": record.cutoff,
        "accuracy": [record.accuracy, record.subnetwork_accuracy],
        "forward_samples": rnf.forwards,
        "paper_over_ours": of_paper / rnf.forwards,
        "bytes_of_state": len(file.getvalue()),
        "bytes_of_masks": Path(options.masks).stat().st_size,
        "bytes_of_bits": -(-units // 8),
        "bytes_of_weights": sum(p.numel() * p.element_size() for p in model.parameters()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["mlp"])
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--samples", type=int, default=50_000, help="in the epoch (%(default)s)")
    parser.add_argument("--reference", type=int, default=5000, help="samples for accuracy (%(default)s)")
    parser.add_argument("--attributed", type=int, default=1000, help="of them for relevance (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--masks", default="task_end.safetensors", help="file of masks to write (%(default)s)")
    parser.add_argument("--output", type=Path, help="JSON")
    options = parser.parse_args()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    rows = [measure(options, network, seed) for network in options.networks for seed in range(options.seeds)]
    print(
        "| network | epoch, s | end, s | end / epoch | attribution, search, s | evaluations | paper's forwards / ours |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        parts = ", ".join(f"{row['seconds'][what]:.2f}" for what in ("attribution", "search"))
        print(
            f"| {row['network']} | {row['seconds_of_epoch']:.2f} | {row['seconds_of_end']:.2f} | "
            f"{row['over_epoch']:.3f} | {parts} | {row['evaluations']} | {row['paper_over_ours']:.0f} |"
        )
    Path(options.masks).unlink()
    if options.output:
        chosen = {key: str(value) for key, value in vars(options).items() if key not in {"output", "masks"}}
        threads = torch.get_num_threads()
        content = {**environment(options.accelerator), "threads": threads, "options": chosen, "rows": rows}
        options.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
