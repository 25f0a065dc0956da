"""Settings that set themselves: the numbers of `tasks.auto`, and that a fit decides by them, resumed or not."""

from __future__ import annotations

import math
import random
from datetime import timedelta

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from torch.utils.data import DataLoader, default_collate
from training import TASKS, Classifier, clusters, task_data, trainer

from lightning_rnf import AccuracyDrop, FreeCapacity, MetricDrop, RelevanceFreezing
from lightning_rnf.search import SubnetworkScore, as_criterion
from lightning_rnf.streams import TaskDataModule
from lightning_rnf.tasks import auto
from lightning_rnf.tasks.auto import PARTS, RECOVERY, SHARES, Enough
from lightning_rnf.tasks.candidates import Known, Subnetworks

ACCURACIES = st.integers(0, 1000).map(lambda right: right / 1000)
TOLERANCES = st.sampled_from([0.0, 0.01, 0.02, 0.1, 1.0])


def score(accuracy, baseline=0.9, cutoff=5, samples=1000):
    return SubnetworkScore(
        cutoff, accuracy, baseline, units=20, relevant=20 - cutoff, free=0, free_before=0, samples=samples
    )


# -- what a task may claim -------------------------------------------------------------------------------------------


def test_shares_grow_up_to_all_and_the_last_of_known_tasks_may_claim_all_at_once():
    assert list(SHARES) == sorted(set(SHARES))
    assert SHARES[0] > 0
    assert SHARES[-1] == 1
    assert [auto.shares_of(task, None, recovers=False) for task in range(3)] == [SHARES] * 3
    shares = [auto.shares_of(task, 3, recovers=False) for task in range(5)]
    assert shares == [SHARES, SHARES, (1.0,), (1.0,), (1.0,)]


def test_a_task_that_recovers_leaves_units_for_the_next_one():
    for task in range(3):
        shares = auto.shares_of(task, None, recovers=True)
        assert max(shares) == auto.NEEDED < 1
        assert shares[-1] == auto.MOST
    assert auto.shares_of(2, 3, recovers=True) == (1.0,)


def test_slack_is_a_standard_error_inside_parts_of_the_tolerance():
    criterion, (least, most) = AccuracyDrop(0.1), PARTS
    for baseline, samples in ((0.5, 400), (0.9, 1000)):
        error = math.sqrt(baseline * (1 - baseline) / samples)
        expected = min(max(error, least * 0.1), most * 0.1)
        assert auto.slack(criterion, score(0.9, baseline, samples=samples)) == pytest.approx(expected, rel=1e-12)
    assert auto.slack(criterion, score(1.0, 1.0)) == least * 0.1  # no error at all
    assert auto.slack(criterion, score(0.5, 0.5, samples=1)) == most * 0.1
    assert auto.slack(criterion, score(0.5, 0.5, samples=0)) == most * 0.1  # not known
    assert auto.slack(AccuracyDrop(0.0), score(0.5, 0.5)) == 0


@given(ACCURACIES, ACCURACIES, TOLERANCES, st.sampled_from(SHARES), st.integers(1, 10_000))
def test_a_share_is_enough_if_no_loss_can_be_told_and_a_large_one_if_the_criterion_accepts_it(
    accuracy, baseline, tolerance, share, samples
):
    criterion, found = AccuracyDrop(tolerance), score(accuracy, baseline, samples=samples)
    slack = auto.slack(criterion, found)
    assume(abs(baseline - accuracy - slack) > 1e-9)
    assert auto.is_enough(criterion, found, share) == (
        accuracy > baseline - slack or (share >= auto.NEEDED and criterion(found))
    )
    if auto.is_enough(criterion, found, share):
        assert criterion(found)


# -- what of it is enough ---------------------------------------------------------------------------------------------


@settings(max_examples=300)
@given(ACCURACIES, ACCURACIES, st.lists(ACCURACIES, max_size=6), TOLERANCES, st.integers(1, 10_000))
def test_what_is_enough_does_as_well_as_the_budget_and_keeps_the_criterion_if_that_does(
    baseline, budget, others, tolerance, samples
):
    criterion = AccuracyDrop(tolerance)
    enough = Enough(criterion, budget=5)
    scores = [score(one, baseline, cutoff, samples) for cutoff, one in enumerate((budget, *others), start=5)]
    slack = auto.slack(criterion, scores[0])
    assume(all(abs(budget - one - slack) > 1e-9 for one in others))
    said = [enough(one) for one in scores]
    assert enough.is_met == criterion(scores[0])
    assert said[0], "what may be claimed is enough, or there is nothing else"
    for one, verdict in zip(scores[1:], said[1:], strict=True):
        assert verdict == (one.accuracy > budget - slack and (criterion(one) or not criterion(scores[0])))


@given(ACCURACIES, ACCURACIES, TOLERANCES, st.integers(1, 10_000))
def test_where_the_whole_network_may_be_claimed_it_is_the_budget(accuracy, baseline, tolerance, samples):
    criterion = AccuracyDrop(tolerance)
    enough, found = Enough(criterion, budget=0), score(accuracy, baseline, samples=samples)
    slack = auto.slack(criterion, found)
    assume(abs(baseline - accuracy - slack) > 1e-9)
    assert enough(found) == (accuracy > baseline - slack)
    assert enough.is_met
    assert not enough(found) or criterion(found)


@given(ACCURACIES, ACCURACIES, ACCURACIES, ACCURACIES, TOLERANCES, st.integers(1, 10_000))
def test_a_task_recovers_in_all_that_it_may_claim_where_nothing_does_as_well(
    baseline, budget, none, other, tolerance, samples
):
    criterion = AccuracyDrop(tolerance)
    enough, usual = Enough(criterion, budget=5, nothing=9), Enough(criterion, budget=5)
    scores = [score(one, baseline, cutoff, samples) for cutoff, one in ((5, budget), (9, none), (7, other))]
    said, otherwise = [enough(one) for one in scores], [usual(one) for one in scores]
    if otherwise[1] and not criterion(scores[0]):  # accuracy doesn't tell which units it needs
        assert said == [True, False, False]
    else:
        assert said == otherwise


def test_criteria_that_name_an_end_are_followed_to_it():
    assert auto.takes(AccuracyDrop(0.1))
    for criterion in (FreeCapacity(0.5), AccuracyDrop(0.1) & FreeCapacity(0.5), as_criterion(lambda score: True)):
        assert not auto.takes(criterion)
    assert not auto.takes(MetricDrop.__new__(MetricDrop))
    rnf = RelevanceFreezing(criterion=FreeCapacity(0.5))
    assert rnf.ending.selection.rations is None


def test_a_trainer_that_is_used_again_recovers_in_the_last_part_of_each_fit():
    begun = []

    class Begins(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            record = rnf.state.recovering
            if record is not None and record.recovery_epochs == 1:
                begun.append(trainer.current_epoch)

    model, rnf = Classifier(), RelevanceFreezing(criterion=0.1)
    one = trainer(Begins(), rnf, max_epochs=0)
    for task in TASKS:
        model.heads.activate(task)
        one.fit_loop.max_epochs += 4
        one.fit(model, datamodule=task_data(task))
    assert begun == [2, 6, 10]
    assert [record.recovery_epochs for record in rnf.state.tasks.values()] == [2, 2, 2]


@pytest.mark.parametrize("step", [40, 60])
@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided:UserWarning")
def test_a_fit_that_is_resumed_at_the_end_of_an_epoch_recovers_as_long_as_one_that_went_on(step, tmp_path):
    """Lightning tells nobody of the epoch that begins then: that of the recovery, or another one in it."""

    def run(*callbacks, **options):
        torch.manual_seed(0)
        model, rnf = Classifier(), RelevanceFreezing(criterion=0.1)
        model.body[2].p = 0.0
        data = task_data("a")
        data.train_dataloader = data.val_dataloader
        model.heads.activate("a")
        trainer(rnf, *callbacks, max_epochs=8, enable_checkpointing=bool(callbacks)).fit(
            model, datamodule=data, **options
        )
        return model, rnf.state.task("a")

    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    model, expected = run(saver)
    assert expected.recovery_epochs == 4
    resumed, record = run(ckpt_path=tmp_path / f"step={step}.ckpt")
    assert record.recovery_epochs == 4
    for name, value in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


# -- how long it recovers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epochs", [2, 3, 4, 8, 10, 100])
def test_a_recovery_is_a_part_of_the_epochs_and_leaves_most_to_the_whole_network(epochs):
    found = auto.recovery_epochs(trainer(max_epochs=epochs))
    assert found == max(1, int(epochs * RECOVERY))
    assert 1 <= found < epochs


@pytest.mark.parametrize(
    "options",
    [
        {"max_epochs": 1},
        {"max_epochs": 0},
        {"max_epochs": -1},
        {"max_epochs": 8, "max_steps": 20},
        {"max_epochs": 8, "max_time": timedelta(seconds=60)},
        {"max_epochs": 8, "fast_dev_run": True},
    ],
    ids=str,
)
def test_no_recovery_where_nobody_knows_which_epochs_are_the_last(options):
    assert auto.recovery_epochs(trainer(**options)) == 0


def test_a_timer_that_only_tells_the_time_ends_no_fit():
    assert auto.recovery_epochs(trainer(Timer(), max_epochs=8)) > 0
    assert auto.recovery_epochs(trainer(Timer(timedelta(seconds=60)), max_epochs=8)) == 0


def fit(rnf, task="a", model=None, *callbacks, **options):
    model = model or Classifier()
    model.heads.activate(task)
    fitting = trainer(*callbacks, rnf, **{"max_epochs": 4, **options})
    fitting.fit(model, datamodule=task_data(task))
    return model


@pytest.fixture(autouse=True)
def _seed():
    pl.seed_everything(0, verbose=False)


@pytest.mark.parametrize(
    ("options", "recovered"),
    [
        ({}, auto.recovery_epochs(trainer(max_epochs=4))),
        ({"max_epochs": 1}, 0),
        ({"max_epochs": -1, "max_steps": 20}, 0),
        ({"max_time": timedelta(seconds=600)}, 0),
    ],
    ids=str,
)
def test_a_fit_recovers_as_long_and_one_that_can_t_says_nothing_of_it(options, recovered):
    rnf = RelevanceFreezing(criterion=0.1)
    fit(rnf, **options)  # a warning would be an error
    assert rnf.state.task("a").recovery_epochs == recovered
    assert rnf.state.task("a").ration in SHARES


def test_a_share_that_is_tried_again_is_not_measured_again(monkeypatch):
    """Where no share is enough a task recovers in one of those that were tried."""
    monkeypatch.setattr(auto, "is_enough", lambda *args: False)
    found = []
    for remembers in (True, False):
        made = []

        def measured(self, cutoff, made=made, measure=Subnetworks._measured):
            made.append((self.ranking.beyond_ration, cutoff))
            return measure(self, cutoff)

        def anew(self, share, turn_to=Known.turn_to):
            self.of_shares.pop(share, None)
            turn_to(self, share)

        with monkeypatch.context() as patched:
            patched.setattr(Subnetworks, "_measured", measured)
            if not remembers:
                patched.setattr(Known, "turn_to", anew)
            rnf = RelevanceFreezing(criterion=0.1)
            pl.seed_everything(0, verbose=False)
            fit(rnf)
        found.append(rnf.state.task("a"))
        assert found[-1].ration == auto.MOST
        budgets = [one for one in made if one[0] == one[1]]
        assert len(budgets) - len(set(budgets)) == (0 if remembers else 1)
        assert sum(cutoff == 0 for _, cutoff in made) == 1
    first, second = found
    assert [one.score for one in first.evaluations] == [one.score for one in second.evaluations]
    assert all(torch.equal(mask, second.relevant[name]) for name, mask in first.relevant.items())


def test_a_fit_that_is_stopped_before_its_recovery_ends_its_task_without_one():
    class Stops(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = True

    rnf = RelevanceFreezing(criterion=0.1)
    fit(rnf, "a", None, Stops(), max_epochs=8)
    assert rnf.state.task("a").recovery_epochs == 0
    assert rnf.state.task("a").accepted


class Ordered(TaskDataModule):
    """The same batches in every epoch, whatever the random state; augmented at random where they are not trained on."""

    def __init__(self, task):
        super().__init__(task, 2, *(clusters(task, 320, seed) for seed in range(3)), batch_size=32)

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=32, collate_fn=self.augmented)

    def augmented(self, samples):
        x, y = default_collate(samples)
        by = 0.0 if self.trainer.training else 0.3
        noise = torch.randn(x.shape) + torch.from_numpy(np.random.randn(*x.shape)) + random.gauss(0.0, 1.0)
        return x + by * noise.float(), y


class Ends(pl.Callback):
    """Ends task "a" after its second epoch, in the fit that then trains "b"."""

    def __init__(self, rnf, epoch=2):
        self.rnf, self.epoch = rnf, epoch

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch + 1 == self.epoch:
            self.rnf.end_task()
            pl_module.heads.activate("b")


def several(**options):
    return RelevanceFreezing(criterion=0.1, task=lambda trainer, module: module.heads.active, **options)


@pytest.mark.parametrize("epoch", [1, 2])
def test_no_recovery_in_a_fit_of_several_tasks_after_the_first_has_ended(epoch):
    """The last half begins with epoch 2: with that of the next task, or behind it."""
    rnf = several(recovery_epochs="auto")
    fit(rnf, "a", None, Ends(rnf, epoch))
    assert [record.recovery_epochs for record in rnf.state.tasks.values()] == [0, 0]
    fit(rnf, "c", rnf._model())
    assert rnf.state.task("c").recovery_epochs == 2, "the next fit is one of its own"


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided:UserWarning")
def test_nor_in_one_that_is_resumed_from_a_checkpoint_of_the_second(tmp_path):
    rnf = several()
    saver = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}", auto_insert_metric_name=False)
    model = fit(rnf, "a", None, Ends(rnf), saver, enable_checkpointing=True)
    for file, tasks in (("a-ended", ["a"]), ("2", ["a"])):
        again, other = several(), Classifier()
        other.heads.activate("b")
        pl.seed_everything(0, verbose=False)
        trainer(again, max_epochs=4).fit(other, datamodule=task_data("a"), ckpt_path=tmp_path / f"{file}.ckpt")
        assert list(again.state.tasks)[: len(tasks)] == tasks
        assert again.state.task("b").recovery_epochs == 0
    assert rnf.state.task("b").recovery_epochs == 0
    assert model is not None


# -- resumed ----------------------------------------------------------------------------------------------------------


class Numbered(pl.Callback):
    """A checkpoint after each epoch."""

    def __init__(self, path):
        self.path = path

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.path / f"{trainer.current_epoch}.ckpt")


def test_a_resumed_fit_claims_the_same_share_and_ends_with_the_same_sub_network_and_head(tmp_path):
    """Resumed after each epoch: before the recovery, inside it, and with nothing left to train."""

    def run(path=None, callbacks=()):
        pl.seed_everything(5, verbose=False)
        rnf, data, model = RelevanceFreezing(), Ordered("a"), Classifier()
        model.body[2].p = 0.0
        model.heads.activate("a")
        trainer(*callbacks, rnf, max_epochs=4).fit(model, datamodule=data, ckpt_path=path)
        return model, rnf.state.task("a")

    model, record = run(callbacks=[Numbered(tmp_path)])
    assert record.recovery_epochs == 2
    for epoch in range(4):
        torch.manual_seed(epoch)
        other, found = run(tmp_path / f"{epoch}.ckpt")
        assert (found.ration, found.cutoff, found.recovery_epochs) == (record.ration, record.cutoff, 2)
        assert all(torch.equal(mask, found.relevant[name]) for name, mask in record.relevant.items())
        assert all(torch.equal(x, y) for x, y in zip(model.parameters(), other.parameters(), strict=True))
        assert [one.score for one in found.evaluations] == [one.score for one in record.evaluations]
        assert [one.score for one in found.recovery] == [one.score for one in record.recovery]
