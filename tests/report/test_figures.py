"""Figures: what they are drawn from, and that they can be told apart without colours."""

from __future__ import annotations

import io
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from matplotlib.text import Text
from records import Mlp, every_second, make, record_of, state_of

from lightning_rnf.anatomy.units import UnitLayer, UnitMap
from lightning_rnf.memory import masks
from lightning_rnf.memory.state import FreezeState
from lightning_rnf.report import figures
from lightning_rnf.report.figures import StreamResult, plot_retention

NAN = float("nan")
RESULT = StreamResult("freezing", ["t-1", "t-2"], torch.tensor([[0.9, NAN], [0.8, 0.7]]), [0.6, 0.25])
NAIVE = StreamResult("naive", RESULT.tasks, torch.tensor([[0.9, NAN], [0.5, 0.8]]))


def state():
    net = make(Mlp)
    return state_of(net, record_of(net), record_of(net, "second", relevant=every_second(net.layers, 1)))


def many(names, layers, units=40, prefix="layer."):
    """A state of tasks with these names: each freezes every second unit, from its place on."""
    found = tuple(UnitLayer(f"{prefix}{index}", units, -1, (f"{prefix}{index}.weight",)) for index in range(layers))
    example, state = record_of(make(Mlp)), FreezeState()
    for index, name in enumerate(names):
        record = replace(example, name=name, relevant=every_second(found, index % 2), relevance={}, norm_statistics={})
        state.add(record, UnitMap(found, f"head {index}", (), (), (), ()))
    return state


def written(figure):
    """Every text of a figure, of legends and ticks too."""
    return [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


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
    naive, freezing = left.get_lines()
    assert naive.get_linestyle() == "--"
    assert freezing.get_ydata() == pytest.approx([90, 75])
    assert legend(left) == ["naive", "freezing", "free units, freezing"]
    assert legend(right) == ["t-1", "t-2"]
    assert [bar.get_height() for bar in capacity.patches] == pytest.approx([60, 25])
    of_tasks = [list(line.get_ydata()) for line in right.get_lines() if len(line.get_ydata())]
    assert of_tasks == [pytest.approx(values) for values in ([90, 50], [80], [90, 80], [70])]


@pytest.mark.parametrize("others", [0, 2])
def test_of_each_task_it_is_said_which_method_is_which_line(others):
    right = figures.retention([NAIVE, *[NAIVE] * others, RESULT]).axes[1]
    assert right.get_title() == "Each task: naive (dashed, small) and freezing (solid)"
    looks = [(line.get_linestyle(), line.get_markersize()) for line in right.get_lines() if len(line.get_ydata())]
    assert looks == [("--", 3)] * 2 + [("-", 6)] * 2
    alone = figures.retention([RESULT]).axes[1]
    assert alone.get_title() == "Each task: freezing"
    assert {line.get_linestyle() for line in alone.get_lines() if len(line.get_ydata())} == {"-"}


def test_a_method_looks_the_same_whatever_it_is_drawn_with():
    def looks(drawn, among):
        results = [StreamResult(name, RESULT.tasks, RESULT.matrix, RESULT.free_capacity) for name in drawn]
        left, _, capacity = figures.retention(results, methods=among).axes
        lines = [(line.get_linestyle(), line.get_color(), line.get_marker()) for line in left.get_lines()]
        bars = [(bars.patches[0].get_edgecolor(), bars.patches[0].get_hatch()) for bars in capacity.containers]
        return dict(zip(drawn, zip(lines, bars, strict=True), strict=True))

    names = ["naive", "paper", "exact", "tuned"]
    of_all = looks(names, names)
    assert of_all == looks(names, None)
    for some in (["naive", "tuned"], ["paper", "tuned"], ["exact"]):
        assert looks(some, names) == {name: of_all[name] for name in some}
    assert looks(["naive", "tuned"], None)["tuned"] != of_all["tuned"]
    for wrong in (["naive", "paper"], [*names, "fifth"], ["tuned", "tuned"], [], "tuned"):
        with pytest.raises(ValueError, match="expected one to four different names, with 'tuned' once each"):
            looks(["tuned"], wrong)
    with pytest.raises(ValueError, match="with 'tuned', 'tuned' once each"):
        looks(["tuned", "tuned"], names)


def test_one_method_alone_is_a_solid_line_with_plain_bars(tmp_path):
    left, _, capacity = figures.retention([RESULT]).axes
    (line,), bars = left.get_lines(), capacity.patches
    assert (line.get_linestyle(), line.get_color(), line.get_marker()) == ("-", "tab:blue", "o")
    assert {bar.get_hatch() for bar in bars} <= {None, ""}
    plot_retention([RESULT], tmp_path / "alone.png")
    plot_retention([RESULT], tmp_path / "third.png", methods=["naive", "paper", "freezing"])
    assert (tmp_path / "alone.png").read_bytes() != (tmp_path / "third.png").read_bytes()


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


def test_tasks_differ_without_colours():
    names = [str(index) for index in range(8)]
    hatches = [group.patches[0].get_hatch() for group in figures.capacity(many(names, layers=1)).axes[0].containers]
    assert len(set(hatches[:8])) == 8
    cells = [figures._cell(*figures._cell_of(task))[..., 3] for task in range(8)]
    cells.append(figures._cell(figures._DOT, "0.5")[..., 3])
    for index, cell in enumerate(cells):
        assert all((cell != other).sum() >= 4 for other in cells[:index])
    assert len({figures._cell_of(task) for task in range(40)}) == 40


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


@pytest.mark.parametrize("tasks", [1, 5, 10, 30])
def test_nothing_lies_outside_of_the_figure_or_is_too_small_to_read(tasks):
    names = [f"a task with a long name {'of words ' * 20}{index}" for index in range(tasks)]
    drawn = many(names, layers=5, prefix="model.backbone.encoder.stages." * 3)
    matrix = torch.full((tasks, tasks), 0.9).tril()
    methods = [f"relevance freezing, variant {index}" for index in range(4)]
    results = [StreamResult(name, names, matrix, [0.5] * tasks) for name in methods]
    for figure in (
        figures.retention(results),
        figures.retention(results[:1]),
        figures.overlap(drawn),
        figures.capacity(drawn),
        figures.unit_map(drawn),
        figures.search(next(iter(drawn.tasks.values()))),
    ):
        image = pixels(figure)  # a warning that the layout was given up is an error
        border = torch.cat([image[0], image[-1], image[:, 0], image[:, -1]])
        assert (border > 0.99).all()
        assert (image.mean(dim=-1) < 0.5).any()
        assert figure.get_figwidth() <= 10
        scale = 800 / figure.get_figwidth() / 72  # to pixels in a README that is 800 wide
        assert min(text.get_fontsize() for text in written(figure)) * scale >= 8
        assert all(axes.get_window_extent().height > 60 for axes in figure.axes if axes.has_data())


@pytest.mark.parametrize("tasks", [1, 2, 5, 30])
def test_ticks_are_whole_numbers_that_do_not_overlap(tasks):
    names = [str(index) for index in range(tasks)]
    figure = figures.retention([StreamResult("a", names, torch.full((tasks, tasks), 0.9).tril(), [0.5] * tasks)])
    figure.draw_without_rendering()
    for axes in figure.axes[:2]:
        ticks = [tick.label1 for tick in axes.xaxis.get_major_ticks() if 1 <= tick.get_loc() <= tasks]
        assert all(float(tick.get_text()).is_integer() for tick in ticks)
        boxes = [tick.get_window_extent() for tick in ticks]
        assert all(one.x1 < other.x0 for one, other in pairwise(boxes))
        assert boxes


def test_hundreds_of_layers_share_bars_and_are_all_in_it():
    drawn = many(["a", "b"], layers=203, units=10)
    for figure in (figures.capacity(drawn), figures.unit_map(drawn)):
        figure.draw_without_rendering()
        assert figure.get_figheight() < 18
        names = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
        assert len(names) == 34
        assert names[:2] == ["layer.0 to layer.5", "layer.6 to layer.11"]
        assert names[-1] == "layer.198 to layer.202"
    frozen = torch.tensor([bar.get_width() for bar in figures.capacity(drawn).axes[0].patches]).view(3, 34)
    assert frozen[0].tolist() == pytest.approx([50] * 34)


def test_wide_layers_do_not_make_a_tower():
    assert figures.unit_map(many(["a"], layers=3, units=50_000)).get_figheight() < 14


@pytest.mark.parametrize("name", ["$\\frac{$", "$a$", "_hidden", "a\nb", "\x1b[31m"])
def test_a_name_is_shown_letter_by_letter(name):
    drawn = many([name, "other"], layers=2)
    shown = masks.printable(name)
    result = StreamResult(name, [name, "other"], torch.eye(2), [0.5, 0.5])
    for figure in (figures.retention([result]), figures.capacity(drawn), figures.unit_map(drawn)):
        figure.draw_without_rendering()
        said = [text for text in written(figure) if not text.get_text().isdigit()]
        assert shown in [text.get_text().replace("\\$", "$") for text in said]
        assert not any(text._preprocess_math(text.get_text())[1] is True for text in said)
        figures.overlap(drawn).draw_without_rendering()
        figures.search(drawn.task(name)).draw_without_rendering()


def test_more_methods_than_there_are_styles_are_refused():
    with pytest.raises(ValueError, match="results of 5 methods, expected one to four"):
        figures.retention([RESULT] * 5)
    with pytest.raises(ValueError, match="results of 0 methods"):
        figures.retention([])


def test_free_capacity_of_several_methods_differs_without_colours():
    bars = [container.patches[0] for container in figures.retention([RESULT] * 4).axes[2].containers]
    assert len({bar.get_hatch() for bar in bars}) == 4
    assert all(bar.get_edgecolor()[3] == 1 for bar in bars)  # to be seen on a dark page, too


def test_lines_of_thirty_tasks_differ_without_colours():
    looks = [figures._of_task(task) for task in range(30)]
    assert len({(look["marker"], look["fillstyle"]) for look in looks}) == 30
    markers = [line.get_marker() for line in figures.retention([RESULT] * 4).axes[0].get_lines()]
    assert len(set(markers)) == 4


def test_cells_of_the_unit_map_differ_without_colours():
    one = make(Mlp)
    masks_of = {"fc1": torch.tensor([1, 1, 0, 0, 0, 0]).bool(), "fc2": torch.tensor([0, 0, 0, 0, 0]).bool()}
    second = {"fc1": torch.tensor([0, 0, 1, 0, 0, 0]).bool(), "fc2": torch.tensor([0, 0, 0, 0, 0]).bool()}
    drawn = state_of(one, record_of(one, relevant=masks_of), record_of(one, "second", relevant=second))
    image = torch.as_tensor(figures.unit_map(drawn).axes[0].images[0].get_array())
    side = 6
    grey = image[..., :3] @ torch.tensor([0.299, 0.587, 0.114]) * image[..., 3] + 1 - image[..., 3]
    first, same, other, free = (grey[:side, side * unit : side * (unit + 1)] for unit in range(4))
    assert torch.equal(first, same)
    for one, another in ((first, other), (other, free), (first, free)):
        assert (one - another).abs().mean() > 0.1
        assert ((one < 0.95) != (another < 0.95)).any()  # another form, not only another shade


def test_the_overlap_of_many_tasks_has_a_scale_for_its_numbers():
    matrix, scale = figures.overlap(many([str(index) for index in range(30)], layers=1)).axes
    assert not matrix.texts
    assert scale.get_ylabel() == "units"
