"""Figures of streams and of finished tasks (extra ``plots``): legible at the size of a README, and in greyscale.

No display is needed, and pyplot is left alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from lightning_rnf.memory import FreezeState, TaskRecord, masks, shortened
from lightning_rnf.metrics import average_accuracy

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


def plot_retention(
    results: Sequence[StreamResult], path: str | PathLike[str], *, methods: Sequence[str] | None = None
) -> None:
    """Draw average accuracy with free capacity, and each task's accuracy with the first and the last method.

    The layout of the paper's Figure 2. On the left each method has a line and a colour of its own; the first, as what
    the others are compared with, is dashed. Of each task's lines on the right the first result's are dashed, the last
    one's solid, with larger markers. With several seeds, a band around a line is one standard deviation wide on either
    side.

    Args:
        results: of one stream, one to four.
        path: where to write the figure; the ending says in which format.
        methods: names of all methods that a set of figures compares, at most four: each looks the same on the left of
            every figure. None: those of these results; one alone is solid.

    Raises:
        ImportError: if matplotlib is not installed (extra ``plots``).
        ValueError: if there is no result, or there are more than four results or methods: so many lines can't be told
            apart; with ``methods``, if one is there or among the results twice, or a result's is not there.
    """
    retention(results, methods=methods).savefig(path, dpi=120)


def retention(results: Sequence[StreamResult], *, methods: Sequence[str] | None = None) -> Figure:
    """The figure of `plot_retention`."""
    from matplotlib.ticker import MaxNLocator

    if not 1 <= len(results) <= 4:
        raise ValueError(f"there are results of {len(results)} methods, expected one to four: draw some of them")
    looks = _looks([result.method for result in results], methods)
    names = shortened(list(results[0].tasks), most=_NAME)
    tasks = len(names)
    freezing = [result for result in results if len(result.free_capacity)]
    of_methods = shortened([result.method for result in results], most=_NAME)
    of_freezing = [f"free units, {name}" for name, one in zip(of_methods, results, strict=True) if one in freezing]
    on_left = [*of_methods, *of_freezing]
    rows = max(_rows(on_left, _HALF), _rows(names, _HALF))
    figure = new_figure(10, 3.7 + _ROW * rows)
    left, right = cast("Sequence[Axes]", figure.subplots(1, 2))
    steps = range(1, tasks + 1)
    size = 6 if tasks <= 12 else 3
    capacity = left.twinx()
    drawn: list[Any] = []
    bars: list[Any] = []
    for result, (style, colour, marker, hatch) in zip(results, looks, strict=True):
        drawn += _line(left, steps, 100 * result.averages, style, color=colour, marker=marker, ms=size, lw=2)
        if result in freezing:
            width = 0.6 / len(freezing)
            middles = [step - 0.3 + width * (len(bars) + 0.5) for step in steps]
            free = [100 * share for share in result.free_capacity]
            bar: dict[str, Any] = {"facecolor": _faded(colour), "edgecolor": colour, "lw": 0.7, "hatch": hatch}
            bars.append(capacity.bar(middles, free, width=width, **bar))
    compared = [results[0], results[-1]][: len(results)]  # more would be too many lines to read
    # Other markers, too: the last task's line is a point.
    of_lines = [("dashed, small", "--", size / 2), ("solid", "-", size)][-len(compared) :]
    for result, (_, style, points) in zip(compared, of_lines, strict=True):
        for task in range(tasks):
            _line(right, list(steps)[task:], 100 * result.matrices[:, task:, task], style, **_of_task(task), ms=points)
    of_tasks = [right.plot([], [], ls="none", **_of_task(task), ms=5)[0] for task in range(tasks)]
    left.set_title("Average over the tasks seen", fontsize=10)
    left.set_ylabel("test accuracy, %")
    capacity.set(ylim=(0, 100))
    if freezing:
        capacity.set_ylabel("free units, %")
    else:
        capacity.set_yticks([])
    left.set_zorder(capacity.get_zorder() + 1)
    left.patch.set_visible(False)
    of_compared = shortened([result.method for result in compared], most=18)
    if len(of_compared) > 1:
        of_compared = [f"{name} ({said})" for name, (said, *_) in zip(of_compared, of_lines, strict=True)]
    right.set_title(literal(f"Each task: {' and '.join(of_compared)}"), fontsize=10, wrap=True)
    right.set_ylabel("test accuracy, %")
    for axes in (left, right):
        axes.set(xlabel="tasks trained", xlim=(0.5, tasks + 0.5))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True, min_n_ticks=1))
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "borderaxespad": 4.5}  # letters: under the axis' name
    _legend(left, [*drawn, *bars], on_left, _HALF, **below)
    _legend(right, of_tasks, names, _HALF, **below)
    return figure


def capacity(state: FreezeState) -> Figure:
    """Each layer as a bar: which share of its units each task was the first to freeze, and what is free.

    Of many layers, neighbours share a bar.
    """
    claims = _together(masks.claims(state))
    names = shortened(list(state.tasks), most=_NAME)
    figure = new_figure(8, 1.4 + 0.34 * len(claims) + _ROW * _rows([*names, "free"], _WHOLE))
    axes = figure.subplots()
    places = range(len(claims))
    left = torch.zeros(len(claims))
    bars: list[Any] = []
    for index in range(len(names)):
        shares = torch.tensor([100 * float((units == index).double().mean()) for units in claims.values()])
        colour, hatch = _COLOURS[index % len(_COLOURS)], _HATCHES[index % len(_HATCHES)]
        look: dict[str, Any] = {"color": colour, "hatch": hatch, "edgecolor": "white", "lw": 0.5}
        bars.append(axes.barh(places, shares.tolist(), left=left.tolist(), **look))
        left += shares
    free = (100 - left).tolist()
    bars.append(axes.barh(places, free, left=left.tolist(), color="none", edgecolor="0.5", lw=0.5))
    axes.set_yticks(places, [literal(name) for name in claims], fontsize=9)
    axes.set_ylim(len(claims) - 0.5, -0.5)
    axes.set(xlim=(0, 100), xlabel="units, %", title="Units by the task that froze them first")
    _legend(figure, bars, [*names, "free"], _WHOLE, loc="outside lower center")
    return figure


def unit_map(state: FreezeState, columns: int = 100) -> Figure:
    """Every unit as a cell, ``columns`` in a row, by the task that was the first to freeze it; a dot is a free unit.

    Colours and forms are the tasks'. Where that many columns would make more than 200 rows, there are more columns.
    """
    from matplotlib.lines import Line2D

    claims = _together(masks.claims(state))
    names = shortened(list(state.tasks), most=_NAME)
    columns = max(columns, math.ceil(sum(map(len, claims.values())) / 200))
    cells = torch.stack([_cell(_DOT, "0.5"), *(_cell(*_cell_of(index)) for index in range(len(names)))])
    side = cells.shape[1]
    rows: list[Tensor] = []
    ticks: list[int] = []
    for claimed in claims.values():
        ticks.append(sum(len(row) for row in rows))
        missing = -len(claimed) % columns
        of_layer = torch.cat([cells[claimed + 1], torch.zeros(missing, side, side, 4)])
        rows.append(of_layer.view(-1, columns, side, side, 4))
        rows.append(torch.zeros(1, columns, side, side, 4))  # a gap between layers
    image = torch.cat(rows[:-1])
    height = min(0.085 * len(image), 12)
    figure = new_figure(8, 0.9 + height + _ROW * _rows(["free", *names], _WHOLE))
    axes = figure.subplots()
    pixels = image.transpose(1, 2).reshape(len(image) * side, columns * side, 4)
    axes.imshow(pixels.numpy(), interpolation="nearest", aspect="auto", extent=(0, columns, len(image), 0))
    axes.set_yticks([tick + 0.5 for tick in ticks], [literal(name) for name in claims], fontsize=8)
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
    axes.set_title("Units by the task that froze them first", fontsize=10)
    handles = [Line2D([], [], ls="none", marker="s", ms=2, color="0.5")]
    for index in range(len(names)):
        form, colour = _cell_of(index)
        handles.append(Line2D([], [], ls="none", color=colour, **_CELLS[form]))
    _legend(figure, handles, ["free", *names], _WHOLE, loc="outside lower center")
    return figure


def search(record: TaskRecord) -> Figure:
    """A search: accuracy over the cutoff, what was accepted and what was not, and what was taken."""
    figure = new_figure(5, 3.2)
    axes = figure.subplots()
    walked = sorted(record.evaluations, key=lambda evaluation: evaluation.score.cutoff)
    axes.plot([one.score.cutoff for one in walked], [100 * one.score.accuracy for one in walked], color="0.5", lw=1)
    for accepted, marker, label in ((True, "o", "accepted"), (False, "x", "rejected")):
        some = [one.score for one in walked if one.accepted == accepted]
        points = [score.cutoff for score in some], [100 * score.accuracy for score in some]
        axes.plot(*points, marker, color="tab:blue" if accepted else "tab:red", ms=6, label=label)
    if record.recovery:
        settled = [one.score for one in record.recovery]
        points = [score.cutoff for score in settled], [100 * score.accuracy for score in settled]
        axes.plot(*points, "D", color="tab:green", ms=6, label="after recovery")
    axes.axvline(record.cutoff, color="0.5", ls="--", lw=1, label=f"cutoff {record.cutoff}")
    axes.set_title(literal(shortened([record.name], most=40)[0]))
    axes.set(xlabel="least relevant units silenced", ylabel=f"{record.scored or 'accuracy'}, %")
    axes.legend(fontsize=8, frameon=False)
    return figure


def overlap(state: FreezeState) -> Figure:
    """How many units are relevant to both of two tasks, as a matrix: with its numbers, of many tasks with a scale.

    See `masks.overlap` for what it means with ``candidates="free"``.
    """
    counts = masks.overlap(state)
    names = [literal(name) for name in shortened(list(state.tasks), most=_NAME)]
    size = min(2.2 + 0.45 * len(names), 9)
    figure = new_figure(size + 0.6, size)
    axes = figure.subplots()
    drawn = axes.imshow(counts.numpy(), cmap="Greys", vmin=0, vmax=max(int(counts.max()), 1) * 1.25)
    if len(names) > 15:
        figure.colorbar(drawn, ax=axes, label="units", shrink=0.6)
    else:
        for row in range(len(names)):
            for column in range(len(names)):
                value = int(counts[row, column])
                # Nearly black, so that a page that recolours what is black leaves it: the cell stays as light as it is.
                shade = "white" if value > 0.6 * float(counts.max()) else "#010101"
                axes.text(column, row, str(value), ha="center", va="center", color=shade, fontsize=8)
    named = range(0, len(names), math.ceil(len(names) / 40))
    axes.set_xticks(named, [names[place] for place in named], rotation=45, ha="right", fontsize=8)
    axes.set_yticks(named, [names[place] for place in named], fontsize=8)
    axes.set_title("Units that tasks share", fontsize=10)
    return figure


def literal(text: str) -> str:
    """Text as matplotlib shows it letter by letter: dollars would start mathematics."""
    return masks.printable(text).replace("$", r"\$")


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


_COLOURS = (
    *("#1f77b4", "#d1670a", "#2ca02c", "#d62728", "#9467bd"),
    *("#8c564b", "#d25fae", "#7f7f7f", "#8f8f1a", "#128f9c"),
)
"""Of tasks: matplotlib's, the light ones darker. On white and on a dark page they are seen with a contrast of 3."""

_MARKERS = "os^Dv<>p*h"
_FILLS = ("full", "none", "left")
_LOOKS = (
    ("--", "0.45", _MARKERS[0], "xxxx"),
    ("-", "tab:blue", _MARKERS[1], ""),
    ("-.", "tab:red", _MARKERS[2], "////"),
    (":", "tab:green", _MARKERS[3], "...."),
)
"""Line, colour, marker and hatch of up to four methods."""

_ALONE = ("-", "tab:blue", _MARKERS[0], "")
_HATCHES = ("", "////", "....", "\\\\\\\\", "xxxx", "oo", "----", "++++")

_DOT = ".....|.....|..#..|.....|....."
_CELLS: dict[str, dict[str, Any]] = {
    "#####|#####|#####|#####|#####": {"marker": "s", "ms": 7, "mew": 0},
    "#####|#...#|#...#|#...#|#####": {"marker": "s", "ms": 6, "mew": 1.5, "mfc": "none"},
    ".....|#####|#####|#####|.....": {"marker": "_", "ms": 7, "mew": 4},
    ".###.|.###.|.###.|.###.|.###.": {"marker": "|", "ms": 7, "mew": 4},
    "#...#|.#.#.|..#..|.#.#.|#...#": {"marker": "x", "ms": 6, "mew": 1.5},
    "..#..|..#..|#####|..#..|..#..": {"marker": "+", "ms": 7, "mew": 1.5},
    "#....|##...|###..|####.|#####": {"marker": [(-1, -1), (1, -1), (-1, 1), (-1, -1)], "ms": 7, "mew": 0},
    "#####|.####|..###|...##|....#": {"marker": [(1, 1), (-1, 1), (1, -1), (1, 1)], "ms": 7, "mew": 0},
}
"""Forms of cells by rows of pixels, and how a legend shows them."""

_NAME = 24
"""Letters of a name that a figure has room for."""

_HALF, _WHOLE, _ROW = 4.4, 7.6, 0.18
"""Width of a legend under half a figure and under a whole one, height of its rows, in inches."""


def _of_task(task: int) -> dict[str, Any]:
    """How a task's line looks: up to 30 differ without their colours."""
    fill = _FILLS[task // len(_MARKERS) % len(_FILLS)]
    return {"color": _COLOURS[task % len(_COLOURS)], "marker": _MARKERS[task % len(_MARKERS)], "fillstyle": fill}


def _looks(drawn: Sequence[str], methods: Sequence[str] | None) -> list[tuple[str, str, str, str]]:
    """Line, colour, marker and hatch of each method that is drawn."""
    if methods is None:
        return [_ALONE] if len(drawn) == 1 else list(_LOOKS[: len(drawn)])
    known = list(methods)
    are_distinct = all(len(set(some)) == len(some) for some in (known, drawn))
    if len(known) > len(_LOOKS) or not are_distinct or not set(drawn) <= set(known):
        names = ", ".join(map(repr, drawn))
        raise ValueError(f"methods is {known}, expected one to four different names, with {names} once each")
    of = dict(zip(known, _LOOKS, strict=False))
    return [of[name] for name in drawn]


def _faded(colour: str) -> tuple[float, float, float, float]:
    from matplotlib.colors import to_rgba

    return to_rgba(colour, 0.2)


def _cell_of(task: int) -> tuple[str, str]:
    """Form and colour of a task's cells: 40 tasks differ, 8 of them without their colours."""
    return list(_CELLS)[task % len(_CELLS)], _COLOURS[task % len(_COLOURS)]


def _cell(form: str, colour: str) -> Tensor:
    """A cell of the unit map: RGBA ``(6, 6, 4)``, of which the last row and column are empty."""
    from matplotlib.colors import to_rgba

    drawn = torch.tensor([[pixel == "#" for pixel in f"{row}."] for row in [*form.split("|"), "....."]])
    return drawn.unsqueeze(-1) * torch.tensor(to_rgba(colour))


def _together(claims: Mapping[str, Tensor], most: int = 40) -> dict[str, Tensor]:
    """Layers by the name to show; of more than ``most``, neighbours become one that is named by the first and last."""
    names = list(claims)
    size = max(math.ceil(len(names) / most), 1)
    short = shortened(names, most=_NAME if size == 1 else _NAME // 2)
    found: dict[str, Tensor] = {}
    for start in range(0, len(names), size):
        of_group = names[start : start + size]
        last = start + len(of_group) - 1
        name = short[start] if last == start else f"{short[start]} to {short[last]}"
        found[name] = torch.cat([claims[layer] for layer in of_group])
    return found


def _rows(names: Sequence[str], width: float) -> int:
    """How many rows a legend with these names has in that width: a letter of 8 points is 0.07 inches wide."""
    columns = max(int(width / (0.55 + 0.07 * max(map(len, names), default=0))), 1)
    return math.ceil(len(names) / columns)


def _legend(owner: Figure | Axes, handles: Sequence[Any], names: Sequence[str], width: float, **place: Any) -> None:
    """A legend in as many columns as there is room for."""
    columns = math.ceil(len(names) / _rows(names, width))
    unnamed = ["?"] * len(names)  # a label with an underscore in front would be left out
    legend = owner.legend(handles, unnamed, ncols=columns, fontsize=8, frameon=False, **place)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(literal(name))


def _line(axes: Axes, steps: Sequence[int], values: Tensor, style: str, **look: Any) -> list[Any]:
    """The mean over seeds, ``values`` being ``(seeds, steps)``, in a band of a standard deviation."""
    mean = values.mean(dim=0).round(decimals=4)  # or an axis shows the last digits of floats
    drawn: list[Any] = axes.plot(steps, mean.tolist(), style, **look)
    if len(values) > 1:
        deviation = values.std(dim=0)
        lower, upper = (mean - deviation).tolist(), (mean + deviation).tolist()
        axes.fill_between(steps, lower, upper, color=look["color"], alpha=0.15, lw=0)
    return drawn
