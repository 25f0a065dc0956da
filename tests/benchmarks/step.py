"""What a training step costs with `RelevanceFreezing`, as a multiple of a plain Lightning step. No test: run it apart.

    PYTHONPATH=tests:examples python tests/benchmarks/step.py --networks mlp zenke resnet18-narrow --accelerator cpu
    PYTHONPATH=tests:examples python tests/benchmarks/step.py --networks resnet50 vgg16 vit_b_16 --precision bf16-mixed

In several processes, behind ``python -m torch.distributed.run --standalone --nproc-per-node 2`` in ``python``'s place.
Each network without the callback, and with it while a share of its units is frozen. All are measured in turns in one
process; a step goes from one batch's start to the next one's. The peak is of the device's memory.
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
from experiment import environment
from lightning.pytorch import Callback, Trainer, seed_everything
from measured import FIRST_TWO, NETWORKS, TASKS, freeze
from torch.utils.data import DataLoader

from lightning_rnf import RelevanceFreezing

PROCESSES = int(os.environ.get("WORLD_SIZE", 1))
PLAIN = "without the callback"
SHARES = {f"{share:.0%} frozen": share for share in (0.0, 0.5, 0.75, 0.95, 1.0)}
FROZEN = {PLAIN: None, **SHARES, f"{FIRST_TWO} frozen": FIRST_TWO}

MEASURED = ("milliseconds", "over_plain", "peak_MiB")


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


def steps(options: argparse.Namespace, network: str, frozen: float | str | None) -> tuple[list[float], float]:
    """Seconds of each step of one fit, the first ones left out; and the peak of the device's memory in MiB."""
    seed_everything(0, verbose=False)
    make, shape = NETWORKS[network]
    batch = torch.randn(options.batch_size, *shape), torch.randint(10, (options.batch_size,))
    model, clock = make(), Clock()
    rnf = Endless(reference=[tuple(part[:2] for part in batch)])
    if frozen:
        freeze(rnf, model, tuple(part[:2] for part in batch), frozen)
    model.heads.activate(TASKS[1])
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(
        accelerator=options.accelerator,
        devices=PROCESSES,
        strategy=options.strategy,
        precision=options.precision,
        max_epochs=1,
        callbacks=[clock] if frozen is None else [clock, rnf],
        **quiet,
    )
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trainer.fit(model, DataLoader([batch] * (options.warm_up + options.steps + 1), batch_size=None))
    peak = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0
    return [end - start for start, end in pairwise(clock.starts[options.warm_up :])], peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["mlp", "zenke", "resnet18-narrow"])
    parser.add_argument("--states", nargs="+", choices=FROZEN, default=list(FROZEN), help="what is frozen (all)")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5, help="each measures all once (%(default)s)")
    parser.add_argument("--steps", type=int, default=30, help="in a round (%(default)s)")
    parser.add_argument("--warm-up", type=int, default=5, help="steps before those (%(default)s)")
    parser.add_argument("--output", type=Path, help="JSON")
    options = parser.parse_args()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")

    states = list(dict.fromkeys([PLAIN, *options.states]))
    found: dict[tuple[str, str], list[tuple[float, float]]] = {
        (network, state): [] for network in options.networks for state in states
    }
    for _ in range(options.rounds):
        for (network, state), of_rounds in found.items():
            seconds, peak = steps(options, network, FROZEN[state])
            of_rounds.append((median(seconds), peak))
    rows = [
        {
            "network": network,
            "state": state,
            MEASURED[0]: [1000 * seconds for seconds, _ in of_rounds],  # the median of each round
            MEASURED[1]: [one / plain for (one, _), (plain, _) in zip(of_rounds, found[network, PLAIN], strict=True)],
            MEASURED[2]: [peak for _, peak in of_rounds],
        }
        for (network, state), of_rounds in found.items()
    ]
    if os.environ.get("RANK", "0") != "0":
        return
    print(
        "| network | state | a step, ms: median of rounds (least to most) | over plain: median (least to most) | MiB |"
    )
    print("| --- | --- | --- | --- | --- |")
    for row in rows:
        cells = [f"{median(row[key]):.2f} ({min(row[key]):.2f} to {max(row[key]):.2f})" for key in MEASURED[:2]]
        print(f"| {row['network']} | {row['state']} | {' | '.join(cells)} | {max(row[MEASURED[2]]):.0f} |")
    if options.output:
        chosen = {key: str(value) for key, value in vars(options).items() if key != "output"}
        threads = torch.get_num_threads()
        content = {**environment(options.accelerator), "processes": PROCESSES, "threads": threads, "options": chosen}
        options.output.write_text(json.dumps(content | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
