"""Torch's attention under recall: rows of zeros are the oracle, and nobody hears what later tasks make of the rest."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from attending import FORMS, HEADS, MASKS, WIDTH, Tagger, batch, inputs, module
from records import bare_record
from torch import Tensor, nn
from training import Classifier, frozen_entries, train

from lightning_rnf import RelevanceFreezing, UnitLayer, UnitMap
from lightning_rnf.anatomy import Inputs
from lightning_rnf.freezing.initial import reset_free
from lightning_rnf.memory import TaskRecord
from lightning_rnf.recall.export import export
from lightning_rnf.recall.subnetwork import recall, silence

NAN = float("nan")


def layers_of(own: Any) -> tuple[UnitLayer, UnitLayer]:
    names = [f"attention.{name}" for name, _ in own.named_parameters()]
    inside = tuple(name for name in names if "out_proj" not in name)
    outside = tuple(name for name in names if "out_proj" in name)
    return (
        UnitLayer("attention", 3 * WIDTH, -1, inside, packed=True),
        UnitLayer("attention.out_proj", WIDTH, -1, outside),
    )


@pytest.mark.filterwarnings("ignore:Support for mismatched:UserWarning")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("masks", MASKS)
@torch.no_grad()
def test_it_is_the_module_with_rows_of_zeros(form, masks):
    own = module(**FORMS[form])
    model, layers = nn.ModuleDict({"attention": own}), layers_of(own)
    relevant = {layer.name: torch.arange(layer.units) % 3 > 0 for layer in layers}
    rowless = copy.deepcopy(model)
    for layer in layers:
        for name in layer.parameters:
            rowless.get_parameter(name)[~layer.spread(name, relevant[layer.name])] = 0.0
    given, how = inputs(own), MASKS[masks]
    for poison in (None, NAN, float("inf")):
        if poison is not None:
            for layer in layers:
                for name in layer.parameters:
                    model.get_parameter(name)[~layer.spread(name, relevant[layer.name])] = poison
        with silence(model, layers, relevant):
            found = own(*given, **how)
        torch.testing.assert_close(found, rowless["attention"](*given, **how))
        assert not found[0][..., ~relevant["attention.out_proj"]].any()
    assert "forward" not in vars(own)


def test_in_training_silent_units_get_no_gradient():
    own = module()
    layers = layers_of(own)
    relevant = {layer.name: torch.arange(layer.units) % 3 > 0 for layer in layers}
    with silence(nn.ModuleDict({"attention": own}), layers, relevant):
        own(*inputs(own))[0].square().sum().backward()
    for layer in layers:
        for name in layer.parameters:
            gradient = own.get_parameter(name.removeprefix("attention.")).grad
            rows = layer.spread(name, relevant[layer.name])
            assert gradient[rows].any()
            assert not gradient[~rows].any()


# -- two tasks ---------------------------------------------------------------------------------------------------------


class Attentive(Classifier):
    """Three tokens of two numbers each, which look at each other between two linear layers."""

    def __init__(self, **options: Any) -> None:
        super().__init__(weight_decay=0.1)
        self.body = nn.Linear(2, 8)
        self.attention = nn.MultiheadAttention(8, 2, **{"batch_first": True, **options})
        self.behind = nn.Linear(8, 40)

    def attend(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0].mean(1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x.unflatten(1, (3, 2)))
        return self.heads(self.behind(self.attend(x)).relu())


class Across(Attentive):
    """Positions first, and three weights."""

    def __init__(self) -> None:
        super().__init__(batch_first=False, kdim=8, vdim=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.unflatten(1, (3, 2)).transpose(0, 1)
        key = self.body(tokens)
        said = self.attention(key, key, tokens, need_weights=False)[0]
        return self.heads(self.behind(said.mean(0)).relu())


class Encoder(Attentive):
    """Shorter sequences are padded."""

    def __init__(self, *, norm_first: bool = False) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first)
        self.attention = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)
        self.behind = nn.Linear(24, 40)

    def attend(self, x: Tensor) -> Tensor:
        padding = torch.arange(3) >= torch.where(x[:, :1, 0] > 0, 3, 2)
        said = self.attention(x, src_key_padding_mask=padding)
        return said.masked_fill(padding[..., None], 0.0).flatten(1)


class Decoder(Attentive):
    """One that looks back, and at what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, batch_first=True), 1)

    def attend(self, x: Tensor) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(3)
        return self.attention(x, x.flip(1), tgt_mask=causal, tgt_is_causal=True).mean(1)


MODELS = {
    "module": Attentive,
    "three weights": Across,
    "encoder": Encoder,
    "norms first": lambda: Encoder(norm_first=True),
    "decoder": Decoder,
}


def look(model: nn.Module, rnf: RelevanceFreezing, task: str = "a") -> Tensor:
    x = torch.randn(33, 6, generator=torch.Generator().manual_seed(7))
    with rnf.recall(task, model), torch.no_grad():
        return model(x)


def attention_of(rnf: RelevanceFreezing) -> list[UnitLayer]:
    return [layer for layer in rnf.state.layers if layer.packed or layer.name.endswith("out_proj")]


@torch.no_grad()
def poison(model: Classifier, rnf: RelevanceFreezing) -> None:
    """All that is not frozen becomes NaN."""
    frozen = frozen_entries(rnf, model)
    held = {*rnf.state.shared, *(name for record in rnf.state.tasks.values() for name in record.head_parameters)}
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter[~frozen[name]] = NAN
        elif name not in held:
            parameter.fill_(NAN)


@pytest.mark.parametrize(
    ("case", "freeze"), [*((case, "connections") for case in MODELS), ("module", "units"), ("encoder", "units")]
)
def test_recall_is_bit_equal_after_a_second_task_and_whatever_the_rest_becomes(case, freeze):
    torch.manual_seed(0)
    model, rnf = MODELS[case](), RelevanceFreezing(freeze=freeze)
    train(model, rnf, "a", max_epochs=4)
    for layer in attention_of(rnf):
        assert 0 < rnf.capacity()[layer.name] < 1
    record, before = rnf.state.tasks["a"], look(model, rnf)
    outputs = [layer.name for layer in attention_of(rnf) if not layer.packed]
    assert set(outputs) <= set(record.connections) or freeze == "units"
    entries = frozen_entries(rnf, model)
    for layer in rnf.state.layers if freeze == "connections" else ():
        outer, _, key = layer.name.rpartition(".")
        if key in ("out_proj", "linear2"):
            read = record.relevant[outer].chunk(3)[2] if key == "out_proj" else record.relevant[f"{outer}.linear1"]
            assert torch.equal(entries[f"{layer.name}.weight"], record.relevant[layer.name][:, None] & read)
    weights = {name: value.detach().clone() for name, value in model.named_parameters()}
    train(model, rnf, "b", max_epochs=2)
    assert torch.equal(look(model, rnf), before)
    for layer in attention_of(rnf):
        for name in layer.parameters:
            found, kept = model.get_parameter(name).detach(), entries[name]
            assert torch.equal(found[kept], weights[name][kept])
            assert (found[~kept] != weights[name][~kept]).any() or not (~kept).any()
    assert rnf.report(model).is_sound
    again = RelevanceFreezing()  # its file knows which rows are whose
    again.state = type(rnf.state).from_plain(rnf.state.to_plain())
    assert torch.equal(look(model, again), before)
    poison(model, rnf)
    assert torch.equal(look(model, rnf), before)
    assert torch.equal(look(model, again), before)


@pytest.mark.filterwarnings("ignore:no free units are left:UserWarning")
def test_what_the_search_has_accepted_is_what_recall_says():
    torch.manual_seed(0)
    model, seen = Encoder(norm_first=True), list[tuple[Tensor, Tensor]]()

    def predict(module: nn.Module, given: Any) -> tuple[Tensor, Tensor]:
        logits = module(given[0])
        seen.append((given[0].clone(), logits.detach().clone()))
        return logits, given[1]

    rnf = RelevanceFreezing(recovery_epochs=0, predict=predict, fit_head=False)
    train(model, rnf, "a", max_epochs=3)
    record: TaskRecord = rnf.state.tasks["a"]
    assert record.cutoff > 0
    with rnf.recall("a", model), torch.no_grad():
        same = [torch.equal(model(x), said) for x, said in seen]
    assert sum(same) >= 10  # a walk through all batches


def test_after_a_recall_inside_another_the_outer_one_goes_on():
    torch.manual_seed(0)
    model, rnf = Attentive(), RelevanceFreezing(recovery_epochs=0)
    for task in "ab":
        train(model, rnf, task, max_epochs=2)
    expected, x = look(model, rnf), torch.randn(33, 6, generator=torch.Generator().manual_seed(7))
    with rnf.recall("a", model), torch.no_grad():
        with rnf.recall("b", model):
            model(x)
        assert torch.equal(model(x), expected)
    assert "forward" not in vars(model.attention)


def test_inside_two_recalls_only_what_speaks_in_both_does():
    own = module()
    model, layers = nn.ModuleDict({"attention": own}), layers_of(own)
    one, other = ({layer.name: torch.arange(layer.units) % n > 0 for layer in layers} for n in (2, 3))
    both = {name: one[name] & other[name] for name in one}
    with torch.no_grad():
        with silence(model, layers, both):
            expected = own(*inputs(own))
        with silence(model, layers, one), silence(model, layers, other):
            torch.testing.assert_close(own(*inputs(own)), expected, rtol=0, atol=0)


def test_the_network_itself_says_what_it_said():
    torch.manual_seed(0)
    model = Encoder().eval()
    x = torch.randn(9, 6)
    with torch.no_grad():
        before = model(x)
        units = UnitMap.of(model, (x, torch.zeros(9).long()))
        with silence(model, units.layers, {layer.name: torch.arange(layer.units) > 3 for layer in units.layers}):
            model(x)
        assert torch.equal(model(x), before)


def test_free_units_are_reset():
    torch.manual_seed(0)
    model, rnf = Attentive(), RelevanceFreezing(reset_free=True)
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    train(model, rnf, "a", max_epochs=4)
    trained = {name: value.detach().clone() for name, value in model.named_parameters()}
    reset_free(rnf.state, model)
    for layer in attention_of(rnf):
        free = ~rnf.state.frozen()[layer.name]
        for name in layer.parameters:
            rows, found = layer.spread(name, free), model.get_parameter(name)
            assert torch.equal(found[rows], start[name][rows])
            assert torch.equal(found[~rows], trained[name][~rows])


@pytest.mark.filterwarnings("ignore:.*belong to no unit and will be frozen whole:UserWarning")
def test_a_model_whose_attention_was_frozen_whole_goes_on_with_that():
    """As files from before have it."""
    torch.manual_seed(0)
    model, rnf = Attentive(), RelevanceFreezing(units=["!attention", "!*.out_proj"])
    train(model, rnf, "a", max_epochs=2)
    plain = rnf.state.to_plain()
    assert all("packed" not in layer for layer in plain["layers"])
    before, weights = look(model, rnf), [value.detach().clone() for value in model.attention.parameters()]
    for forms in (True, False):
        again = RelevanceFreezing()
        again.state = type(rnf.state).from_plain(
            {key: value for key, value in plain.items() if forms or key != "forms"}
        )
        train(model, again, "b", max_epochs=1)
        assert [layer.name for layer in again.state.layers] == ["body", "behind"]
        assert torch.equal(look(model, again), before)
        assert all(torch.equal(one, other) for one, other in zip(weights, model.attention.parameters(), strict=True))


@pytest.mark.parametrize("case", ["module", "encoder"])
def test_wider_it_can_not_be_and_why(case):
    torch.manual_seed(0)
    model, rnf = MODELS[case](), RelevanceFreezing()
    train(model, rnf, "a", max_epochs=1)
    layer = attention_of(rnf)[0].name
    why = r"attention \(MultiheadAttention\) mixes channels" if case == "module" else r"is not taken apart"
    for name in (layer, f"{layer}.out_proj"):
        with pytest.raises(ValueError, match=rf"layer '{name}' can't be widened: .*({why}|is not taken apart)"):
            rnf.widen(model, layers=name)


def test_another_kind_of_layer_in_its_place_is_refused():
    torch.manual_seed(0)
    model, rnf = Attentive(), RelevanceFreezing()
    train(model, rnf, "a", max_epochs=1)
    other = Attentive(kdim=4)
    with pytest.raises(ValueError, match="attention"):
        rnf.state.check_module(other)
    other.attention = nn.Linear(8, 24)
    with pytest.raises(ValueError, match="attention"):
        rnf.state.check_module(other)


# -- export ------------------------------------------------------------------------------------------------------------


class Untraceable(Tagger):
    def forward(self, x: Tensor) -> Tensor:
        if x.size(0) == 0:
            raise ValueError("no sample")
        return super().forward(x)


class Encoded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(3, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 12, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.before(x)).mean(1))


@pytest.mark.filterwarnings("ignore:.*of the parameters of its silent units are still there:UserWarning")
@pytest.mark.parametrize("make", [Tagger, lambda: Tagger(batch_first=False), Untraceable, Encoded])
@pytest.mark.parametrize("left", [None, "!*.out_proj"])
def test_what_is_exported_says_what_recall_says(make, left):
    torch.manual_seed(0)
    model = make().double()
    x = batch()[0].double()
    units = UnitMap.of(model, (x, batch()[1]), units=left)
    relevant = {layer.name: torch.arange(layer.units) % 3 > 0 for layer in units.layers}
    record = bare_record(units, relevant, {})
    small = export(model, units.layers, record, inputs=lambda: Inputs((x,), {}))
    assert isinstance(small, torch.fx.GraphModule)
    with torch.no_grad(), recall(model, units.layers, record):
        expected, other = model(x), model(-x)
    with torch.no_grad():
        torch.testing.assert_close(small(x), expected)
        torch.testing.assert_close(small(-x), other)
    assert any("taken apart" in reason or "attention" in reason for reason in small.kept["reasons"])
