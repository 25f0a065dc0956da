"""A task that was never trained here is kept like one that was."""

from __future__ import annotations

import copy
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from snapshot import changes, snapshot
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from training import Classifier, ConvClassifier, clusters, inputs, loader, task_data, train, trainer
from zennit.composites import EpsilonGammaBox

from lightning_rnf import AccuracyDrop, MultiHead, RelevanceFreezing
from lightning_rnf.memory.state import TaskRecord
from lightning_rnf.runtime.guard import evaluating

MODELS = pytest.mark.parametrize("model_type", [Classifier, ConvClassifier])
pytestmark = pytest.mark.filterwarnings("ignore:no free units are left:UserWarning")


@pytest.fixture(autouse=True)
def _seed():
    pl.seed_everything(0, verbose=False)


def pretrained(model_type=Classifier, task="a"):
    """A model that knows a task, and no callback knows of it."""
    model = model_type()
    train(model, None, task)
    model.heads.activate(task)
    return model


def validation(task="a"):
    return task_data(task).val_dataloader()


def same(found: TaskRecord, expected: TaskRecord) -> None:
    """All that a record says, bit by bit, but for the clock."""
    assert {**vars(found), "seconds": None}.keys() == vars(expected).keys()
    for key, value in vars(expected).items():
        mine = getattr(found, key)
        if key in ("relevant", "relevance", "norm_statistics"):
            assert mine.keys() == value.keys()
            assert all(torch.equal(mine[name], value[name]) for name in value), key
        elif key != "seconds":
            assert mine == value, key


class Still(pl.Callback):
    """Puts the weights back at the fit's end: that fit has trained nothing."""

    def on_fit_start(self, trainer, pl_module):
        self.before = copy.deepcopy(pl_module.state_dict())

    def on_train_end(self, trainer, pl_module):
        pl_module.load_state_dict(self.before)


def ended_by_a_fit(model, rnf, data, task="a"):
    """The record of a fit's end with the weights that the model has now."""
    trainer(Still(), rnf, max_epochs=1, num_sanity_val_steps=0).fit(model, datamodule=data)
    return rnf.state.tasks[task]


OPTIONS = {
    "default": {},
    "paper": {"retention": "paper", "candidates": "all", "normalize": "none", "recalibrate_norm": False},
    "ration": {"ration": 0.9, "criterion": 0.1},
    "rules": {"composite": EpsilonGammaBox(low=-3.0, high=3.0)},
    "few": {"reference_samples": 100, "attribution_samples": 50, "seed": 3, "criterion": 0.1},
    "taylor": {"importance": "taylor", "search": "linear", "resolution": 10},
}


@MODELS
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_record_is_that_of_a_fit_that_has_trained_nothing(model_type, options):
    model = pretrained(model_type)
    # Heads are fitted at the end of fits only.
    one, other = RelevanceFreezing(**options, fit_head=False), RelevanceFreezing(**options)
    expected = ended_by_a_fit(copy.deepcopy(model), one, task_data("a"))
    found = other.protect(model, validation(), name="a")
    assert found is other.state.tasks["a"]
    same(found, expected)
    assert other.state.layers == one.state.layers
    assert other.state.shared == one.state.shared
    assert 0 < other.free_capacity < 1


@MODELS
def test_it_does_not_matter_in_which_mode_the_model_comes(model_type):
    model = pretrained(model_type)
    found = []
    for prepare in (model.train, model.eval, lambda: model.requires_grad_(False)):
        prepare()
        found.append(RelevanceFreezing().protect(model, validation(), name="a"))
    for grad_mode in (torch.no_grad, torch.inference_mode):
        with grad_mode():
            found.append(RelevanceFreezing().protect(model, validation(), name="a"))
    for record in found[1:]:
        same(record, found[0])


def test_norms_that_are_in_eval_mode_by_themselves_keep_their_statistics_as_in_a_fit():
    model = pretrained(ConvClassifier)
    model.train()
    model.body[4].eval()
    statistics = model.body[4].running_mean.clone()
    record = RelevanceFreezing().protect(model, validation(), name="a")
    assert torch.equal(record.norm_statistics["body.4.running_mean"], statistics)
    assert not model.body[4].training
    model.eval()
    record = RelevanceFreezing().protect(model, validation(), name="a")
    assert not torch.equal(record.norm_statistics["body.4.running_mean"], statistics)


@MODELS
def test_the_next_fit_holds_its_rows_and_recall_is_exact(model_type):
    model, rnf = pretrained(model_type), RelevanceFreezing(criterion=0.1, freeze="units")
    rnf.protect(model, validation(), name="a")
    with rnf.recall("a"), torch.no_grad():
        logits = model(inputs())
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    frozen = rnf.state.frozen()
    train(model, rnf, "b", "c")
    after = dict(model.named_parameters())
    for layer in rnf.state.layers:
        for name in layer.parameters:
            assert torch.equal(after[name][frozen[layer.name]], before[name][frozen[layer.name]])
            free = ~frozen[layer.name]
            assert not free.any() or not torch.equal(after[name][free], before[name][free])
    for name in rnf.state.tasks["a"].head_parameters:
        assert torch.equal(after[name], before[name])
    with rnf.recall("a"), torch.no_grad():
        assert torch.equal(model(inputs()), logits)
    report = rnf.report()
    assert report.is_sound
    assert report.drift == {"a": 0.0, "b": 0.0, "c": 0.0}
    assert list(report.changed) == ["a", "b", "c"]
    with torch.no_grad():
        layer = next(layer.name for layer in rnf.state.layers if frozen[layer.name].any())
        after[f"{layer}.weight"][int(frozen[layer].nonzero()[0])] += 1e-6
    assert layer in rnf.report(model).changed["a"]


def test_a_task_with_a_head_made_elsewhere_joins_those_that_were_trained():
    model, rnf = Classifier(), RelevanceFreezing()
    train(model, rnf, "a")
    with rnf.recall("a"), torch.no_grad():
        logits = model(inputs())
    model.heads.activate("b")  # trained by hand on what is there
    x, y = clusters("b", 320).tensors
    optimizer = torch.optim.Adam(model.heads.parameters(), lr=1e-2)
    model.eval()
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    record = rnf.protect(model, validation("b"), name="b")
    model.train()
    assert list(rnf.state.tasks) == ["a", "b"]
    assert record.drift == {"a": 0.0}
    assert all((record.relevant[name] >= mask).all() for name, mask in rnf.state.tasks["a"].relevant.items())
    with rnf.recall("a"), torch.no_grad():
        assert torch.equal(model(inputs()), logits)
    train(model, rnf, "c")
    assert rnf.report().is_sound


@MODELS
def test_the_model_and_the_random_states_come_back_as_they_were(model_type):
    model = pretrained(model_type)
    model.body.eval()
    before = snapshot(model)
    RelevanceFreezing().protect(model, DataLoader(clusters("a", 200), 32, shuffle=True), name="a")
    assert changes(before, snapshot(model)) == []
    other = RelevanceFreezing(reference_samples=4, criterion=0.0)
    with pytest.raises(ValueError, match="labels range"):
        other.protect(model, [(inputs(8), torch.full((8,), 5))], name="a")
    assert changes(before, snapshot(model)) == []
    assert not other.state.tasks
    assert not other.state.layers


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided:UserWarning")
def test_it_is_in_checkpoints_and_files_and_another_process_goes_on_from_them(tmp_path):
    model, rnf = pretrained(), RelevanceFreezing()
    rnf.protect(model, validation(), name="a")
    with rnf.recall("a"), torch.no_grad():
        logits = model(inputs())
    rnf.save(tmp_path / "masks.safetensors")
    loaded = RelevanceFreezing()
    loaded.load(tmp_path / "masks.safetensors", model)
    assert loaded.report(model).changed == {"a": ()}
    model.heads.activate("b")
    saver = ModelCheckpoint(tmp_path, save_last=True)
    trainer(rnf, saver, enable_checkpointing=True).fit(model, datamodule=task_data("b"))

    again, gone_on = Classifier(), RelevanceFreezing()
    again.heads.activate("b")
    trainer(gone_on).test(again, datamodule=task_data("b"), ckpt_path=tmp_path / "b-ended.ckpt", verbose=False)
    assert list(gone_on.state.tasks) == ["a", "b"]
    same(gone_on.state.tasks["a"], rnf.state.tasks["a"])
    for callback in (gone_on, loaded):
        with callback.recall("a", again), torch.no_grad():
            assert torch.equal(again(inputs()), logits)
    assert gone_on.report(again).changed == {"a": (), "b": ()}


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided:UserWarning")
def test_a_script_that_protects_again_before_it_resumes_goes_on(tmp_path):
    def begun():
        pl.seed_everything(0, verbose=False)
        model, rnf = pretrained(), RelevanceFreezing()
        rnf.protect(model, validation(), name="a")
        model.heads.activate("b")
        return model, rnf

    model, rnf = begun()
    trainer(rnf, ModelCheckpoint(tmp_path), enable_checkpointing=True).fit(model, datamodule=task_data("b"))
    again, resumed = begun()
    again.heads.activate("c")
    trainer(resumed, max_epochs=5).fit(again, datamodule=task_data("c"), ckpt_path=tmp_path / "b-ended.ckpt")
    assert list(resumed.state.tasks) == ["a", "b", "c"]
    assert not any(resumed.report().changed.values())
    assert set(resumed.report().drift.values()) == {0.0}


def test_free_units_start_each_task_from_their_pretrained_values():
    model, rnf = pretrained(), RelevanceFreezing(reset_free=True, criterion=0.1)
    rnf.protect(model, validation(), name="a")
    before = {name: parameter.detach().clone() for name, parameter in model.body.named_parameters()}
    train(model, rnf, "b")
    seen = {}

    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            seen.update({name: value.detach().clone() for name, value in pl_module.body.named_parameters()})

    model.heads.activate("c")
    frozen = rnf.state.frozen()
    assert any((~units).any() for units in frozen.values())
    trainer(rnf, Look()).fit(model, datamodule=task_data("c"))
    for name, value in before.items():
        free = ~frozen[f"body.{name.partition('.')[0]}"]
        assert torch.equal(seen[name][free], value[free])


def test_a_warning_that_is_an_error_leaves_a_task_that_later_ones_can_follow():
    model, rnf = pretrained(), RelevanceFreezing(reset_free=True)
    start = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings(), pytest.raises(UserWarning, match="no free units are left"):
        warnings.simplefilter("error")
        rnf.protect(model, validation(), name="a", criterion=lambda score: False)
    assert list(rnf.state.tasks) == ["a"]
    assert rnf.state.initial
    assert all(torch.equal(value, start[name]) for name, value in rnf.state.initial.items())
    with rnf.recall("a"):
        pass
    with pytest.raises(ValueError, match="'a'"):
        rnf.protect(Classifier(), validation(), name="a")
    with rnf.recall("a"):
        assert not model.training  # what was refused is not what is recalled


def test_a_criterion_of_its_own_counts_for_this_task_only():
    model, rnf = pretrained(), RelevanceFreezing(criterion=0.0)
    record = rnf.protect(model, validation(), name="a", criterion=AccuracyDrop(0.2))
    assert 0.0 < record.accuracy - record.subnetwork_accuracy <= 0.2
    assert rnf.ending.criterion == AccuracyDrop(0.0)
    strict = RelevanceFreezing(criterion=0.2).protect(model, validation(), name="a", criterion=0.0)
    assert strict.accuracy <= strict.subnetwork_accuracy
    assert record.cutoff > strict.cutoff


def test_a_recovery_belongs_to_fits_only():
    model, rnf = pretrained(), RelevanceFreezing(criterion=0.1, recovery_epochs=1, recovery_criterion=0.15)
    same(
        rnf.protect(model, validation(), name="a"),
        RelevanceFreezing(criterion=0.1).protect(model, validation(), name="a"),
    )
    train(model, rnf, "b", max_epochs=8)
    assert rnf.state.tasks["a"].recovery_epochs == 0
    assert rnf.state.tasks["b"].recovery_epochs == 1
    rationed = RelevanceFreezing(ration=0.02, criterion=0.0)
    with pytest.warns(UserWarning, match=r"ration of 0.02 falls short .* give it a larger ration$"):
        rationed.protect(model, validation(), name="a")


def test_a_protected_task_takes_the_first_ration_and_the_next_fit_the_second():
    model, rnf = pretrained(), RelevanceFreezing(ration=[0.5, 0.25], criterion=lambda score: False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* falls short of the criterion", UserWarning)
        rnf.protect(model, validation(), name="a")
        assert rnf.capacity() == {"body.0": 0.5, "body.3": 0.5}
        train(model, rnf, "b")
    assert rnf.capacity() == {"body.0": 0.375, "body.3": 0.375}


class Life(pl.LightningDataModule):
    """Has data between setup and teardown only, and transfer hooks that ask the Trainer."""

    def __init__(self):
        super().__init__()
        self.events, self.data = [], None

    def prepare_data(self):
        self.events.append("prepare")

    def setup(self, stage):
        self.events.append(stage)
        self.data = TensorDataset(clusters("a", 320, 1).tensors[0] + 5, clusters("a", 320, 1).tensors[1])

    def teardown(self, stage):
        self.events.append("teardown")
        self.data = None

    def val_dataloader(self):
        return DataLoader(self.data, 32)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        assert self.trainer.validating
        assert not self.trainer.training
        assert self.trainer.world_size == 1
        return batch[0] - 5, batch[1]


def test_a_data_module_goes_through_its_life_cycle_and_its_hooks_count():
    model, data = pretrained(), Life()
    record = RelevanceFreezing().protect(model, data, name="a")
    assert data.events == ["prepare", "validate", "teardown"]
    assert data.trainer is None
    assert record.accuracy > 0.9


class Asking(Classifier):
    """A module whose hooks and properties ask the Trainer."""

    def on_before_batch_transfer(self, batch, dataloader_idx):
        assert self.current_epoch == 0
        return batch[0] - 5, batch[1]

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return (batch[0] + 100 * self.trainer.training, batch[1])

    def forward(self, x):
        self.log("mean", x.mean())
        return super().forward(x)


def test_the_modules_hooks_count_and_what_they_ask_the_trainer_is_answered():
    model = pretrained()
    asking = Asking()
    asking.load_state_dict(model.state_dict())
    x, y = clusters("a", 320, 1).tensors
    found = RelevanceFreezing().protect(asking, DataLoader(TensorDataset(x + 5, y), 32), name="a")
    same_data = DataLoader(TensorDataset((x + 5) - 5, y), 32)
    same(found, RelevanceFreezing().protect(model, same_data, name="a"))
    with pytest.raises(RuntimeError, match="not attached"):
        _ = asking.trainer

    class Curious(Classifier):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return self.trainer.strategy.broadcast(batch)

    with pytest.raises(AttributeError, match="Trainer was asked for 'strategy', but none is running"):
        RelevanceFreezing().protect(Curious(), same_data, name="a")


def test_batches_in_a_list_will_do_and_a_plain_module_too():
    model = pretrained()
    x, y = clusters("a", 320, 1).tensors
    batches = list(zip(x.split(64), y.split(64), strict=True))
    rnf = RelevanceFreezing()
    record = rnf.protect(model, batches, name="a")
    assert record.samples == 320
    plain = nn.Sequential(*copy.deepcopy(model.body), copy.deepcopy(model.heads.tasks["a"]))
    alone = RelevanceFreezing()
    found = alone.protect(plain, batches, name="a")
    assert all(map(torch.equal, found.relevant.values(), record.relevant.values()))
    with alone.recall("a"), rnf.recall("a"), torch.no_grad():
        assert torch.equal(plain(inputs()), model(inputs()))


def test_a_compiled_model_is_protected_as_it_is():
    model = pretrained()
    expected = RelevanceFreezing().protect(model, validation(), name="a")
    same(RelevanceFreezing().protect(torch.compile(model, backend="eager"), validation(), name="a"), expected)


def test_heatmaps_of_a_protected_task_are_made_again_after_later_ones():
    class Images(ConvClassifier):
        def __init__(self):
            super().__init__()
            self.body = self.body[1:]

    def images(task):
        x, y = clusters(task, 320).tensors
        return DataLoader(TensorDataset(x.view(-1, 1, 1, 6), y), 32)

    model, rnf = Images(), RelevanceFreezing(heatmaps=4, task="b")
    rnf.protect(model, images("a"), name="a", criterion=0.3)
    model.heads.activate("b")
    trainer(rnf).fit(model, images("b"), images("b"))
    first, second = rnf._witnesses.gallery.maps["a"].values()
    assert torch.equal(first, second)


class Squeezing(pl.LightningModule):
    """SqueezeNet in small: fire modules, and a head that is a convolution before the pooling; flattened at last."""

    def __init__(self):
        super().__init__()
        from torchvision.models.squeezenet import Fire

        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2),
            nn.ReLU(inplace=True),
            Fire(16, 8, 12, 12),
            nn.MaxPool2d(2),
            Fire(24, 8, 12, 12),
        )
        self.classifier = nn.Sequential(
            nn.Dropout(0.1), nn.Conv2d(24, 3, 1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1)
        )
        nn.init.ones_(self.classifier[1].bias)  # a logit that the ReLU has cut off learns no more

    def forward(self, x):
        return torch.flatten(self.classifier(self.features(x)), 1)

    def training_step(self, batch):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch):
        self.log("accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def colours(shift, seed=0):
    """Images whose mean colour tells the class."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (192,), generator=generator)
    x = nn.functional.one_hot(y, 3).roll(shift, dims=1).float()[:, :, None, None]
    return DataLoader(TensorDataset(x + torch.randn(192, 3, 17, 17, generator=generator) / 2, y), 32)


def test_a_squeezenet_keeps_its_head_and_gets_another_beside_it():
    pytest.importorskip("torchvision")
    model = Squeezing()
    trainer(max_epochs=12).fit(model, colours(0), colours(0))
    x = next(iter(colours(0, 1)))[0]
    with evaluating(model), torch.no_grad():
        whole = model(x)
    head = model.classifier
    model.classifier = MultiHead(
        24,
        {"imagenet": head},
        lambda features, classes: nn.Sequential(
            nn.Dropout(0.1), nn.Conv2d(features, classes, 1), nn.AdaptiveAvgPool2d(1)
        ),
    )
    model.classifier.add("ages", 3)
    with evaluating(model), torch.no_grad():
        assert torch.equal(model(x), whole)
    rnf = RelevanceFreezing(task="ages")
    record = rnf.protect(model, colours(0, 1), name="imagenet", criterion=0.05)
    assert record.head == "classifier.tasks.imagenet"
    assert record.accuracy > 0.9
    assert record.cutoff > 0
    assert all(layer.name.startswith("features.") for layer in rnf.state.layers)
    with rnf.recall("imagenet"), torch.no_grad():
        recalled = model(x)
    model.classifier.activate("ages")
    trainer(rnf, max_epochs=3).fit(model, colours(1), colours(1))
    with rnf.recall("imagenet"), torch.no_grad():
        assert torch.equal(model(x), recalled)
    assert rnf.report().is_sound
    small = rnf.export(model, "ages")
    with rnf.recall("ages"), torch.no_grad():
        torch.testing.assert_close(small(x), model(x))


class AskingInForward(Classifier):
    def forward(self, x):
        assert not self.trainer.training
        return super().forward(x + self.trainer.global_rank)


def test_a_forward_may_ask_its_trainer():
    model, rnf = AskingInForward(), RelevanceFreezing()
    rnf.protect(model, validation(), name="a")
    with pytest.raises(RuntimeError, match="not attached"):
        _ = model.trainer
    assert list(rnf.state.tasks) == ["a"]


class Headless(Classifier):
    def forward(self, x):
        features = self.body(x)
        return features[:, :2] + features[:, 2:4]


class Borrowed(Classifier):
    def forward(self, x):
        features = self.body(x)
        return self.heads(nn.functional.linear(features, self.body[3].weight).relu())


REFUSED = {
    "no head": (Headless, {}, loader("a"), ValueError, "head not found"),
    "labels": (Classifier, {}, [(inputs(), torch.full((64,), 7))], ValueError, "but the head has 2 outputs"),
    "no labels": (Classifier, {}, [inputs()], TypeError, r"not \(x, y\)"),
    "empty": (Classifier, {}, [], ValueError, "reference data is empty"),
    "nothing": (Classifier, {}, None, TypeError, "reference is None"),
    "a generator": (Classifier, {}, (batch for batch in loader("a")), TypeError, "walked twice"),
    "a function": (Classifier, {}, lambda trainer, module: loader("a"), TypeError, "no Trainer is running"),
    "two loaders": (Classifier, {}, [loader("a"), loader("b")], ValueError, "has 2 loaders"),
    "too few": (Classifier, {}, loader("a", 10), ValueError, "give at least 50 samples"),
    "too few drawn": (Classifier, {"reference_samples": 8}, loader("a"), ValueError, "give at least 50 samples"),
    "units": (Classifier, {"units": "nothing.*"}, loader("a"), ValueError, "nothing"),
}


@pytest.mark.parametrize(("model_type", "options", "reference", "error", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_a_fit_refuses_is_refused(model_type, options, reference, error, sentence):
    model, rnf = model_type(), RelevanceFreezing(**options)
    before = snapshot(model)
    with pytest.raises(error, match=sentence):
        rnf.protect(model, reference, name="a")
    assert changes(before, snapshot(model)) == []
    assert not rnf.state.tasks


@pytest.mark.filterwarnings("ignore:.*belong to no unit and will be frozen whole")
def test_a_layer_that_units_cant_follow_is_frozen_whole_and_named():
    model, rnf = Borrowed(), RelevanceFreezing()
    with pytest.warns(UserWarning, match=r"frozen whole .*: body\.3 has its 'body.3.weight' used a second time"):
        rnf.protect(model, loader("a"), name="a")
    assert set(rnf.state.shared) == {"body.3.weight", "body.3.bias"}


def test_names_and_models_that_do_not_go_with_the_finished_tasks_are_refused():
    model, rnf = Classifier(), RelevanceFreezing()
    rnf.protect(model, validation(), name="a")
    with pytest.raises(ValueError, match="task 'a' has ended already"):
        rnf.protect(model, validation(), name="a")
    with pytest.raises(ValueError, match="belongs to the finished task 'a'"):
        rnf.protect(model, validation(), name="b")
    model.heads.activate("b")
    with pytest.raises(ValueError, match=r"layer 'body\.0' had 40 units"):
        rnf.protect(ConvClassifier(), validation(), name="b")
    for name in ("", 3, None):
        with pytest.raises(TypeError, match=r"name is .* expected the task's name"):
            rnf.protect(model, validation(), name=name)
    with pytest.raises(TypeError, match="criterion"):
        rnf.protect(model, validation(), name="b", criterion="strict")
    with pytest.raises(TypeError, match="model is of type int"):
        rnf.protect(3, validation(), name="b")
    assert list(rnf.state.tasks) == ["a"]


def test_a_fit_under_way_is_not_disturbed():
    model, rnf, sentences = Classifier(), RelevanceFreezing(), []

    class Protect(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            with pytest.raises(RuntimeError) as caught:
                rnf.protect(pl_module, validation(), name="other")
            sentences.append(str(caught.value))

    trainer(Protect(), rnf, max_epochs=1).fit(model, datamodule=task_data("a"))
    assert sentences == ["a fit is under way: protect a task before it, or after its end"]
    assert list(rnf.state.tasks) == ["a"]
