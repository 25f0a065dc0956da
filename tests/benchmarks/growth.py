"""How the costs grow with the units of a network and with finished tasks. No test: run it apart.

    PYTHONPATH=tests/support:examples python tests/benchmarks/growth.py --accelerator cpu

Over the units: an MLP of two hidden layers, of which the second has always the same width, so that a unit has the same
number of weights and a forward pass takes time in proportion to the units: what the search adds is seen beyond that.
Over the tasks: one network learns one after the other, each with a ration, so that free units are left to the last; an
MLP, and those that ``--networks`` names.
Rounds go through all of them in turns.
"""

from __future__ import annotations

import argparse
import math
import time
from itertools import pairwise
from pathlib import Path
from statistics import linear_regression, median

import torch
from benchmark import Benchmark, Rows, add_data, markdown, spread, trainer
from lightning.pytorch import LightningModule, seed_everything
from measured import ADAM, NETWORKS, SIZES, TASKS, Network
from step import Clock
from task_end import Counting, clusters, sized, sizes
from torch import nn
from torch.utils.data import DataLoader

from lightning_rnf.report.figures import new_figure

INPUTS, SECOND = 64, 50
SIZE = argparse.Namespace(samples=2000, reference=1000, attributed=200, batch_size=128)  # of the MLP's tasks
MLP = "mlp of --width"
OF_RECALL = ("entry", "forward")


def mlp(units: int) -> Network:
    """So many units in two hidden layers."""
    first = units - SECOND
    return Network(
        nn.Sequential(nn.Linear(INPUTS, first), nn.ReLU(), nn.Linear(first, SECOND), nn.ReLU()), SECOND, ADAM
    )


def loader(
    options: argparse.Namespace,
    samples: int,
    seed: int,
    task: int = 0,
    shuffle: bool = False,
    shape: tuple[int, ...] = (INPUTS,),
) -> DataLoader:
    return DataLoader(clusters(samples, shape, seed, task), batch_size=options.batch_size, shuffle=shuffle)


def with_units(options: argparse.Namespace, units: int, seed: int) -> dict:
    """One task's end with so many units."""
    seed_everything(seed, verbose=False)
    options = sized(options, SIZE)
    model, clock = mlp(units), Clock()
    model.heads.activate(TASKS[0])
    rnf = Counting(loader(options, options.reference, 2), attribution_samples=options.attributed)
    trainer(options, [clock, rnf]).fit(model, loader(options, options.samples, 1, shuffle=True))
    (record,) = rnf.state.tasks.values()
    return {
        "seconds_of_end": rnf.end,
        "seconds_of_attribution": record.seconds["attribution"],
        "seconds_of_search": record.seconds["search"],
        "milliseconds_of_step": 1000 * median(clock.seconds(0)),
        "reference_epochs": rnf.forwards / options.reference,
        "evaluations": len(record.evaluations),
        "bytes_of_state": sizes(rnf, model)["bytes_of_state"],
    }


def over_tasks(options: argparse.Namespace, network: str, seed: int) -> list[dict]:
    """What each task of one network costs while more and more have ended."""
    seed_everything(seed, verbose=False)
    names = [f"task-{number}" for number in range(options.tasks)]
    options = sized(options, SIZE if network == MLP else SIZES[network])
    make, shape = (lambda: mlp(options.width), (INPUTS,)) if network == MLP else NETWORKS[network]
    model = make()
    for name in names:
        model.heads.add(name, 10)
    references = {name: loader(options, options.reference, 2, task, shape=shape) for task, name in enumerate(names)}
    rnf = Counting(
        lambda trainer, module: references[module.heads.active],
        attribution_samples=options.attributed,
        ration=options.ration,
    )
    rows = []
    for task, name in enumerate(names):
        clock = Clock()
        model.heads.activate(name)
        trainer(options, [clock, rnf]).fit(model, loader(options, options.samples, 1, task, True, shape))
        record = rnf.state.tasks[name]
        rows.append(
            {
                "seconds_of_end": rnf.end,
                "seconds_of_attribution": record.seconds["attribution"],
                "seconds_of_search": record.seconds["search"],
                "milliseconds_of_step": 1000 * median(clock.seconds(0)),
                **recalled(options, rnf, model, names[0], shape),
                "evaluations": len(record.evaluations),
                "bytes_of_state": sizes(rnf, model)["bytes_of_state"],
                "free_capacity": rnf.free_capacity,
            }
        )
    return rows


def recalled(
    options: argparse.Namespace, rnf: Counting, model: LightningModule, task: str, shape: tuple[int, ...]
) -> dict[str, float]:
    """Milliseconds to enter and leave recall, and of a batch's forward in it."""
    x = torch.randn(options.batch_size, *shape)
    entries, forwards = [], []
    for _ in range(options.recalls):
        started = time.perf_counter()
        with rnf.recall(task, model), torch.no_grad():
            entered = time.perf_counter()
            model(x)
            ran = time.perf_counter()
        entries.append(time.perf_counter() - ran + entered - started)
        forwards.append(ran - entered)
    times = zip(OF_RECALL, (entries, forwards), strict=True)
    return {f"milliseconds_of_{part}": 1000 * median(seconds) for part, seconds in times}


def measure(options: argparse.Namespace) -> Rows:
    """All sizes, then all tasks, in each round once."""
    of_units: dict[int, list[dict]] = {units: [] for units in options.units}
    of_tasks: dict[str, list[list[dict]]] = {network: [] for network in (MLP, *options.networks)}
    for seed in range(options.rounds):
        for units, runs in of_units.items():
            runs.append(with_units(options, units, seed))
        for network, runs in of_tasks.items():
            runs.append(over_tasks(options, network, seed))
    return [
        *({"over": "units", "units": units, **_by_key(runs)} for units, runs in of_units.items()),
        *(
            {"over": "tasks", "network": network, "finished": number, **_by_key(runs)}
            for network, rounds in of_tasks.items()
            for number, runs in enumerate(zip(*rounds, strict=True))
        ),
    ]


def _by_key(runs) -> dict[str, list]:
    return {key: [run[key] for run in runs] for key in runs[0]}


def _of(rows: Rows, over: str, network: str | None = None) -> Rows:
    return [row for row in rows if row["over"] == over and network in (None, row.get("network"))]


def slope(rows: Rows) -> float:
    """Of the task's end over the units, both as logarithms: 1 is in proportion."""
    points = [(math.log(row["units"]), math.log(median(row["seconds_of_end"]))) for row in _of(rows, "units")]
    return linear_regression(*zip(*points, strict=True)).slope


def per_doubling(rows: Rows) -> tuple[float, float]:
    """How many more reference epochs forward one doubling of the units costs: by least squares, and the most.

    A bisection makes ⌈log2⌉ steps or one fewer, depending on where its boundary lies: neighbours differ by that, too.
    """
    points = [(math.log2(row["units"]), median(row["reference_epochs"])) for row in _of(rows, "units")]
    most = max((high - low) / (above - below) for (below, low), (above, high) in pairwise(points))
    return linear_regression(*zip(*points, strict=True)).slope, most


def table(rows: Rows) -> str:
    """Two: over the units, over the tasks of each network."""
    of_units = markdown(
        [
            "units",
            "end, s",
            "attribution, s",
            "search, s",
            "evaluations",
            "forward passes, in epochs of the reference data",
            "a step, ms",
            "state, kB",
        ],
        (
            [
                f"{row['units']:,}",
                *(spread(row[f"seconds_of_{part}"], 3) for part in ("end", "attribution", "search")),
                spread(row["evaluations"], 0),
                spread(row["reference_epochs"]),
                spread(row["milliseconds_of_step"]),
                f"{median(row['bytes_of_state']) / 1000:,.1f}",
            ]
            for row in _of(rows, "units")
        ),
    )
    of_tasks = markdown(
        [
            "network",
            "finished tasks",
            "a step, ms",
            "end, s",
            "attribution, s",
            "search, s",
            "evaluations",
            "recall: in and out, ms",
            "its forward, ms",
            "state after, kB",
            "free after",
        ],
        (
            [
                row["network"],
                str(row["finished"]),
                spread(row["milliseconds_of_step"]),
                *(spread(row[f"seconds_of_{part}"], 3) for part in ("end", "attribution", "search")),
                spread(row["evaluations"], 0),
                *(spread(row[f"milliseconds_of_{part}"], 3) for part in OF_RECALL),
                f"{median(row['bytes_of_state']) / 1000:,.1f}",
                f"{median(row['free_capacity']):.0%}",
            ]
            for row in _of(rows, "tasks")
        ),
    )
    on_the_whole, most = per_doubling(rows)
    summary = (
        f"The end's time grows as units to the power of {slope(rows):.2f}. A doubling of the units costs "
        f"{on_the_whole:.2f} more epochs of the reference data, forward (least squares; at most {most:.2f} between "
        "neighbouring sizes, where a bisection may make one step more or fewer)."
    )
    return "\n\n".join([of_units, summary, of_tasks])


def draw(rows: Rows, path: Path) -> None:
    """On the left over the units, on the right over finished tasks, each as a multiple of what it was at first."""
    figure = new_figure(11, 4.2)
    left, right = figure.subplots(1, 2)
    of_units, of_tasks = _of(rows, "units"), _of(rows, "tasks", MLP)
    units = [row["units"] for row in of_units]
    for part, style in (("end", "o-"), ("attribution", "s--"), ("search", "^:")):
        seconds = [median(row[f"seconds_of_{part}"]) for row in of_units]
        label = f"the task's end (slope {slope(rows):.2f})" if part == "end" else part
        left.plot(units, seconds, style, label=label)
    left.set(xscale="log", yscale="log", xlabel="units", ylabel="seconds", title="The end of a task")
    left.legend()
    drawn = {
        "the task's end": ("seconds_of_end", "o-"),
        "a training step": ("milliseconds_of_step", "s--"),
        "recall: in and out": ("milliseconds_of_entry", "^:"),
        "recall: a forward pass": ("milliseconds_of_forward", "v-."),
        "bytes of state": ("bytes_of_state", "D-"),
    }
    for label, (key, style) in drawn.items():
        values = [median(row[key]) for row in of_tasks]
        right.plot([row["finished"] for row in of_tasks], [value / values[0] for value in values], style, label=label)
    right.set_xticks([row["finished"] for row in of_tasks])
    right.set(xlabel="tasks finished before", ylabel="multiple of the first task's", title="Over the tasks")
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=[], help="over the tasks, besides an MLP")
    parser.add_argument("--units", nargs="+", type=int, default=[100, 1000, 10_000, 100_000], help="(%(default)s)")
    parser.add_argument("--tasks", type=int, default=10, help="of one network (%(default)s)")
    parser.add_argument("--width", type=int, default=1000, help="units of that network (%(default)s)")
    parser.add_argument("--ration", type=float, default=0.2, help="of its free units for each task (%(default)s)")
    add_data(parser, samples=None, reference=None, attributed=None)
    parser.set_defaults(batch_size=None)
    parser.add_argument("--recalls", type=int, default=30, help="in a round (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="each measures all once (%(default)s)")


GROWTH = Benchmark(
    name="growth",
    title="Growth",
    columns=(
        "Over the units of an MLP whose second hidden layer has always 50 of them: a forward pass takes time in "
        "proportion to the units. Over the tasks of one network, an MLP or one that is named: a step, and the end of a "
        "task, with so many tasks finished before; then recall of the first task, and the state. Medians of the rounds "
        "(the least to the most)."
    ),
    arguments=arguments,
    quick=[
        *("--units", "100", "400", "--tasks", "3", "--width", "100", "--samples", "384", "--reference", "64"),
        *("--attributed", "32", "--recalls", "2", "--rounds", "1", "--networks", "mlp"),
    ],
    of_row=["over", "units", "network", "finished"],
    once=["--rounds", "1"],
    measure=measure,
    table=table,
    draw=draw,
)

if __name__ == "__main__":
    GROWTH.main(__doc__)
