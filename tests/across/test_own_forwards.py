"""Modules with a forward of their own, trained on two tasks: recall of the first is bit-equal."""

from __future__ import annotations

import copy
from contextlib import ExitStack

import pytest
import torch
from torch import nn
from training import Classifier, inputs, train

from lightning_rnf import RelevanceFreezing

ZERO = torch.zeros(1, dtype=torch.int32)


class OneScale(nn.Linear):
    """Ternary weights with one scale for all of them, as BitNet has it."""

    def forward(self, x):
        scale = self.weight.detach().abs().mean()
        ternary = (self.weight / scale).round().clamp(-1, 1) * scale
        return nn.functional.linear(x, self.weight + (ternary - self.weight).detach(), self.bias)


class LargestOfAll(nn.Linear):
    """Fake quantisation, per tensor."""

    def forward(self, x):
        step = self.weight.detach().abs().max() / 7
        quantised = torch.fake_quantize_per_tensor_affine(self.weight, step, ZERO, -7, 7)
        return nn.functional.linear(x, quantised, self.bias)


class Spectral(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight / torch.linalg.matrix_norm(self.weight, 2), self.bias)


class StandardisedOverAll(nn.Linear):
    def forward(self, x):
        weight = (self.weight - self.weight.mean()) / self.weight.std()
        return nn.functional.linear(x, 0.3 * weight, self.bias)


class Centred(nn.Linear):
    """What a head without a preferred direction does: rows sum up to nothing."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight - self.weight.mean(0), self.bias)


class StandardisedByRow(nn.Linear):
    def forward(self, x):
        spread, mean = torch.std_mean(self.weight, 1, keepdim=True)
        return nn.functional.linear(x, 0.3 * (self.weight - mean) / spread, self.bias)


class ScaledByRow(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight / self.weight.norm(dim=1, keepdim=True), self.bias)


class StepOfRow(nn.Linear):
    """Fake quantisation, per channel."""

    def forward(self, x):
        step = self.weight.detach().abs().amax(1) / 7
        zeros = torch.zeros(self.out_features, dtype=torch.int32)
        quantised = torch.fake_quantize_per_channel_affine(self.weight, step, zeros, 0, -7, 7)
        return nn.functional.linear(x, quantised, self.bias)


class GainOfRow(nn.Linear):
    """With a parameter more than torch's, which has a number for each unit, as those of NFNets."""

    def __init__(self, *features):
        super().__init__(*features)
        self.gain = nn.Parameter(torch.ones(self.out_features, 1))

    def forward(self, x):
        rows = self.gain * self.weight / self.weight.norm(dim=1, keepdim=True)
        return nn.functional.linear(x, rows, self.bias)


class GainOfAll(GainOfRow):
    """So many numbers, and each is all units'."""

    def forward(self, x):
        return nn.functional.linear(x, self.gain.mean() * self.weight, self.bias)


COUPLED = (OneScale, LargestOfAll, Spectral, StandardisedOverAll, Centred, GainOfAll)
INDEPENDENT = (StandardisedByRow, ScaledByRow, StepOfRow, GainOfRow)


@pytest.mark.filterwarnings("ignore:8[56]% of the parameters outside of heads belong to no unit:UserWarning")
@pytest.mark.filterwarnings("ignore:.*of the parameters of its silent units are still there:UserWarning")
@pytest.mark.parametrize("kind", [*COUPLED, *INDEPENDENT])
def test_recall_is_bit_equal_after_a_second_task(kind):
    torch.manual_seed(0)
    model, rnf, x = Classifier(), RelevanceFreezing(), inputs()
    model.body[3] = kind(40, 40)
    train(model, rnf, "a", max_epochs=2)
    assert [layer.name for layer in rnf.state.layers] == ["body.0", "body.3"][: 1 + (kind in INDEPENDENT)]
    with rnf.recall("a", model), torch.no_grad():
        before = model(x)
    weights = copy.deepcopy(model.state_dict())
    train(model, rnf, "b", max_epochs=2)
    with rnf.recall("a", model), torch.no_grad():
        assert torch.equal(model(x), before)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, weights[name])}
    assert "body.0.weight" in moved  # there was something to break
    assert ("body.3.weight" in moved) == (kind in INDEPENDENT)
    assert ("body.3.gain" in moved) == (kind is GainOfRow)
    assert rnf.report(model).is_sound
    with ExitStack() as said:
        if kind in INDEPENDENT:  # why little can be cut
            said.enter_context(pytest.warns(UserWarning, match="body.3 has a forward of its own"))
        small = rnf.export(model, "a")
    assert (small(x) - before).abs().max() < 1e-5 * before.abs().max()


class Casting(Classifier):
    """A body that is stored and run in bfloat16, and heads in single precision."""

    def __init__(self):
        super().__init__()
        self.body.bfloat16()

    def forward(self, x):
        return self.heads(self.body(x.to(torch.bfloat16)).to(torch.float32))


class Autocasting(Classifier):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.heads(self.body(x)).float()


@pytest.mark.parametrize(
    ("kind", "precision"),
    [(Casting, "32-true"), (Casting, "bf16-true"), (Autocasting, "32-true"), (Autocasting, "bf16-true")],
)
def test_a_model_that_casts_keeps_its_tasks_in_its_own_dtypes(kind, precision):
    torch.manual_seed(0)
    model, rnf, x = kind(), RelevanceFreezing(), inputs()
    if (kind, precision) == (Casting, "bf16-true"):
        model.forward = lambda x: model.heads(model.body(x.to(torch.bfloat16)))
    train(model, rnf, "a", max_epochs=2, precision=precision)
    with rnf.recall("a", model), torch.no_grad():
        before = model(x.to(model.heads.tasks["a"].weight.dtype))
    dtypes = {name: value.dtype for name, value in model.state_dict().items()}
    assert torch.bfloat16 in dtypes.values() or kind is Autocasting
    train(model, rnf, "b", max_epochs=2, precision=precision)
    assert {name: value.dtype for name, value in model.state_dict().items()} == dtypes
    with rnf.recall("a", model), torch.no_grad():
        assert torch.equal(model(x.to(model.heads.tasks["a"].weight.dtype)), before)
