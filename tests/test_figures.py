"""Figures: what they are drawn from, and that they can be told apart without colours."""

from __future__ import annotations

import io
import sys
from itertools import pairwise

import pytest
import torch
from records import Mlp, every_second, make, record_of, state_of

from lightning_rnf import figures
from lightning_rnf.figures import StreamResult, plot_retention

NAN = float("nan")
RESULT = StreamResult("freezing", ["t-1", "t-2"], torch.tensor([[0.9, NAN], [0.8, 0.7]]), [0.6, 0.25])
NAIVE = StreamResult("naive", RESULT.tasks, torch.tensor([[0.9, NAN], [0.5, 0.8]]))


def state():
    net = make(Mlp)
    return state_of(net, record_of(net), record_of(net, "second", relevant=every_second(net.layers, 1)))


def pixels(figure):
    from matplotlib.image import imread

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=60)
    buffer.seek(0)
    return torch.from_numpy(imread(buffer))[..., :3]


def test_retention_is_drawn_without_touching_pyplot(tmp_path):
    loaded = "matplotlib.pyplot" in sys.modules
    plot_retention([NAIVE, RESULT], tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    assert ("matplotlib.pyplot" in sys.modules) == loaded


def test_retention_shows_averages_tasks_and_capacity():
    figure = figures.retention([NAIVE, RESULT])
    left, right, capacity = figure.axes
    drawn = {line.get_label(): line for line in left.get_lines()}
    assert drawn["naive"].get_linestyle() == "--"
    assert drawn["freezing"].get_ydata() == pytest.approx([90, 75])
    assert [bar.get_height() for bar in capacity.patches] == pytest.approx([60, 25])
    of_tasks = [list(line.get_ydata()) for line in right.get_lines() if len(line.get_ydata())]
    assert of_tasks == [pytest.approx(values) for values in ([90, 50], [80], [90, 80], [70])]


def test_several_seeds_are_a_mean_in_a_band_of_a_deviation():
    matrix = torch.stack([RESULT.matrix, RESULT.matrix - 0.2])
    figure = figures.retention([StreamResult("freezing", RESULT.tasks, matrix, RESULT.free_capacity)])
    left = figure.axes[0]
    assert left.get_lines()[0].get_ydata() == pytest.approx([80, 65])
    band = left.collections[0].get_paths()[0].vertices[:, 1]
    assert band.min() == pytest.approx(65 - 10 * 2**0.5, abs=1e-3)
    assert band.max() == pytest.approx(80 + 10 * 2**0.5, abs=1e-3)


def test_capacity_bars_add_up_to_all_units():
    axes = figures.capacity(state()).axes[0]
    widths = torch.tensor([bar.get_width() for bar in axes.patches]).view(3, 2)  # first, second, free; two layers
    assert widths.sum(dim=0).tolist() == pytest.approx([100, 100])
    assert widths[:, 1].tolist() == pytest.approx([60, 40, 0])


def test_tasks_differ_in_greyscale():
    shades = [sum(a * b for a, b in zip(shade, (0.299, 0.587, 0.114), strict=False)) for shade in figures._shades(5)]
    assert min(later - earlier for earlier, later in pairwise(shades)) > 0.08


def test_a_search_shows_every_evaluation_and_what_was_taken():
    record = state().task("first")
    axes = figures.search(record).axes[0]
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert list(lines["accepted"].get_xdata()) == [0]
    assert list(lines["rejected"].get_xdata()) == [4]
    assert lines["rejected"].get_ydata() == pytest.approx([50])
    assert set(lines["cutoff 4"].get_xdata()) == {4}


def test_overlap_writes_its_numbers():
    axes = figures.overlap(state()).axes[0]
    assert [text.get_text() for text in axes.texts] == ["6", "0", "0", "5"]


@pytest.mark.parametrize("tasks", [1, 10])
def test_nothing_lies_outside_of_the_figure(tasks):
    names = [f"a task with a long name {index}" for index in range(tasks)]
    matrix = torch.full((tasks, tasks), 0.9).tril()
    result = StreamResult("relevance freezing, exact", names, matrix, [0.5] * tasks)
    for figure in (figures.retention([NAIVE, result] if tasks == 2 else [result]), figures.overlap(state())):
        image = pixels(figure)
        border = torch.cat([image[0], image[-1], image[:, 0], image[:, -1]])
        assert (border > 0.99).all()
        assert (image.mean(dim=-1) < 0.5).any()
