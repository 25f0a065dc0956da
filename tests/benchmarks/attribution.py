"""What relevance of a sample costs, as a multiple of a training step of that sample. No test: run it apart.

    PYTHONPATH=tests/support:examples python tests/benchmarks/attribution.py \
        --networks resnet18 resnet50 vit_b_16 --accelerator cpu

One batch, attributed and trained on in turns in one process: a step is forward, backward and the optimizer's step,
without Lightning's loop around it. Memory is what is made during either and alive at once, taken apart from the times.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from statistics import median

import torch
from benchmark import Benchmark, Rows, markdown, spread
from lightning.pytorch import LightningModule, seed_everything
from measured import NETWORKS, SIZES, TASKS
from peak_memory import PeakMemory
from torch import Tensor

from lightning_rnf import UnitMap
from lightning_rnf.anatomy import supervised
from lightning_rnf.relevance import attribute


def measure(options: argparse.Namespace) -> Rows:
    """A row for each network."""
    device = torch.device("cuda" if options.accelerator in ("auto", "gpu") and torch.cuda.is_available() else "cpu")
    rows = []
    for network in options.networks:
        seed_everything(0, verbose=False)
        make, shape = NETWORKS[network]
        model = make().to(device)
        size = options.batch_size or SIZES[network].batch_size
        batch = torch.rand(size, *shape, device=device), torch.randint(10, (size,), device=device)
        model.heads.activate(TASKS[0])
        units = UnitMap.of(model.eval(), batch)
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        compared: dict[str, Callable[[], object]] = {
            "step": lambda model=model, optimizer=optimizer, batch=batch: _step(model, optimizer, batch),
            "attribution": lambda model=model, units=units, batch=batch: attribute(
                model, units.layers, [batch], supervised
            ),
        }
        seconds = {what: [] for what in compared}
        for number in range(options.rounds + 1):
            order = list(compared) if number % 2 else list(reversed(compared))
            for what in order:
                seconds[what].append(_timed(compared[what], device))
        peaks = {}
        for what, run in compared.items():
            gc.collect()
            with PeakMemory(device) as peak:
                run()
            peaks[what] = peak.after
        of_rounds = {what: found[1:] for what, found in seconds.items()}  # the first one warms up
        rows.append(
            {
                "network": network,
                "batch_size": size,
                **{f"seconds_of_{what}": found for what, found in of_rounds.items()},
                **{f"peak_of_{what}": peak for what, peak in peaks.items()},
            }
        )
    return rows


def _step(model: LightningModule, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor]) -> None:
    model.train()
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()


def _timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds; on a CPU of the process, since other processes may run beside it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    start = clock()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def table(rows: Rows) -> str:
    """A row for each network."""
    return markdown(
        [
            *("network", "batch", "a step, s", "attribution, s", "over a step"),
            *("peak of a step, MB", "peak of attribution, MB", "over a step"),
        ],
        (
            [
                row["network"],
                str(row["batch_size"]),
                *(f"{median(row[f'seconds_of_{what}']):.3f}" for what in ("step", "attribution")),
                spread(
                    [a / b for a, b in zip(row["seconds_of_attribution"], row["seconds_of_step"], strict=True)],
                ),
                *(f"{row[f'peak_of_{what}'] / 1e6:,.0f}" for what in ("step", "attribution")),
                f"{row['peak_of_attribution'] / row['peak_of_step']:.2f}",
            ]
            for row in rows
        ),
    )


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--networks", nargs="+", choices=NETWORKS, default=["mlp", "zenke", "resnet18", "resnet50", "vit_b_16"]
    )
    parser.set_defaults(batch_size=None)
    parser.add_argument("--rounds", type=int, default=3, help="after one that warms up (%(default)s)")


ATTRIBUTION = Benchmark(
    name="attribution",
    title="Attribution",
    columns=(
        "Relevance of all units from one batch, over a training step of the same batch in the same round: the median "
        "of the rounds (the least to the most); on a CPU in time of the process. Peaks: bytes of tensors that were "
        "made during either and alive at once."
    ),
    arguments=arguments,
    quick=["--networks", "mlp", "--rounds", "1", "--batch-size", "16"],
    of_row=["network"],
    once=["--rounds", "1"],
    measure=measure,
    table=table,
)

if __name__ == "__main__":
    ATTRIBUTION.main(__doc__)
