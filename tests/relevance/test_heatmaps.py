"""Heatmaps of the input: where relevance arrives, how far it drifts, and what loggers are given."""

from __future__ import annotations

import pytest
import torch
from records import ConvNet, Mlp, batch, make
from torch import nn
from torch.utils.data import TensorDataset
from training import Classifier, Recorder, trainer

from lightning_rnf import RelevanceFreezing, UnitMap
from lightning_rnf.relevance.heatmaps import Drift, Gallery, compare_heatmaps, draw, heatmaps, images_of
from lightning_rnf.streams import TaskDataModule


class Images(Classifier):
    """The classifier for images of 3 × 8 × 8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 12, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 36, 40), nn.ReLU()
        )


def image_task(name, samples=64):
    generator = torch.Generator().manual_seed(ord(name))
    data = TensorDataset(torch.randn(samples, 3, 8, 8, generator=generator), torch.arange(samples) % 2)
    return TaskDataModule(name, 2, data, data, data, batch_size=32)


def test_all_relevance_arrives_at_the_pixels_that_are_read():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4, 3, bias=False))
    for parameter in net.parameters():
        parameter.data.abs_()  # nothing negative: no contribution is lost
    x = torch.rand(5, 2, 4, 4)
    x[:, :, 0] = 0
    y = torch.tensor([0, 1, 2, 0, 1])
    units = UnitMap.of(net, (x, y))
    maps = heatmaps(net, units.layers, (x, y))
    logits = net(x).gather(1, y.unsqueeze(1)).squeeze()
    torch.testing.assert_close(maps.sum(dim=(1, 2)), logits.detach(), rtol=1e-4, atol=1e-4)
    assert maps.shape == (5, 4, 4)
    assert not maps[:, 0].any()  # black pixels say nothing
    assert (maps[:, 1:] > 0).any()


def test_a_flattened_image_has_a_heatmap_too():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))
    x, y = torch.rand(3, 1, 4, 4), torch.tensor([0, 1, 0])
    assert heatmaps(net, UnitMap.of(net, (x, y)).layers, (x, y)).shape == (3, 4, 4)


def test_the_module_comes_back_as_it_was():
    net = make(ConvNet)
    net.heads.activate("first")
    before = {name: value.clone() for name, value in net.state_dict().items()}
    heatmaps(net, net.layers, batch(net))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_what_is_no_image_is_refused():
    net = make(Mlp)
    net.heads.activate("first")
    with pytest.raises(ValueError, match=r"need images \(N, channels, height, width\), the batch has"):
        heatmaps(net, net.layers, batch(net))
    pooled = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(4, 2))
    x, y = torch.rand(3, 1, 4, 4), torch.tensor([0, 1, 0])
    with pytest.raises(ValueError, match="what changes their size before the first unit layer has no heatmap"):
        heatmaps(pooled, UnitMap.of(pooled, (x, y)).layers, (x, y))


def test_images_are_found_in_any_batch():
    x = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    assert torch.equal(images_of({"mask": torch.zeros(2, 1, 4, 4).bool(), "x": [x]}), x.float())


def test_images_of_bytes_are_found_where_no_floats_are():
    x = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8)
    assert torch.equal(images_of({"mask": torch.zeros(2, 1, 4, 4).bool(), "x": x}), x.float())
    assert images_of([x, torch.rand(2, 1, 4, 4)]).shape == (2, 1, 4, 4)
    with pytest.raises(ValueError, match="heatmaps need images"):
        images_of([torch.zeros(2, 1, 4, 4).bool()])
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    y = torch.tensor([0, 1])

    def predict(module, batch):
        return module(batch[0].float() / 255), batch[1]

    units = UnitMap.of(net, (x.float() / 255, y))
    maps = heatmaps(net, units.layers, (x, y), predict)
    assert torch.equal(maps, heatmaps(net, units.layers, (x.float() / 255, y)))


def test_a_cosine_is_one_at_most():
    for seed in range(20):
        maps = torch.randn(3, 7, 7, generator=torch.Generator().manual_seed(seed))
        assert Drift.between(maps, 3 * maps).cosine <= 1
        assert Drift.between(maps, -maps).cosine >= -1


def test_drift_of_maps_written_by_hand():
    one = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]])
    for factor, cosine, signs in ((3, 1, 1), (-1, -1, 0)):
        drift = Drift.between(one, factor * one)
        assert (drift.cosine, drift.signs) == (pytest.approx(cosine), signs)
    other = torch.tensor([[[1.0, 1.0], [0.0, 0.0]]])  # 3 pixels speak in either, one the same way
    drift = Drift.between(one, other)
    assert drift.cosine == pytest.approx(0.5)
    assert drift.signs == pytest.approx(1 / 3)
    zero = torch.zeros(1, 2, 2)
    assert Drift.between(zero, zero) == Drift(1.0, 1.0)
    assert Drift.between(zero, one) == Drift(0.0, 0.0)


def test_the_figure_has_a_row_for_each_image_and_a_column_for_each_map():
    figure = draw(torch.rand(2, 3, 6, 6), {"then": torch.randn(2, 6, 6), "now": torch.randn(2, 6, 6)}, "title")
    assert [axes.get_title() for axes in figure.axes[:3]] == ["image", "then", "now"]
    assert len(figure.axes) == 6
    assert all(len(axes.images) == 1 for axes in figure.axes)
    draw(torch.rand(1, 1, 6, 6), {"then": torch.zeros(1, 6, 6)})  # grey, and a map without relevance


def test_what_is_no_number_is_grey_and_the_rest_keeps_its_colours():
    maps = torch.tensor([[[1.0, -1.0], [0.0, 0.5]]])
    broken = torch.tensor([[[1.0, -1.0], [float("nan"), float("inf")]]])
    sound, grey = (draw(torch.rand(1, 3, 2, 2), {"a": one}).axes[1].images[0].get_array() for one in (maps, broken))
    assert (sound[0] == grey[0]).all()
    assert grey[1].tolist() == [[128] * 3] * 2
    assert (draw(torch.rand(1, 3, 2, 2), {"a": maps * float("nan")}).axes[1].images[0].get_array() == 128).all()


def titles_of(figure):
    return [axes.get_title() for axes in figure.axes if axes.get_title() not in ("", "image")]


def test_methods_are_compared_right_after_the_task_and_after_each_later_one():
    maps = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]])
    other = torch.tensor([[[1.0, 1.0], [0.0, 0.0]]])
    when = ("right after it", "1 task later", "2 tasks later")
    methods = {"naive": dict(zip(when, (maps, other, -maps), strict=True)), "exact": dict.fromkeys(when, maps)}
    figure = compare_heatmaps(torch.rand(1, 3, 2, 2), methods)
    figure.draw_without_rendering()
    assert titles_of(figure)[:3] == [
        "right after it\ncosine 1.000\nsigns 100%",
        "1 task later\ncosine 0.500\nsigns 33%",
        "2 tasks later\ncosine -1.000\nsigns 0%",
    ]
    assert [title.splitlines()[1] for title in titles_of(figure)[3:]] == ["cosine 1.000"] * 3
    assert [part.get_suptitle() for part in figure.subfigs] == ["naive", "exact"]
    measured = {name: [Drift(0.25, 0.5)] * 3 for name in methods}
    assert (
        titles_of(compare_heatmaps(torch.rand(1, 3, 2, 2), methods, measured))[1]
        == "1 task later\ncosine 0.250\nsigns 50%"
    )


def test_the_heatmaps_of_many_tasks_fit_on_a_page():
    gallery = Gallery()
    for index in range(30):
        gallery.add("first", f"a task with a long name: $t_{index}$", torch.rand(2, 3, 4, 4), torch.randn(2, 4, 4))
    figure = gallery.draw("first")
    figure.draw_without_rendering()
    assert figure.get_figwidth() < 15
    shown = [title.splitlines()[0] for title in titles_of(figure)]
    assert len(set(shown)) == 8
    assert shown[0].endswith(r"\$t_0\$")
    assert shown[-1].endswith(r"\$t_29\$")


class Experiment:
    def __init__(self):
        self.figures, self.numbers = [], []

    def add_figure(self, name, figure, global_step, close):
        self.figures.append((name, global_step, len(figure.axes)))


@pytest.mark.filterwarnings("ignore:no free units are left:UserWarning")
def test_the_callback_logs_them_after_each_task_and_recall_does_not_drift():
    experiment = Experiment()
    logger = Recorder(experiment)
    torch.manual_seed(0)
    model, rnf = Images(), RelevanceFreezing(heatmaps=2)
    for name in ("a", "b"):
        model.heads.activate(name)
        trainer(rnf, max_epochs=1, logger=logger, log_every_n_steps=1).fit(model, datamodule=image_task(name))
    found = [(name, step, axes) for name, step, axes in experiment.figures if "heatmaps" in name]
    assert found == [("rnf/heatmaps/a", 1, 4), ("rnf/heatmaps/a", 2, 6), ("rnf/heatmaps/b", 2, 4)]
    (numbers,) = [n for step, n in logger.numbers if step == 2 and "rnf/heatmap_cosine/a" in n]
    assert numbers["rnf/heatmap_cosine/a"] == pytest.approx(1)
    assert numbers["rnf/heatmap_signs/a"] == 1
    first, last = rnf._witnesses.gallery.maps["a"].values()
    assert torch.equal(first, last)


@pytest.mark.filterwarnings("ignore:no free units are left:UserWarning")
def test_tasks_whose_samples_are_gone_are_named():
    torch.manual_seed(0)
    model, before = Images(), RelevanceFreezing(heatmaps=2)
    model.heads.activate("a")
    trainer(before, max_epochs=1).fit(model, datamodule=image_task("a"))
    rnf = RelevanceFreezing(heatmaps=2)
    rnf.load_state_dict(before.state_dict())
    model.heads.activate("b")
    with pytest.warns(UserWarning, match="no heatmaps of 'a': samples of a task are kept until the program ends"):
        trainer(rnf, max_epochs=1).fit(model, datamodule=image_task("b"))
    assert {task: list(maps) for task, maps in rnf._witnesses.gallery.maps.items()} == {"b": ["b"]}
    before.load_state_dict(before.state_dict())  # the same tasks: their samples stay
    trainer(before, max_epochs=1).fit(model, datamodule=image_task("b"))
    assert {task: list(maps) for task, maps in before._witnesses.gallery.maps.items()} == {"a": ["a", "b"], "b": ["b"]}


def test_a_task_without_images_is_refused_before_it_is_trained():
    from training import task_data

    model = Classifier()
    model.heads.activate("a")
    before = model.body[0].weight.clone()
    with pytest.raises(ValueError, match="heatmaps need images"):
        trainer(RelevanceFreezing(heatmaps=1)).fit(model, datamodule=task_data("a"))
    assert torch.equal(model.body[0].weight, before)


@pytest.mark.parametrize("number", [-1, 9, 1.5])
def test_the_option_is_checked(number):
    with pytest.raises((ValueError, TypeError), match="heatmaps"):
        RelevanceFreezing(heatmaps=number)


def test_a_gallery_compares_the_first_with_the_last():
    gallery = Gallery()
    one = torch.tensor([[[1.0, -1.0]]])
    for ended, maps in (("a", one), ("b", -one), ("c", 2 * one)):
        gallery.add("a", ended, torch.rand(1, 3, 1, 2), maps)
    assert gallery.drift("a").cosine == pytest.approx(1)
    assert gallery.drift("a").signs == 1
    titles = [axes.get_title() for axes in gallery.draw("a").axes]
    assert "cosine -1.000" in titles[2]
