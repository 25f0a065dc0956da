"""Relevance of the units of torch's attention: that of the same network written with linear layers."""

from __future__ import annotations

import pytest
import torch
from attending import CLASSES, HEADS, LENGTH, SAMPLES, WIDTH, Tagger, Written, batch
from torch import Tensor, nn
from zennit.composites import EpsilonPlus

from lightning_rnf import UnitMap
from lightning_rnf.anatomy import supervised
from lightning_rnf.relevance import IMPORTANCES, attribute

PARTS = ("query", "key", "value")


def of_parts(found: dict[str, Tensor]) -> Tensor:
    return torch.cat([found[name] for name in PARTS])


@pytest.mark.parametrize("options", [{}, {"batch_first": False}], ids=str)
@pytest.mark.parametrize("over_samples", ["signed", "absolute"])
@pytest.mark.parametrize("composite", [None, EpsilonPlus], ids=str)
def test_it_is_that_of_linear_layers(options, over_samples, composite):
    torch.manual_seed(0)
    model = Tagger(**options).double()
    written = Written(model).double()
    given = [(batch(seed)[0].double(), batch(seed)[1]) for seed in range(2)]
    of_model, of_written = (
        attribute(
            *(one, UnitMap.of(one, given[0]).layers, given),
            composite=None if composite is None else composite(),
            over_samples=over_samples,
        ).relevance
        for one in (model, written)
    )
    if composite is None:
        torch.testing.assert_close(of_model["attention"], of_parts(of_written), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(of_model["beside"], of_written["beside"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(of_model["attention.out_proj"], of_written["output"], rtol=1e-4, atol=1e-6)
    assert all(values.isfinite().all() and values.any() for values in of_model.values())


@pytest.mark.parametrize("name", ["gradient_x_activation", "taylor", "activation", "magnitude"])
def test_other_importances_are_those_of_linear_layers(name):
    torch.manual_seed(0)
    model = Tagger().double()
    written = Written(model).double()
    given = [(batch()[0].double(), batch()[1])]
    of_model, of_written = (
        IMPORTANCES[name](one, UnitMap.of(one, given[0]).layers, given, supervised) for one in (model, written)
    )
    torch.testing.assert_close(of_model["attention"], of_parts(of_written))
    torch.testing.assert_close(of_model["attention.out_proj"], of_written["output"])


class Encoded(nn.Module):
    """Attention that is called by keyword, and a transformer's encoder; sequences of two lengths."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.before = nn.Linear(WIDTH, WIDTH)
        self.first = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 12, batch_first=True, **options)  # type: ignore[arg-type]
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        padding = torch.arange(LENGTH) >= 2 + 3 * (x[:, :1, 0] > 0)
        x = self.before(x)
        x = x + self.first(query=x, key=x, value=x, key_padding_mask=padding)[0]
        return self.head(self.encoder(x, src_key_padding_mask=padding).masked_fill(padding[..., None], 0.0).sum(1))


def without_biases(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    return model


@pytest.mark.parametrize("norm_first", [False, True])
def test_without_biases_all_of_it_arrives_and_parts_have_what_comes_out(norm_first):
    torch.manual_seed(0)
    model = without_biases(Encoded(norm_first=norm_first)).double()
    given = (torch.randn(SAMPLES, LENGTH, WIDTH).double(), batch()[1])
    units = UnitMap.of(model, given)
    assert sum(layer.packed for layer in units.layers) == 3
    found = attribute(model, units.layers, [given])
    assert found.conservation.ratios["<input>"] == pytest.approx(1.0, abs=1e-3)
    assert found.conservation.unruled == {}
    for layer in units.layers:
        if layer.packed:
            out = found.relevance[f"{layer.name}.out_proj"].sum()
            torch.testing.assert_close(found.relevance[layer.name].sum(), out, rtol=1e-3, atol=1e-6)
    assert "forward" not in vars(model.first)


def test_one_without_a_graph_is_refused_by_its_name():
    class Blind(Tagger):
        def attend(self, x, other):
            with torch.set_grad_enabled(self.seen):
                return super().attend(x, other) + x

    model = Blind()
    model.seen = True
    units = UnitMap.of(model, batch())
    model.seen = False
    with pytest.raises(ValueError, match="layer 'attention' runs without a graph"):
        attribute(model, units.layers, [batch()])


def test_what_it_reads_may_be_the_input_itself():
    torch.manual_seed(0)
    own = without_biases(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)).double()

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own, self.head = own, nn.Linear(WIDTH, CLASSES, bias=False).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.own(x, x, x, need_weights=False)[0].mean(1))

    given = (torch.randn(SAMPLES, LENGTH, WIDTH).double(), batch()[1])
    model = Bare()
    found = attribute(model, UnitMap.of(model, given).layers, [given])
    assert found.conservation.ratios["<input>"] == pytest.approx(1.0, abs=1e-4)
    assert all(values.all() for values in found.relevance.values())
