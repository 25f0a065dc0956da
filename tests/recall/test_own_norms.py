"""Each task has scale and shift of norms of its own: later tasks train them on, recall brings them back."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from training import TASKS, Classifier, ConvClassifier, inputs, train

from lightning_rnf import MultiHead, RelevanceFreezing

OPTIONS = {"recovery_epochs": 0, "ration": 0.4, "criterion": 0.1}


class Normed(Classifier):
    """Norms of every kind that torch has, in front of and behind sums; some belong to units, others to none."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.start = nn.Sequential(nn.Linear(6, 24), nn.BatchNorm1d(24), nn.ReLU())
        self.block = nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24))
        self.behind = nn.ModuleList([nn.BatchNorm1d(24), nn.GroupNorm(4, 24), nn.RMSNorm(24)])
        self.body = nn.Sequential(nn.Linear(24, 20), nn.ReLU())
        self.heads = MultiHead(20, dict.fromkeys(TASKS, 2))

    def forward(self, x):
        x = self.start(x)
        x = x + self.block(x)
        for norm in self.behind:
            x = norm(x)
        return self.heads(self.body(x))


NORMS = {
    ConvClassifier: ["body.4"],
    Normed: ["start.1", "block.0", "behind.0", "behind.1", "behind.2"],
}


def built(network):
    torch.manual_seed(0)
    return network()


def recalled(rnf, model, task):
    with rnf.recall(task, model), torch.no_grad():
        return model(inputs())


def scales(model, network):
    return {f"{name}.weight": model.get_parameter(f"{name}.weight").detach().clone() for name in NORMS[network]}


@pytest.mark.parametrize("network", NORMS)
def test_later_tasks_train_them_and_recall_is_bit_equal(network):
    model, rnf = built(network), RelevanceFreezing(**OPTIONS)
    train(model, rnf, "a", max_epochs=3)
    then, of_a = recalled(rnf, model, "a"), scales(model, network)
    train(model, rnf, "b", max_epochs=3)
    for name, value in scales(model, network).items():
        assert (value != of_a[name]).all(), "each channel's, of relevant units, too"
        assert torch.equal(rnf.state.task("a").norm_statistics[name], of_a[name])
        assert torch.equal(rnf.state.task("b").norm_statistics[name], value)
        assert name not in rnf.state.shared
    assert torch.equal(recalled(rnf, model, "a"), then)
    of_b = recalled(rnf, model, "b")
    with torch.no_grad():
        for name in scales(model, network):
            model.get_parameter(name).fill_(float("nan"))
    assert torch.equal(recalled(rnf, model, "a"), then)
    assert torch.equal(recalled(rnf, model, "b"), of_b)
    assert all(value.isnan().all() for value in scales(model, network).values()), "recall leaves what it found"


class Plain(Classifier):
    """A layer norm and no buffers."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.body = nn.Sequential(nn.Linear(6, 24), nn.LayerNorm(24), nn.ReLU())
        self.heads = MultiHead(24, dict.fromkeys(TASKS, 2))


def test_graphs_around_a_recall_stay_whole():
    """Distillation: the old task is recalled between a forward and its backward; and what was recalled is sent back."""
    model, rnf = built(Plain), RelevanceFreezing(**OPTIONS)
    for task in "ab":
        train(model, rnf, task, max_epochs=2)
    model.requires_grad_(True)
    own = model.get_parameter("body.1.weight")
    now = model(inputs()).sum()
    recalled(rnf, model, "a")
    now.backward()
    assert own.grad is not None
    with rnf.recall("a", model):
        then = model(inputs()).sum()
        assert model.get_parameter("body.1.weight") is not own
    then.backward()
    assert model.get_parameter("body.1.weight") is own


def test_one_that_no_task_but_a_later_one_has_run_is_told_of():
    class Some(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(6, 24), nn.ReLU())
            self.seldom, self.runs = nn.LayerNorm(24), False

        def forward(self, x):
            x = self.body(x)
            return self.heads(self.seldom(x) if self.runs or self.heads.active == "b" else x)

    model, rnf = Some(), RelevanceFreezing(**OPTIONS)
    train(model, rnf, "a", max_epochs=1)
    train(model, rnf, "b", max_epochs=1)
    model.runs = True
    with pytest.warns(UserWarning, match=r"'seldom' \(LayerNorm\) runs in the recall of 'a', but ran on none"):
        recalled(rnf, model, "a")
    recalled(rnf, model, "b")


@pytest.mark.parametrize("options", [{"norm_statistics": "shared"}, {"retention": "paper"}])
@pytest.mark.filterwarnings("ignore:norm_statistics='shared':UserWarning")
def test_callbacks_of_other_kinds_go_on_with_them(options):
    model, rnf = built(ConvClassifier), RelevanceFreezing(**OPTIONS)
    train(model, rnf, "a", max_epochs=2)
    of_a = scales(model, ConvClassifier)["body.4.weight"]
    few = {} if "retention" not in options else {"ration": None}
    other = RelevanceFreezing(**{**OPTIONS, **few}, **options)
    other.state = rnf.state
    train(model, other, "b", max_epochs=2)
    assert "body.4.weight" in other.state.task("b").norm_statistics
    with other.recall("a", model):
        assert torch.equal(model.get_parameter("body.4.weight"), of_a)


@pytest.mark.parametrize("network", NORMS)
def test_frozen_ones_stay_with_their_units_and_are_nobody_s_own(network):
    model, rnf = built(network), RelevanceFreezing(**OPTIONS, norm_parameters="frozen")
    train(model, rnf, "a", max_epochs=3)
    of_a, layers = scales(model, network), {layer.norm: layer.name for layer in rnf.state.layers}
    train(model, rnf, "b", max_epochs=3)
    for name, value in scales(model, network).items():
        owner = name.rpartition(".")[0]
        relevant = rnf.state.task("a").relevant[layers[owner]] if owner in layers else slice(None)
        assert torch.equal(value[relevant], of_a[name][relevant])
        assert name not in rnf.state.task("b").norm_statistics


@pytest.mark.parametrize("first", ["per_task", "frozen"])
def test_what_the_first_task_has_decided_holds_for_later_ones(first):
    """A project that was begun before there were any goes on with norms that are frozen."""
    model, rnf = built(Normed), RelevanceFreezing(**OPTIONS, norm_parameters=first)
    train(model, rnf, "a", max_epochs=2)
    then, of_a = recalled(rnf, model, "a"), scales(model, Normed)
    other = RelevanceFreezing(**OPTIONS, norm_parameters="frozen" if first == "per_task" else None)
    other.state = rnf.state
    train(model, other, "b", max_epochs=2)
    assert torch.equal(recalled(other, model, "a"), then)
    name = "behind.1.weight"
    assert (name in other.state.task("b").norm_statistics) == (first == "per_task")
    assert torch.equal(model.get_parameter(name), of_a[name]) == (first == "frozen")


def test_free_units_start_from_their_first_ones():
    model = built(ConvClassifier)
    rnf = RelevanceFreezing(**OPTIONS, reset_free=True)
    train(model, rnf, "a", max_epochs=3)
    (layer,) = (layer for layer in rnf.state.layers if layer.norm)
    relevant = rnf.state.task("a").relevant[layer.name]
    seen = []

    class Look(type(rnf)):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(pl_module.get_parameter("body.4.weight").detach().clone())

    other = Look(**OPTIONS, reset_free=True)
    other.state = rnf.state
    train(model, other, "b", max_epochs=1)
    assert (seen[0][~relevant] == 1).all()
    assert torch.equal(seen[0][relevant], other.state.task("a").norm_statistics["body.4.weight"][relevant])


def test_masks_and_small_networks_have_them(tmp_path):
    model, rnf = built(ConvClassifier), RelevanceFreezing(**OPTIONS)
    for task in "ab":
        train(model, rnf, task, max_epochs=3)
    then = recalled(rnf, model, "a")
    rnf.save(tmp_path / "masks.safetensors")
    other = RelevanceFreezing()
    other.load(tmp_path / "masks.safetensors", model)
    assert torch.equal(recalled(other, model, "a"), then)
    with torch.no_grad():
        torch.testing.assert_close(rnf.export(model, "a")(inputs()), then, rtol=0, atol=1e-5 * float(then.abs().max()))


@pytest.mark.parametrize(
    "options", [{"retention": "paper"}, {"norm_statistics": "pinned"}, {"norm_statistics": "shared"}]
)
def test_they_need_recall_with_statistics(options):
    with pytest.raises(ValueError, match="norm_parameters='per_task' is brought back by recall"):
        RelevanceFreezing(norm_parameters="per_task", **options)


def test_one_that_another_module_has_too_is_frozen():
    model = built(Normed)
    model.behind[0].weight = model.start[1].weight
    rnf = RelevanceFreezing(**OPTIONS)
    train(model, rnf, "a", max_epochs=2)
    then = recalled(rnf, model, "a")
    train(model, rnf, "b", max_epochs=2)
    assert torch.equal(recalled(rnf, model, "a"), then)
    assert "start.1.weight" not in rnf.state.task("a").norm_statistics
    assert "start.1.bias" in rnf.state.task("a").norm_statistics


@pytest.mark.parametrize("option", ["elasticity", "irrelevant_elasticity"])
def test_a_factor_that_would_reach_nothing_else_is_refused(option):
    with pytest.raises(
        ValueError, match=rf"{option}: 'block\.0' matches nothing but norms, .* norm_parameters='frozen'"
    ):
        train(built(Normed), RelevanceFreezing(**OPTIONS, **{option: {"block.0": 0.0}}), "a")
    train(built(Normed), RelevanceFreezing(**OPTIONS, norm_parameters="frozen", **{option: {"block.0": 0.0}}), "a")
