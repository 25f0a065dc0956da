"""Recurrent layers under recall: a smaller layer is the oracle, and nobody hears what later tasks make of the rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from records import bare_record
from recurring import FORMS, HIDDEN, KINDS, Tagger, batch, made, packed, sequences, states
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_packed_sequence
from training import Classifier, train

from lightning_rnf import RelevanceFreezing, UnitLayer, UnitMap
from lightning_rnf.anatomy import Inputs
from lightning_rnf.freezing.initial import reset_free
from lightning_rnf.recall.export import export
from lightning_rnf.recall.subnetwork import recall, silence

each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def layer_of(own: Any) -> UnitLayer:
    cells = own.num_layers, 1 + own.bidirectional
    names = tuple(f"memory.{key}" for key, _ in own.named_parameters())
    gates = len(own.weight_ih_l0) // own.hidden_size
    return UnitLayer("memory", cells[0] * cells[1] * own.hidden_size, -1, names, recurrent=(gates, *cells))


def smaller(own: Any, relevant: Tensor) -> tuple[Any, list[Tensor]]:
    """A layer of the relevant units alone, two of each cell, and their places in the cells."""
    cells = relevant.view(-1, own.hidden_size)
    places = [cell.nonzero().flatten() for cell in cells]
    directions = 1 + own.bidirectional
    options = {key: getattr(own, key) for key in ("num_layers", "batch_first", "bidirectional", "bias")}
    small = type(own)(own.input_size, len(places[0]), **options).double()
    for cell, rows in enumerate(places):
        layer, direction = divmod(cell, directions)
        below = torch.cat([places[(layer - 1) * directions + d] + d * own.hidden_size for d in range(directions)])
        for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            name = f"{kind}_l{layer}{'_reverse' * direction}"
            if not hasattr(own, name):
                continue
            value = getattr(own, name).detach().unflatten(0, (-1, own.hidden_size))[:, rows].flatten(0, 1)
            if kind == "weight_hh":
                value = value[:, rows]
            elif kind == "weight_ih" and layer:
                value = value[:, below]
            getattr(small, name).data.copy_(value)
    return small, places


@each_kind
@pytest.mark.parametrize("options", FORMS, ids=str)
@torch.no_grad()
def test_it_is_the_layer_of_its_relevant_units(kind, options):
    own = made(kind, **options)
    layer = layer_of(own)
    relevant = torch.zeros(layer.units, dtype=torch.bool)
    for cell in range(layer.units // HIDDEN):
        relevant[cell * HIDDEN + torch.tensor([cell % 4, (cell + 2) % 4])] = True
    small, places = smaller(own, relevant)
    x = sequences(batch_first=own.batch_first)
    model = nn.ModuleDict({"memory": own})
    for poison in (None, float("nan"), float("inf")):
        if poison is not None:  # a later task may have diverged: in the rows of silent units, and what reads them
            for name in layer.parameters:
                parameter = model.get_parameter(name)
                parameter[~layer.spread(name, relevant)] = poison
                columns = layer.cells.heard(name, relevant)
                if columns is not None:
                    parameter[:, ~columns] = poison
        for state in (None, states(own)):
            for given in (x, packed(x, batch_first=own.batch_first, ordered=False)):
                with silence(model, [layer], {"memory": relevant}):
                    output, last = own(given, state)
                expected, expected_last = small(given, cut(state, places))
                if not isinstance(output, Tensor):
                    (output, _), (expected, _) = pad_packed_sequence(output), pad_packed_sequence(expected)
                of_last = relevant[-output.shape[-1] :]
                torch.testing.assert_close(output[..., of_last], expected)
                assert not output[..., ~of_last].any()
                for found, wanted in zip(tensors(last), tensors(expected_last), strict=True):
                    torch.testing.assert_close(found, spread(wanted, places))
    assert "forward" not in vars(own)


def tensors(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def cut(state: Any, places: list[Tensor]) -> Any:
    if state is None:
        return None
    found = tuple(torch.stack([one[cell][:, rows] for cell, rows in enumerate(places)]) for one in tensors(state))
    return found if isinstance(state, tuple) else found[0]


def spread(state: Tensor, places: list[Tensor]) -> Tensor:
    found = state.new_zeros(*state.shape[:2], HIDDEN)
    for cell, rows in enumerate(places):
        found[cell][:, rows] = state[cell]
    return found


def test_in_training_silent_units_get_no_gradient():
    own = made(nn.LSTM, batch_first=True)
    layer, relevant = layer_of(own), torch.arange(HIDDEN) < 2
    with silence(nn.ModuleDict({"memory": own}), [layer], {"memory": relevant}):
        own(sequences())[0].sum().backward()
    for name, parameter in own.named_parameters():
        rows = layer.spread(f"memory.{name}", relevant)
        assert parameter.grad[rows].any()
        assert not parameter.grad[~rows].any()


# -- two tasks ---------------------------------------------------------------------------------------------------------


class Recurrent(Classifier):
    """Two steps of three numbers each, read by a recurrent layer between two linear ones."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__(weight_decay=0.1)
        self.body = nn.Linear(2, 8)
        self.memory = kind(8, 12, **{"batch_first": True, **options})
        width = 12 * (1 + self.memory.bidirectional)
        self.behind = nn.Linear(width, 40)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x.unflatten(1, (3, 2))).relu()
        if not self.memory.batch_first:
            return self.heads(self.behind(self.memory(x.transpose(0, 1))[0][-1]).relu())
        return self.heads(self.behind(self.memory(x)[0][:, -1]).relu())


class OfPacked(Recurrent):
    """Sequences of two and three steps."""

    def forward(self, x: Tensor) -> Tensor:
        lengths = 2 + (x[:, 0] > 0).long()
        steps = self.body(x.unflatten(1, (3, 2))).relu()
        given = nn.utils.rnn.pack_padded_sequence(steps, lengths.cpu(), batch_first=True, enforce_sorted=False)
        last = self.memory(given)[1]
        last = last[0] if isinstance(last, tuple) else last
        return self.heads(self.behind(last.transpose(0, 1)[:, -1 - self.memory.bidirectional :].flatten(1)).relu())


MODELS = {
    "LSTM": lambda: Recurrent(nn.LSTM),
    "GRU": lambda: Recurrent(nn.GRU, batch_first=False),
    "RNN": lambda: Recurrent(nn.RNN, nonlinearity="relu", bias=False),
    "deep": lambda: Recurrent(nn.GRU, num_layers=2, bidirectional=True),
    "packed": lambda: OfPacked(nn.LSTM, bidirectional=True),
}


def look(model: nn.Module, rnf: RelevanceFreezing, task: str = "a") -> Tensor:
    x = torch.randn(33, 6, generator=torch.Generator().manual_seed(7))
    with rnf.recall(task, model), torch.no_grad():
        return model(x)


@pytest.mark.parametrize("case", MODELS)
def test_recall_is_bit_equal_after_a_second_task_and_whatever_the_rest_becomes(case):
    torch.manual_seed(0)
    model, rnf = MODELS[case](), RelevanceFreezing()
    train(model, rnf, "a", max_epochs=4)
    layer = next(layer for layer in rnf.state.layers if layer.name == "memory")
    assert 0 < rnf.capacity()["memory"] < 1
    frozen, before = rnf.state.frozen()["memory"], look(model, rnf)
    weights = {name: model.get_parameter(name).detach().clone() for name in layer.parameters}
    train(model, rnf, "b", max_epochs=2)
    assert torch.equal(look(model, rnf), before)
    for name, value in weights.items():
        rows = layer.spread(name, frozen)
        found = model.get_parameter(name).detach()
        assert torch.equal(found[rows], value[rows])
        assert (found[~rows] != value[~rows]).any() or not (~rows).any()
    assert rnf.report(model).is_sound
    again = RelevanceFreezing()  # its file knows which rows are whose
    again.state = type(rnf.state).from_plain(rnf.state.to_plain())
    assert torch.equal(look(model, again), before)
    for change in (100.0, float("nan")):
        with torch.no_grad():
            for name in layer.parameters:
                parameter = model.get_parameter(name)
                free = ~layer.spread(name, rnf.state.tasks["a"].relevant["memory"])
                parameter[free] += change
        assert torch.equal(look(model, rnf), before)


@pytest.mark.filterwarnings("ignore:no free units are left in memory:UserWarning")
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_after_a_recall_inside_another_the_outer_one_goes_on(kind):
    """A training step that recalls an old task, say, while a recovery lets only the new one's units speak."""
    torch.manual_seed(0)
    model, rnf = Recurrent(kind), RelevanceFreezing(recovery_epochs=0)
    for task in "ab":
        train(model, rnf, task, max_epochs=2)
    expected, x = look(model, rnf), torch.randn(33, 6, generator=torch.Generator().manual_seed(7))
    with rnf.recall("a", model), torch.no_grad():
        with rnf.recall("b", model):
            model(x)
        assert torch.equal(model(x), expected)
    assert "forward" not in vars(model.memory)


def test_free_units_are_reset():
    torch.manual_seed(0)
    model, rnf = Recurrent(nn.GRU), RelevanceFreezing(reset_free=True)
    start = {name: value.detach().clone() for name, value in model.memory.named_parameters()}
    train(model, rnf, "a", max_epochs=4)
    layer = next(layer for layer in rnf.state.layers if layer.name == "memory")
    free = ~rnf.state.frozen()["memory"]
    trained = {name: value.detach().clone() for name, value in model.memory.named_parameters()}
    reset_free(rnf.state, model)
    for name, value in model.memory.named_parameters():
        rows = layer.spread(f"memory.{name}", free)
        assert torch.equal(value[rows], start[name][rows])
        assert torch.equal(value[~rows], trained[name][~rows])


@pytest.mark.filterwarnings("ignore:.*belong to no unit and will be frozen whole:UserWarning")
def test_a_model_whose_recurrent_layer_was_frozen_whole_goes_on_with_that():
    """As files from before have it."""
    torch.manual_seed(0)
    model, rnf = Recurrent(nn.LSTM), RelevanceFreezing(units="!memory")
    train(model, rnf, "a", max_epochs=2)
    plain = rnf.state.to_plain()
    assert all("recurrent" not in layer for layer in plain["layers"])
    before, weights = look(model, rnf), [value.detach().clone() for value in model.memory.parameters()]
    for forms in (True, False):
        again = RelevanceFreezing()
        again.state = type(rnf.state).from_plain(
            {key: value for key, value in plain.items() if forms or key != "forms"}
        )
        train(model, again, "b", max_epochs=1)
        assert [layer.name for layer in again.state.layers] == ["body", "behind"]
        assert torch.equal(look(model, again), before)
        assert all(torch.equal(one, other) for one, other in zip(weights, model.memory.parameters(), strict=True))


def test_wider_it_can_not_be_and_why():
    torch.manual_seed(0)
    model, rnf = Recurrent(nn.LSTM), RelevanceFreezing()
    train(model, rnf, "a", max_epochs=1)
    with pytest.raises(ValueError, match=r"layer 'memory' can't be widened: memory \(LSTM\)"):
        rnf.widen(model, layers="memory")


def test_another_kind_of_layer_in_its_place_is_refused():
    torch.manual_seed(0)
    model, rnf = Recurrent(nn.LSTM), RelevanceFreezing()
    train(model, rnf, "a", max_epochs=1)
    other = Recurrent(nn.LSTM)
    other.memory = nn.LSTM(8, 6, batch_first=True, bidirectional=True)
    with pytest.raises(ValueError, match="memory"):
        rnf.state.check_module(other)


# -- export ------------------------------------------------------------------------------------------------------------


class Traceable(Tagger):
    """Without a look at sizes."""

    def __init__(self, kind: type[nn.RNNBase], *, given: bool = False, **options: Any) -> None:
        super().__init__(kind, **options)
        self.given = given

    def forward(self, x: Tensor, state: Any = None) -> Tensor:
        output, _ = self.memory(self.before(x).relu(), state) if self.given else self.memory(self.before(x).relu())
        return self.head(self.behind(output[:, -1]).relu())


class Untraceable(Traceable):
    def forward(self, x: Tensor, state: Any = None) -> Tensor:
        if x.size(0) == 0:
            raise ValueError("no sample")
        return super().forward(x, state)


@pytest.mark.filterwarnings("ignore:.*of the parameters of its silent units are still there:UserWarning")
@each_kind
@pytest.mark.parametrize("make", [Traceable, Untraceable])
@pytest.mark.parametrize("given", [False, True])
def test_what_is_exported_says_what_recall_says(kind, make, given):
    torch.manual_seed(0)
    model = make(kind, given=given, num_layers=2, bidirectional=True).double()
    x = batch()[0].double()
    units = UnitMap.of(model, (x, batch()[1]))
    relevant = {layer.name: torch.arange(layer.units) % 3 > 0 for layer in units.layers}
    record = bare_record(units, relevant, {})
    args = (x, states(model.memory)) if given else (x,)
    small = export(model, units.layers, record, inputs=lambda: Inputs(args, {}))
    assert isinstance(small, torch.fx.GraphModule)
    with torch.no_grad(), recall(model, units.layers, record):
        expected = model(*args)
        other = model(*(-one if isinstance(one, Tensor) else one for one in args))
    with torch.no_grad():
        torch.testing.assert_close(small(*args), expected)
        torch.testing.assert_close(small(*(-one if isinstance(one, Tensor) else one for one in args)), other)
    assert any("memory" in reason for reason in small.kept["reasons"])


def test_without_biases_a_given_state_can_not_be_exported_and_why():
    torch.manual_seed(0)
    model = Traceable(nn.LSTM, given=True, bias=False)
    units = UnitMap.of(model, batch())
    relevant = {layer.name: torch.arange(layer.units) > 0 for layer in units.layers}
    with pytest.raises(ValueError, match="is given an initial state and has no biases"):
        export(model, units.layers, bare_record(units, relevant, {}))


def test_what_it_says_is_what_the_whole_layer_says_where_all_units_are_relevant():
    model = Tagger(nn.LSTM)
    units = UnitMap.of(model, batch())
    record = bare_record(units, {layer.name: torch.ones(layer.units) > 0 for layer in units.layers}, {})
    with torch.no_grad(), recall(model, units.layers, record):
        assert torch.equal(model(batch()[0]), model.eval()(batch()[0]))
