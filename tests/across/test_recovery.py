"""The last epochs inside the sub-network, the ration, and the reset of free units: what makes capacity last."""

from __future__ import annotations

import copy
import warnings

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torchmetrics.classification import MulticlassF1Score
from training import Classifier, ConvClassifier, clusters, inputs, task_data, trainer

from lightning_rnf import RelevanceFreezing
from lightning_rnf.search.criteria import ComputeBudget, FreeCapacity, MetricDrop

HALF = {"recovery_epochs": 2, "recovery_criterion": FreeCapacity(0.5), "criterion": 1.0}


class Watch(pl.Callback):
    """Copies of the parameters at the start of each epoch, and what each layer says, in training and in validation."""

    def __init__(self) -> None:
        self.at_start: list[dict[str, torch.Tensor]] = []
        self.said: list[dict[str, torch.Tensor]] = []
        self.steps = 0

    def on_train_epoch_start(self, trainer, pl_module):
        self.at_start.append({name: value.detach().clone() for name, value in pl_module.named_parameters()})
        self.said.append({})

        def listen(name):
            def hook(module, args, output):
                self.said[-1][name] = self.said[-1].get(name, 0) + output.detach().abs().sum(dim=0)

            return hook

        self.handles = [pl_module.body[i].register_forward_hook(listen(f"body.{i}")) for i in (0, 3)]

    def on_train_batch_end(self, *args):
        self.steps += 1

    def on_train_epoch_end(self, trainer, pl_module):
        for handle in self.handles:
            handle.remove()


def fit(model: pl.LightningModule, rnf: RelevanceFreezing, task: str, *callbacks: pl.Callback, **options) -> None:
    model.heads.activate(task)
    trainer(rnf, *callbacks, **{"max_epochs": 4, **options}).fit(model, datamodule=task_data(task))


def in_order(task: str) -> pl.LightningDataModule:
    """Data that is not shuffled: the order of a resumed or compiled fit is drawn anew."""
    data = task_data(task)
    data.train_dataloader = data.val_dataloader
    return data


def seeded(kind: type = Classifier, **options) -> pl.LightningModule:
    torch.manual_seed(0)
    return kind(**options)


# -- inside the sub-network -------------------------------------------------------------------------------------------


def test_in_the_last_epochs_only_the_sub_network_speaks_and_learns():
    model, rnf, watch = seeded(weight_decay=0.1), RelevanceFreezing(**HALF), Watch()
    fit(model, rnf, "a", watch)
    relevant = rnf.state.tasks["a"].relevant
    end = dict(model.named_parameters())
    for layer, mask in relevant.items():
        assert 0 < mask.sum() < len(mask)
        for epoch in (0, 1):
            assert watch.said[epoch][layer].all()
        for epoch in (2, 3):
            assert torch.equal(watch.said[epoch][layer] > 0, mask)  # in the steps and in the validation
        for name in (f"{layer}.weight", f"{layer}.bias"):
            moved = (end[name] != watch.at_start[2][name]).reshape(len(mask), -1).any(dim=1)
            assert torch.equal(moved, mask)
    assert not torch.equal(end["heads.tasks.a.weight"], watch.at_start[2]["heads.tasks.a.weight"])


def test_the_record_says_what_the_recovery_started_from_and_what_it_reached():
    model, rnf = seeded(), RelevanceFreezing(**HALF)
    fit(model, rnf, "a")
    record = rnf.state.tasks["a"]
    assert record.recovery_epochs == 2
    assert record.evaluations[0].score.accuracy == record.accuracy
    (after,) = record.recovery
    assert (after.score.cutoff, after.score.accuracy) == (record.cutoff, record.subnetwork_accuracy)
    x, y = task_data("a").validation.tensors
    with rnf.recall("a"), torch.no_grad():
        assert record.subnetwork_accuracy == (model(x).argmax(1) == y).double().mean().item()
    before = next(one.score.accuracy for one in record.evaluations if one.score.cutoff == record.cutoff)
    assert record.subnetwork_accuracy > before
    assert sum(int(mask.sum()) for mask in record.relevant.values()) == 40


def test_everything_speaks_and_learns_again_in_the_next_task_and_old_ones_stay_exact():
    model, rnf = seeded(ConvClassifier), RelevanceFreezing(**HALF)
    remembered = {}
    for task in "abc":
        watch = Watch()
        fit(model, rnf, task, watch)
        if task != "a":
            assert watch.said[0]["body.3"].reshape(16, -1).any(dim=1).all()
        with rnf.recall(task), torch.no_grad():
            remembered[task] = model(inputs())
    for task, logits in remembered.items():
        with rnf.recall(task), torch.no_grad():
            assert torch.equal(model(inputs()), logits)


def test_norms_of_silent_units_keep_their_statistics():
    """Else their variance falls to 0, and a deep network of them overflows as soon as they speak again."""
    model, rnf = seeded(ConvClassifier), RelevanceFreezing(**{**HALF, "recovery_epochs": 3})
    norm, variances = model.body[4], []

    class Variances(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            variances.append(norm.running_var.clone())

    fit(model, rnf, "a", Variances(), max_epochs=5)
    silent = ~rnf.state.tasks["a"].relevant["body.3"]
    before, after = variances[1], variances[-1]
    assert silent.any()
    assert torch.equal(after[silent], before[silent])
    assert not torch.isclose(after[~silent], before[~silent]).all()


def test_hooks_of_a_recovery_are_gone_after_it():
    model, rnf = seeded(), RelevanceFreezing(**HALF)
    fit(model, rnf, "a")
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.body.parameters())


def test_a_compiled_model_recovers_inside_its_sub_network_too():
    runs = []
    for compile_ in (lambda model: model, lambda model: torch.compile(model, backend="eager")):
        model, rnf = seeded(), RelevanceFreezing(**HALF)
        model.body[2].p = 0.0
        model.heads.activate("a")
        trainer(rnf, max_epochs=4).fit(compile_(model), datamodule=in_order("a"))
        runs.append((model.state_dict(), rnf.state.tasks["a"].relevant))
    torch.compiler.reset()
    (weights, relevant), (compiled_weights, compiled_relevant) = runs
    assert all(torch.equal(mask, compiled_relevant[name]) for name, mask in relevant.items())
    assert all(torch.equal(value, compiled_weights[name]) for name, value in weights.items())


@pytest.mark.parametrize("criterion", [MetricDrop(MulticlassF1Score(2), 1.0), ComputeBudget(0.9)])
def test_what_only_the_later_criterion_asks_for_is_measured_before_the_recovery_too(criterion):
    rnf = RelevanceFreezing(**{**HALF, "criterion": criterion})
    fit(seeded(), rnf, "a")
    record = rnf.state.tasks["a"]
    assert set(record.recovery[0].score.values) == set(record.evaluations[0].score.values)
    assert record.recovery[0].score.baseline_values == record.evaluations[0].score.values


# -- what falls short -------------------------------------------------------------------------------------------------


def unreachable(score) -> bool:
    return score.cutoff == 0 or score.accuracy > 1


def test_a_recovery_that_falls_short_is_said():
    rnf = RelevanceFreezing(**{**HALF, "criterion": unreachable})
    with pytest.warns(UserWarning, match=r"a: its recovery falls short of the criterion: accuracy 0\.\d+ of the whole"):
        fit(seeded(), rnf, "a")
    record = rnf.state.tasks["a"]
    assert not record.accepted
    assert sum(int(mask.sum()) for mask in record.relevant.values()) == 40


def test_recovery_search_takes_a_milder_cutoff_without_another_step():
    def few_pruned(score) -> bool:
        return score.cutoff <= 44

    options = {**HALF, "recovery_criterion": FreeCapacity(0.6), "criterion": few_pruned}
    plain, searched = Watch(), Watch()
    with pytest.warns(UserWarning, match="falls short"):
        fit(seeded(), RelevanceFreezing(**options), "a", plain)
    rnf = RelevanceFreezing(**options, recovery_search=True)
    fit(model := seeded(), rnf, "a", searched)
    record = rnf.state.tasks["a"]
    assert [one.score.cutoff for one in record.recovery] == [48, 80 - 32 * 3 // 2]
    assert record.cutoff == 32
    assert record.accepted
    assert searched.steps == plain.steps
    x, y = task_data("a").validation.tensors
    with rnf.recall("a"), torch.no_grad():
        assert record.subnetwork_accuracy == (model(x).argmax(1) == y).double().mean().item()


def test_if_no_milder_cutoff_will_do_the_recovered_one_stays():
    options = {**HALF, "recovery_criterion": FreeCapacity(0.6), "criterion": lambda score: False}
    rnf = RelevanceFreezing(**options, recovery_search=True)
    with pytest.warns(UserWarning, match="falls short"):
        fit(seeded(), rnf, "a")
    assert sum(int(mask.sum()) for mask in rnf.state.tasks["a"].relevant.values()) == 32
    assert [one.score.cutoff for one in rnf.state.tasks["a"].recovery] == [48, 32, 8, 0]  # of 80


def test_a_fit_that_ends_before_its_last_epochs_recovers_nothing_and_says_so():
    rnf = RelevanceFreezing(**HALF)
    with pytest.warns(UserWarning, match="a: the fit ended before its last 2 epochs: no recovery"):
        fit(seeded(), rnf, "a", max_steps=5)
    assert rnf.state.tasks["a"].recovery == ()
    assert rnf.state.tasks["a"].recovery_epochs == 0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"max_epochs": 2}, r"recovery_epochs=2 of the 2 epochs that are left leave none for the whole network"),
        (
            {"max_epochs": -1, "max_steps": 5},
            r"recovery_epochs are the last of a known number: give Trainer\(max_epochs",
        ),
    ],
)
def test_a_fit_too_short_or_endless_is_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        fit(seeded(), RelevanceFreezing(**HALF), "a", **options)


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ({"recovery_epochs": 2, "retention": "paper"}, "which retention='paper' never runs"),
        ({"recovery_epochs": -1}, "recovery_epochs is -1, expected a whole number of at least 0"),
        ({"recovery_criterion": "much"}, "expected a tolerance"),
        ({"recovery_search": 1}, "recovery_search is 1, expected True or False"),
        ({"recovery_search": True, "recovery_epochs": 0}, "of use with recovery_epochs only"),
        ({"recovery_criterion": 0.3, "recovery_epochs": 0}, "of use with recovery_epochs only"),
        ({"ration": 0}, "ration is 0, expected a share"),
        ({"ration": 1.5}, "ration is 1.5, expected a share"),
        ({"ration": True}, "ration is True, expected a share"),
        ({"ration": [0.5, 0]}, r"ration is \[0.5, 0\], expected a share .* or a list of them"),
        ({"ration": ()}, r"ration is \(\), expected a share"),
        ({"ration": "0.5"}, "ration is '0.5', expected a share"),
        ({"ration": b"\x01"}, "expected a share above 0 and up to 1, or a list of them"),
        ({"ration": [0.5, None]}, "expected a share above 0 and up to 1, or a list of them"),
        ({"reset_free": "yes"}, "reset_free is 'yes'"),
    ],
)
def test_options_out_of_range_are_refused(option, sentence):
    with pytest.raises((TypeError, ValueError), match=sentence):
        RelevanceFreezing(**option)


# -- stopped and resumed ----------------------------------------------------------------------------------------------


class Stop(pl.Callback):
    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == self.epoch and batch_idx == 3:
            raise KeyError("stopped")


@pytest.mark.parametrize("epoch", [1, 2, 3])
@pytest.mark.parametrize("task", ["a", "b"])
def test_a_fit_stopped_before_or_within_its_recovery_and_resumed_equals_one_that_was_not(tmp_path, task, epoch):
    def begin() -> tuple[pl.LightningModule, RelevanceFreezing]:
        model = seeded(ConvClassifier)
        model.heads.activate(task)
        rnf = RelevanceFreezing(**HALF, reset_free=True)
        if task == "b":
            fit(model, rnf, "a")
            model.heads.activate("b")
        return model, rnf

    expected, uninterrupted = begin()
    trainer(uninterrupted, max_epochs=4).fit(expected, datamodule=in_order(task))

    model, rnf = begin()
    earlier = copy.deepcopy(rnf)
    saving = {"default_root_dir": tmp_path, "enable_checkpointing": True}
    with pytest.raises(KeyError, match="stopped"):
        trainer(rnf, Stop(epoch), max_epochs=4, **saving).fit(model, datamodule=in_order(task))
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    other = seeded(ConvClassifier)
    other.heads.activate(task)
    trainer(earlier, max_epochs=4, **saving).fit(other, datamodule=in_order(task), ckpt_path=checkpoint)

    for name, mask in uninterrupted.state.tasks[task].relevant.items():
        assert torch.equal(earlier.state.tasks[task].relevant[name], mask)
    for name, value in expected.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    assert earlier.state.tasks[task].recovery == uninterrupted.state.tasks[task].recovery
    for name, value in uninterrupted.state.initial.items():
        assert torch.equal(earlier.state.initial[name], value), name


@pytest.mark.parametrize(
    ("begun", "resumed"),
    [({"ration": [0.5, 0.25]}, {"ration": 0.25}), ({"ration": 0.5}, {"ration": None}), ({}, {"normalize": "none"})],
)
def test_a_recovery_is_not_resumed_with_options_that_give_another_sub_network(tmp_path, begun, resumed):
    model = seeded(ConvClassifier)
    model.heads.activate("a")
    saving = {"default_root_dir": tmp_path, "enable_checkpointing": True}
    with pytest.raises(KeyError, match="stopped"):
        trainer(RelevanceFreezing(**HALF, **begun), Stop(3), max_epochs=4, **saving).fit(
            model, datamodule=task_data("a")
        )
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    other = seeded(ConvClassifier)
    other.heads.activate("a")
    again = trainer(RelevanceFreezing(**HALF, **resumed), max_epochs=4, **saving)
    with pytest.raises(ValueError, match="a: its recovery was begun inside another sub-network"):
        again.fit(other, datamodule=task_data("a"), ckpt_path=checkpoint)


def test_a_recovery_that_was_stopped_early_says_how_many_epochs_it_had():
    class StopInThree(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = trainer.current_epoch == 2

    rnf = RelevanceFreezing(**HALF)
    fit(seeded(), rnf, "a", StopInThree())
    assert rnf.state.tasks["a"].recovery_epochs == 1


def test_a_trainer_that_was_stopped_can_resume_within_the_recovery(tmp_path):
    model, rnf = seeded(), RelevanceFreezing(**HALF)
    stop = Stop(3)
    model.heads.activate("a")
    one = trainer(rnf, stop, max_epochs=4, default_root_dir=tmp_path, enable_checkpointing=True)
    with pytest.raises(KeyError, match="stopped"):
        one.fit(model, datamodule=task_data("a"))
    stop.epoch = -1
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    one.fit(model, datamodule=task_data("a"), ckpt_path=checkpoint)
    assert rnf.state.tasks["a"].recovery_epochs == 2


def test_resumed_under_another_name_the_whole_network_learns_again(tmp_path):
    model, rnf = seeded(), RelevanceFreezing(**HALF, task="one")
    model.heads.activate("a")
    saving = {"default_root_dir": tmp_path, "enable_checkpointing": True}
    with pytest.raises(KeyError, match="stopped"):
        trainer(rnf, Stop(3), max_epochs=4, **saving).fit(model, datamodule=task_data("a"))
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    other = RelevanceFreezing(**HALF, task="two")
    trainer(other, watch := Watch(), max_epochs=8, **saving).fit(model, datamodule=task_data("a"), ckpt_path=checkpoint)
    assert list(other.state.tasks) == ["two"]
    assert all(said.all() for said in watch.said[0].values())
    first, last = watch.at_start[0], watch.at_start[2]
    assert (first["body.0.weight"] != last["body.0.weight"]).all()


def test_an_optimizer_of_what_can_learn_is_resumed_within_a_recovery(tmp_path):
    class Filtering(Classifier):
        def configure_optimizers(self):
            return torch.optim.AdamW([one for one in self.parameters() if one.requires_grad], lr=1e-2)

    saving = {"default_root_dir": tmp_path, "enable_checkpointing": True}
    model, rnf = seeded(Filtering), RelevanceFreezing(**HALF)
    fit(model, rnf, "a")
    with pytest.raises(KeyError, match="stopped"):
        fit(model, rnf, "b", Stop(3), **saving)  # b only reuses what a has
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    model.heads.activate("b")
    trainer(rnf, max_epochs=4, **saving).fit(model, datamodule=task_data("b"), ckpt_path=checkpoint)
    assert list(rnf.state.tasks) == ["a", "b"]


def test_what_units_started_from_has_to_be_known_to_reset_them():
    model, rnf = seeded(), RelevanceFreezing(reset_free=False)
    fit(model, rnf, "a")
    rnf.reset_free = True
    with pytest.raises(ValueError, match=r"were trained without reset_free.*leave reset_free out"):
        fit(model, rnf, "b")


def test_a_recovery_that_was_given_up_is_forgotten_by_the_next_fit():
    model, rnf = seeded(), RelevanceFreezing(**HALF)
    with pytest.raises(KeyError, match="stopped"):
        fit(model, rnf, "a", Stop(3))
    assert rnf.state.recovering is not None
    watch = Watch()
    fit(model, rnf, "a", watch)
    assert all(said.all() for said in watch.said[0].values())
    assert len(rnf.state.tasks) == 1


# -- ration and reset -------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.* falls short of the criterion:UserWarning")
@pytest.mark.parametrize("recovery_epochs", [0, 1])
@pytest.mark.parametrize(
    ("ration", "claims"),
    [(0.25, [10, 7, 5]), ((np.float32(0.5), 0.3), [20, 6, 4]), ([0.1, 0.5, 1.0], [4, 18, 18]), (1.0, [40, 0, 0])],
)
def test_each_task_claims_its_ration_of_each_layer_at_most(ration, claims, recovery_epochs):
    def nothing_may_be_pruned(score):
        return False

    rnf = RelevanceFreezing(
        ration=ration,
        criterion=nothing_may_be_pruned,
        recovery_epochs=recovery_epochs,
        recovery_criterion=nothing_may_be_pruned if recovery_epochs else None,
    )
    model, free = seeded(), 40
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "no free units are left", UserWarning)
        for task, claimed in zip("abc", claims, strict=True):
            fit(model, rnf, task, max_epochs=1 + recovery_epochs)
            free -= claimed
            assert [round(40 * share) for share in rnf.state.tasks[task].capacity.values()] == [free, free]


def test_a_ration_that_costs_more_than_the_tolerance_is_said():
    rnf = RelevanceFreezing(ration=0.05, criterion=0.0)
    with pytest.warns(UserWarning, match=r"a: the ration of 0\.05 falls short of the criterion"):
        fit(seeded(), rnf, "a")
    assert not rnf.state.tasks["a"].accepted
    assert [int(mask.sum()) for mask in rnf.state.tasks["a"].relevant.values()] == [2, 2]


def test_the_ration_that_is_said_is_the_task_s_own():
    model, rnf = seeded(), RelevanceFreezing(ration=[0.4, 0.04], criterion=0.0, recovery_epochs=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        fit(model, rnf, "a")
    with pytest.warns(UserWarning, match=r"b: the ration of 0\.04 falls short of the criterion"):
        fit(model, rnf, "b")


def test_free_units_start_each_task_from_where_they_were_at_first():
    model = seeded(ConvClassifier)
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    rnf = RelevanceFreezing(criterion=FreeCapacity(0.5), reset_free=True, freeze="units")
    fit(model, rnf, "a")
    frozen = rnf.state.frozen()
    after_a = {name: value.clone() for name, value in model.state_dict().items()}

    class Start(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 0:
                self.state = {name: value.clone() for name, value in pl_module.state_dict().items()}

    fit(model, rnf, "b", start := Start())
    of_units = {name: layer.name for layer in rnf.state.layers for name in layer.parameters}
    of_units |= {f"body.4.{key}": "body.3" for key in ("running_mean", "running_var", "weight", "bias")}
    for name, value in start.state.items():
        if name in of_units:
            mask = frozen[of_units[name]].view(-1, *[1] * (value.ndim - 1))
            assert torch.equal(value, torch.where(mask, after_a[name], initial[name])), name
        else:
            assert torch.equal(value, after_a[name]), name
    assert any(not torch.equal(after_a[name], initial[name]) for name in of_units)


def test_without_reset_nothing_moves_between_tasks_and_nothing_is_stored():
    model, rnf = seeded(), RelevanceFreezing(reset_free=False)
    fit(model, rnf, "a")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.heads.activate("b")
    trainer(rnf, limit_train_batches=0).fit(model, datamodule=task_data("b"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert rnf.state.initial == {}


def test_a_diverged_task_leaves_no_trace_in_free_units_that_are_reset():
    model, rnf = seeded(ConvClassifier), RelevanceFreezing(criterion=FreeCapacity(0.5), reset_free=True)
    fit(model, rnf, "a")
    with torch.no_grad():
        for layer in rnf.state.layers:
            for name in layer.parameters:
                model.get_parameter(name)[~rnf.state.frozen()[layer.name]] = torch.nan
    x, y = clusters("b", 320, 1).tensors
    fit(model, rnf, "b")
    with rnf.recall("b"), torch.no_grad():
        assert (model(x).argmax(1) == y).float().mean() > 0.6
