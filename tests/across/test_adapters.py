"""Adapters beside layers that are kept from training: each task uses those whole, and adapters are the units."""

from __future__ import annotations

import copy
import math
import warnings

import lightning.pytorch as pl
import pytest
import torch
from adapters import ADAPTERS, BASE, RANK, Adapted, Lora
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from training import Classifier, clusters, frozen_entries, inputs, task_data, train, trainer

from lightning_rnf import FreeCapacity, RelevanceFreezing, UnitMap
from lightning_rnf.memory import FreezeState
from lightning_rnf.relevance import attribute
from lightning_rnf.relevance.conservation import INPUT

OPTIONS = {"criterion": FreeCapacity(0.1), "ration": 0.4, "fit_head": False}


def adapted() -> Adapted:
    torch.manual_seed(0)
    model = Adapted()
    model.heads.activate("a")
    return model


def batch(task="a"):
    return tuple(clusters(task, 40).tensors)


def names(units):
    return [layer.name for layer in units.layers]


def values(model, of):
    return {name: model.get_parameter(name).detach().clone() for name in of}


def assert_bits(model, before):
    for name, value in before.items():
        assert torch.equal(model.get_parameter(name), value), name


# -- which units ----------------------------------------------------------------------------------------------------


def test_adapters_are_units_and_what_they_stand_on_is_kept():
    units = UnitMap.of(adapted(), batch())
    assert names(units) == ADAPTERS
    assert [layer.units for layer in units.layers] == [RANK, 40, RANK, 40]
    assert set(units.kept) == {*BASE, "body.2.weight", "body.2.bias"} == set(units.shared)


def test_the_map_says_so_in_one_line():
    said = str(UnitMap.of(adapted(), batch()))
    assert (
        "kept from training (requires_grad is False), so every task uses all of it: 6 parameters of 3 modules" in said
    )
    assert "shared, frozen whole" not in said
    assert "base_layer" not in said


def test_a_layer_with_anything_that_learns_is_made_of_units():
    model = adapted()
    model.body[0].base_layer.bias.requires_grad_(True)
    units = UnitMap.of(model, batch())
    assert names(units) == ["body.0.base_layer", *ADAPTERS]
    assert "body.0.base_layer.weight" not in units.shared


def test_globs_that_ask_for_a_layer_get_it_and_those_that_leave_out_do_not_bring_it_back():
    assert "body.0.base_layer" in names(UnitMap.of(adapted(), batch(), units="*"))
    assert names(UnitMap.of(adapted(), batch(), units="body.3.base_layer")) == ["body.3.base_layer"]
    assert names(UnitMap.of(adapted(), batch(), units="!body.3*")) == ADAPTERS[:2]
    assert names(UnitMap.of(adapted(), batch(), units="!body.3.base_layer")) == ADAPTERS


def test_a_network_of_which_only_the_head_learns_has_the_units_that_it_had():
    model = Classifier()
    model.body.requires_grad_(False)
    assert names(UnitMap.of(model, batch())) == ["body.0", "body.3"]


def test_what_was_trained_counts_as_trained():
    model = adapted()
    units = UnitMap.of(model, batch(), learned=BASE[:2])
    assert names(units) == ["body.0.base_layer", *ADAPTERS]


def test_relevance_goes_past_adapters_by_what_they_stand_on():
    """At zero biases all of it arrives, with an adapter's share as it is where all layers are units."""
    model = adapted().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif "lora_B" in name:
                parameter.normal_(0, 0.3)
    example = (x := inputs(), model(x).argmax(1))
    found, every = (
        attribute(model, UnitMap.of(model, example, units=globs).layers, [example]) for globs in (None, "*")
    )
    assert found.conservation.ratios[INPUT] == pytest.approx(1, abs=1e-3)
    assert list(found.relevance) == ADAPTERS
    for name in ADAPTERS:
        assert torch.equal(found.relevance[name], every.relevance[name])


# -- fits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"freeze": "units"}, {"recovery_epochs": 0}], ids=str)
def test_old_tasks_are_recalled_to_the_bit_whatever_becomes_of_what_is_free(options):
    model, rnf, x = adapted(), RelevanceFreezing(**OPTIONS | options), inputs()
    base = values(model, BASE)
    logits = {}
    for task in ("a", "b"):
        train(model, rnf, task)
        with rnf.recall(task, model), torch.no_grad():
            logits[task] = model(x)
        assert_bits(model, base)
    assert [layer.name for layer in rnf.state.layers] == ADAPTERS
    assert list(rnf.capacity()) == ADAPTERS
    report = rnf.report(model)
    assert not any(report.audit.changed.values())

    frozen = frozen_entries(rnf, model)
    assert set(frozen) == {f"{name}.weight" for name in ADAPTERS}
    with torch.no_grad():
        for name, mask in frozen.items():
            assert not mask.all()
            model.get_parameter(name)[~mask] = math.nan
    for task, expected in logits.items():
        with rnf.recall(task, model), torch.no_grad():
            assert torch.equal(model(x), expected)


def test_a_sub_network_has_all_of_what_adapters_stand_on():
    """The oracle: the layers by hand, with rows of zeros for silent units of the adapters alone."""
    model, rnf, x = adapted(), RelevanceFreezing(**OPTIONS), inputs()
    train(model, rnf, "a")
    relevant = rnf.state.tasks["a"].relevant
    assert all(mask.any() and not mask.all() for mask in relevant.values())

    def said(index, x):
        layer = model.body[index]
        a, b = (
            layer.get_submodule(f"lora_{kind}.default").weight * relevant[f"body.{index}.lora_{kind}.default"][:, None]
            for kind in "AB"
        )
        return nn.functional.linear(x, layer.base_layer.weight, layer.base_layer.bias) + 2 * x @ a.T @ b.T

    model.eval()
    with torch.no_grad(), rnf.recall("a", model):
        expected = model.heads(said(3, model.body[2](said(0, x).relu())).relu())
        assert torch.allclose(model(x), expected, atol=1e-6)


def test_nothing_of_it_is_copied_into_checkpoints():
    model, rnf = adapted(), RelevanceFreezing(**OPTIONS)
    train(model, rnf, "a")
    assert set(rnf.state.initial) == {f"{name}.weight" for name in ADAPTERS}


def test_no_word_of_what_is_frozen_whole_and_a_word_where_nothing_that_learns_is_made_of_units():
    train(adapted(), RelevanceFreezing(**OPTIONS), "a", max_epochs=1)  # where a warning is an error

    class Scaled(nn.Module):  # as IA3 has it
        def __init__(self):
            super().__init__()
            self.base_layer, self.scale = nn.Linear(6, 40).requires_grad_(False), nn.Parameter(torch.ones(40))

        def forward(self, x):
            return self.base_layer(x) * self.scale

    model = adapted()
    model.body = nn.Sequential(Scaled(), nn.ReLU())
    with pytest.warns(UserWarning, match="100% of the parameters outside of heads belong to no unit.*Scaled's own"):
        train(model, RelevanceFreezing(**OPTIONS), "a", max_epochs=1)


# -- flags that change ------------------------------------------------------------------------------------------------


def test_what_is_let_go_in_a_later_task_stays_frozen_with_a_word():
    model, rnf, x = adapted(), RelevanceFreezing(**OPTIONS), inputs()
    train(model, rnf, "a")
    with rnf.recall("a", model), torch.no_grad():
        before = model(x)
    base = values(model, BASE)
    model.body.requires_grad_(True)

    with pytest.warns(UserWarning, match=r"body.0.base_layer, body.3.base_layer: kept from training .* when 'a' ended"):
        train(model, rnf, "b", max_epochs=1)

    assert_bits(model, base)
    assert [layer.name for layer in rnf.state.layers] == ADAPTERS
    assert model.body[0].base_layer.weight.requires_grad, "the flag is the user's"
    with rnf.recall("a", model), torch.no_grad():
        assert torch.equal(model(x), before)


def test_what_is_named_in_units_learns_when_it_is_let_go():
    model, rnf, x = adapted(), RelevanceFreezing(units="*", **OPTIONS), inputs()
    train(model, rnf, "a")
    with rnf.recall("a", model), torch.no_grad():
        before = model(x)
    base = values(model, BASE)
    model.body[0].requires_grad_(True)
    train(model, rnf, "b", max_epochs=2)
    assert not torch.equal(model.body[0].base_layer.weight, base[BASE[0]])
    with rnf.recall("a", model), torch.no_grad():
        assert torch.equal(model(x), before)


def test_units_that_a_later_task_keeps_from_training_stay_units():
    torch.manual_seed(0)
    model, rnf, x = Classifier(), RelevanceFreezing(**OPTIONS), inputs()
    train(model, rnf, "a")
    with rnf.recall("a", model), torch.no_grad():
        before = model(x)
    model.body[0].requires_grad_(False)
    for task in ("b", "c"):
        train(model, rnf, task, max_epochs=2)
    assert [layer.name for layer in rnf.state.layers] == ["body.0", "body.3"]
    assert rnf.state.kept == ()
    with rnf.recall("a", model), torch.no_grad():
        assert torch.equal(model(x), before)


class At(pl.Callback):
    """Sets the flags of a part of the body at the start of an epoch."""

    def __init__(self, epoch, flag):
        self.epoch, self.flag = epoch, flag

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            pl_module.body[0].requires_grad_(self.flag)


@pytest.mark.parametrize("recovery_epochs", [0, 1])
@pytest.mark.parametrize(("before", "after"), [(False, True), (True, False)])
def test_what_a_fit_has_trained_is_made_of_units_whenever_it_was(before, after, recovery_epochs):
    torch.manual_seed(0)
    model, x = Classifier(), inputs()
    rnf = RelevanceFreezing(recovery_epochs=recovery_epochs, **OPTIONS)
    model.body[0].requires_grad_(before)
    model.heads.activate("a")
    trainer(rnf, At(1, after), max_epochs=4).fit(model, datamodule=task_data("a"))
    assert [layer.name for layer in rnf.state.layers] == ["body.0", "body.3"]
    assert rnf.state.kept == ()
    with rnf.recall("a", model), torch.no_grad():
        expected = model(x)
    train(model, rnf, "b", max_epochs=2)
    with rnf.recall("a", model), torch.no_grad():
        assert torch.equal(model(x), expected)


def test_what_is_let_go_inside_a_sub_network_stays_shared():
    torch.manual_seed(0)
    model, x = Classifier(), inputs()
    rnf = RelevanceFreezing(recovery_epochs=2, **OPTIONS)
    model.body[0].requires_grad_(False)
    model.heads.activate("a")
    trainer(rnf, At(3, True), max_epochs=4).fit(model, datamodule=task_data("a"))
    assert [layer.name for layer in rnf.state.layers] == ["body.3"]
    with rnf.recall("a", model), torch.no_grad():
        expected = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is let go
        train(model, rnf, "b", max_epochs=3)
    with rnf.recall("a", model), torch.no_grad():
        assert torch.equal(model(x), expected)


def test_a_fit_that_was_given_up_says_nothing_of_the_next():
    torch.manual_seed(0)
    model, rnf = Adapted(), RelevanceFreezing(**OPTIONS)
    model.heads.activate("a")
    model.requires_grad_(True)

    class Stop(pl.Callback):
        def on_train_batch_end(self, *args):
            raise RuntimeError("given up")

    with pytest.raises(RuntimeError, match="given up"):
        trainer(rnf, Stop()).fit(model, datamodule=task_data("a"))
    for name in BASE:
        model.get_parameter(name).requires_grad_(False)
    train(model, rnf, "a", max_epochs=1)
    assert [layer.name for layer in rnf.state.layers] == ADAPTERS


# -- what is kept of it -----------------------------------------------------------------------------------------------


def test_files_and_checkpoints_bring_it_back(tmp_path):
    model, rnf, x = adapted(), RelevanceFreezing(**OPTIONS), inputs()
    saver = ModelCheckpoint(tmp_path, save_last=True)
    trainer(rnf, saver, enable_checkpointing=True).fit(model, datamodule=task_data("a"))
    rnf.save(tmp_path / "masks.safetensors")
    with rnf.recall("a", model), torch.no_grad():
        expected = model(x)

    masks, restored, other = RelevanceFreezing(**OPTIONS), RelevanceFreezing(**OPTIONS), Adapted()
    masks.load(tmp_path / "masks.safetensors", model)
    restored.restore(tmp_path / "a-ended.ckpt", other)
    for callback, of in ((masks, model), (restored, other)):
        assert callback.state.kept == rnf.state.kept
        assert set(callback.state.kept) == {*BASE}
        with callback.recall("a", of), torch.no_grad():
            assert torch.equal(of(x), expected)
    train(other, restored, "b", max_epochs=1)
    with restored.recall("a", other), torch.no_grad():
        assert torch.equal(other(x), expected)


def test_a_resumed_fit_ends_as_one_that_was_not_stopped(tmp_path):
    class Calm(Adapted):  # no random state is in a checkpoint
        def __init__(self):
            super().__init__()
            for part in self.modules():
                if isinstance(part, Lora):
                    part.dropout.p = 0.0

    class Once(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 3:
                raise KeyError("stopped")

    ended = []
    for stopped in (False, True):
        pl.seed_everything(0, verbose=False)
        saver = ModelCheckpoint(tmp_path / str(stopped), save_last=True, enable_version_counter=False)

        def fit(model, rnf, *more, saver=saver, **options):
            model.heads.activate("a")
            made = trainer(rnf, saver, SeededEpochs(), *more, enable_checkpointing=True, max_epochs=4)
            made.fit(model, datamodule=task_data("a"), **options)

        model, rnf = Calm(), RelevanceFreezing(**OPTIONS)
        if stopped:
            with pytest.raises(KeyError, match="stopped"):
                fit(model, rnf, Once())
            model, rnf = Calm(), RelevanceFreezing(**OPTIONS)
            fit(model, rnf, ckpt_path=tmp_path / "True" / "last.ckpt")
        else:
            fit(model, rnf)
        ended.append((model, rnf.state))
    (model, state), (other, resumed) = ended
    assert resumed.kept == state.kept != ()
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    for name, mask in state.tasks["a"].relevant.items():
        assert torch.equal(mask, resumed.tasks["a"].relevant[name])


class SeededEpochs(pl.Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        pl.seed_everything(trainer.current_epoch, verbose=False)
        trainer.train_dataloader.generator = torch.Generator().manual_seed(trainer.current_epoch)
        trainer.train_dataloader.sampler.generator = torch.Generator().manual_seed(trainer.current_epoch)
        iter(trainer.fit_loop._data_fetcher)


def test_states_of_before_have_nothing_kept_and_lies_are_refused():
    model, rnf = adapted(), RelevanceFreezing(**OPTIONS)
    train(model, rnf, "a", max_epochs=1)
    plain = rnf.state_dict()
    assert FreezeState.from_plain(plain).kept == rnf.state.kept
    assert FreezeState.from_plain({key: value for key, value in plain.items() if key != "kept"}).kept == ()
    for lie in (["body.0.lora_A.default.weight"], "body", [1]):
        with pytest.raises(ValueError, match="not a state of lightning_rnf"):
            FreezeState.from_plain({**plain, "kept": lie})


def test_tasks_of_before_in_which_it_was_made_of_units_go_on_so():
    model, before, x = adapted(), RelevanceFreezing(units="*", **OPTIONS), inputs()
    train(model, before, "a", max_epochs=2)
    plain = {key: value for key, value in before.state_dict().items() if key != "kept"}
    rnf = RelevanceFreezing(**OPTIONS)
    rnf.load_state_dict(plain)
    with rnf.recall("a", model), torch.no_grad():
        expected = model(x)
    train(model, rnf, "b", max_epochs=2)
    assert "body.0.base_layer" in rnf.state.tasks["b"].relevant
    with rnf.recall("a", model), torch.no_grad():
        assert torch.equal(model(x), expected)


def test_a_task_that_is_given_up_gives_it_up():
    model, rnf = adapted(), RelevanceFreezing(**OPTIONS)
    train(model, rnf, "a", "b", max_epochs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no unit is free again, since the later task has all of the first one's
        rnf.forget("a")
    assert set(BASE) <= set(rnf.state.kept) <= set(rnf.state.shared)
    rnf.forget("b")
    assert rnf.state.kept == rnf.state.shared == ()


def test_an_exported_network_has_smaller_adapters_on_the_same_layers():
    model, rnf, x = adapted(), RelevanceFreezing(recovery_epochs=0, **OPTIONS), inputs()
    train(model, rnf, "a")
    kept = {name: int(mask.sum()) for name, mask in rnf.state.tasks["a"].relevant.items()}
    small = rnf.export(model, "a")
    for index in ("0", "3"):
        layer = small.get_submodule(f"body.{index}")
        assert torch.equal(layer.base_layer.weight, model.body[int(index)].base_layer.weight)
        assert len(layer.get_submodule("lora_A.default").weight) <= max(1, kept[f"body.{index}.lora_A.default"])
    with rnf.recall("a", model), torch.no_grad():
        assert torch.allclose(small(x), model(x), atol=1e-5)


def test_an_adapter_may_be_given_a_higher_rank():
    model, rnf, x = adapted(), RelevanceFreezing(**OPTIONS), inputs()
    train(model, rnf, "a")
    with rnf.recall("a", model), torch.no_grad():
        before = model(x)
    grown = rnf.widen(model, 1.0, layers="*lora_A*")
    assert grown == dict.fromkeys(ADAPTERS[::2], RANK)
    assert model.body[0].lora_B["default"].weight.shape == (40, 2 * RANK)
    train(model, rnf, "b", max_epochs=2)
    with rnf.recall("a", model), torch.no_grad():
        assert torch.equal(model(x), before)


def test_weights_that_an_adapter_was_merged_into_are_noticed():
    model, rnf = adapted(), RelevanceFreezing(**OPTIONS)
    train(model, rnf, "a")
    merged = copy.deepcopy(model)
    with torch.no_grad():
        for layer in (merged.body[0], merged.body[3]):
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            layer.base_layer.weight += 2 * b @ a
            b.zero_()
    assert set(rnf.report(merged).audit.changed["a"]) >= {BASE[0], BASE[2]}
    with pytest.raises(ValueError, match="weights are not those in which the finished tasks ended"):
        train(merged, rnf, "b", max_epochs=1)
