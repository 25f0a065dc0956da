"""Units of recurrent layers: which rows are whose, and what can only be frozen whole."""

from __future__ import annotations

import pytest
import torch
from recurring import FORMS, HIDDEN, KINDS, Tagger, batch, made, sequences
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from lightning_rnf import UnitLayer, UnitMap, register_layer
from lightning_rnf.memory.model import layer_from_plain

each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def layer_of(model: nn.Module, name: str = "memory") -> UnitLayer:
    return next(layer for layer in UnitMap.of(model, batch()).layers if layer.name == name)


@each_kind
def test_its_parameters_are_its_units(kind):
    units = UnitMap.of(Tagger(kind, num_layers=2, bidirectional=True), batch())
    assert [(layer.name, layer.units) for layer in units.layers] == [
        ("before", 5),
        ("memory", 4 * HIDDEN),
        ("behind", 6),
    ]
    assert units.shared == ()
    assert "mixes" not in units.by_rows["memory"]
    assert "hears all of its units in each step" in units.by_rows["memory"]


@each_kind
@pytest.mark.parametrize("options", FORMS, ids=str)
def test_rows_move_the_unit_that_they_are_said_to_be_of(kind, options):
    """Where cells don't hear their own state a row says one channel, whatever the others do."""
    own = made(kind, **options)
    model = nn.ModuleDict({"memory": own})
    layer = UnitLayer(
        "memory", units_of(own), -1, tuple(f"memory.{key}" for key, _ in own.named_parameters()), recurrent=form(own)
    )
    x = sequences(batch_first=options["batch_first"])
    cells = own.num_layers * (1 + own.bidirectional)
    for cell in range(cells):
        for name, parameter in own.named_parameters():
            if name.startswith("weight_hh"):
                nn.init.zeros_(parameter)
        with torch.no_grad():
            before = own(x)[1]
            unit = cell * HIDDEN + 2
            rows = {name: layer.spread(name, torch.arange(layer.units) == unit) for name in layer.parameters}
            assert sum(int(row.any()) for row in rows.values()) == len(rows) // cells  # of one cell's parameters
            for name, row in rows.items():
                assert row.shape == layer.leading_shape(name) == model.get_parameter(name).shape[:1]
                if "weight_ih" in name or "bias" in name:
                    model.get_parameter(name)[row] += 1.0
            after = own(x)[1]
        last_before, last_after = (one[0] if isinstance(one, tuple) else one for one in (before, after))
        moved = (last_before != last_after).any(dim=1)  # (cells, hidden)
        layer_of_cell = cell // (1 + own.bidirectional)
        of_same_layer = moved.view(own.num_layers, -1)[layer_of_cell]
        assert of_same_layer.nonzero().flatten().tolist() == [unit - layer_of_cell * of_same_layer.numel()]


def units_of(own):
    return own.num_layers * (1 + own.bidirectional) * own.hidden_size


def form(own):
    return len(own.weight_ih_l0) // own.hidden_size, own.num_layers, 1 + own.bidirectional


class Twice(Tagger):
    def forward(self, x, state=None):
        return super().forward(x, self.memory(self.before(x))[1])


class Outside(Tagger):
    def forward(self, x, state=None):
        return super().forward(x + self.memory.weight_hh_l0.sum())


class Own(nn.GRU):
    def forward(self, input, hx=None):
        output, last = super().forward(input, hx)
        return output.flip(-1), last


def tied() -> nn.Module:
    model = Tagger(num_layers=2)
    model.memory.weight_hh_l1 = model.memory.weight_hh_l0
    return model


WHOLE = {
    "projection": (lambda: Projected(), "projects its hidden state"),
    "twice": (Twice, "runs 2 times in one forward"),
    "outside": (Outside, "used a second time outside the layer"),
    "own": (lambda: Tagger(Own), "has a forward of its own"),
    "parametrized": (lambda: parametrized(), "is parametrized"),
    "tied": (tied, "has other parameters than torch's|shares"),
}


def parametrized() -> nn.Module:
    model = Tagger(nn.GRU)
    weight_norm(model.memory, "weight_hh_l0")
    return model


class Projected(Tagger):
    def __init__(self):
        super().__init__()
        self.memory, self.behind = nn.LSTM(5, HIDDEN, batch_first=True, proj_size=2), nn.Linear(2, 6)

    def forward(self, x, state=None):
        return self.head(self.behind(self.memory(self.before(x))[0][:, -1]))


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
@pytest.mark.parametrize("case", WHOLE)
def test_what_units_can_not_follow_is_frozen_whole_and_why(case):
    make, why = WHOLE[case]
    model = make()
    units = UnitMap.of(model, batch())
    assert "memory" not in [layer.name for layer in units.layers]
    found = units.whole["memory"]
    assert any(one in found for one in why.split("|")), found
    own = {name for name, _ in model.named_parameters() if name.startswith("memory.")}
    assert own <= set(units.shared)


def test_a_state_from_an_encoder_and_globs():
    class Coder(Tagger):
        def __init__(self):
            super().__init__(nn.GRU)
            self.decoder = nn.GRU(5, HIDDEN, batch_first=True)

        def forward(self, x, state=None):
            x = self.before(x)
            output, _ = self.decoder(x, self.memory(x)[1])  # of which the last state alone is read
            return self.head(self.behind(output[:, -1]))

    names = [layer.name for layer in UnitMap.of(Coder(), batch()).layers]
    assert names == ["before", "memory", "decoder", "behind"]
    units = UnitMap.of(Coder(), batch(), units="!decoder")
    assert [layer.name for layer in units.layers] == ["before", "memory", "behind"]
    assert units.reasons["decoder.weight_hh_l0"] == "left out by units="


def test_it_is_none_to_register():
    with pytest.raises(ValueError, match="inherits from one: it is known already"):
        register_layer(nn.LSTM, axis=-1)


WRONG = {
    "gates": {"recurrent": [5, 1, 1]},
    "directions": {"recurrent": [4, 1, 3]},
    "units": {"recurrent": [4, 3, 1]},
    "numbers": {"recurrent": ["4", 1, 1]},
    "cells": {"recurrent": [4, 1, 1], "parameters": ["memory.weight_hh_l0", "memory.weight_hh_l1"]},
}


@pytest.mark.parametrize("case", WRONG)
def test_a_file_that_says_what_can_not_be_is_refused(case):
    plain = {"name": "memory", "units": 4, "axis": -1, "norm": None, "slopes": None, "transposed": None}
    good = {**plain, "parameters": ["memory.weight_hh_l0"], "recurrent": [4, 1, 1]}
    assert layer_from_plain(good).recurrent == (4, 1, 1)
    with pytest.raises(ValueError, match=r"recurrent|cells"):
        layer_from_plain({**good, **WRONG[case]})
