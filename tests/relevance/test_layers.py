"""Rules of layers: against Zennit's, against networks unrolled or written without in-place functions, and in memory."""

from __future__ import annotations

import copy
import gc
from functools import partial

import pytest
import torch
from networks import CLASSES, Built, labelled
from torch import Tensor, nn
from zennit.composites import EpsilonPlus

from lightning_rnf.anatomy.units import UnitMap
from lightning_rnf.relevance.attribution import attribute
from lightning_rnf.relevance.layers import epsilon, plus

LAYERS = {
    "linear": (lambda bias: nn.Linear(4, 5, bias=bias), (3, 4)),
    "linear at positions": (lambda bias: nn.Linear(4, 5, bias=bias), (3, 2, 4)),
    "convolution": (lambda bias: nn.Conv2d(4, 6, 3, padding=1, stride=2, groups=2, bias=bias), (3, 4, 7, 7)),
    "reflecting": (lambda bias: nn.Conv1d(4, 6, 3, padding=1, padding_mode="reflect", bias=bias), (3, 4, 7)),
    "transposed": (lambda bias: nn.ConvTranspose2d(4, 6, 3, stride=2, bias=bias), (3, 4, 5, 5)),
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("positive", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_hands_on_what_it_does_under_zennits_hooks(name, bias, positive):
    make, shape = LAYERS[name]
    layer, x = make(bias), torch.randn(shape)
    x = (x.relu() if positive else x).requires_grad_()
    relevance = torch.randn(layer(x).shape)
    kept = {key: (value, value.clone()) for key, value in layer.named_parameters()}
    found = (epsilon if isinstance(layer, nn.Linear) else plus)(layer, x.detach(), relevance)
    assert all(layer.get_parameter(key) is value and torch.equal(value, was) for key, (value, was) in kept.items())
    with EpsilonPlus().context(nn.Sequential(layer)) as hooked:
        (expected,) = torch.autograd.grad(hooked(x), x, relevance)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU, nn.Hardtanh, nn.LeakyReLU])
def test_an_activation_in_place_is_read_as_what_it_has_become(activation):
    """Under Zennit's hooks it writes to a copy, and the network says something else."""

    def in_place(net, x):
        x = net.first(x)
        y = net.second(net.act(x))
        return net.head(y.relu() + x)  # which is the activation's output by now

    def apart(net, x):
        x = net.act(net.first(x))
        return net.head(net.second(x).relu() + x)

    parts = {"first": nn.Linear(4, 6), "second": nn.Linear(6, 6), "head": nn.Linear(6, CLASSES)}
    net = Built(in_place, **parts, act=activation(inplace=True))
    other = Built(apart, **parts, act=activation())
    batch = labelled(5, 4)
    layers = UnitMap.of(other, batch).layers
    found, expected = (attribute(one, layers, [batch]) for one in (net, other))
    for layer in layers:
        torch.testing.assert_close(found.relevance[layer.name], expected.relevance[layer.name], rtol=1e-5, atol=1e-7)
    assert found.conservation.ratios == pytest.approx(expected.conservation.ratios, rel=1e-5)


def test_a_convolution_that_runs_several_times_has_its_rule_in_each_run():
    def run(net, x):
        x = net.stem(x).relu()
        for _ in range(3):
            x = net.again(x).relu()
        return net.head(net.last(x).relu().mean((2, 3)))

    def unrolled(net, x):
        x = net.stem(x).relu()
        for layer in (net.again, net.second, net.third):
            x = layer(x).relu()
        return net.head(net.last(x).relu().mean((2, 3)))

    parts = {"stem": nn.Conv2d(2, 6, 3), "again": nn.Conv2d(6, 6, 3, padding=1), "last": nn.Conv2d(6, 5, 3)}
    net = Built(run, **parts, head=nn.Linear(5, CLASSES))
    other = copy.deepcopy(net)
    other.compute, other.second, other.third = unrolled, copy.deepcopy(net.again), copy.deepcopy(net.again)
    batch = labelled(4, 2, 8, 8)
    layers = UnitMap.of(net, batch).layers
    found, expected = (attribute(one, layers, [batch]) for one in (net, other))
    for layer in layers:
        assert torch.equal(found.relevance[layer.name], expected.relevance[layer.name])
    assert found.conservation.notes == ()


def test_layers_that_are_called_by_keyword_have_their_rules():
    def forward(net, x, *, named):
        x = net.first(x)
        if named:
            return net.head(input=net.act(input=net.second(input=x)).flatten(1))
        return net.head(net.act(net.second(x)).flatten(1))

    parts = {
        "first": nn.Conv1d(2, 4, 3),
        "second": nn.Conv1d(4, 5, 3),
        "act": nn.ReLU(),
        "head": nn.Linear(10, CLASSES),
    }
    batch = labelled(4, 2, 6)
    nets = [Built(partial(forward, named=named), **parts) for named in (True, False)]
    layers = [layer for layer in UnitMap.of(nets[1], batch).layers if layer.name == "first"]
    found, expected = (attribute(net, layers, [batch]).relevance["first"] for net in nets)
    assert torch.equal(found, expected)


def test_nothing_is_left_on_the_layers():
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, CLASSES)).eval()
    before = [dict(vars(part)) for part in net.modules()]
    batch = labelled(4, 2, 6, 6)
    attribute(net, UnitMap.of(net, batch).layers, [batch])
    assert [dict(vars(part)) for part in net.modules()] == before


def test_what_is_kept_for_the_backward_is_a_training_steps_or_less():
    """Bytes of tensors that are alive when the logits are there, by their storages."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(2))
            self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2))
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norms[1](self.second(self.relu(self.norms[0](self.first(x)))))
            y += x
            return self.relu(y)

    net = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), *(Block() for _ in range(6)), nn.AdaptiveAvgPool2d(1))
    net = nn.Sequential(net, nn.Flatten(), nn.Linear(8, CLASSES))
    batch = labelled(8, 2, 16, 16)
    layers = UnitMap.of(net.eval(), batch).layers
    counted: list[int] = []

    def alive() -> int:
        gc.collect()
        tensors = [one for one in gc.get_objects() if issubclass(type(one), Tensor) and type(one) is not nn.Parameter]
        storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
        return sum(storages.values())

    def predict(module: nn.Module, given: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        logits = module(given[0])
        counted.append(alive())
        return logits, given[1]

    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # with itself the graph would hold itself

    before = alive()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        net.train()(batch[0])
    of_step = sum(saved.values())
    net.eval()
    attribute(net, layers, [batch], predict)
    assert counted[0] - before <= of_step
