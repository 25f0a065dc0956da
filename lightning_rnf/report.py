"""What a stream of tasks has come to, as a table and as a figure in the paper's layout (Figure 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from os.path import commonprefix
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from lightning_rnf.metrics import average_accuracy, forgetting
from lightning_rnf.state import FreezeState

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table


@dataclass(frozen=True, eq=False)
class StreamResult:
    """One method's result on one stream.

    Attributes:
        method: its name, for the legend.
        tasks: names, in the order of training.
        matrix: accuracy ``(tasks, tasks)``, see `metrics`.
        free_capacity: share of free units after each task; empty for a method that freezes nothing.
    """

    method: str
    tasks: Sequence[str]
    matrix: Tensor
    free_capacity: Sequence[float] = ()


def free_capacity_over_tasks(state: FreezeState) -> list[float]:
    """Share of units that were relevant to no task yet, after each finished task."""
    flat = [torch.cat([record.relevant[layer.name] for layer in state.layers]) for record in state.tasks.values()]
    frozen = torch.stack(flat).cumsum(dim=0) > 0 if flat else torch.empty(0, 1)
    return [1.0 - float(row.float().mean()) for row in frozen]


def accuracy_table(result: StreamResult) -> Table:
    """Accuracy in per cent of every task after every task, the average, and free capacity: a table for rich to print.

    Raises:
        ImportError: if rich is not installed (extra ``demo``).
    """
    from rich.table import Table

    prefix = commonprefix(result.tasks)  # noqa: RUF071 - of strings, not of paths
    names = [name.removeprefix(prefix) or name for name in result.tasks]
    table = Table(title=f"{result.method}: test accuracy after each task, %")
    table.add_column(f"after {prefix}…" if prefix else "after")
    for column in [*names, "average", "free units"]:
        table.add_column(column, justify="right")
    averages = average_accuracy(result.matrix)
    for index, name in enumerate(names):
        seen = [f"{100 * value:.1f}" for value in result.matrix[index, : index + 1].tolist()]
        free = f"{100 * result.free_capacity[index]:.0f}" if result.free_capacity else ""
        table.add_row(name, *seen, *[""] * (len(names) - index - 1), f"{100 * float(averages[index]):.1f}", free)
    table.caption = f"forgetting {100 * float(forgetting(result.matrix)):.2f} points"
    return table


def plot_retention(results: Sequence[StreamResult], path: str | PathLike[str]) -> None:
    """Draw average accuracy with free capacity, and the accuracy of each task with the first and the last method.

    Line styles are the methods'; the first is drawn dashed, as what the others are compared with.

    Args:
        results: of one stream, at most four.
        path: where to write the figure; the ending says in which format.

    Raises:
        ImportError: if matplotlib is not installed (extra ``demo``).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)  # no display, and the user's pyplot is left alone
    left, right = cast("Sequence[Axes]", figure.subplots(1, 2))
    steps = range(1, len(results[0].tasks) + 1)
    styles = ["--", "-", "-.", ":"]
    colours = ["0.45", "tab:blue", "tab:red", "tab:green"]
    capacity = left.twinx()
    freezing = [result for result in results if result.free_capacity]
    for result, style, colour in zip(results, styles, colours, strict=False):
        left.plot(
            steps, 100 * average_accuracy(result.matrix), style, color=colour, marker="o", lw=2, label=result.method
        )
        if result in freezing:
            width = 0.6 / len(freezing)
            places = [step - 0.3 + width * (freezing.index(result) + 0.5) for step in steps]
            free = [100 * share for share in result.free_capacity]
            capacity.bar(places, free, width=width, color=colour, alpha=0.18, label=f"free units, {result.method}")
    compared = [results[0], results[-1]][: len(results)]  # more would be too many lines to read
    for result, style in zip(compared, styles, strict=False):
        for task in range(len(result.tasks)):
            right.plot(
                list(steps)[task:],
                100 * result.matrix[task:, task],
                style,
                color=f"C{task % 10}",
                marker="os^Dv<>p*h"[task % 10],
                ms=4,
            )
    for task, name in enumerate(results[0].tasks):  # for the legend: styles are the methods', as on the left
        right.plot([], [], color=f"C{task % 10}", marker="os^Dv<>p*h"[task % 10], ms=4, ls="none", label=name)
    left.set(title="Average over the tasks seen", xlabel="tasks trained", ylabel="test accuracy, %", xticks=steps)
    capacity.set(ylim=(0, 100), ylabel="free units, %")
    left.set_zorder(capacity.get_zorder() + 1)
    left.patch.set_visible(False)
    handles = [*left.get_legend_handles_labels()[0], *capacity.get_legend_handles_labels()[0]]
    labels = [*left.get_legend_handles_labels()[1], *capacity.get_legend_handles_labels()[1]]
    left.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, fontsize=8, frameon=False)
    right.set(
        title="Each task: " + " and ".join(result.method for result in compared),
        xlabel="tasks trained",
        ylabel="test accuracy, %",
        xticks=steps,
    )
    right.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)
