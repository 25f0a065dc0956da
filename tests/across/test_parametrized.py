"""Weights that are computed from a direction and a length for each row: rows are units, as in plain layers."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from networks import labelled
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations
from training import Classifier, inputs, train

from lightning_rnf import RelevanceFreezing, UnitMap
from lightning_rnf.relevance.attribution import attribute
from lightning_rnf.relevance.importance import magnitude


class Causal(nn.Module):
    """A block of a temporal convolutional network: two dilated convolutions with weight norm, and a skip connection."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.first, self.second = (
            weight_norm(nn.Conv1d(channels, channels, 2, padding=dilation, dilation=dilation)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[2]
        return x + self.second(self.first(x)[..., :length].relu())[..., :length].relu()


def tcn() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 6)),
        weight_norm(nn.Conv1d(1, 8, 1)),
        Causal(8, 1),
        Causal(8, 2),
        nn.Flatten(),
        nn.Linear(48, 40),
    )


class Standardised(nn.Module):
    """A parametrization of somebody's own, row by row."""

    def forward(self, weight: Tensor) -> Tensor:
        return (weight - weight.mean(1, keepdim=True)) / weight.std(1, keepdim=True)


def own() -> nn.Module:
    net = nn.Sequential(nn.Linear(6, 40), nn.BatchNorm1d(40), nn.ReLU(), weight_norm(nn.Linear(40, 40)), nn.ReLU())
    register_parametrization(net[0], "weight", Standardised())
    return net


NETS = {"TCN": (tcn, 6), "own": (own, 2)}


@pytest.mark.filterwarnings("ignore:.*of the parameters of its silent units are still there:UserWarning")
@pytest.mark.parametrize("case", NETS)
def test_recall_is_bit_equal_after_a_second_task(case):
    torch.manual_seed(0)
    build, count = NETS[case]
    model, rnf, x = Classifier(), RelevanceFreezing(), inputs()
    model.body = build()
    units = UnitMap.of(model, (x, torch.zeros(64).long()))
    assert (len(units.layers), units.shared, units.whole) == (count, (), {})
    train(model, rnf, "a", max_epochs=2)
    with rnf.recall("a", model), torch.no_grad():
        before = model(x)
    assert 0 < rnf.free_weights < 1
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train(model, rnf, "b", max_epochs=2)
    with rnf.recall("a", model), torch.no_grad():
        assert torch.equal(model(x), before)
    assert rnf.report(model).is_sound
    frozen = rnf.state.tasks["a"].relevant
    for layer in rnf.state.layers:
        for name in layer.parameters:
            moved = (model.get_parameter(name) != weights[name]).view(layer.units, -1).any(dim=1)
            assert not (moved & frozen[layer.name]).any()
            assert moved[~frozen[layer.name]].any() or bool(frozen[layer.name].all())
    assert (rnf.export(model, "a")(x) - before).abs().max() < 1e-5 * before.abs().max()
    again = RelevanceFreezing()
    again.state = type(rnf.state).from_plain(rnf.state.to_plain())
    with again.recall("a", model), torch.no_grad():
        assert torch.equal(model(x), before)


def test_relevance_and_magnitude_are_those_of_plain_layers():
    torch.manual_seed(0)
    batch = labelled(16, 6)
    net = nn.Sequential(tcn(), nn.ReLU(), nn.Linear(40, 3))
    plain = nn.Sequential(tcn(), nn.ReLU(), nn.Linear(40, 3))  # a copy would share torch's class with it
    plain.load_state_dict(net.state_dict())
    for module in list(plain.modules()):
        if hasattr(module, "parametrizations"):
            remove_parametrizations(module, "weight")
    layers, expected = UnitMap.of(net, batch).layers, UnitMap.of(plain, batch).layers
    before = copy.deepcopy(net.state_dict())
    found = attribute(net, layers, [batch])
    of_plain = attribute(plain, expected, [batch])
    assert [layer.name for layer in layers] == [layer.name for layer in expected]
    for name, values in of_plain.relevance.items():
        torch.testing.assert_close(found.relevance[name], values, rtol=1e-4, atol=1e-6)
    assert found.conservation.notes == of_plain.conservation.notes
    magnitudes = magnitude(net, layers, [], None), magnitude(plain, expected, [], None)
    assert all(torch.allclose(magnitudes[0][name], values) for name, values in magnitudes[1].items())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


class Cached(Classifier):
    """The weight of a layer is read a second time, and with `parametrize.cached` it is computed only once."""

    def __init__(self, is_cached: bool) -> None:
        super().__init__()
        self.is_cached = is_cached
        self.body = None
        self.first, self.normed, self.mid = nn.Linear(6, 12), weight_norm(nn.Linear(12, 12)), nn.Linear(12, 12)
        self.last = nn.Linear(12, 40)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).relu()
        with parametrize.cached() if self.is_cached else nullcontext():
            both = self.mid(self.normed(hidden).relu()) + nn.functional.linear(hidden, self.normed.weight)
        return self.heads(self.last(both.relu()).relu())


@pytest.mark.parametrize("is_cached", [False, True])
def test_a_weight_that_is_read_a_second_time_is_frozen_whole_if_it_is_cached_too(is_cached):
    x = inputs()
    units = UnitMap.of(Cached(is_cached), (x, torch.zeros(len(x), dtype=torch.long)))
    assert [layer.name for layer in units.layers] == ["first", "mid", "last"]
    assert "used a second time outside the layer" in units.whole["normed"]
