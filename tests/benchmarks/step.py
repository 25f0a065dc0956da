"""What a training step costs with `RelevanceFreezing`, as a multiple of a plain Lightning step. No test: run it apart.

    PYTHONPATH=tests/support:examples python tests/benchmarks/step.py \
        --networks mlp zenke resnet18-narrow --accelerator cpu
    PYTHONPATH=tests/support:examples python tests/benchmarks/step.py \
        --networks resnet50 vgg16 vit_b_16 --precision bf16-mixed

In several processes, behind ``python -m torch.distributed.run --standalone --nproc-per-node 2`` in ``python``'s place.
Each network without the callback, and with it while a share of its units is frozen. All are measured in turns in one
process; a step goes from one batch's start to the next one's. The peak is of the device's memory.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

import torch
from benchmark import PROCESSES, Benchmark, Rows, markdown, spread, trainer
from lightning.pytorch import Callback, LightningModule, seed_everything
from measured import FIRST_TWO, NETWORKS, TASKS, freeze
from torch.utils.data import DataLoader

from lightning_rnf import RelevanceFreezing
from lightning_rnf.freezing.freezer import elasticities
from lightning_rnf.memory.state import FreezeState

PLAIN = "without the callback"
SHARES = {f"{share:.0%} frozen": share for share in (0.0, 0.5, 0.75, 0.95, 1.0)}
FROZEN = {PLAIN: None, **SHARES, f"{FIRST_TWO} frozen": FIRST_TWO}


class Endless(RelevanceFreezing):
    """Does not end its task: a step is measured, not attribution and search."""

    def on_train_end(self, *args):
        pass


class Clock(Callback):
    """Notes when batches start, with the device's work done; and which parameters are trained."""

    def __init__(self):
        self.starts = []
        self.trained = []

    def on_train_start(self, trainer, module):
        self.trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]

    def on_train_batch_start(self, trainer, module, *args):
        if module.device.type == "cuda":
            torch.cuda.synchronize()
        self.starts.append(time.perf_counter())

    def seconds(self, warm_up: int) -> list[float]:
        """Of each step between two starts, the first ones left out."""
        return [end - start for start, end in pairwise(self.starts[warm_up:])]


@dataclass(frozen=True)
class Fit:
    """What one fit has shown.

    Attributes:
        seconds: of a step, the median.
        peak: of the device's memory, in bytes; 0 on a CPU.
        gradients: bytes of the gradients of all parameters that are trained: what DDP sends around.
        free: those of them that belong to free rows.
    """

    seconds: float
    peak: int
    gradients: int
    free: int


def fit(options: argparse.Namespace, network: str, frozen: float | str | None) -> Fit:
    """Train with so much frozen; None: without the callback."""
    seed_everything(0, verbose=False)
    make, shape = NETWORKS[network]
    batch = torch.randn(options.batch_size, *shape), torch.randint(10, (options.batch_size,))
    model, clock = make(), Clock()
    rnf = Endless(reference=[tuple(part[:2] for part in batch)], criterion=0.5)  # of two samples one weighs as much
    if frozen:
        freeze(rnf, model, tuple(part[:2] for part in batch), frozen)
    model.heads.activate(TASKS[1])
    one = trainer(
        options,
        [clock] if frozen is None else [clock, rnf],
        devices=PROCESSES,
        strategy=options.strategy,
        use_distributed_sampler=False,  # each process makes all of the steps
    )
    device = one.strategy.root_device
    # There already, so that no copy from the host is measured, which would hide a part of what a step costs.
    batch = batch[0].to(device), batch[1].to(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # refused before the first tensor is on the device
    one.fit(model, DataLoader([batch] * (options.warm_up + options.steps + 1), batch_size=None))
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return Fit(median(clock.seconds(options.warm_up)), peak, *bytes_of_gradients(model, clock.trained, rnf.state))


def bytes_of_gradients(model: LightningModule, trained: list[str], state: FreezeState) -> tuple[int, int]:
    """Of the trained parameters, and of their rows that are free: counted from the masks."""
    factors = elasticities(state)
    in_all = of_free = 0
    for name in trained:
        size = model.get_parameter(name).nbytes
        factor = factors.get(name, torch.ones(()))
        in_all += size
        of_free += size // factor.numel() * int(factor.count_nonzero())
    return in_all, of_free


def measure(options: argparse.Namespace) -> Rows:
    """Every network in every state, in each round once; every other round the other way round."""
    states = list(dict.fromkeys([PLAIN, *options.states]))
    found: dict[tuple[str, str], list[Fit]] = {(network, state): [] for network in options.networks for state in states}
    for number in range(options.rounds):
        for network, state in reversed(found) if number % 2 else found:
            found[network, state].append(fit(options, network, FROZEN[state]))
    return [
        {
            "network": network,
            "state": state,
            "milliseconds": [1000 * one.seconds for one in fits],  # the median of each round
            "over_plain": [one.seconds / plain.seconds for one, plain in zip(fits, found[network, PLAIN], strict=True)],
            "peak_MiB": [one.peak / 2**20 for one in fits],
            "bytes_of_gradients": fits[0].gradients,
            "bytes_of_free_rows": fits[0].free,
        }
        for (network, state), fits in found.items()
    ]


def table(rows: Rows) -> str:
    """A row for each network and state."""
    header = ["network", "state", "a step, ms", "over plain", "peak, MiB", "gradients, MB", "of free rows, MB"]
    return markdown(
        header,
        (
            [
                row["network"],
                row["state"],
                spread(row["milliseconds"]),
                spread(row["over_plain"]),
                f"{max(row['peak_MiB']):.0f}" if max(row["peak_MiB"]) else "–",
                f"{row['bytes_of_gradients'] / 1e6:.2f}",
                f"{row['bytes_of_free_rows'] / 1e6:.2f}",
            ]
            for row in rows
        ),
    )


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["mlp", "zenke", "resnet18-narrow"])
    parser.add_argument("--states", nargs="+", choices=FROZEN, default=list(FROZEN), help="what is frozen (all)")
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--rounds", type=int, default=5, help="each measures all once (%(default)s)")
    parser.add_argument("--steps", type=int, default=30, help="in a round (%(default)s)")
    parser.add_argument("--warm-up", type=int, default=5, help="steps before those (%(default)s)")


STEP = Benchmark(
    name="step",
    title="Training steps",
    columns=(
        "Each round's median step, and that over the median of the plain Lightning step in the same round: the median "
        "of the rounds (the least to the most). The peak is of a GPU's memory. Gradients: bytes of those of all "
        "parameters that are trained, which DDP sends around in each step, and of their free rows, which alone are "
        "not zero; both counted from the masks."
    ),
    arguments=arguments,
    quick=["--networks", "mlp", "--rounds", "1", "--steps", "2", "--warm-up", "1", "--batch-size", "8"],
    of_row=["network", "state"],
    once=["--rounds", "1"],
    measure=measure,
    table=table,
)

if __name__ == "__main__":
    STEP.main(__doc__)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
