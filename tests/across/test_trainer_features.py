"""Two tasks under every feature of the Trainer that a project may use: what is promised holds, or a sentence says so.

docs/trainer.md has a row for each, with the test that shows it.
"""

from __future__ import annotations

import re

import lightning.pytorch as pl
import pytest
import torch
from launched import ROOT
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from training import (
    Classifier,
    ConvClassifier,
    clusters,
    frozen_entries,
    inputs,
    loader,
    plain,
    task_data,
    train,
    trainer,
)

from lightning_rnf import RelevanceFreezing
from lightning_rnf.streams import TaskDataModule

pytestmark = [
    pytest.mark.filterwarnings("ignore:no free units are left:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*lr scheduler.*interval:UserWarning"),
]


@pytest.fixture(autouse=True)
def _seed():
    pl.seed_everything(0, verbose=False)


def fit(model, rnf, task, *callbacks, before=True, **options):
    """One task with a Trainer of its own; ``before``: the other callbacks stand before ours."""
    model.heads.activate(task)
    order = (*callbacks, rnf) if before else (rnf, *callbacks)
    one = trainer(*order, **{"max_epochs": 2, **options})
    one.fit(model, datamodule=task_data(task))
    return one


def assert_kept(model, rnf, learn_more, dtype=torch.float32):
    """``learn_more`` trains another task: what is frozen and recall of the first stay bit-equal, what is free moves."""
    (name, record), *_ = rnf.state.tasks.items()
    x = inputs().to(dtype)
    with rnf.recall(name, model), torch.no_grad():
        logits = model(x)
    frozen, named = frozen_entries(rnf, model), dict(model.named_parameters())
    before = {n: named[n].detach().clone() for n in frozen}
    assert frozen.keys() == {n for layer in rnf.state.layers for n in layer.parameters}
    learn_more()
    named = dict(model.named_parameters())
    moved = False
    for n, mask in frozen.items():
        assert torch.equal(named[n][mask], before[n][mask]), n
        moved |= not torch.equal(named[n], before[n])
    assert moved
    with rnf.recall(name, model), torch.no_grad():
        assert torch.equal(model(x), logits)
    assert record.subnetwork_accuracy >= record.accuracy - 0.02 - 1e-9


def assert_two_tasks_work(model, *callbacks, **options):
    rnf = RelevanceFreezing()
    fit(model, rnf, "a", *callbacks, **options)
    assert_kept(model, rnf, lambda: fit(model, rnf, "b", *callbacks, **options))
    assert list(rnf.state.tasks) == ["a", "b"]
    return rnf


# -- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16), ("64-true", torch.float64)]
)
def test_precisions(precision, dtype):
    model, rnf = ConvClassifier(weight_decay=0.1), RelevanceFreezing()
    fit(model, rnf, "a", precision=precision)
    assert_kept(model, rnf, lambda: fit(model, rnf, "b", precision=precision), dtype)


class CountSteps(pl.Callback):
    def __init__(self):
        self.skipped = self.batches = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before = pl_module.heads.tasks[pl_module.heads.active].weight.detach().clone()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches += 1
        self.skipped += torch.equal(self.before, pl_module.heads.tasks[pl_module.heads.active].weight)


def test_16_mixed_with_skipped_steps():
    model, rnf, steps = Classifier(weight_decay=0.1), RelevanceFreezing(), CountSteps()

    def overflowing():  # the first steps overflow and are skipped, until the scale is small enough
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-8)
        return MixedPrecision("16-mixed", "cpu", scaler)

    fit(model, rnf, "a", steps, plugins=overflowing())
    assert_kept(model, rnf, lambda: fit(model, rnf, "b", steps, plugins=overflowing()))
    assert 2 <= steps.skipped < steps.batches


# -- steps ------------------------------------------------------------------------------------------------------------


def test_accumulation():
    assert_two_tasks_work(Classifier(weight_decay=0.1), accumulate_grad_batches=3)


class Clipped(Classifier):
    """Notes the norm of all gradients that clipping sees, and of those of free rows."""

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        grads = {n: p.grad.clone() for n, p in self.named_parameters() if p.grad is not None}
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        self.seen = grads, {n: p.grad.clone() for n, p in self.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping(algorithm):
    model = Clipped(weight_decay=0.1)
    options = {"gradient_clip_val": 0.01, "gradient_clip_algorithm": algorithm}
    rnf = RelevanceFreezing()
    fit(model, rnf, "a", **options)
    frozen = frozen_entries(rnf, model)
    assert_kept(model, rnf, lambda: fit(model, rnf, "b", **options))
    found, clipped = model.seen
    for name, mask in frozen.items():
        assert not found[name][mask].any()
    free = torch.cat(
        [found[name][~mask].flatten() for name, mask in frozen.items()]
        + [found[f"heads.tasks.b.{name}"].flatten() for name in ("weight", "bias")]
    )
    after = torch.cat([value.flatten() for value in clipped.values()])
    if algorithm == "norm":
        assert free.norm() > 0.01
        assert after.norm() == pytest.approx(0.01, rel=1e-3)
    else:
        assert after.abs().max() <= 0.01


class Losses(pl.Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(float(outputs["loss"]))


def test_lbfgs():
    model, losses = Classifier(torch.optim.LBFGS, lr=0.1, max_iter=4), Losses()
    model.body[2].p = 0.0  # a loss that differs from one look to the next has no curvature
    assert_two_tasks_work(model, losses)
    # Each task's recovery goes on from about where it was: it has begun anew, not with the curvature of the whole.
    for task in (losses.seen[:20], losses.seen[20:]):
        assert max(task[10:]) < 2 * max(task[:10])


class Scheduled(Classifier):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=60)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class OnPlateau(Classifier):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_accuracy"}}


@pytest.mark.parametrize("model_type", [Scheduled, OnPlateau])
def test_schedulers(model_type):
    assert_two_tasks_work(model_type(weight_decay=0.1))


class Manual(Classifier):
    """Two optimizers in turn, by hand, one of them over a part of what the other has, too."""

    automatic_optimization = False

    def configure_optimizers(self):
        return (
            torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1),
            torch.optim.SGD(self.body.parameters(), lr=1e-2, momentum=0.9),
        )

    def training_step(self, batch):
        for optimizer in self.optimizers():
            loss = super().training_step(batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
            optimizer.step()


def test_several_optimizers_by_hand():
    model = Manual()
    model.automatic_optimization = False
    assert_two_tasks_work(model)


# -- the model --------------------------------------------------------------------------------------------------------


def test_a_compiled_module():
    model, rnf = Classifier(weight_decay=0.1), RelevanceFreezing()
    compiled = torch.compile(model, backend="eager")
    fit(compiled, rnf, "a")
    assert_kept(model, rnf, lambda: fit(compiled, rnf, "b"))


class Checkpointed(Classifier):
    def forward(self, x):
        return self.heads(checkpoint(self.body, x, use_reentrant=False))


def test_gradient_checkpointing():
    rnf = assert_two_tasks_work(Checkpointed(weight_decay=0.1))
    pl.seed_everything(0, verbose=False)
    plain = assert_two_tasks_work(Classifier(weight_decay=0.1))
    for name, mask in rnf.state.tasks["a"].relevant.items():
        assert torch.equal(mask, plain.state.tasks["a"].relevant[name])


# -- callbacks that change weights ------------------------------------------------------------------------------------


def recalled_accuracy(model, rnf, task):
    x, y = task_data(task).val_dataloader().dataset.tensors
    with rnf.recall(task, model), torch.no_grad():
        return (model(x).argmax(1) == y).float().mean().item()


def averaging():
    from lightning.pytorch import callbacks

    if not hasattr(callbacks, "WeightAveraging"):
        pytest.skip("WeightAveraging is there from Lightning 2.6 on")
    ema = torch.optim.swa_utils.get_ema_avg_fn(0.9)
    return callbacks.WeightAveraging(use_buffers=True, avg_fn=ema)


def test_weight_averaging_before_us():
    model, rnf = Classifier(weight_decay=0.1), RelevanceFreezing()
    fit(model, rnf, "a", averaging())
    assert rnf.state.tasks["a"].subnetwork_accuracy == pytest.approx(recalled_accuracy(model, rnf, "a"))
    assert_kept(model, rnf, lambda: fit(model, rnf, "b", averaging()))


def test_a_checkpoint_of_averaged_weights_has_frozen_rows_bit_equal(tmp_path):
    model, rnf = Classifier(weight_decay=0.1), RelevanceFreezing()
    fit(model, rnf, "a")
    with rnf.recall("a"), torch.no_grad():
        logits = model(inputs())
    options = {"enable_checkpointing": True, "default_root_dir": tmp_path, "max_epochs": 4}
    fit(model, rnf, "b", averaging(), ModelCheckpoint(tmp_path, save_top_k=-1), **options)
    saved = sorted(tmp_path.glob("*.ckpt"))
    assert len(saved) == 5
    for path in saved:
        other = Classifier()
        other.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
        with rnf.recall("a", other), torch.no_grad():
            assert torch.equal(other(inputs()), logits), path.name


def test_stochastic_weight_averaging_before_us():
    model, rnf = Classifier(weight_decay=0.1), RelevanceFreezing()
    swa = {"swa_lrs": 1e-2, "swa_epoch_start": 1, "annealing_epochs": 1}
    fit(model, rnf, "a", StochasticWeightAveraging(**swa), max_epochs=4)
    assert rnf.state.tasks["a"].subnetwork_accuracy == pytest.approx(recalled_accuracy(model, rnf, "a"))
    assert_kept(model, rnf, lambda: fit(model, rnf, "b", StochasticWeightAveraging(**swa), max_epochs=4))


@pytest.mark.filterwarnings("ignore:.*weights were written after the task's record:UserWarning")
@pytest.mark.parametrize("callback", [averaging, lambda: StochasticWeightAveraging(1e-2)])
def test_averaging_behind_us_is_warned_of(callback):
    with pytest.warns(UserWarning, match=r"Averaging writes its averaged weights after .* has recorded the task: put"):
        fit(Classifier(), RelevanceFreezing(), "a", callback(), before=False)


@pytest.mark.filterwarnings("ignore:.*Averaging writes its averaged weights after:UserWarning")
@pytest.mark.parametrize("callback", [averaging, lambda: StochasticWeightAveraging(1e-2)])
def test_what_averaging_behind_us_has_written_is_said_when_it_has(callback):
    with pytest.warns(UserWarning, match=r"a: weights were written after the task's record was made"):
        fit(Classifier(), RelevanceFreezing(), "a", callback(), before=False)


class Finetuned(Classifier):
    """`BackboneFinetuning` wants a module called ``backbone``, and optimizers of what it leaves."""

    @property
    def backbone(self):
        return self.body

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)


@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist:UserWarning")
def test_backbone_finetuning_beside_us():
    model, rnf = Finetuned(), RelevanceFreezing()

    def finetuning():
        return BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=1e-2, verbose=False)

    fit(model, rnf, "a", finetuning(), max_epochs=4)
    assert_kept(model, rnf, lambda: fit(model, rnf, "b", finetuning(), max_epochs=4))


# -- when a fit ends, and what is saved then --------------------------------------------------------------------------


def test_early_stopping_ends_the_task():
    rnf = RelevanceFreezing()
    stopped = fit(Classifier(lr=0.0), rnf, "a", EarlyStopping("val_accuracy", mode="max", patience=1), max_epochs=50)
    assert stopped.current_epoch < 5
    assert list(rnf.state.tasks) == ["a"]


def test_an_early_stopping_of_an_earlier_fit_is_told_of_where_it_ends_the_next_one():
    model, rnf = Classifier(lr=0.0), RelevanceFreezing()
    stopping = EarlyStopping("val_accuracy", mode="max", patience=2)
    fit(model, rnf, "a", stopping, max_epochs=50)  # earned: no warning
    sentence = (
        r"b: EarlyStopping\(monitor='val_accuracy'\) has ended the fit at epoch \d of 50 by .* a new EarlyStopping"
    )
    stopping.best_score = torch.tensor(1.1)  # whatever task b has is worse
    with pytest.warns(UserWarning, match=sentence):
        stopped = fit(model, rnf, "b", stopping, max_epochs=50)
    assert stopped.current_epoch == 1  # its count goes on
    assert list(rnf.state.tasks) == ["a", "b"]
    stopping.best_score, stopping.wait_count = torch.tensor(0.1), 0
    fit(model, rnf, "c", stopping, max_epochs=50)  # it has seen a better one in this fit: earned


@pytest.mark.parametrize("limit", [{"max_steps": 7, "max_epochs": -1}, {"max_time": "00:00:00:01", "max_epochs": -1}])
def test_other_ends_of_a_fit_end_the_task(limit):
    rnf = RelevanceFreezing()
    fit(Classifier(), rnf, "a", **limit)
    assert list(rnf.state.tasks) == ["a"]


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided:UserWarning")
@pytest.mark.parametrize("saver", [ModelCheckpoint, lambda path: ModelCheckpoint(path, save_last=True)])
def test_the_finished_task_is_in_a_checkpoint_without_anybodys_doing(saver, tmp_path):
    model, rnf = Classifier(), RelevanceFreezing(task="a/b: first")
    fit(model, rnf, "a", saver(tmp_path), enable_checkpointing=True)
    paths = [tmp_path / "a_b_first-ended.ckpt", *tmp_path.glob("last*.ckpt")]
    for path in paths:
        other, again = Classifier(), RelevanceFreezing(task="second")
        other.heads.activate("b")
        trainer(again, max_epochs=4).fit(other, datamodule=task_data("b"), ckpt_path=path, weights_only=True)
        assert list(again.state.tasks) == ["a/b: first", "second"]
        with rnf.recall("a/b: first"), again.recall("a/b: first"), torch.no_grad():
            assert torch.equal(model(inputs()), other(inputs()))


def test_who_wants_no_checkpoints_gets_none(tmp_path):
    fit(Classifier(), RelevanceFreezing(), "a", ModelCheckpoint(tmp_path, save_top_k=0), enable_checkpointing=True)
    assert not list(tmp_path.iterdir())


class LoadBest(pl.Callback):
    """What README says to do for a record of the best weights."""

    def on_train_end(self, trainer, pl_module):
        best = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)
        pl_module.load_state_dict(best["state_dict"])


def test_the_best_weights_are_recorded_if_a_callback_before_us_loads_them(tmp_path):
    model, rnf = Classifier(lr=0.1), plain()
    saver = ModelCheckpoint(tmp_path, monitor="val_accuracy", mode="max", filename="{val_accuracy:.6f}")
    fit(model, rnf, "a", LoadBest(), saver, enable_checkpointing=True, max_epochs=5)
    assert rnf.state.tasks["a"].accuracy == pytest.approx(float(saver.best_model_score))


@pytest.mark.parametrize("how", ["loaded module", "state"])
def test_a_checkpoint_read_without_a_trainer(how, tmp_path):
    model, rnf = Classifier(), RelevanceFreezing()
    fit(model, rnf, "a", ModelCheckpoint(tmp_path), enable_checkpointing=True)
    path = tmp_path / "a-ended.ckpt"
    other, again = Classifier(), RelevanceFreezing()
    if how == "loaded module":
        other = Classifier.load_from_checkpoint(path, weights_only=True)
    else:
        other.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    again.load_state_dict(torch.load(path, weights_only=True)["callbacks"]["RelevanceFreezing"])
    with rnf.recall("a", model), again.recall("a", other), torch.no_grad():
        assert torch.equal(model(inputs()), other(inputs()))


# -- short and odd runs -----------------------------------------------------------------------------------------------


class Sized(TaskDataModule):
    batch_size = 8


def sized(task):
    data = task_data(task)
    data.train_dataloader = lambda: DataLoader(clusters(task, 320), batch_size=data.batch_size)
    return data


@pytest.mark.parametrize("how", ["tuner", "callback"])
def test_the_batch_size_scaler_ends_no_task_and_loses_none(how, tmp_path):
    model, rnf = Classifier(), RelevanceFreezing()
    train(model, rnf, "a")

    def more():
        model.heads.activate("b")
        data, options = sized("b"), {"default_root_dir": tmp_path, "max_epochs": 1}
        if how == "tuner":
            one = trainer(rnf, **options)
            Tuner(one).scale_batch_size(model, datamodule=data, max_trials=2, steps_per_trial=2)
            assert list(rnf.state.tasks) == ["a"]
            one.fit(model, datamodule=data)
        else:
            finder = BatchSizeFinder(max_trials=2, steps_per_trial=2)
            trainer(finder, rnf, **options).fit(model, datamodule=data)

    assert_kept(model, rnf, more)
    assert list(rnf.state.tasks) == ["a", "b"]


def test_the_learning_rate_finder(tmp_path):
    model, rnf = Classifier(), RelevanceFreezing()
    model.lr = 1e-2
    finder = LearningRateFinder(num_training_steps=10, update_attr=False)
    fit(model, rnf, "a")
    assert_kept(model, rnf, lambda: fit(model, rnf, "b", finder, default_root_dir=tmp_path))
    assert list(rnf.state.tasks) == ["a", "b"]


def test_fast_dev_run_ends_no_task():
    rnf = RelevanceFreezing()
    fit(Classifier(), rnf, "a", fast_dev_run=True)
    assert not rnf.state.tasks


@pytest.mark.filterwarnings("ignore:You requested to overfit:UserWarning")
def test_overfit_batches():
    assert_two_tasks_work(Classifier(weight_decay=0.1), overfit_batches=4)


def test_limit_val_batches_limits_validation_and_not_reference_data():
    for limit in (0, 2):
        rnf = assert_two_tasks_work(Classifier(weight_decay=0.1), limit_val_batches=limit, num_sanity_val_steps=0)
        assert rnf.state.tasks["a"].samples == 320


@pytest.mark.parametrize("limit", [0, 2])
def test_limit_val_batches_leaves_reference_data_alone_that_fit_is_given_as_loaders(limit):
    held_out = DataLoader(clusters("a", 77, seed=1), 32)
    for loaders in (held_out, CombinedLoader(held_out)):
        model, rnf = Classifier(), plain(task="a")
        model.heads.activate("a")
        options = {"limit_val_batches": limit, "num_sanity_val_steps": 0, "max_epochs": 1}
        trainer(rnf, **options).fit(model, loader("a"), loaders)
        x, y = held_out.dataset[:]
        with torch.no_grad():
            accuracy = (model.eval()(x).argmax(1) == y).double().mean()
        record = rnf.state.tasks["a"]
        assert (record.samples, record.accuracy) == (77, pytest.approx(float(accuracy)))


def test_one_trainer_for_all_tasks():
    model, rnf = Classifier(weight_decay=0.1), RelevanceFreezing()
    one = fit(model, rnf, "a")

    def more():
        model.heads.activate("b")
        with pytest.warns(UserWarning, match="nothing was trained, so 'b' has not ended: .* raise max_epochs"):
            one.fit(model, datamodule=task_data("b"))
        assert list(rnf.state.tasks) == ["a"]
        one.fit_loop.max_epochs += 2
        one.fit(model, datamodule=task_data("b"))

    assert_kept(model, rnf, more)
    assert list(rnf.state.tasks) == ["a", "b"]


# -- tasks ended by hand ----------------------------------------------------------------------------------------------


class InTurn(pl.Callback):
    """One long fit: two epochs for each task."""

    def __init__(self, rnf, tasks="abc"):
        self.rnf, self.tasks = rnf, tasks
        self.ends = []

    def on_train_epoch_end(self, trainer, pl_module):
        done, left = divmod(trainer.current_epoch + 1, 2)
        if left or done >= len(self.tasks):
            return
        self.rnf.reference = loader(self.tasks[done - 1])
        self.rnf.end_task(self.tasks[done - 1])
        weights = {name: value.clone() for name, value in pl_module.state_dict().items()}
        self.ends.append((frozen_entries(self.rnf, pl_module), weights))
        pl_module.heads.activate(self.tasks[done])
        self.rnf.reference = loader(self.tasks[done])


class AllInOne(pl.LightningDataModule):
    def __init__(self):
        super().__init__()
        self.trainer = None

    def train_dataloader(self):
        return loader("abc"[self.trainer.current_epoch // 2])

    def val_dataloader(self):
        return loader("a")


@pytest.mark.parametrize("options", [{}, {"reset_free": True}, {"norm_statistics": "pinned"}])
def test_tasks_ended_by_hand_inside_one_fit(options):
    model = ConvClassifier(weight_decay=0.1)
    rnf = RelevanceFreezing(loader("a"), task=lambda trainer, module: module.heads.active, **options)
    in_turn = InTurn(rnf)
    trainer(in_turn, rnf, max_epochs=6, reload_dataloaders_every_n_epochs=2).fit(model, datamodule=AllInOne())
    assert list(rnf.state.tasks) == ["a", "b", "c"]
    state = model.state_dict()
    for task, (frozen, then) in zip("ab", in_turn.ends, strict=True):
        for name, mask in frozen.items():
            assert torch.equal(state[name][mask], then[name][mask])
        other = ConvClassifier()
        other.load_state_dict(then)
        with rnf.recall(task, model), rnf.recall(task, other), torch.no_grad():
            assert torch.equal(model(inputs()), other(inputs()))


class EndAtTheEnd(pl.Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            self.rnf.end_task()


def test_a_task_ended_by_hand_in_the_last_epoch_is_not_ended_twice():
    rnf, by_hand = RelevanceFreezing(), EndAtTheEnd()
    by_hand.rnf = rnf
    fit(Classifier(), rnf, "a", by_hand)
    assert list(rnf.state.tasks) == ["a"]


def test_a_task_can_be_ended_by_hand_only_while_it_is_trained():
    rnf = RelevanceFreezing()
    with pytest.raises(RuntimeError, match="no fit is under way whose task could end: call end_task from a hook"):
        rnf.end_task()
    model = Classifier()
    fit(model, rnf, "a")
    with pytest.raises(RuntimeError, match="no fit is under way"):
        rnf.end_task()


# -- the table --------------------------------------------------------------------------------------------------------


def test_each_row_of_the_table_names_tests_that_exist():
    rows = [line for line in (ROOT / "docs" / "trainer.md").read_text().splitlines() if line.startswith("| ")][2:]
    assert len(rows) > 20
    for row in rows:
        named = re.findall(r"`([\w/]*test_\w+\.py)::(\w+)`", row)
        assert named or "GPU" in row, row
        for file, test in named:
            assert f"def {test}(" in (ROOT / "tests" / file).read_text(), (file, test)
