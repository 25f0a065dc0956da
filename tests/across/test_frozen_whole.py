"""Layers whose units can't be followed, trained on two tasks: frozen whole with one warning, and recall is exact."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm
from training import TASKS, Classifier, inputs, train

from lightning_rnf import MultiHead, RelevanceFreezing


class Decoded(nn.Module):
    """What is decoded by the transposed weight of its encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.last = nn.Linear(6, 12), nn.Linear(6, 40)

    def forward(self, x: Tensor) -> Tensor:
        code = self.encoder(x).relu()
        return self.last(x - nn.functional.linear(code, self.encoder.weight.T)).relu()


class RunTwice(nn.Module):
    """A layer of somebody's own that runs twice: how it does so the second time nobody can try."""

    def __init__(self) -> None:
        super().__init__()
        self.same, self.last = Own(6, 6), nn.Linear(6, 40)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.same(self.same(x).relu()).relu()).relu()


class Own(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Teacher(nn.Module):
    """It runs once more, where no gradient comes back from."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(12, 40)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            beside = self.first(x.flip(1))
        return self.last(torch.cat([self.first(x), beside], 1).relu()).relu()


class Cast(nn.Module):
    """Inside of its own autocast the graph has one edge to the weight, whatever reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.same, self.last = nn.Linear(6, 6), nn.Linear(6, 40)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            x = self.same(self.same(x).relu()).relu()
            return self.last(nn.functional.linear(x, self.same.weight).relu()).relu().float()


class Mirrored(nn.Module):
    """It runs once with its weight and once with that turned over."""

    def __init__(self) -> None:
        super().__init__()
        self.same, self.last = nn.Linear(6, 6), nn.Linear(6, 40)

    def forward(self, x: Tensor) -> Tensor:
        turned = {"weight": self.same.weight.flip(0), "bias": self.same.bias}
        return self.last(torch.func.functional_call(self.same, turned, self.same(x).relu()).relu()).relu()


class Tied(nn.Module):
    """Two layers of different kinds with one weight, a norm behind one of them; the other has nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, 6), nn.BatchNorm1d(6), Own(6, 6, bias=False)
        self.second.weight = self.first.weight
        self.last = nn.Linear(6, 40)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.norm(self.first(x)).relu()).relu()).relu()


def parametrized(how: object) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 40), nn.ReLU(), how(nn.Linear(40, 40)), nn.ReLU())  # type: ignore[operator]


def of_inputs(layer: nn.Module) -> nn.Module:
    """Its columns have a length each, not its rows."""
    return weight_norm(layer, dim=1)


COUPLED = "is parametrized, and is not made of rows, output"
PARAMETRIZED = "is parametrized, and"
NETS = {
    "run twice": (RunTwice, 1, "body.same runs 2 times in one forward, and may do something else", ["last"]),
    "teacher": (Teacher, 1, "body.first runs 2 times in one forward, not always where", ["last"]),
    "cast": (Cast, 1, "body.same runs 2 times in one forward, and its 'body.same.weight' may be", ["last"]),
    "mirrored": (Mirrored, 1, "body.same runs 2 times in one forward, and its 'body.same.weight' may be", ["last"]),
    "decoded": (Decoded, 1, "body.encoder has its 'body.encoder.weight' used a second time outside", ["last"]),
    "tied": (
        Tied,
        2,
        "body.first shares 'body.first.weight' with ['body.second.weight'], which is of another kind (Own); body",
        ["last"],
    ),
    "spectral norm": (lambda: parametrized(spectral_norm), 1, f"body.2 {COUPLED}", ["0"]),
    "orthogonal": (lambda: parametrized(orthogonal), 1, f"body.2 {COUPLED}", ["0"]),
    "weight norm of inputs": (lambda: parametrized(of_inputs), 1, f"body.2 {PARAMETRIZED} what its weight", ["0"]),
}


@pytest.mark.parametrize("case", NETS)
def test_what_units_cant_follow_is_frozen_whole_with_one_warning(case):
    build, count, described, units = NETS[case]
    torch.manual_seed(0)
    model, rnf, x = Classifier(), RelevanceFreezing(), inputs()
    model.body = build()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        train(model, rnf, "a", max_epochs=1)
    (message,) = [str(one.message) for one in said if "can't be made of units" in str(one.message)]
    assert message.startswith(f"{count} layer{'s' * (count > 1)} can't be made of units and will be frozen whole")
    assert f": {described}" in message
    assert [layer.name for layer in rnf.state.layers] == [f"body.{name}" for name in units]
    with rnf.recall("a", model), torch.no_grad():
        before = model(x)
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    with warnings.catch_warnings(record=True) as said_later:
        warnings.simplefilter("always")
        train(model, rnf, "b", max_epochs=1)

    assert not [one for one in said_later if "can't be made of units" in str(one.message)]
    with rnf.recall("a", model), torch.no_grad():
        assert torch.equal(model(x), before)
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, weights[name])}
    assert f"body.{units[0]}.weight" in moved or f"body.{units[-1]}.weight" in moved  # there was something to break
    for name in re.findall(r"body\.[\w.]+", described):
        assert not any(one.startswith(f"{name.removesuffix('.weight')}.") for one in moved)


class Tokens(Classifier):
    """Signs of six numbers as tokens; the first task's head is the embedding's weight, as language models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict(
            {
                "table": nn.Embedding(12, 16),
                "wide": nn.Linear(16, 40),
                "narrow": nn.Linear(40, 16),
                "norm": nn.LayerNorm(16),
            }
        )
        tied = nn.Linear(16, 12)
        tied.weight = self.body["table"].weight
        self.heads = MultiHead(16, {"a": tied, **dict.fromkeys(TASKS[1:], 2)})
        self.heads.activate("a")

    def forward(self, x: Tensor) -> Tensor:
        x = self.body["table"]((x > 0) + 2 * torch.arange(6))
        return self.heads(self.body["norm"](x + self.body["narrow"](self.body["wide"](x).relu())).mean(1))


@pytest.mark.parametrize("search", ["fewest", "bisect"])
def test_a_head_that_has_the_weight_of_an_embedding_keeps_it(search):
    torch.manual_seed(0)
    model, rnf, x = Tokens(), RelevanceFreezing(search=search), inputs()
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        train(model, rnf, "a", max_epochs=12)
    record = rnf.state.tasks["a"]
    assert record.accuracy > 0.7
    assert record.subnetwork_accuracy > 0.9 * record.accuracy  # nothing was fitted over the embedding
    assert all(mask.any() for mask in record.relevant.values())  # its head can't be fitted, so half is hardly heard
    with rnf.recall("a", model), torch.no_grad():
        before = model(x)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        train(model, rnf, "b", max_epochs=2)
    with rnf.recall("a", model), torch.no_grad():
        assert torch.equal(model(x), before)
    assert rnf.report(model).is_sound


def test_a_layer_that_stands_in_two_places_is_made_of_units():
    torch.manual_seed(0)
    model, rnf, x = Classifier(), RelevanceFreezing(), inputs()
    model.encoder, model.last = nn.ModuleList([model.body]), model.body[3]
    train(model, rnf, "a", max_epochs=1)  # where a warning is an error
    assert [layer.name for layer in rnf.state.layers] == ["body.0", "body.3"]
    with rnf.recall("a", model), torch.no_grad():
        before = model(x)
    train(model, rnf, "b", max_epochs=1)
    with rnf.recall("a", model), torch.no_grad():
        assert torch.equal(model(x), before)
    assert rnf.report(model).is_sound
    assert (rnf.export(model, "a")(x) - before).abs().max() < 1e-5 * before.abs().max()
