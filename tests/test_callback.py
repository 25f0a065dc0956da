"""The whole way: train task after task under a Trainer, and hold the promises."""

from __future__ import annotations

import copy
import pickle

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities import CombinedLoader
from snapshot import changes, snapshot
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassF1Score
from torchmetrics.functional.classification import multiclass_f1_score
from training import (
    PLAIN,
    Classifier,
    ConvClassifier,
    allocated,
    clusters,
    frozen_rows,
    inputs,
    loader,
    task_data,
    train,
    trainer,
)
from zennit.composites import EpsilonPlus

from lightning_rnf import AccuracyDrop, ComputeBudget, FreeCapacity, MetricDrop, RelevanceFreezing
from lightning_rnf.memory.state import FreezeState
from lightning_rnf.recall.sizes import size_of
from lightning_rnf.tasks.reference import ReferenceData

MODELS = pytest.mark.parametrize("model_type", [Classifier, ConvClassifier])
pytestmark = pytest.mark.filterwarnings("ignore:no free units are left:UserWarning")


@pytest.fixture(autouse=True)
def _seed():
    pl.seed_everything(0, verbose=False)


@MODELS
def test_recall_is_bit_identical_after_every_later_task(model_type):
    model, rnf, before = model_type(), RelevanceFreezing(), {}
    for task in "abc":
        train(model, rnf, task)
        with rnf.recall(task), torch.no_grad():
            before[task] = model(inputs())
    for task, logits in before.items():
        with rnf.recall(task), torch.no_grad():
            assert torch.equal(model(inputs()), logits)


@MODELS
def test_frozen_rows_and_heads_are_bit_equal_and_free_rows_move(model_type):
    model, rnf = model_type(weight_decay=0.1), RelevanceFreezing(freeze="units")
    train(model, rnf, "a")
    rows, head = frozen_rows(model, rnf), copy.deepcopy(model.heads.tasks["a"].state_dict())
    everything = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    frozen = rnf.state.frozen()
    assert 0 < rnf.free_capacity < 1
    train(model, rnf, "b")
    after = dict(model.named_parameters())
    for layer in rnf.state.layers:
        for name in layer.parameters:
            assert torch.equal(after[name][frozen[layer.name]], rows[name])
            free = ~frozen[layer.name]
            assert not free.any() or not torch.equal(after[name][free], everything[name][free])
    assert all(torch.equal(value, head[name]) for name, value in model.heads.tasks["a"].state_dict().items())


def test_the_next_task_diverging_to_nan_does_not_touch_recall():
    model, rnf = Classifier(), RelevanceFreezing()
    train(model, rnf, "a")
    with rnf.recall("a"), torch.no_grad():
        before = model(inputs())
    model.heads.activate("b")
    model.options["lr"] = 1e30
    with pytest.raises(ValueError, match="logits on the reference data are not finite"):
        trainer(rnf).fit(model, datamodule=task_data("b"))
    assert model.body[0].weight.isnan().any()
    assert list(rnf.state.tasks) == ["a"]
    with rnf.recall("a"), torch.no_grad():
        assert torch.equal(model(inputs()), before)


@pytest.mark.parametrize("options", [{}, PLAIN], ids=["default", "plain"])
def test_the_subnetwork_keeps_accuracy_within_the_tolerance_by_the_same_loop(options):
    model, rnf = Classifier(), RelevanceFreezing(criterion=0.05, **options)
    train(model, rnf, "a")
    record = rnf.state.tasks["a"]
    x, y = clusters("a", 320, seed=1).tensors  # the task's validation data
    with rnf.recall("a"), torch.no_grad():
        assert (model(x).argmax(1) == y).float().mean().item() == pytest.approx(record.subnetwork_accuracy)
    model.eval()
    with torch.no_grad():
        now = (model(x).argmax(1) == y).float().mean().item()
    if options:  # else it was measured before the recovery, and with another head
        assert now == pytest.approx(record.accuracy)
    assert record.accuracy - record.subnetwork_accuracy <= 0.05 + 1e-9
    assert record.samples == 320
    assert record.evaluations[0].score.cutoff == 0
    assert record.cutoff in [evaluation.score.cutoff for evaluation in record.evaluations]


@MODELS
def test_same_seed_same_masks(model_type):
    masks = []
    for _ in range(2):
        pl.seed_everything(3, verbose=False)
        model, rnf = model_type(), RelevanceFreezing()
        train(model, rnf, "a", "b")
        masks.append([record.relevant for record in rnf.state.tasks.values()])
    for first, second in zip(*masks, strict=True):
        assert all(torch.equal(first[name], second[name]) for name in first)


class Watch(pl.Callback):
    """Takes a snapshot at the start of on_train_end and one in on_fit_end's stead: after the callbacks behind it."""

    def __init__(self, taken):
        self.taken = taken

    def on_train_end(self, trainer, pl_module):
        self.taken.append(snapshot(pl_module))


@MODELS
@pytest.mark.parametrize("options", [{"recovery_epochs": 0}, PLAIN], ids=["fitted", "plain"])
def test_the_tasks_end_leaves_the_module_as_it_was_but_for_the_fitted_head(model_type, options):
    taken, rnf, model = [], RelevanceFreezing(**options), model_type()
    model.heads.activate("a")
    trainer(Watch(taken), rnf, Watch(taken)).fit(model, datamodule=task_data("a"))
    assert list(rnf.state.tasks) == ["a"]
    head = [] if "fit_head" in options else ["heads.tasks.a.weight value", "heads.tasks.a.bias value"]
    assert changes(*taken) == head


def test_a_second_fit_gives_back_flags_and_hooks():
    model, rnf = Classifier(), RelevanceFreezing()
    train(model, rnf, "a")
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    train(model, rnf, "b")
    assert {name for name, flag in flags.items() if flag} == {
        name.replace("tasks.b", "tasks.a") for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


@pytest.mark.parametrize("learning_only", [False, True])
def test_gradients_and_optimizer_states_of_what_is_frozen_whole_are_never_allocated(learning_only):
    found, learning, frozen = allocated(learning_only=learning_only)
    assert len(found.gradients) == 30
    for names in (*found.gradients, *found.states):
        assert names == learning
        assert names.isdisjoint(frozen)


def test_a_layer_that_is_frozen_whole_gets_no_gradient():
    model, rnf = Classifier(), RelevanceFreezing(criterion=lambda score: False, recovery_epochs=0)
    with pytest.warns(UserWarning, match="no free units are left"):
        train(model, rnf, "a")
    assert rnf.free_capacity == 0
    seen = []

    class Gradients(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            seen.append({name: parameter.grad is not None for name, parameter in pl_module.named_parameters()})

    model.heads.activate("b")
    trainer(rnf, Gradients()).fit(model, datamodule=task_data("b"))
    assert {name for name, there in seen[-1].items() if there} == {"heads.tasks.b.weight", "heads.tasks.b.bias"}


@pytest.mark.filterwarnings("ignore:c. weights were written after the task's record:UserWarning")
def test_rows_are_held_against_callbacks_that_write_weights():
    model, rnf = Classifier(), RelevanceFreezing()
    train(model, rnf, "a")
    with rnf.recall("a"), torch.no_grad():
        before = model(inputs())

    class Clamp(pl.Callback):
        def clamp(self, trainer, pl_module, *args):
            with torch.no_grad():
                for parameter in pl_module.parameters():
                    parameter.clamp_(-0.01, 0.01)

        on_train_batch_end = on_train_end = clamp

    for task, callbacks in (("b", (Clamp(), rnf)), ("c", (rnf, Clamp()))):
        model.heads.activate(task)
        trainer(*callbacks, max_epochs=1).fit(model, datamodule=task_data(task))
        with rnf.recall("a"), torch.no_grad():
            assert torch.equal(model(inputs()), before)


def test_an_exception_in_training_leaves_nothing_attached():
    model, rnf = Classifier(), RelevanceFreezing()
    train(model, rnf, "a")

    class Fail(pl.Callback):
        def on_train_batch_end(self, *args):
            raise RuntimeError("stop here")

    model.heads.activate("b")
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(RuntimeError, match="stop here"):
        trainer(rnf, Fail()).fit(model, datamodule=task_data("b"))
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
    assert list(rnf.state.tasks) == ["a"]


# -- what ends no task ------------------------------------------------------------------------------------------------


def test_fast_dev_run_ends_no_task():
    model, rnf = Classifier(), RelevanceFreezing()
    trainer(rnf, fast_dev_run=True).fit(model, datamodule=task_data("a"))
    assert not rnf.state.tasks


def test_a_skipped_fit_ends_no_task():
    model, rnf = Classifier(), RelevanceFreezing()
    same = trainer(rnf)
    same.fit(model, datamodule=task_data("a"))
    model.heads.activate("b")
    with pytest.warns(UserWarning, match="nothing was trained, so 'b' has not ended: .* 3 of max_epochs=3 are over"):
        same.fit(model, datamodule=task_data("b"))
    assert list(rnf.state.tasks) == ["a"]


def test_no_training_batches_and_the_sanity_check_end_no_task():
    model, rnf = Classifier(), RelevanceFreezing()
    trainer(rnf, limit_train_batches=0, num_sanity_val_steps=2).fit(model, datamodule=task_data("a"))
    assert not rnf.state.tasks


def test_an_interrupted_fit_ends_no_task():
    model, rnf = Classifier(), RelevanceFreezing()

    class Interrupt(pl.Callback):
        def on_train_epoch_end(self, *args):
            raise KeyboardInterrupt

    with pytest.raises(SystemExit):
        trainer(rnf, Interrupt()).fit(model, datamodule=task_data("a"))
    assert not rnf.state.tasks


@pytest.mark.parametrize("how", ["tuner", "callback"])
def test_the_learning_rate_finder_ends_no_task_and_loses_none(how, tmp_path):
    model, rnf = Classifier(), RelevanceFreezing(freeze="units")
    model.lr = 1e-2
    train(model, rnf, "a")
    rows = frozen_rows(model, rnf)
    model.heads.activate("b")
    options = {"default_root_dir": tmp_path, "max_epochs": 2}
    if how == "tuner":
        Tuner(trainer(rnf, **options)).lr_find(model, datamodule=task_data("b"), num_training=10, update_attr=False)
        assert list(rnf.state.tasks) == ["a"]
    else:
        finder = LearningRateFinder(num_training_steps=10, update_attr=False)
        trainer(rnf, finder, **options).fit(model, datamodule=task_data("b"))
        assert list(rnf.state.tasks) == ["a", "b"]
    now = dict(model.named_parameters())
    relevant = rnf.state.tasks["a"].relevant
    for layer in rnf.state.layers:
        for name in layer.parameters:
            assert torch.equal(now[name][relevant[layer.name]], rows[name])


# -- checkpoints ------------------------------------------------------------------------------------------------------


def test_the_state_survives_a_checkpoint_and_a_new_process_goes_on_from_it(tmp_path):
    model, rnf = Classifier(), RelevanceFreezing()
    model.heads.activate("a")
    first = trainer(rnf)
    first.fit(model, datamodule=task_data("a"))
    first.save_checkpoint(tmp_path / "a.ckpt")
    torch.load(tmp_path / "a.ckpt", weights_only=True)
    with rnf.recall("a"), torch.no_grad():
        before = model(inputs())

    other, fresh = Classifier(), RelevanceFreezing()
    other.heads.activate("b")
    trainer(fresh, max_epochs=5).fit(other, datamodule=task_data("b"), ckpt_path=tmp_path / "a.ckpt")
    assert list(fresh.state.tasks) == ["a", "b"]
    with fresh.recall("a"), torch.no_grad():
        assert torch.equal(other(inputs()), before)


class Stops(pl.Callback):
    """Stops a fit after an epoch, the first of which is 0."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop |= trainer.current_epoch == self.epoch


def test_stopped_in_the_middle_of_a_task_and_resumed_gives_the_same_weights_and_masks(tmp_path):
    def run(stop):
        pl.seed_everything(5, verbose=False)
        model, rnf = Classifier(), RelevanceFreezing()
        train(model, rnf, "a")
        pl.seed_everything(6, verbose=False)  # batches of the resumed fit are drawn anew: fix their order
        model.heads.activate("b")
        data = task_data("b")
        data.train_dataloader = data.val_dataloader
        model.body[2].p = 0.0
        if stop:
            half = trainer(rnf, Stops(1), max_epochs=4)  # how long it recovers follows from the epochs
            half.callbacks[0].on_train_end = lambda *args: None
            half.fit(model, datamodule=data)
            half.save_checkpoint(tmp_path / "half.ckpt")
            model, rnf = Classifier(), RelevanceFreezing()
            model.heads.activate("b")
            model.body[2].p = 0.0
        trainer(rnf, max_epochs=4).fit(model, datamodule=data, ckpt_path=tmp_path / "half.ckpt" if stop else None)
        return model, rnf

    (model, rnf), (resumed, again) = run(stop=False), run(stop=True)
    assert list(again.state.tasks) == ["a", "b"]
    assert [record.recovery_epochs for record in again.state.tasks.values()] == [1, 2]
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), resumed.parameters(), strict=True))
    for task, record in rnf.state.tasks.items():
        other = again.state.tasks[task]
        assert all(torch.equal(mask, other.relevant[name]) for name, mask in record.relevant.items())


def test_a_copy_of_the_callback_keeps_the_tasks():
    model, rnf = Classifier(), RelevanceFreezing()
    train(model, rnf, "a")
    for other in (copy.deepcopy(rnf), pickle.loads(pickle.dumps(rnf))):
        with other.recall("a", model), rnf.recall("a"):
            pass
        with pytest.raises(ValueError, match=r"no model for recall\('a'\): name it"), other.recall("a"):
            pass


def test_the_best_checkpoint_of_before_the_tasks_end_does_not_make_it_forgotten(tmp_path):
    model, rnf = Classifier(), RelevanceFreezing()
    model.heads.activate("a")
    best = trainer(rnf, enable_checkpointing=True, default_root_dir=tmp_path)
    best.fit(model, datamodule=task_data("a"))
    with pytest.warns(UserWarning, match="saved before 'a' ended: these tasks are kept"):
        best.test(model, datamodule=task_data("a"), ckpt_path="best", verbose=False)
    assert list(rnf.state.tasks) == ["a"]
    model.heads.activate("b")
    best.fit_loop.max_epochs = 6
    with pytest.raises(ValueError, match=r"saved before 'a' ended: this fit would train over what they need"):
        best.fit(model, datamodule=task_data("b"), ckpt_path="best")
    assert list(rnf.state.tasks) == ["a"]


# -- validate, test, predict -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", ["datamodule", "active head"])
def test_a_trainer_recalls_a_finished_task_by_itself(named):
    model, rnf = Classifier(), RelevanceFreezing()
    train(model, rnf, "a", "b", "c")
    data = task_data("a")
    if named == "active head":
        model.heads.activate("a")
    source = {"datamodule": data} if named == "datamodule" else {"dataloaders": data.test_dataloader()}
    x, y = clusters("a", 320, seed=2).tensors
    with rnf.recall("a"), torch.no_grad():
        logits = model(x)
    (tested,) = trainer(rnf).test(model, verbose=False, **source)
    assert tested["test_accuracy"] == pytest.approx((logits.argmax(1) == y).float().mean().item())
    if named == "active head":
        predicted = trainer(rnf).predict(model, data.test_dataloader())
        assert torch.equal(torch.cat(predicted), logits)
    assert not any(module._forward_hooks for module in model.modules())


def test_the_data_module_of_an_earlier_run_names_nothing():
    model, rnf = Classifier(), RelevanceFreezing()
    train(model, rnf, "a")
    model.heads.activate("b")
    last = trainer(rnf)
    last.fit(model, datamodule=task_data("b"))
    model.heads.activate("a")
    with rnf.recall("a"), torch.no_grad():
        logits = model(inputs())
    assert torch.equal(torch.cat(last.predict(model, DataLoader(TensorDataset(inputs()), 32))), logits)


def test_a_name_that_was_given_for_the_last_fit_does_not_name_the_test():
    model, rnf = Classifier(), RelevanceFreezing()
    for task in "ab":
        rnf.task = task
        train(model, rnf, task)
    x, y = clusters("a", 320, seed=2).tensors
    with rnf.recall("a"), torch.no_grad():
        expected = (model(x).argmax(1) == y).float().mean().item()
    model.heads.activate("a")
    for source in ({"datamodule": task_data("a")}, {"dataloaders": task_data("a").test_dataloader()}):
        (tested,) = trainer(rnf).test(model, verbose=False, **source)
        assert tested["test_accuracy"] == pytest.approx(expected)


def test_paper_runs_the_head_of_the_task_that_is_tested():
    model, rnf = Classifier(), RelevanceFreezing.paper(criterion=0.05)
    train(model, rnf, "a", "b")
    (tested,) = trainer(rnf).test(model, datamodule=task_data("a"), verbose=False)
    x, y = clusters("a", 320, seed=2).tensors
    with rnf.recall("a"), torch.no_grad():
        assert tested["test_accuracy"] == pytest.approx((model(x).argmax(1) == y).float().mean().item())


def test_a_compiled_model_can_be_recalled():
    model, rnf = Classifier(), RelevanceFreezing()
    train(model, rnf, "a")
    with rnf.recall("a"), torch.no_grad():
        logits = model(inputs())
    compiled = torch.compile(model, backend="eager")
    compiled(inputs())
    with rnf.recall("a", compiled), torch.no_grad():
        assert torch.equal(compiled(inputs()), logits)


def test_an_untrained_task_is_tested_as_it_is():
    model, rnf = Classifier(), RelevanceFreezing()
    train(model, rnf, "a")
    model.heads.activate("b")
    (tested,) = trainer(rnf).test(model, datamodule=task_data("b"), verbose=False)
    x, y = clusters("b", 320, seed=2).tensors
    model.eval()
    with torch.no_grad():
        assert tested["test_accuracy"] == pytest.approx((model(x).argmax(1) == y).float().mean().item())


class OfSeveralLoaders(Classifier):
    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        return self(batch[0])

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        super().test_step(batch)


class Several(pl.LightningDataModule):
    """Test data of several tasks, one loader each."""

    def __init__(self, *tasks: str) -> None:
        super().__init__()
        self.task = tasks

    def test_dataloader(self):
        return [task_data(task).test_dataloader() for task in self.task]

    predict_dataloader = test_dataloader


@pytest.mark.parametrize("named", ["by the data module", "by the data sets", "in a dict"])
def test_several_loaders_recall_the_task_of_each(named):
    model, rnf = OfSeveralLoaders(), RelevanceFreezing()
    train(model, rnf, "a", "b", "c")
    expected = {}
    for task in "abc":
        with rnf.recall(task), torch.no_grad():
            expected[task] = model(clusters(task, 320, seed=2).tensors[0])
    if named == "by the data module":
        source = {"datamodule": Several("c", "a", "b")}
    else:
        loaders = {}
        for task in "cab":
            loaders[task] = task_data(task).test_dataloader()
            loaders[task].dataset.task = task
        source = {"dataloaders": loaders if named == "in a dict" else list(loaders.values())}
    predicted = trainer(rnf).predict(model, **source)
    for task, logits in zip("cab", predicted, strict=True):
        assert torch.equal(torch.cat(logits), expected[task])
    results = trainer(rnf).test(model, verbose=False, **source)
    for task, result in zip("cab", results, strict=True):
        (accuracy,) = result.values()
        labels = clusters(task, 320, seed=2).tensors[1]
        assert accuracy == pytest.approx((expected[task].argmax(1) == labels).double().mean().item())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_loader_of_an_unfinished_task_among_others_runs_the_model_as_it_is():
    model, rnf = OfSeveralLoaders(), RelevanceFreezing()
    train(model, rnf, "a")
    model.heads.activate("b")
    model.eval()
    with torch.no_grad():
        expected = model(clusters("b", 320, seed=2).tensors[0])
    finished, unfinished = trainer(rnf).predict(model, datamodule=Several("a", "b"))
    assert torch.equal(torch.cat(unfinished), expected)
    with rnf.recall("a"), torch.no_grad():
        assert torch.equal(torch.cat(finished), model(clusters("a", 320, seed=2).tensors[0]))


@pytest.mark.parametrize("mode", ["max_size", "min_size", "max_size_cycle"])
def test_loaders_of_several_tasks_in_one_batch_are_refused(mode):
    model, rnf = OfSeveralLoaders(), RelevanceFreezing()
    train(model, rnf, "a", "b")
    loaders = {task: task_data(task).test_dataloader() for task in "ab"}
    for task, one in loaders.items():
        one.dataset.task = task
    with pytest.raises(ValueError, match=rf"tasks \['a', 'b'\] are combined in mode '{mode}'.*use mode 'sequential'"):
        trainer(rnf).test(model, CombinedLoader(loaders, mode))


def test_a_data_module_that_names_another_number_of_tasks_is_refused():
    model, rnf = OfSeveralLoaders(), RelevanceFreezing()
    train(model, rnf, "a")
    data = Several("a", "b")
    data.task = ("a", "b", "c")
    data.test_dataloader = lambda: [task_data("a").test_dataloader()] * 2
    with pytest.raises(ValueError, match=r"datamodule.task names 3 tasks, \['a', 'b', 'c'\], for 2 loaders"):
        trainer(rnf).test(model, data)


# -- options ----------------------------------------------------------------------------------------------------------


def test_a_metric_as_the_criterion_is_measured_on_the_reference_data():
    torch.manual_seed(0)
    metric = MulticlassF1Score(2, average="macro")
    model, rnf = Classifier(), RelevanceFreezing(criterion=MetricDrop(metric, 0.05) & FreeCapacity(0.9))
    train(model, rnf, "a")
    record = rnf.state.tasks["a"]
    x, y = task_data("a").validation.tensors
    with rnf.recall("a"), torch.no_grad():
        expected = multiclass_f1_score(model(x), y, 2, average="macro").item()
    (taken,) = (one.score for one in record.recovery if one.score.cutoff == record.cutoff)
    assert taken.values == {"MulticlassF1Score": pytest.approx(expected)}
    assert taken.baseline_values["MulticlassF1Score"] - expected <= 0.05
    assert metric.update_count == 0


@pytest.mark.parametrize(
    ("criterion", "error", "sentence"),
    [
        (MetricDrop(MulticlassF1Score(2, average="none")), ValueError, "computed 2 numbers, expected one"),
        (ComputeBudget(0.5), ValueError, "predict does not call the module"),
    ],
)
def test_what_a_criterion_asks_for_is_tried_before_the_training(criterion, error, sentence):
    def predict(module, batch):
        return module.heads(module.body(batch[0])), batch[1]

    model = Classifier()
    before = model.body[0].weight.detach().clone()
    with pytest.raises(error, match=sentence):
        trainer(RelevanceFreezing(criterion=criterion, predict=predict)).fit(model, datamodule=task_data("a"))
    assert torch.equal(model.body[0].weight, before)


def test_a_forward_that_logs_keeps_its_logs_to_training_and_ends_its_task():
    class Logging(Classifier):
        def forward(self, x):
            z = self.body(x)
            self.log("mean", z.mean(), batch_size=len(x))
            return self.heads(z)

    model, rnf = Logging(), RelevanceFreezing()
    model.heads.activate("a")
    fit = trainer(rnf)
    fit.fit(model, datamodule=task_data("a"))
    assert list(rnf.state.tasks) == ["a"]
    assert "mean" in fit.callback_metrics
    assert "log" not in vars(model)


def test_a_copy_of_the_callback_holds_no_model():
    model, rnf = Classifier(), RelevanceFreezing()
    train(model, rnf, "a")
    assert b"Classifier" not in pickle.dumps(rnf)
    model.heads.activate("b")

    class Pickling(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            self.size = len(pickle.dumps(rnf))

    trainer(rnf, copying := Pickling()).fit(model, datamodule=task_data("b"))
    assert copying.size > 0


@MODELS
def test_a_compute_budget_is_kept_by_the_exported_sub_network(model_type):
    model, rnf = model_type(), RelevanceFreezing(criterion=ComputeBudget(0.5))
    train(model, rnf, "a")
    record = rnf.state.tasks["a"]
    taken = next(one.score for one in record.evaluations if one.score.cutoff == record.cutoff)
    whole, small = size_of(model, inputs()).flops, size_of(rnf.export(model, "a"), inputs()).flops
    assert taken.baseline_values["flops"] == whole
    assert taken.values["flops"] == small <= 0.5 * whole < taken.values["flops_before"]


def test_a_budget_that_is_not_met_within_the_tolerance_is_pruned_as_far_as_that_allows():
    model, rnf = Classifier(), RelevanceFreezing(criterion=AccuracyDrop(0.0) & ComputeBudget(0.0001), recovery_epochs=0)
    train(model, rnf, "a")
    record = rnf.state.tasks["a"]
    assert record.subnetwork_accuracy >= record.accuracy


def test_paper_silences_nothing_in_recall_and_old_logits_drift():
    model, rnf = Classifier(), RelevanceFreezing.paper(criterion=0.05)
    train(model, rnf, "a")
    model.eval()
    with torch.no_grad():
        plain = model(inputs())
    with rnf.recall("a"), torch.no_grad():
        assert torch.equal(model(inputs()), plain)
    rows, relevant = frozen_rows(model, rnf), rnf.state.tasks["a"].relevant
    model.train()
    train(model, rnf, "b")
    now = dict(model.named_parameters())
    for layer in rnf.state.layers:
        for name in layer.parameters:
            assert torch.equal(now[name][relevant[layer.name]], rows[name])
    with rnf.recall("a"), torch.no_grad():
        assert not torch.equal(model(inputs()), plain)


def test_candidates_free_keeps_frozen_units_in_later_subnetworks():
    model, rnf = Classifier(), RelevanceFreezing()
    train(model, rnf, "a", "b")
    first, second = rnf.state.tasks.values()
    assert all((second.relevant[name] | ~mask).all() for name, mask in first.relevant.items())


def test_candidates_all_ranks_every_unit_anew():
    model, rnf = Classifier(), RelevanceFreezing(candidates="all", criterion=0.1)
    train(model, rnf, "a", "b")
    first, second = rnf.state.tasks.values()
    assert any((mask & ~second.relevant[name]).any() for name, mask in first.relevant.items())


def test_free_capacity_as_the_criterion_leaves_that_share_free():
    model, rnf = Classifier(), RelevanceFreezing(criterion=FreeCapacity(0.75))
    train(model, rnf, "a")
    assert rnf.free_capacity == 0.75
    assert sum(rnf.capacity().values()) / 2 == pytest.approx(0.75)  # both layers have 40 units


def test_linear_search_and_resolution():
    model, rnf = Classifier(), RelevanceFreezing(**PLAIN | {"search": "linear", "resolution": 10})
    train(model, rnf, "a")
    cutoffs = [evaluation.score.cutoff for evaluation in rnf.state.tasks["a"].evaluations]
    assert cutoffs == sorted(cutoffs) == list(range(0, 10 * len(cutoffs), 10))


def test_units_left_out_are_frozen_whole_after_the_first_task():
    model, rnf = Classifier(), RelevanceFreezing(units="body.3")
    train(model, rnf, "a")
    assert [layer.name for layer in rnf.state.layers] == ["body.3"]
    first = model.body[0].weight.detach().clone()
    train(model, rnf, "b")
    assert torch.equal(model.body[0].weight, first)


def test_elasticity_lets_relevant_units_go_on_and_says_that_recall_is_not_exact():
    with pytest.warns(UserWarning, match="recall will not be exact"):
        rnf = RelevanceFreezing(elasticity=0.1)
    model = Classifier()
    train(model, rnf, "a")
    rows = frozen_rows(model, rnf)
    relevant = rnf.state.tasks["a"].relevant
    train(model, rnf, "b")
    now = dict(model.named_parameters())
    assert all(
        not torch.equal(now[name][relevant[layer.name]], rows[name])
        for layer in rnf.state.layers
        for name in layer.parameters
    )


def test_heads_may_be_named_by_their_container():
    for heads in ("heads", "heads*", "heads.tasks.*"):
        model, rnf = Classifier(), RelevanceFreezing(heads=heads)
        train(model, rnf, "a", "b")
        assert [record.head for record in rnf.state.tasks.values()] == ["heads.tasks.a", "heads.tasks.b"]


def test_what_only_training_runs_is_none_of_our_business():
    class Auxiliary(Classifier):
        def __init__(self):
            super().__init__()
            self.decoder = nn.Linear(40, 6)
            self.register_buffer("memory", torch.zeros(10, 6))

        def training_step(self, batch):
            return super().training_step(batch) + (self.decoder(self.body(batch[0])) - batch[0]).square().mean()

    model, rnf = Auxiliary(), RelevanceFreezing()
    train(model, rnf, "a")
    assert [layer.name for layer in rnf.state.layers] == ["body.0", "body.3"]
    assert not rnf.state.shared
    assert not rnf.state.tasks["a"].norm_statistics
    before = model.decoder.weight.detach().clone()
    train(model, rnf, "b")
    assert not torch.equal(model.decoder.weight, before)


class DetachedEncoder(Classifier):
    """Its encoder learns from a loss of its own; the logits depend on it without a gradient."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return super().forward(self.encoder(x).relu().detach())

    def training_step(self, batch):
        reconstruction = self.decoder(self.encoder(batch[0]).relu())
        return super().training_step(batch) + (reconstruction - batch[0]).square().mean()


class CentredInput(Classifier):
    """A running mean of the model's own, which its forward reads."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x):
        if self.training:
            self.mean.lerp_(x.mean(dim=0) + 1, 0.1)
        return super().forward(x - self.mean)


class Attention(Classifier):
    """Attention between two linear layers: its parameters are shared."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(1, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.body[0] = nn.Linear(8, 40)

    def forward(self, x):
        tokens = self.embed(x[..., None])
        return super().forward(self.attention(tokens, tokens, tokens)[0].mean(dim=1))


@pytest.mark.filterwarnings("ignore:.*relevance is not conserved.*MultiheadAttention:UserWarning")
@pytest.mark.parametrize("model_type", [DetachedEncoder, CentredInput, Attention])
def test_recall_is_bit_identical_where_units_are_not_all(model_type):
    model, rnf = model_type(), RelevanceFreezing(criterion=0.1)
    train(model, rnf, "a")
    with rnf.recall("a"), torch.no_grad():
        before = model(inputs())
    train(model, rnf, "b")
    with rnf.recall("a"), torch.no_grad():
        assert torch.equal(model(inputs()), before)


def test_a_parameter_that_is_replaced_during_the_fit_is_refused():
    class Replace(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            pl_module.body[0].weight = nn.Parameter(pl_module.body[0].weight.detach().clone())

    model, rnf = Classifier(), RelevanceFreezing()
    train(model, rnf, "a")
    model.heads.activate("b")
    with pytest.raises(ValueError, match=r"parameter 'body.0.weight' was replaced by another during the fit"):
        trainer(Replace(), rnf).fit(model, datamodule=task_data("b"))
    assert list(rnf.state.tasks) == ["a"]


def test_new_optimizers_in_the_middle_of_a_fit_are_followed():
    class Renew(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            trainer.strategy.setup_optimizers(trainer)

    model, rnf = Classifier(weight_decay=0.5), RelevanceFreezing(freeze="units")
    train(model, rnf, "a")
    rows, relevant = frozen_rows(model, rnf), rnf.state.tasks["a"].relevant
    model.heads.activate("b")
    trainer(Renew(), rnf).fit(model, datamodule=task_data("b"))
    now = dict(model.named_parameters())
    assert all(
        torch.equal(now[name][relevant[layer.name]], rows[name])
        for layer in rnf.state.layers
        for name in layer.parameters
    )


def test_tasks_are_named_by_argument_function_datamodule_or_number():
    for task, expected in (("mine", "mine"), (lambda trainer, module: module.heads.active + "!", "a!"), (None, "a")):
        model, rnf = Classifier(), RelevanceFreezing(task=task)
        train(model, rnf, "a")
        assert list(rnf.state.tasks) == [expected]
    model, rnf = Classifier(), RelevanceFreezing()
    trainer(rnf).fit(model, loader("a"), loader("a"))
    assert list(rnf.state.tasks) == ["task-0"]


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "64-true"])
def test_other_precisions(precision):
    model, rnf = Classifier(), RelevanceFreezing(criterion=0.1, freeze="units")
    train(model, rnf, "a", precision=precision)
    rows, relevant = frozen_rows(model, rnf), rnf.state.tasks["a"].relevant
    dtypes = {parameter.dtype for parameter in model.parameters()}
    train(model, rnf, "b", precision=precision)
    now = dict(model.named_parameters())
    for layer in rnf.state.layers:
        for name in layer.parameters:
            assert torch.equal(now[name][relevant[layer.name]], rows[name])
    assert {parameter.dtype for parameter in model.parameters()} == dtypes
    assert dtypes == {{"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(precision, torch.float32)}


def test_a_forward_that_asks_for_its_dtype_is_attributed_in_single_precision():
    class Asking(Classifier):
        def forward(self, x):
            return super().forward(x.to(self.dtype))

    model, rnf = Asking(), RelevanceFreezing(criterion=0.1)
    train(model, rnf, "a", precision="bf16-true")
    assert list(rnf.state.tasks) == ["a"]
    assert model.dtype == torch.bfloat16


def test_batches_of_another_form_are_read_by_predict():
    class Dictionaries(torch.utils.data.Dataset):
        def __len__(self):
            return 64

        def __getitem__(self, index):
            x, y = clusters("a", 64)[index]
            return {"image": x, "label": y}

    class DictClassifier(Classifier):
        def training_step(self, batch):
            return super().training_step((batch["image"], batch["label"]))

        def validation_step(self, batch):
            pass

    model = DictClassifier()
    rnf = RelevanceFreezing(predict=lambda module, batch: (module(batch["image"]), batch["label"]))
    batches = DataLoader(Dictionaries(), 16)
    trainer(rnf).fit(model, batches, batches)
    assert rnf.state.tasks["task-0"].samples == 64


# -- bad input: one sentence, nothing changed -------------------------------------------------------------------------


class NoHidden(Classifier):
    def __init__(self):
        super().__init__()
        self.body = nn.Flatten()
        self.heads.tasks["a"] = nn.Linear(6, 2)


class FunctionalLogits(Classifier):
    def forward(self, x):
        features = self.body(x)
        return features[:, :2] + features[:, 2:4]


def labelled(y):
    return DataLoader(TensorDataset(torch.randn(len(y), 6), y), 32)


@pytest.mark.parametrize(
    ("model_type", "reference", "error", "sentence"),
    [
        (NoHidden, None, ValueError, "no unit layers"),
        (FunctionalLogits, None, ValueError, "head not found.*name the heads' modules with heads="),
        (Classifier, labelled(torch.zeros(0, dtype=torch.long)), ValueError, "reference data is empty"),
        (Classifier, [torch.randn(4, 6)], TypeError, "not \\(x, y\\): reference data needs labels"),
        (Classifier, labelled(torch.rand(80)), TypeError, "labels are a torch.float32 tensor"),
        (
            Classifier,
            labelled(torch.full((80,), 2)),
            ValueError,
            "labels range from 2 to 2, but the head has 2 outputs",
        ),
        (Classifier, labelled(torch.full((80,), -1)), ValueError, "labels range from -1 to -1"),
        (Classifier, labelled(torch.full((80,), -100)), ValueError, "predict returns no target for any of the"),
        (Classifier, loader("a", 20), ValueError, "20 samples, so one weighs 5.0%.*at least 50 samples"),
        (Classifier, [loader("a"), loader("b")], ValueError, "reference has 2 loaders.*can't be told"),
    ],
)
def test_bad_models_and_reference_data_are_refused_before_training(model_type, reference, error, sentence):
    model, rnf = model_type(), RelevanceFreezing(reference)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=f"(?s){sentence}") as caught:
        trainer(rnf).fit(model, datamodule=task_data("a"))
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not rnf.state.tasks
    assert not any(module._forward_hooks for module in model.modules())


def test_several_validation_loaders_without_reference_are_refused():
    model, rnf = Classifier(), RelevanceFreezing()
    model.validation_step = lambda batch, dataloader_idx=0: None
    with pytest.raises(ValueError, match="validation data has 2 loaders, and which of them belongs to the task"):
        trainer(rnf).fit(model, loader("a"), [loader("a"), loader("b")])


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no:UserWarning")
def test_no_validation_data_and_no_reference_is_refused_and_reference_serves():
    with pytest.raises(ValueError, match=r"no reference data.*set reference="):
        trainer(RelevanceFreezing(), limit_val_batches=0).fit(Classifier(), loader("a"))
    rnf = RelevanceFreezing(task_data("a"))
    trainer(rnf, limit_val_batches=0).fit(Classifier(), loader("a"), loader("a"))
    assert rnf.state.tasks["task-0"].samples == 320


def test_a_tolerance_of_zero_is_meant_and_needs_no_size():
    model, rnf = Classifier(), RelevanceFreezing(loader("a", 20), criterion=0)
    trainer(rnf).fit(model, loader("a"), loader("a"))
    record = rnf.state.tasks["task-0"]
    assert record.subnetwork_accuracy >= record.accuracy


def test_a_nan_in_relevance_is_refused_by_layer():
    model, rnf = Classifier(), RelevanceFreezing(composite=EpsilonPlus(epsilon=float("nan")))
    with pytest.raises(ValueError, match=r"relevance of layer 'body.\d' is not finite in (\d|[1-3]\d|40) of 40 units"):
        trainer(rnf).fit(model, datamodule=task_data("a"))
    assert not rnf.state.tasks


def test_a_refused_model_does_not_take_the_place_of_the_last_one():
    model, rnf = Classifier(), RelevanceFreezing()
    train(model, rnf, "a")
    other = Classifier()
    other.body[0], other.body[3] = nn.Linear(6, 30), nn.Linear(30, 40)
    with pytest.raises(ValueError, match=r"layer 'body.0' had 40 units"):
        trainer(rnf).fit(other, datamodule=task_data("b"))
    with rnf.recall("a"):
        model(inputs())


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork"])
def test_launchers_that_lose_the_state_are_refused(strategy):
    sentence = r"take the finished tasks with them.*use Trainer\(strategy='ddp'\)"
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match=sentence):
        trainer(RelevanceFreezing(), strategy=strategy, devices=1).fit(Classifier(), datamodule=task_data("a"))


def test_a_layer_that_relevance_cannot_reach_is_refused_before_training():
    class Keyword(Classifier):
        def forward(self, x):
            x = self.body[0](input=x).relu()
            return self.heads(self.body[3](x).relu())

    model = Keyword()
    before = model.body[0].weight.detach().clone()
    with pytest.raises(ValueError, match=r"layer 'body.0' is called by keyword.*leave it out of units="):
        trainer(RelevanceFreezing()).fit(model, datamodule=task_data("a"))
    assert torch.equal(model.body[0].weight, before)


def test_a_glob_of_elasticity_that_matches_nothing_is_refused():
    with pytest.raises(ValueError, match=r"irrelevant_elasticity: 'bdoy.\*' matches no unit layer"):
        trainer(RelevanceFreezing(irrelevant_elasticity={"bdoy.*": 0.1})).fit(Classifier(), datamodule=task_data("a"))


@pytest.mark.parametrize("name", [3, "", None])
def test_a_function_that_returns_no_name_is_refused(name):
    rnf = RelevanceFreezing(task=lambda trainer, module: name)
    with pytest.raises(TypeError, match=rf"task\(trainer, module\) returned {name!r}, expected the task's name"):
        trainer(rnf).fit(Classifier(), datamodule=task_data("a"))


def test_a_second_callback_of_the_kind_is_refused():
    class Mine(RelevanceFreezing):
        pass

    with pytest.raises(ValueError, match="more than one RelevanceFreezing"):
        trainer(RelevanceFreezing(), Mine()).fit(Classifier(), datamodule=task_data("a"))
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `RelevanceFreezing`"):
        trainer(RelevanceFreezing(), RelevanceFreezing())


def test_a_task_name_used_twice_is_refused():
    model, rnf = Classifier(), RelevanceFreezing()
    train(model, rnf, "a")
    with pytest.raises(ValueError, match="task 'a' has ended already; name the new one"):
        train(model, rnf, "a")


def test_the_head_of_a_finished_task_is_refused_for_a_new_one():
    model, rnf = Classifier(), RelevanceFreezing(task=lambda trainer, module: f"task-{len(rnf.state.tasks)}")
    train(model, rnf, "a")
    with pytest.raises(ValueError, match=r"head 'heads.tasks.a' belongs to the finished task 'task-0'"):
        train(model, rnf, "a")


def test_a_model_whose_layers_no_longer_match_is_refused():
    model, rnf = Classifier(), RelevanceFreezing()
    train(model, rnf, "a")
    wider = Classifier()
    wider.body[0], wider.body[3] = nn.Linear(6, 30), nn.Linear(30, 40)
    flags = [parameter.requires_grad for parameter in wider.parameters()]
    with pytest.raises(ValueError, match=r"layer 'body.0' had 40 units.*has shape \(30, 6\)"):
        trainer(rnf).fit(wider, datamodule=task_data("b"))
    deeper = Classifier()
    deeper.load_state_dict(model.state_dict())
    deeper.body.append(nn.Linear(40, 40))
    deeper.heads.activate("b")
    with pytest.raises(ValueError, match=r"no longer match the finished tasks: \['body.5'\] ran for one task"):
        trainer(rnf).fit(deeper, datamodule=task_data("b"))
    assert [parameter.requires_grad for parameter in wider.parameters()] == flags
    assert list(rnf.state.tasks) == ["a"]


class Stems(Classifier):
    """A layer for each task before the body that they share."""

    def __init__(self):
        super().__init__()
        self.stems = nn.ModuleDict({task: nn.Linear(6, 6) for task in "abc"})

    def forward(self, x):
        return super().forward(self.stems[self.heads.active](x).tanh())


@pytest.mark.parametrize("units", [None, "body.*"])
def test_a_stem_for_each_task_is_kept_with_its_task(units):
    """That of the first task has units of its own, unless ``units`` leaves it out; later ones are frozen whole."""
    model, rnf = Stems(), RelevanceFreezing(units=units)
    train(model, rnf, "a")
    with rnf.recall("a"), torch.no_grad():
        expected = model(inputs())
    train(model, rnf, "b", "c")
    assert {f"stems.{task}.weight" for task in "bc"} <= set(rnf.state.shared)
    model.heads.activate("a")  # and with it the stem
    with rnf.recall("a"), torch.no_grad():
        assert torch.equal(model(inputs()), expected)


def test_a_shared_head_is_refused_with_what_is_not_possible():
    model, rnf = Classifier(), RelevanceFreezing(task=lambda trainer, module: f"task-{len(rnf.state.tasks)}")
    train(model, rnf, "a")
    with pytest.raises(ValueError, match=r"several tasks share, or that grows, can't be kept: .* heads with heads="):
        train(model, rnf, "a")


def test_a_checkpoint_of_another_model_or_version_is_refused():
    rnf = RelevanceFreezing()
    for rubbish in ({}, {"version": 99}, {"version": 1, "layers": "none"}):
        with pytest.raises(ValueError, match=r"version|not a state"):
            rnf.load_state_dict(rubbish)
    assert not rnf.state.tasks


def test_a_state_that_lacks_a_finished_task_is_refused_in_a_fit():
    model, rnf = Classifier(), RelevanceFreezing()
    train(model, rnf, "a")
    other, other_model = copy.deepcopy(rnf), copy.deepcopy(model)
    train(model, rnf, "b")
    train(other_model, other, "c")

    class Load(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            rnf.load_state_dict(other.state_dict())

    model.heads.activate("c")
    with pytest.raises(ValueError, match="saved before 'b' ended: this fit would train over what they need"):
        trainer(rnf, Load()).fit(model, datamodule=task_data("c"))
    assert list(rnf.state.tasks) == ["a", "b"]


def test_unknown_tasks_are_named_in_the_error():
    model, rnf = Classifier(), RelevanceFreezing()
    train(model, rnf, "a")
    with pytest.raises(KeyError, match=r"no finished task 'z'; finished tasks: \['a'\]"), rnf.recall("z"):
        pass


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("criterion", -0.1),
        ("criterion", 2),
        ("elasticity", -1.0),
        ("elasticity", {"body.*": float("nan")}),
        ("irrelevant_elasticity", float("inf")),
        ("retention", "approximate"),
        ("candidates", "some"),
        ("normalize", "global"),
        ("search", "binary"),
        ("resolution", 0),
        ("reference_samples", 0),
        ("attribution_samples", -1),
        ("reference_samples", True),
        ("resolution", None),
        ("predict", 5),
        ("task", 5),
        ("composite", "EpsilonPlus"),
        ("seed", 1.5),
        ("units", 5),
        ("heads", [5]),
    ],
)
def test_arguments_out_of_range_are_refused_by_name(option, value):
    with pytest.raises((ValueError, TypeError), match=f"^{option}|tolerance"):
        RelevanceFreezing(**{option: value})


def test_defaults_are_the_documented_ones():
    assert RelevanceFreezing().ending.criterion == AccuracyDrop(0.02)
    paper = RelevanceFreezing.paper(criterion=0.05)
    assert (paper.retention, paper.ending.selection.candidates, paper.ending.selection.normalize) == (
        "paper",
        "all",
        "none",
    )
    assert (paper.ending.recovery.epochs, paper.ending.selection.recalibrate_norm) == (0, False)
    assert paper.ending.criterion == AccuracyDrop(0.05)
    assert RelevanceFreezing().state_dict() == FreezeState().to_plain()


def test_an_option_that_would_be_without_effect_can_not_be_set_later():
    rnf = RelevanceFreezing()
    with pytest.raises(AttributeError, match="criterion is an option of a task's end: set it when you make"):
        rnf.criterion = 0.1
    rnf.reference, rnf.task, rnf.reset_free = loader("a"), "a", True  # these count from the next fit on
    assert rnf.ending.reference.source is rnf.reference


@pytest.mark.parametrize("options", [{"recovery_epochs": 0, "ration": None}, PLAIN], ids=["fitted", "plain"])
def test_evaluations_that_fail_early_change_no_verdict(monkeypatch, options):
    """The search of a fit, with and without: the same cutoffs and masks; what was taken was measured on all samples."""
    found = []
    for ends_early in (True, False):
        with monkeypatch.context() as patch:
            if not ends_early:
                whole = ReferenceData.measure
                patch.setattr(ReferenceData, "measure", lambda *args, lowest, **kwargs: whole(*args, **kwargs))  # noqa: B023
            torch.manual_seed(0)
            rnf, model = RelevanceFreezing(criterion=0.02, **options), Classifier()
            train(model, rnf, "a", max_epochs=4)
            found.append(rnf.state.tasks["a"])
    early, late = found
    assert [one.score.cutoff for one in early.evaluations] == [one.score.cutoff for one in late.evaluations]
    assert [one.accepted for one in early.evaluations] == [one.accepted for one in late.evaluations]
    assert all(torch.equal(mask, late.relevant[name]) for name, mask in early.relevant.items())
    assert {one.score.samples for one in late.evaluations} == {late.samples}
    assert {one.score.samples for one in early.evaluations if one.accepted} == {early.samples}
    assert any(one.score.samples < early.samples for one in early.evaluations if not one.accepted)
    assert early.subnetwork_accuracy == late.subnetwork_accuracy


@pytest.mark.parametrize("name", ["a\nb", "\x1b[2J", "\ud800", "a\x00"])
def test_a_name_that_could_not_be_loaded_again_is_refused_before_training(name):
    model = Classifier()
    model.heads.activate("a")
    before = model.body[0].weight.clone()
    with pytest.raises(ValueError, match=r"task name .* has control characters"):
        trainer(RelevanceFreezing(task=name)).fit(model, datamodule=task_data("a"))
    assert torch.equal(model.body[0].weight, before)
