"""Group norms of several channels a group behind a layer: its units are silent behind the norm, too."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from records import bare_record
from torch import Tensor, nn
from training import ConvClassifier, frozen_entries, train

from lightning_rnf import RelevanceFreezing, UnitMap
from lightning_rnf.anatomy import Wiring
from lightning_rnf.memory import FreezeState
from lightning_rnf.recall.export import export
from lightning_rnf.recall.subnetwork import recall, silence

NAN = float("nan")


class Grouped(ConvClassifier):
    """Two convolutions, each with a group norm of four channels a group, and a linear layer."""

    def __init__(self) -> None:
        super().__init__(weight_decay=0.1)
        self.body = nn.Sequential(
            nn.Unflatten(1, (1, 1, 6)),
            *(nn.Conv2d(1, 16, (1, 3), bias=False), nn.GroupNorm(4, 16), nn.ReLU()),
            *(nn.Conv2d(16, 16, (1, 2)), nn.GroupNorm(4, 16), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(48, 40), nn.ReLU()),
        )


def given() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(33, 6, generator=generator), torch.randint(2, (33,), generator=generator)


def built() -> Grouped:
    torch.manual_seed(0)
    model = Grouped()
    model.heads.activate("a")
    for norm in (model.body[2], model.body[5]):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return model.eval()


def test_what_silent_units_say_is_zero_and_the_rest_is_a_norm_of_zeros():
    model, x = built(), given()[0]
    units = UnitMap.of(model, given())
    assert [layer.norm for layer in units.layers] == ["body.2", "body.5", None]
    relevant = {layer.name: torch.arange(layer.units) % 3 > 0 for layer in units.layers}
    with torch.no_grad():
        first = model.body[1](model.body[0](x))
        expected = nn.functional.group_norm(
            torch.where(relevant["body.1"].view(-1, 1, 1), first, 0.0), 4, model.body[2].weight, model.body[2].bias
        )
        for poison in (0.0, NAN):
            model.body[1].weight[~relevant["body.1"]] += poison
            with silence(model, units.layers, relevant):
                said = model.body[:3](x)
            assert not said[:, ~relevant["body.1"]].any()
            torch.testing.assert_close(said[:, relevant["body.1"]], expected[:, relevant["body.1"]])


@pytest.mark.parametrize("slopes", [nn.PReLU(16), nn.PReLU()])
def test_slopes_behind_it_are_the_units_where_there_is_one_each(slopes):
    model = built()
    model.body[3] = slopes
    (layer, *_) = UnitMap.of(model, given()).layers
    assert layer.norm == "body.2"
    assert layer.slopes == ("body.3" if slopes.num_parameters > 1 else None)
    assert layer.parameters[:3] == ("body.1.weight", "body.2.weight", "body.2.bias")


def test_who_reads_it_hears_nothing_of_silent_units():
    model = built()
    units = UnitMap.of(model, given())
    assert units.by_rows == {}
    relevant = {layer.name: torch.arange(layer.units) % 3 > 0 for layer in units.layers}
    heard = Wiring.of(model, units.layers).heard(relevant)
    assert torch.equal(heard["body.4"], relevant["body.1"])


def look(model: nn.Module, rnf: RelevanceFreezing) -> Tensor:
    with rnf.recall("a", model), torch.no_grad():
        return model(given()[0])


@pytest.mark.parametrize("norm_parameters", ["per_task", "frozen"])
def test_recall_is_bit_equal_after_a_second_task_and_whatever_the_rest_becomes(norm_parameters):
    torch.manual_seed(0)
    model, rnf = Grouped(), RelevanceFreezing(norm_parameters=norm_parameters)
    train(model, rnf, "a", max_epochs=4)
    assert {"body.4", "body.8"} <= set(rnf.state.tasks["a"].connections)
    before = look(model, rnf)
    train(model, rnf, "b", max_epochs=2)
    assert torch.equal(look(model, rnf), before)
    assert rnf.report(model).is_sound
    with torch.no_grad():
        for name, entries in frozen_entries(rnf, model).items():
            model.get_parameter(name)[~entries] = NAN
    assert torch.equal(look(model, rnf), before)


@pytest.mark.parametrize("norm_parameters", ["per_task", "frozen"])
def test_a_model_whose_group_norms_were_nobodys_goes_on_with_that(norm_parameters):
    """As files from before have it."""
    torch.manual_seed(0)
    model, rnf = Grouped(), RelevanceFreezing(norm_parameters=norm_parameters)
    train(model, rnf, "a", max_epochs=2)
    state = rnf.state
    norms = tuple(name for name in state.forms if name.startswith(("body.2.", "body.5.")))
    state.layers = tuple(
        replace(layer, norm=None, parameters=tuple(name for name in layer.parameters if name not in norms))
        for layer in state.layers
    )
    state.initial = {name: value for name, value in state.initial.items() if name not in norms}
    state.tasks["a"] = replace(state.tasks["a"], connections=(), rows={})
    if norm_parameters == "frozen":
        state.shared = (*state.shared, *norms)
    before = look(model, rnf)
    again = RelevanceFreezing(norm_parameters=norm_parameters)
    again.state = FreezeState.from_plain(state.to_plain())
    train(model, again, "b", max_epochs=1)
    assert [layer.norm for layer in again.state.layers] == [None] * 3
    assert torch.equal(look(model, again), before)
    assert (set(norms) <= set(again.state.shared)) == (norm_parameters == "frozen")


@pytest.mark.filterwarnings("ignore:.*of the parameters of its silent units are still there:UserWarning")
def test_what_is_exported_says_what_recall_says():
    model, x = built(), given()[0]
    units = UnitMap.of(model, given())
    relevant = {layer.name: torch.arange(layer.units) % 3 > 0 for layer in units.layers}
    record = bare_record(units, relevant, {})
    small = export(model, units.layers, record)
    with torch.no_grad(), recall(model, units.layers, record):
        expected = model(x)
    torch.testing.assert_close(small(x), expected)
