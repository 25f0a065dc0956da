"""How many bytes are kept for each finished task. No test: run it apart.

    PYTHONPATH=tests/support:examples python tests/benchmarks/state.py \
        --networks mlp zenke resnet18-narrow --accelerator cpu

Records of real tasks, with few samples: the size depends on the network, on the number of measured cutoffs (some dozens
of bytes each), and not on the data.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext

from benchmark import Benchmark, Rows, add_data, markdown
from measured import NETWORKS
from task_end import ended, sizes


def measure(options: argparse.Namespace) -> Rows:
    """The state after one task."""
    rows = []
    for network in options.networks:
        model, rnf, _ = ended(options, network, 0, nullcontext)
        units = sum(layer.units for layer in rnf.state.layers)
        rows.append({"network": network, "units": units, **sizes(rnf, model)})
    return rows


def table(rows: Rows) -> str:
    """A row for each network."""
    kinds = ("state", "masks", "bits", "weights")
    return markdown(
        ["network", "units", "state, kB", "masks, kB", "bits alone, kB", "weights, kB", "state / weights"],
        (
            [
                row["network"],
                f"{row['units']:,}",
                *(f"{row[f'bytes_of_{kind}'] / 1000:,.1f}" for kind in kinds),
                f"{row['bytes_of_state'] / row['bytes_of_weights']:.2%}",
            ]
            for row in rows
        ),
    )


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["mlp", "zenke", "resnet18-narrow"])
    add_data(parser, samples=512, reference=256, attributed=64)


STATE = Benchmark(
    name="state",
    title="State of one task",
    columns=(
        "Bytes that are kept for one finished task: the callback's state in a checkpoint (relevance of every unit "
        "included), the file of `rnf.save`, a bit for each unit, and the model's weights to compare with."
    ),
    arguments=arguments,
    quick=["--networks", "mlp", "--samples", "64", "--reference", "64", "--attributed", "32"],
    of_row=["network"],
    once=[],
    measure=measure,
    table=table,
)

if __name__ == "__main__":
    STATE.main(__doc__)
