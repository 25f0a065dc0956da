"""Layers that are not torch's: known by name or registered, with rows or columns for their units."""

from __future__ import annotations

import copy

import pytest
import torch
from kinds import Competing, Conv1D, Cosine, Linear, Pixelwise
from networks import CLASSES, Built, labelled
from records import bare_record
from torch import nn

from lightning_rnf import FreezeState, UnitLayer, UnitMap, register_layer
from lightning_rnf.anatomy import Flow, Traced, kinds, widened
from lightning_rnf.freezing.freezer import Freezer, elasticities
from lightning_rnf.recall.subnetwork import recall, statistics
from lightning_rnf.relevance.attribution import attribute
from lightning_rnf.relevance.importance import magnitude


@pytest.fixture(autouse=True)
def _apart(monkeypatch):
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(kinds, "_REGISTERED", {})
    torch.manual_seed(0)


def registered() -> None:
    register_layer(Cosine, -1)
    register_layer(Pixelwise, axis=-3, transposed=True)


LAYERS = {  # square ones, too: of those no shape tells rows from columns
    "Conv1D": (lambda: Conv1D(5, 4), (4,), UnitLayer("0", 5, -1, ("0.weight", "0.bias"), transposed=(1, 4))),
    "Conv1D, square": (lambda: Conv1D(4, 4), (3, 4), UnitLayer("0", 4, -1, ("0.weight", "0.bias"), transposed=(1, 4))),
    "Linear": (lambda: Linear(4, 5), (4,), UnitLayer("0", 5, -1, ("0.weight", "0.bias"))),
    "Linear, square, no bias": (lambda: Linear(4, 4, bias=False), (3, 4), UnitLayer("0", 4, -1, ("0.weight",))),
    "registered": (lambda: Cosine(4, 4), (4,), UnitLayer("0", 4, -1, ("0.weight", "0.scale"))),
    "registered, transposed": (
        lambda: Pixelwise(4, 4),
        (4, 3, 3),
        UnitLayer("0", 4, -3, ("0.weight",), transposed=(1, 4)),
    ),
}


@pytest.mark.parametrize("case", LAYERS)
def test_a_unit_owns_what_its_output_reads(case):
    build, shape, expected = LAYERS[case]
    registered()
    layer, x = build(), labelled(4, *shape)[0]
    said = layer(x)
    net = nn.Sequential(layer, nn.ReLU(), nn.Flatten(), nn.Linear(said[0].numel(), CLASSES))

    units = UnitMap.of(net, (x, labelled(4)[1]))

    assert units.layers == (expected,)
    for name in expected.parameters:
        parameter = net.get_parameter(name)
        owner = expected.spread(name, torch.arange(expected.units))
        assert owner.shape == parameter.shape[: owner.ndim]
        for unit in range(expected.units):
            (read,) = torch.autograd.grad(layer(x).select(expected.axis, unit).sum(), parameter)
            assert read[owner != unit].eq(0).all()
            assert read[owner == unit].ne(0).all()


def stack(kind: str, norm: bool = False) -> Built:
    """Two square layers of a kind between torch's."""
    register_layer(Cosine, -1)
    make = {"Conv1D": lambda: Conv1D(6, 6), "Linear": lambda: Linear(6, 6), "Cosine": lambda: Cosine(6, 6)}[kind]
    return Built(
        lambda net, x: net.head(net.second(net.norm(net.first(net.stem(x).relu())).relu()).relu()),
        stem=nn.Linear(4, 6),
        first=make(),
        norm=nn.BatchNorm1d(6) if norm else nn.Identity(),
        second=make(),
        head=nn.Linear(6, CLASSES),
    )


@pytest.mark.parametrize("kind", ["Conv1D", "Linear", "Cosine"])
@pytest.mark.parametrize("norm", [False, True])
def test_recall_is_exact_after_a_step_that_writes_everywhere(kind, norm):
    net = stack(kind, norm).eval()
    batch = labelled(4, 4)
    units = UnitMap.of(net, batch)
    assert [layer.name for layer in units.layers] == ["stem", "first", "second"]
    assert units.layers[1].norm == ("norm" if norm else None)
    assert set(units.by_rows) == {"first", "second"}
    generator = torch.Generator().manual_seed(1)
    relevant = {one.name: torch.rand(one.units, generator=generator) < 0.5 for one in units.layers}
    state = FreezeState()
    state.add(bare_record(units, relevant, statistics(net, units)), units)
    with recall(net, units.layers, state.tasks["task"]), torch.no_grad():
        before = net(batch[0])
    weights = copy.deepcopy(net.state_dict())
    freezer = Freezer(net, elasticities(state))
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    freezer.attach([optimizer])
    for parameter in net.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    with recall(net, units.layers, state.tasks["task"]), torch.no_grad():
        assert torch.equal(net(batch[0]), before)
    # What moved are the others' rows, or columns, and all of them.
    moved = net.first.weight != weights["first.weight"]
    free = ~relevant["first"]
    assert torch.equal(moved, (free[None, :] if kind == "Conv1D" else free[:, None]).expand(6, 6))
    assert UnitMap.of(net, batch).layers == units.layers


def twin(net: Built) -> Built:
    """The same network of torch's layers."""
    other = copy.deepcopy(net)
    for name in ("first", "second"):
        old, new = getattr(net, name), nn.Linear(6, 6)
        with torch.no_grad():
            new.weight.copy_(old.weight.T if isinstance(old, Conv1D) else old.weight)
            new.bias.copy_(old.bias)
        setattr(other, name, new)
    return other


@pytest.mark.parametrize("kind", ["Conv1D", "Linear"])
@pytest.mark.parametrize("norm", [False, True])
def test_relevance_is_that_of_torchs_linear_layer(kind, norm):
    net, batch = stack(kind), labelled(16, 4)
    other = twin(net)
    layers, others = (UnitMap.of(one, batch).layers for one in (net, other))
    found, expected = attribute(net, layers, [batch]), attribute(other, others, [batch])
    for name, values in expected.relevance.items():
        torch.testing.assert_close(found.relevance[name], values, rtol=1e-3, atol=1e-5)
    assert found.conservation.notes == ()
    assert found.conservation.cuts == expected.conservation.cuts
    magnitudes = magnitude(net, layers, [], None), magnitude(other, others, [], None)
    assert all(torch.allclose(magnitudes[0][name], values) for name, values in magnitudes[1].items())


def test_without_biases_all_relevance_arrives():
    net, batch = stack("Conv1D"), labelled(16, 4)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    ratios = attribute(net, UnitMap.of(net, batch).layers, [batch]).conservation.ratios
    assert all(abs(ratio - 1) < 1e-3 for ratio in ratios.values())


def test_a_widening_says_what_it_cant_follow():
    net = stack("Conv1D").eval()
    layers = UnitMap.of(net, labelled(4, 4)).layers
    flow = Flow.of(Traced.of(net, layers), {layer.name: torch.zeros(layer.units) > 0 for layer in layers})
    with pytest.raises(ValueError, match="layer 'first' can't be widened: it has a forward of its own"):
        widened([flow], layers, ["first"], 0.5)


# -- what the user registers ------------------------------------------------------------------------------------------


def test_what_is_not_registered_is_shared_and_the_error_says_how_to():
    net = nn.Sequential(Cosine(4, 4), nn.ReLU(), nn.Linear(4, CLASSES))
    with pytest.raises(ValueError, match=r"Cosine '0' \(20\).*lightning_rnf.register_layer\(Kind, axis\)"):
        UnitMap.of(net, labelled(4, 4))
    register_layer(Cosine, -1)
    register_layer(Cosine, -1)  # again: a notebook's cell
    assert [layer.name for layer in UnitMap.of(net, labelled(4, 4)).layers] == ["0"]


def test_rows_of_a_registered_kind_are_tried():
    register_layer(Cosine, -1)
    net = nn.Sequential(nn.Linear(4, 4), Competing(4, 4), nn.Linear(4, CLASSES))  # a subclass of it
    units = UnitMap.of(net, labelled(4, 4))
    assert [layer.name for layer in units.layers] == ["0"]
    assert "Competing is not made of rows, output" in units.reasons["1.weight"]


@pytest.mark.parametrize(("axis", "transposed"), [(-2, False), (-1, True)])
def test_a_wrong_registration_freezes_nothing_but_the_whole(axis, transposed):
    register_layer(Linear, axis, transposed=transposed)  # before what is known by name
    net = nn.Sequential(nn.Linear(4, 4), Linear(4, 4), nn.Linear(4, CLASSES))
    units = UnitMap.of(net, labelled(4, 4))
    assert [layer.name for layer in units.layers] == ["0"]
    assert "Linear is not made of rows" in units.reasons["1.weight"]
    net = nn.Sequential(nn.Linear(4, 4), Linear(4, 5), nn.Linear(5, CLASSES))
    assert set(UnitMap.of(net, labelled(4, 4)).shared) == {"1.weight", "1.bias"}


class Scalar(Cosine):
    """A parameter that is all units'."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.scale = nn.Parameter(torch.ones(()))


def test_what_has_more_than_rows_is_shared():
    register_layer(Cosine, -1)
    net = nn.Sequential(nn.Linear(4, 4), Scalar(), nn.Linear(4, CLASSES))
    assert set(UnitMap.of(net, labelled(4, 4)).reasons.values()) == {
        "Scalar has more to it than one row for each output"
    }


@pytest.mark.parametrize(
    ("kind", "axis", "error", "message"),
    [
        (Cosine(4, 4), -1, TypeError, "kind is Cosine"),
        (int, -1, TypeError, "expected a class of modules"),
        (nn.Conv2d, -3, ValueError, "Conv2d is a layer of torch's"),
        (Cosine, 1, ValueError, "axis is 1, expected"),
        (Cosine, True, ValueError, "axis is True"),
    ],
)
def test_what_cant_be_registered_is_refused(kind, axis, error, message):
    with pytest.raises(error, match=message):
        register_layer(kind, axis)


def test_a_state_of_a_registered_kind_asks_for_it():
    net, batch = stack("Cosine"), labelled(4, 4)
    units = UnitMap.of(net, batch)
    state = FreezeState()
    state.add(bare_record(units, {one.name: torch.ones(one.units) > 0 for one in units.layers}, {}), units)
    state.check_module(net)
    kinds._REGISTERED.clear()
    with pytest.raises(
        ValueError, match=r"layer 'first' was a layer with .* of type Cosine; .*call register_layer here"
    ):
        state.check_module(net)


def test_a_model_that_has_never_run_is_refused():
    net = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, CLASSES))
    with pytest.raises(
        ValueError, match=r"parameter '0.weight' has no shape yet: .*with torch.no_grad\(\): model\(x\)"
    ):
        UnitMap.of(net, labelled(4, 4))
