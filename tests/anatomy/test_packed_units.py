"""Units of torch's attention: which rows are whose, the same numbers by its parts, and what is frozen whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attending import FORMS, HEADS, MASKS, SAMPLES, WIDTH, Tagger, batch, inputs, module
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from training import Classifier

from lightning_rnf import UnitLayer, UnitMap, register_layer
from lightning_rnf.anatomy import Wiring
from lightning_rnf.anatomy.packed import by_parts
from lightning_rnf.freezing import Listening
from lightning_rnf.memory.model import layer_from_plain
from lightning_rnf.recall.subnetwork import silence
from lightning_rnf.runtime import evaluating

each_form = pytest.mark.parametrize("form", FORMS)


def test_its_parameters_are_its_units():
    units = UnitMap.of(Tagger(), batch())
    assert [(layer.name, layer.units) for layer in units.layers] == [
        ("before", WIDTH),
        ("beside", WIDTH),
        ("attention", 3 * WIDTH),
        ("attention.out_proj", WIDTH),
        ("behind", 6),
    ]
    assert units.shared == ()
    assert units.head == "head"
    # Values are known to be all that out_proj reads; what reads attention isn't followed.
    assert set(units.by_rows) == {"attention", "behind"}
    assert {total for _, total in units.parts()["attention"]} == {0.5, 1.0}


@pytest.mark.filterwarnings("ignore:Support for mismatched:UserWarning")
@each_form
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("how", [{}, {"average_attn_weights": False}, {"need_weights": False}], ids=str)
@torch.no_grad()
def test_by_its_parts_it_says_what_torch_says(form, masks, how):
    own = module(**FORMS[form])
    given = inputs(own)
    expected, found = own(*given, **MASKS[masks], **how), by_parts(own)(*given, **MASKS[masks], **how)
    torch.testing.assert_close(found, expected)


@each_form
@torch.no_grad()
def test_by_its_parts_it_takes_one_sample_and_hints(form):
    own = module(**FORMS[form])
    query, key, value = (x.select(0 if own.batch_first else 1, 0) for x in inputs(own))
    torch.testing.assert_close(by_parts(own)(query, key, value), own(query, key, value))
    causal = torch.ones(len(query), len(query), dtype=torch.bool).triu(1)
    if own.kdim == own.vdim == WIDTH:
        for how in ({}, {"need_weights": False}):
            given = (query, query, query)
            expected = own(*given, attn_mask=causal, is_causal=True, **how)
            torch.testing.assert_close(by_parts(own)(*given, attn_mask=causal, is_causal=True, **how), expected)
    with pytest.raises(ValueError, match="is_causal without an attn_mask"):
        by_parts(own)(query, key, value, is_causal=True)


def test_in_training_weights_are_dropped():
    own = module(dropout=0.5).train()
    given = inputs(own)
    looked = by_parts(own)(*given, average_attn_weights=False)[1]
    assert 0.3 < float((looked == 0).double().mean()) < 0.7
    assert not torch.equal(by_parts(own)(*given)[0], by_parts(own)(*given)[0])


@each_form
def test_rows_move_the_unit_that_they_are_said_to_be_of(form):
    own = module(**FORMS[form])
    names = tuple(f"attention.{key}" for key, _ in own.named_parameters() if not key.startswith("out_proj"))
    layer = UnitLayer("attention", 3 * WIDTH, -1, names, packed=True)

    def said() -> Tensor:
        seen: dict[str, Tensor] = {}
        by_parts(own, lambda role, made: seen.setdefault(role, made))(*inputs(own))
        return torch.cat([seen[role].flatten(0, 1).sum(0) for role in ("query", "key", "value")])

    with torch.no_grad():
        for name in names:
            for unit in range(layer.units):
                row = layer.spread(name, torch.arange(layer.units) == unit)
                parameter = own.get_parameter(name.removeprefix("attention."))
                assert row.shape == layer.leading_shape(name) == parameter.shape[:1]
                before = said()
                parameter[row] += 1.0
                moved = (said() - before).abs() > 1e-9
                assert moved.nonzero().flatten().tolist() == [unit] * bool(row.any())


# -- what can't be ----------------------------------------------------------------------------------------------------


class Doubled(nn.MultiheadAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        said, looked = super().forward(*args, **kwargs)
        return 2 * said, looked


class Louder(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Twice(Tagger):
    def attend(self, x, other):
        return super().attend(super().attend(x, other), other)


class Loose(Tagger):
    def attend(self, x, other):
        return super().attend(x, other) + self.attention.in_proj_bias[:WIDTH]


def with_another(made: Tagger, output: nn.Module | None = None, *, hook: bool = False) -> Tagger:
    made.attention.out_proj = made.attention.out_proj if output is None else output
    if hook:
        made.attention.out_proj.register_forward_hook(lambda *call: None)
    return made


def parametrized() -> Tagger:
    made = Tagger()
    weight_norm(made.attention, "in_proj_weight")
    return made


def of_kind() -> Tagger:
    made = Tagger()
    made.attention = Doubled(WIDTH, HEADS, batch_first=True)
    return made


def shared() -> Tagger:
    made = Tagger()
    made.beside.weight = nn.Parameter(torch.randn(WIDTH, 3))
    made.twin = nn.MultiheadAttention(WIDTH, HEADS)
    made.twin.in_proj_weight = made.attention.in_proj_weight
    return made


WHOLE = {
    "a key of its own": (lambda: Tagger(add_bias_kv=True), "adds a key and a value of its own"),
    "own forward": (of_kind, "has a forward of its own"),
    "parametrized": (parametrized, "is parametrized"),
    "runs twice": (Twice, "runs 2 times in one forward"),
    "another layer": (
        lambda: with_another(Tagger(), Louder(WIDTH, WIDTH)),
        "has an out_proj that is not torch's",
    ),
    "hook": (lambda: with_another(Tagger(), hook=True), "has hooks on its out_proj, which torch never runs"),
    "used elsewhere": (Loose, "used a second time outside the layer"),
    "shared": (shared, "shares 'attention.in_proj_weight' with"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("case", WHOLE)
def test_what_units_can_not_follow_is_frozen_whole_and_why(case):
    make, why = WHOLE[case]
    model = make()
    units = UnitMap.of(model, batch())
    assert "attention" not in [layer.name for layer in units.layers]
    assert why in units.whole["attention"]
    own = {name for name, _ in model.named_parameters() if name.startswith("attention.")}
    assert own - {"attention.out_proj.weight", "attention.out_proj.bias"} <= set(units.shared)


@pytest.mark.parametrize("left", ["attention", "attention.out_proj"])
def test_one_of_the_two_may_be_left_out(left):
    units = UnitMap.of(Tagger(), batch(), units=f"!{left}")
    other = {"attention": "attention.out_proj", "attention.out_proj": "attention"}[left]
    names = [layer.name for layer in units.layers]
    assert left not in names
    assert other in names
    assert set(units.reasons.values()) == {"left out by units="}
    assert ("attention.out_proj" in units.by_rows) == (left == "attention")


def test_attention_in_a_head_is_the_heads():
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.attention = nn.Parameter(torch.randn(1, 1, WIDTH)), nn.MultiheadAttention(WIDTH, HEADS)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(self.query.expand(-1, len(x), -1), *[x.transpose(0, 1)] * 2)[0][0]

    model = nn.Sequential(nn.Linear(3, WIDTH), nn.Linear(WIDTH, WIDTH), Pooled())
    units = UnitMap.of(model, (batch()[0], torch.arange(SAMPLES) % WIDTH))
    assert units.head == "2"
    assert [layer.name for layer in units.layers] == ["0", "1"]


def test_tracing_leaves_the_module_as_it_was():
    model = Tagger()
    UnitMap.of(model, batch())
    assert "forward" not in vars(model.attention)
    assert not model.attention.out_proj._forward_hooks


def test_it_is_none_to_register():
    with pytest.raises(ValueError, match="inherits from one: it is known already"):
        register_layer(nn.MultiheadAttention, axis=-1)


WRONG = {
    "units": {"units": 7},
    "kind": {"packed": 1},
    "recurrent, too": {"recurrent": [3, 1, 1]},
    "transposed, too": {"transposed": [1, 4]},
    "names": {"parameters": ["attention.in_proj_weight", "attention.bias_k"]},
}


@pytest.mark.parametrize("case", WRONG)
def test_a_file_that_says_what_can_not_be_is_refused(case):
    plain = {"name": "attention", "units": 6, "axis": -1, "norm": None, "slopes": None, "transposed": None}
    good = {**plain, "parameters": ["attention.in_proj_weight"], "packed": True}
    assert layer_from_plain(good).packed
    with pytest.raises(ValueError, match=r"packed|queries|recurrent"):
        layer_from_plain({**good, **WRONG[case]})


def test_a_classifier_without_attention_has_none():
    assert not any(
        layer.packed for layer in UnitMap.of(Classifier(), (torch.randn(4, 6), torch.zeros(4).long())).layers
    )


# -- what reads what --------------------------------------------------------------------------------------------------


class Loud(nn.TransformerEncoderLayer):
    def _ff_block(self, x: Tensor) -> Tensor:
        return self.dropout2(self.linear2(self.dropout(self.activation(self.linear1(x)) + 1)))


BLOCKS = {
    "encoder": (lambda: nn.TransformerEncoderLayer(WIDTH, HEADS, 12, batch_first=True), True),
    "GELU": (lambda: nn.TransformerEncoderLayer(WIDTH, HEADS, 12, activation="gelu", batch_first=True), True),
    "module": (lambda: nn.TransformerEncoderLayer(WIDTH, HEADS, 12, activation=nn.SiLU(), batch_first=True), True),
    "sigmoid": (
        lambda: nn.TransformerEncoderLayer(WIDTH, HEADS, 12, activation=torch.sigmoid, batch_first=True),
        False,
    ),
    "another block": (lambda: Loud(WIDTH, HEADS, 12, batch_first=True), False),
}


@pytest.mark.parametrize("case", BLOCKS)
def test_inside_of_torchs_blocks_it_is_known_what_is_read(case):
    make, known = BLOCKS[case]
    model = nn.Sequential(nn.Linear(3, WIDTH), make(), nn.Linear(WIDTH, 40), nn.Flatten(), nn.Linear(200, 3)).eval()
    units = UnitMap.of(model, batch())
    relevant = {layer.name: torch.arange(layer.units) % 3 > 0 for layer in units.layers}
    heard = Wiring.of(model, units.layers).heard(relevant)
    assert torch.equal(heard["1.self_attn.out_proj"], relevant["1.self_attn"][2 * WIDTH :])
    assert ("1.linear2" in heard) == known == ("1.linear2" not in units.by_rows)
    ears = Listening()
    with (
        torch.no_grad(),
        evaluating(model),
        silence(model, units.layers, relevant),
        ears.to(model, units.layers, heard),
    ):
        model(batch()[0])
    assert not ears.wrong
    assert ears.seen == set(heard)
