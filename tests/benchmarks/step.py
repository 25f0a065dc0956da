"""What a training step costs with `RelevanceFreezing`, as a multiple of a plain Lightning step. No test: run it apart.

    PYTHONPATH=tests:examples python tests/benchmarks/step.py --strategies auto ddp --output step.json

In several processes, behind ``python -m torch.distributed.run --standalone --nproc-per-node 2`` in ``python``'s place.
A ResNet-18 for 32 × 32 images under SGD: without the callback, and with it while none, half and three quarters of the
units are frozen. All are measured in turns in one process; a step goes from one batch's start to the next one's.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
import warnings
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
from cifar_resnet import ResNet18
from experiment import environment
from lightning.pytorch import Callback, Trainer, seed_everything
from records import bare_record
from torch.utils.data import DataLoader

from lightning_rnf import RelevanceFreezing, UnitMap

PROCESSES = int(os.environ.get("WORLD_SIZE", 1))
PLAIN = "without the callback"
FROZEN = {PLAIN: None, "nothing frozen": 0.0, "half of the units frozen": 0.5, "three quarters frozen": 0.75}

MEASURED = ("milliseconds", "over_plain")


class Endless(RelevanceFreezing):
    """Does not end its task: a step is measured, not attribution and search."""

    def on_train_end(self, *args):
        pass


class Clock(Callback):
    """Notes when batches start, with the device's work done."""

    def __init__(self):
        self.starts = []

    def on_train_batch_start(self, *args):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.starts.append(time.perf_counter())


def steps(options: argparse.Namespace, strategy: str, frozen: float | None) -> list[float]:
    """Seconds of each step of one fit, the first ones left out."""
    seed_everything(0, verbose=False)
    batch = torch.randn(options.batch_size, 3, 32, 32), torch.randint(10, (options.batch_size,))
    model, clock = ResNet18(options.width), Clock()
    for task in ("old", "new"):
        model.heads.add(task, 10)
    rnf = Endless(reference=[batch])
    if frozen:
        model.heads.activate("old")
        units = UnitMap.of(model.eval(), batch)
        relevant = {layer.name: torch.randperm(layer.units) < frozen * layer.units for layer in units.layers}
        statistics = {name: value.clone() for name, value in model.named_buffers()}
        rnf.state.add(bare_record(units, relevant, statistics), units)
    model.train().heads.activate("new")
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(
        accelerator=options.accelerator,
        devices=PROCESSES,
        strategy=strategy,
        precision=options.precision,
        max_epochs=1,
        callbacks=[clock] if frozen is None else [clock, rnf],
        **quiet,
    )
    trainer.fit(model, DataLoader([batch] * (options.warm_up + options.steps + 1), batch_size=None))
    return [end - start for start, end in pairwise(clock.starts[options.warm_up :])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--strategies", nargs="+", default=["auto"])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5, help="each measures all once (%(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="in a round (%(default)s)")
    parser.add_argument("--warm-up", type=int, default=10, help="steps before those (%(default)s)")
    parser.add_argument("--output", type=Path, help="JSON")
    options = parser.parse_args()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")

    medians = {(strategy, name): [] for strategy in options.strategies for name in FROZEN}
    for _ in range(options.rounds):
        for (strategy, name), found in medians.items():
            found.append(median(steps(options, strategy, FROZEN[name])))
    rows = [
        {
            "strategy": strategy,
            "network": name,
            MEASURED[0]: [1000 * one for one in found],  # the median of each round
            MEASURED[1]: [one / plain for one, plain in zip(found, medians[strategy, PLAIN], strict=True)],
        }
        for (strategy, name), found in medians.items()
    ]
    if os.environ.get("RANK", "0") != "0":
        return
    print("| strategy | network | a step, ms: median of rounds (least to most) | over plain: median (least to most) |")
    print("| --- | --- | --- | --- |")
    for row in rows:
        cells = [f"{median(row[key]):.2f} ({min(row[key]):.2f} to {max(row[key]):.2f})" for key in MEASURED]
        print(f"| {row['strategy']} | {row['network']} | {' | '.join(cells)} |")
    if options.output:
        chosen = {key: str(value) for key, value in vars(options).items() if key != "output"}
        content = {**environment(options.accelerator), "processes": PROCESSES, "options": chosen, "rows": rows}
        options.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
