"""Relevance through recurrent layers: the published rules against a hand-written oracle, and other importances."""

from __future__ import annotations

import pytest
import torch
from recurring import FORMS, HIDDEN, KINDS, Tagger, batch, made, packed, sequences, states
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_packed_sequence

from lightning_rnf import UnitMap
from lightning_rnf.anatomy import supervised
from lightning_rnf.relevance.attribution import attribute
from lightning_rnf.relevance.importance import IMPORTANCES
from lightning_rnf.relevance.recurrent import GRADIENTS, SignalTakesAll, unrolled

each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
EPSILON = 1e-6


@each_kind
@pytest.mark.parametrize("options", FORMS, ids=str)
def test_step_by_step_it_computes_what_the_kernel_does(kind, options):
    own, batch_first = made(kind, **options), options["batch_first"]
    x = sequences(batch_first=batch_first)
    for flow in (GRADIENTS, SignalTakesAll()):
        for state in (None, states(own)):
            torch.testing.assert_close(unrolled(own, flow)(x, state), own(x, state))
            for ordered in (True, False):
                given = packed(x, batch_first=batch_first, ordered=ordered)
                (found, last), (output, expected) = unrolled(own, flow)(given, state), own(given, state)
                torch.testing.assert_close(last, expected)
                torch.testing.assert_close(pad_packed_sequence(found), pad_packed_sequence(output))
        torch.testing.assert_close(unrolled(own, flow)(x[0]), own(x[0]))  # a single sequence


def test_a_relu_in_place_of_tanh():
    own = made(nn.RNN, nonlinearity="relu", batch_first=True)
    torch.testing.assert_close(unrolled(own, GRADIENTS)(sequences()), own(sequences()))


# -- the rules, written down once more --------------------------------------------------------------------------------


def split(parts: list[Tensor], bias: Tensor, arrived: Tensor) -> list[Tensor]:
    """Epsilon rule: of ``z = Σ parts + bias``, each ``(outputs, inputs)`` or ``(outputs,)``, the parts' shares."""
    z = sum(part.sum(1) if part.ndim == 2 else part for part in parts) + bias
    ratio = arrived / (z + EPSILON * torch.where(z < 0, -1.0, 1.0))
    return [(part * ratio[:, None]).sum(0) if part.ndim == 2 else part * ratio for part in parts]


def of_lstm(own: nn.LSTM, x: Tensor, arrived: Tensor) -> tuple[Tensor, Tensor]:
    """Relevance of ``(T, features)`` and of hidden states ``(T, hidden)``, from that of the last hidden state."""
    w, u, b = own.weight_ih_l0, own.weight_hh_l0, own.bias_ih_l0 + own.bias_hh_l0
    h, c, steps = torch.zeros(HIDDEN).double(), torch.zeros(HIDDEN).double(), []
    for xt in x:
        i, f, g, o = (w @ xt + u @ h + b).chunk(4)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        steps.append((xt, h, c, i, f, g))
        c = f * c + i * g
        h = o * c.tanh()
    at_x, at_h = torch.zeros_like(x), torch.zeros(len(x), HIDDEN).double()
    r_h, r_c = arrived, torch.zeros(HIDDEN).double()
    rows = slice(2 * HIDDEN, 3 * HIDDEN)
    for t in reversed(range(len(x))):
        xt, h, c, i, f, g = steps[t]
        at_h[t] = r_h
        r_c, r_g = split([f * c, i * g], torch.zeros(HIDDEN).double(), r_c + r_h)  # the output gate takes nothing
        at_x[t], r_h = split([w[rows] * xt, u[rows] * h], b[rows], r_g)
    return at_x, at_h


def of_gru(own: nn.GRU, x: Tensor, arrived: Tensor) -> tuple[Tensor, Tensor]:
    w, u, b, d = own.weight_ih_l0, own.weight_hh_l0, own.bias_ih_l0, own.bias_hh_l0
    h, steps = torch.zeros(HIDDEN).double(), []
    for xt in x:
        (r, z, n), (rr, zz, nn_) = (w @ xt + b).chunk(3), (u @ h + d).chunk(3)
        r, z = (r + rr).sigmoid(), (z + zz).sigmoid()
        n = (n + r * nn_).tanh()
        steps.append((xt, h, r, z, n))
        h = (1 - z) * n + z * h
    at_x, at_h, r_h = torch.zeros_like(x), torch.zeros(len(x), HIDDEN).double(), arrived
    rows = slice(2 * HIDDEN, 3 * HIDDEN)
    for t in reversed(range(len(x))):
        xt, h, r, z, n = steps[t]
        at_h[t] = r_h
        r_n, kept = split([(1 - z) * n, z * h], torch.zeros(HIDDEN).double(), r_h)
        at_x[t], heard = split([w[rows] * xt, r[:, None] * u[rows] * h], b[rows] + r * d[rows], r_n)
        r_h = kept + heard
    return at_x, at_h


class Last(nn.Module):
    """The last hidden state is read by the head."""

    def __init__(self, kind) -> None:
        super().__init__()
        self.memory, self.head = made(kind, batch_first=True), nn.Linear(HIDDEN, 3).double()

    def forward(self, x):
        return self.head(self.memory(x)[0][:, -1])


@pytest.mark.parametrize(("kind", "oracle"), [(nn.LSTM, of_lstm), (nn.GRU, of_gru)])
@pytest.mark.parametrize("steps", [1, 2, 4])
@torch.no_grad()
def test_relevance_is_that_of_the_rules_written_by_hand(kind, oracle, steps):
    model = Last(kind)
    x, target = sequences()[:, :steps], batch()[1]
    units = UnitMap.of(model, (x, target))
    at_input = []
    found = attribute(model, units.layers, [(x, target)], arrived=lambda roots, arrived: at_input.extend(arrived))
    expected, absolute, inputs = torch.zeros(HIDDEN).double(), torch.zeros(HIDDEN).double(), []
    for sample, label in zip(x, target, strict=True):
        h = model.memory(sample[None])[0][0, -1]
        z = model.head.weight[label] @ h + model.head.bias[label]
        (arrived,) = split([(model.head.weight[label] * h)[None]], model.head.bias[label], z[None])
        at_x, at_h = oracle(model.memory, sample, arrived)
        inputs.append(at_x)
        expected += at_h.sum(0)
        absolute += at_h.sum(0).abs()
    torch.testing.assert_close(found.relevance["memory"], expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(at_input[0], torch.stack(inputs), rtol=1e-6, atol=1e-6)
    found = attribute(model, units.layers, [(x, target)], over_samples="absolute")
    torch.testing.assert_close(found.relevance["memory"], absolute, rtol=1e-6, atol=1e-6)


@each_kind
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False}], ids=str)
def test_relevance_is_conserved_without_biases(kind, options):
    torch.manual_seed(0)
    model = Tagger(kind, **options).double()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.zeros_(parameter)
    x, target = batch()
    given = (x.double(), target)
    found = attribute(model, UnitMap.of(model, given).layers, [given]).conservation
    assert found.cuts == ("behind", "before", "<input>")  # a recurrent layer's units hear each other: it is no cut
    assert found.ratios["<input>"] == pytest.approx(1, abs=0.02)
    assert found.notes == ()
    assert found.loss() is None


def test_biases_are_named_where_they_take_their_share():
    torch.manual_seed(0)
    model = Tagger(nn.GRU)
    causes = attribute(model, UnitMap.of(model, batch()).layers, [batch()]).conservation.causes
    assert any("in memory" in places for of_cut in causes.values() for places in of_cut.values())


def test_samples_of_packed_sequences_count_as_they_would_alone():
    class Packed(Last):
        def forward(self, x):
            given = packed(x, batch_first=True, ordered=False)
            return self.head(self.memory(given)[1][-1])

    class Alone(Last):
        def forward(self, x):
            x = x[:, : self.steps]
            return self.head(self.memory(x)[1][-1])

    x, target = sequences(), batch()[1]
    model, alone = Packed(nn.GRU), Alone(nn.GRU)
    alone.load_state_dict(model.state_dict())
    units = UnitMap.of(model, (x, target))
    found = attribute(model, units.layers, [(x, target)]).relevance["memory"]
    expected = torch.zeros(HIDDEN).double()
    for index, steps in enumerate([1, 5, 2, 1, 5, 4]):
        alone.steps = steps
        one = (x[index : index + 1], target[index : index + 1])
        expected += attribute(alone, units.layers, [one]).relevance["memory"]
    torch.testing.assert_close(found, expected)


# -- other importances ------------------------------------------------------------------------------------------------


@each_kind
def test_other_importances_of_one_step_are_those_of_the_output(kind):
    model = Last(kind)
    x, target = sequences()[:, :1], batch()[1]
    layers = UnitMap.of(model, (x, target)).layers
    h = model.memory(x)[0][:, 0].detach().requires_grad_()
    logits = model.head(h)
    (of_logit,) = torch.autograd.grad(logits.gather(1, target[:, None]).sum(), h, retain_graph=True)
    (of_loss,) = torch.autograd.grad(nn.functional.cross_entropy(logits, target, reduction="sum"), h)
    expected = {
        "gradient_x_activation": (h * of_logit).sum(0),
        "taylor": (h * of_loss).abs().sum(0),
        "activation": h.clamp(min=0).sum(0),
    }
    for name, scores in expected.items():
        torch.testing.assert_close(IMPORTANCES[name](model, layers, [(x, target)], supervised)["memory"], scores)


def test_gradients_of_several_steps_are_those_of_a_shift_of_all_hidden_states():
    """The sum over steps of ``h · ∂logit/∂h`` of a simple layer without tanh's bend, by hand."""
    model = Last(nn.RNN)
    model.memory.nonlinearity, model.memory.mode = "relu", "RNN_RELU"
    x, target = sequences(), batch()[1]
    layers = UnitMap.of(model, (x, target)).layers
    found = IMPORTANCES["gradient_x_activation"](model, layers, [(x, target)], supervised)["memory"]
    expected = torch.zeros(HIDDEN).double()
    with torch.no_grad():
        for sample, label in zip(x, target, strict=True):
            states, gradient = model.memory(sample[None])[0][0], model.head.weight[label]
            for h in states.flip(0):
                expected += h * gradient
                gradient = model.memory.weight_hh_l0.T @ (gradient * (h > 0))
    torch.testing.assert_close(found, expected)


@each_kind
def test_magnitude_is_the_sum_over_all_rows_of_a_unit(kind):
    model = Tagger(kind, num_layers=2)
    layers = UnitMap.of(model, batch()).layers
    found = IMPORTANCES["magnitude"](model, layers, [], supervised)["memory"]
    for unit in range(2 * HIDDEN):
        cell, row = divmod(unit, HIDDEN)
        weights = (getattr(model.memory, f"weight_{key}_l{cell}").detach() for key in ("ih", "hh"))
        assert float(found[unit]) == pytest.approx(sum(float(one[row::HIDDEN].abs().sum()) for one in weights))


def test_a_layer_that_is_left_out_hands_relevance_on_by_the_rules():
    model = Tagger().double()
    given = (batch()[0].double(), batch()[1])
    all_units, some = (UnitMap.of(model, given, units=units).layers for units in (None, "!memory"))
    found = attribute(model, some, [given])
    assert found.conservation.notes == ()
    torch.testing.assert_close(found.relevance["before"], attribute(model, all_units, [given]).relevance["before"])
