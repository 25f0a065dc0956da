"""Figures of streams and of finished tasks (extra ``plots``): legible at the size of a README, and in greyscale.

No display is needed, and pyplot is left alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from lightning_rnf import masks
from lightning_rnf.metrics import average_accuracy
from lightning_rnf.state import FreezeState, TaskRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class StreamResult:
    """One method's result on one stream, once or with several seeds.

    Attributes:
        method: its name, for the legend.
        tasks: names, in the order of training.
        matrix: accuracy ``(tasks, tasks)``, see `metrics`; or ``(seeds, tasks, tasks)``.
        free_capacity: share of free units after each task, mean over seeds; empty for a method that freezes nothing.
    """

    method: str
    tasks: Sequence[str]
    matrix: Tensor
    free_capacity: Sequence[float] = ()

    @property
    def matrices(self) -> Tensor:
        """``(seeds, tasks, tasks)``."""
        return self.matrix if self.matrix.ndim == 3 else self.matrix.unsqueeze(0)

    @property
    def mean(self) -> Tensor:
        """The matrix's mean over seeds: ``(tasks, tasks)``."""
        return self.matrices.mean(dim=0)

    @property
    def averages(self) -> Tensor:
        """Average accuracy after each task, of each seed: ``(seeds, tasks)``."""
        return torch.stack([average_accuracy(matrix) for matrix in self.matrices])


def plot_retention(results: Sequence[StreamResult], path: str | PathLike[str]) -> None:
    """Draw average accuracy with free capacity, and each task's accuracy with the first and the last method.

    The layout of the paper's Figure 2. Line styles are the methods'; the first is drawn dashed, as what the others are
    compared with. With several seeds, a band around a line is one standard deviation wide on either side.

    Args:
        results: of one stream, at most four.
        path: where to write the figure; the ending says in which format.

    Raises:
        ImportError: if matplotlib is not installed (extra ``plots``).
    """
    retention(results).savefig(path, dpi=120)


def retention(results: Sequence[StreamResult]) -> Figure:
    """The figure of `plot_retention`."""
    if len(results) == 1:
        styles, colours = ["-"], ["tab:blue"]
    else:
        styles, colours = ["--", "-", "-.", ":"], ["0.45", "tab:blue", "tab:red", "tab:green"]
    figure = new_figure(10, 4)
    left, right = cast("Sequence[Axes]", figure.subplots(1, 2))
    steps = range(1, len(results[0].tasks) + 1)
    capacity = left.twinx()
    freezing = [result for result in results if len(result.free_capacity)]
    for result, style, colour in zip(results, styles, colours, strict=False):
        averages = 100 * result.averages
        _line(left, steps, averages, style, color=colour, marker="o", lw=2, label=result.method)
        if result in freezing:
            width = 0.6 / len(freezing)
            places = [step - 0.3 + width * (freezing.index(result) + 0.5) for step in steps]
            free = [100 * share for share in result.free_capacity]
            capacity.bar(places, free, width=width, color=colour, alpha=0.18, label=f"free units, {result.method}")
    compared = [results[0], results[-1]][: len(results)]  # more would be too many lines to read
    for result, style in zip(compared, styles, strict=False):
        for task in range(len(result.tasks)):
            of_task = 100 * result.matrices[:, task:, task]
            _line(right, list(steps)[task:], of_task, style, color=f"C{task % 10}", marker=_MARKERS[task % 10], ms=4)
    for task, name in enumerate(results[0].tasks):  # for the legend: styles are the methods', as on the left
        right.plot([], [], color=f"C{task % 10}", marker=_MARKERS[task % 10], ms=4, ls="none", label=name)
    left.set(title="Average over the tasks seen", xlabel="tasks trained", ylabel="test accuracy, %", xticks=steps)
    capacity.set(ylim=(0, 100))
    if freezing:
        capacity.set_ylabel("free units, %")
    else:
        capacity.set_yticks([])
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
    return figure


def capacity(state: FreezeState) -> Figure:
    """Each layer as a bar: which share of its units each task was the first to freeze, and what is free."""
    claims = masks.claims(state)
    figure = new_figure(8, 1.4 + 0.34 * len(claims))
    axes = figure.subplots()
    layers = list(claims)
    left = torch.zeros(len(layers))
    shades = _shades(len(state.tasks))
    for index, name in enumerate(state.tasks):
        shares = torch.tensor([100 * float((claims[layer] == index).double().mean()) for layer in layers])
        axes.barh(
            layers,
            shares.tolist(),
            left=left.tolist(),
            color=shades[index],
            hatch=_HATCHES[index % len(_HATCHES)],
            edgecolor="0.5",
            lw=0.5,
            label=name,
        )
        left += shares
    free = (100 - left).tolist()
    axes.barh(layers, free, left=left.tolist(), color="none", edgecolor="0.5", lw=0.5, label="free")
    axes.invert_yaxis()
    axes.set(xlim=(0, 100), xlabel="units, %", title="Units by the task that froze them first")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
    return figure


def unit_map(state: FreezeState, columns: int = 100) -> Figure:
    """Every unit as a cell, ``columns`` in a row, coloured by the task that was the first to freeze it."""
    from matplotlib.patches import Patch

    claims = masks.claims(state)
    shades = torch.tensor([[*_FREE], *([*shade] for shade in _shades(len(state.tasks)))], dtype=torch.float32)
    rows: list[Tensor] = []
    ticks: list[int] = []
    for claimed in claims.values():
        ticks.append(sum(len(row) for row in rows))
        cells = shades[claimed + 1]
        missing = -len(cells) % columns
        rows.append(torch.cat([cells, torch.zeros(missing, 4)]).view(-1, columns, 4))
        rows.append(torch.zeros(1, columns, 4))  # a gap between layers
    image = torch.cat(rows[:-1])
    figure = new_figure(8, 1.2 + 0.085 * len(image))
    axes = figure.subplots()
    axes.imshow(image.numpy(), interpolation="nearest", aspect="auto")
    axes.set_yticks(ticks, list(claims), fontsize=8)
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
    axes.set_title("Units by the task that froze them first", fontsize=10)
    named = zip(shades, ["free", *state.tasks], strict=True)
    patches = [Patch(facecolor=shade.tolist(), edgecolor="0.5", lw=0.5, label=name) for shade, name in named]
    axes.legend(handles=patches, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
    return figure


def search(record: TaskRecord) -> Figure:
    """A search: accuracy over the cutoff, what was accepted and what was not, and what was taken."""
    figure = new_figure(5, 3.2)
    axes = figure.subplots()
    walked = sorted(record.evaluations, key=lambda evaluation: evaluation.score.cutoff)
    axes.plot([one.score.cutoff for one in walked], [100 * one.score.accuracy for one in walked], color="0.6", lw=1)
    for accepted, marker, label in ((True, "o", "accepted"), (False, "x", "rejected")):
        some = [one.score for one in walked if one.accepted == accepted]
        points = [score.cutoff for score in some], [100 * score.accuracy for score in some]
        axes.plot(*points, marker, color="tab:blue" if accepted else "tab:red", ms=6, label=label)
    if record.recovery:
        settled = [one.score for one in record.recovery]
        points = [score.cutoff for score in settled], [100 * score.accuracy for score in settled]
        axes.plot(*points, "D", color="tab:green", ms=6, label="after recovery")
    axes.axvline(record.cutoff, color="0.4", ls="--", lw=1, label=f"cutoff {record.cutoff}")
    axes.set(title=record.name, xlabel="least relevant units silenced", ylabel="accuracy, %")
    axes.legend(fontsize=8, frameon=False)
    return figure


def overlap(state: FreezeState) -> Figure:
    """How many units are relevant to both of two tasks, as a matrix with its numbers."""
    counts, names = masks.overlap(state), list(state.tasks)
    size = 2.2 + 0.55 * len(names)
    figure = new_figure(size + 0.6, size)
    axes = figure.subplots()
    axes.imshow(counts.numpy(), cmap="Greys", vmin=0, vmax=max(int(counts.max()), 1) * 1.25)
    for row in range(len(names)):
        for column in range(len(names)):
            value = int(counts[row, column])
            # Nearly black, so that a page that recolours what is black leaves it: the cell stays as light as it is.
            shade = "white" if value > 0.6 * float(counts.max()) else "#010101"
            axes.text(column, row, str(value), ha="center", va="center", color=shade, fontsize=8)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_title("Units that tasks share", fontsize=10)
    return figure


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, that no display and no pyplot knows.

    Raises:
        ImportError: if matplotlib is not installed (extra ``plots``).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


_FREE = (0.5, 0.5, 0.5, 0.2)
_MARKERS = "os^Dv<>p*h"
_HATCHES = ("", "///", "...", "\\\\\\", "xxx", "ooo", "---", "+++")


def _shades(number: int) -> list[Any]:
    """Colours that go from dark to light: in greyscale they still differ."""
    from matplotlib import colormaps

    return [colormaps["viridis"](0.15 + 0.8 * index / max(number - 1, 1)) for index in range(number)]


def _line(axes: Axes, steps: Sequence[int], values: Tensor, style: str, **look: Any) -> None:
    """The mean over seeds, ``values`` being ``(seeds, steps)``, in a band of a standard deviation."""
    mean = values.mean(dim=0)
    axes.plot(steps, mean.tolist(), style, **look)
    if len(values) > 1:
        deviation = values.std(dim=0)
        lower, upper = (mean - deviation).tolist(), (mean + deviation).tolist()
        axes.fill_between(steps, lower, upper, color=look["color"], alpha=0.15, lw=0)
