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


class Siamese(nn.Module):
    """One encoder reads both halves of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.joined = nn.Linear(3, 12), nn.Linear(24, 40)

    def forward(self, x: Tensor) -> Tensor:
        halves = [self.encoder(half).relu() for half in x.chunk(2, dim=1)]
        return self.joined(torch.cat([halves[0] + halves[1], (halves[0] - halves[1]).abs()], 1)).relu()


class Block(nn.Module):
    """Of a transformer: query, key and value, a projection and a feed-forward part, each behind a layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.wide, self.narrow = nn.Linear(8, 16), nn.Linear(16, 8)
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.query(x) @ self.key(x).transpose(1, 2) / 8**0.5).softmax(2)
        x = self.norms[0](x + self.out(weights @ self.value(x)))
        return self.norms[1](x + self.narrow(nn.functional.gelu(self.wide(x))))


class Repeated(nn.Module):
    """One block that runs three times, as ALBERT has it, between layers that run once."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block, self.pooler = nn.Linear(2, 8), Block(), nn.Linear(8, 40)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.unflatten(1, (3, 2)))
        for _ in range(3):
            x = self.block(x)
        return self.pooler(x[:, 0]).tanh()


class Decoded(nn.Module):
    """What is decoded by the transposed weight of its encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.last = nn.Linear(6, 12), nn.Linear(6, 40)

    def forward(self, x: Tensor) -> Tensor:
        code = self.encoder(x).relu()
        return self.last(x - nn.functional.linear(code, self.encoder.weight.T)).relu()


class Tied(nn.Module):
    """Two layers with one weight, a norm behind one of them; the other has nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6, bias=False)
        self.second.weight = self.first.weight
        self.last = nn.Linear(6, 40)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.norm(self.first(x)).relu()).relu()).relu()


def parametrized(how: object) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 40), nn.ReLU(), how(nn.Linear(40, 40)), nn.ReLU())  # type: ignore[operator]


def of_inputs(layer: nn.Module) -> nn.Module:
    """Its columns have a length each, not its rows."""
    return weight_norm(layer, dim=1)


BLOCK = "block.query, body.block.key, body.block.value, body.block.out, body.block.wide, body.block.narrow"
COUPLED = "is parametrized, and is not made of rows, output"
RUNS = "in one forward, so the relevance of its units is not defined"
PARAMETRIZED = "is parametrized, and"
NETS = {
    "siamese": (Siamese, 1, f"body.encoder runs 2 times {RUNS}", ["joined"]),
    "ALBERT": (Repeated, 6, f"body.{BLOCK} runs 3 times {RUNS}", ["embed", "pooler"]),
    "decoded": (Decoded, 1, "body.encoder has its 'body.encoder.weight' used a second time outside", ["last"]),
    "tied": (
        Tied,
        2,
        "body.first shares 'body.first.weight' with ['body.second.weight']; body.second shares",
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


def test_without_a_word_where_they_are_left_out():
    torch.manual_seed(0)
    model, rnf = Classifier(), RelevanceFreezing(units="!body.encoder")
    model.body = Siamese()
    train(model, rnf, "a", max_epochs=1)  # where a warning is an error
    assert [layer.name for layer in rnf.state.layers] == ["body.joined"]


class Tokens(Classifier):
    """Six numbers as tokens; the first task's head is the embedding's weight, as language models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict(
            {
                "table": nn.Embedding(2, 16),
                "wide": nn.Linear(16, 40),
                "narrow": nn.Linear(40, 16),
                "norm": nn.LayerNorm(16),
            }
        )
        tied = nn.Linear(16, 2)
        tied.weight = self.body["table"].weight
        self.heads = MultiHead(16, {"a": tied, **dict.fromkeys(TASKS[1:], 2)})
        self.heads.activate("a")

    def forward(self, x: Tensor) -> Tensor:
        x = self.body["table"]((x > 0).long())
        return self.heads(self.body["norm"](x + self.body["narrow"](self.body["wide"](x).relu())).mean(1))


def test_a_head_that_has_the_weight_of_an_embedding_keeps_it():
    torch.manual_seed(0)
    model, rnf, x = Tokens(), RelevanceFreezing(), inputs()
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        train(model, rnf, "a", max_epochs=2)
    record = rnf.state.tasks["a"]
    assert record.subnetwork_accuracy > 0.9 * record.accuracy  # nothing was fitted over the embedding
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
