"""Finished tasks and their model meet again: in a new process, in a notebook cell run twice, with other weights."""

from __future__ import annotations

import re
import warnings

import launched
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from returning import CASES, first, second
from torch import nn
from training import Classifier, ConvClassifier, frozen_rows, inputs, task_data, train, trainer

from lightning_rnf import MultiHead, RelevanceFreezing

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*relevance is not conserved:UserWarning"),
    pytest.mark.filterwarnings("ignore:no free units are left:UserWarning"),
]


def in_a_process(function, *args):
    assert launched.ended(launched.started(function, *args)) == [0]


# -- a new process -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Task a of each model has ended in a process that is gone; and what another has found then, by case and way."""
    folder = tmp_path_factory.mktemp("ended")
    in_a_process(first, folder)
    in_a_process(second, folder)
    return folder, torch.load(folder / "found.pt", weights_only=True)


def assert_added(case, found, folder):
    assert found.get("error") is None
    assert found["tasks"] == ["a", "b"]
    assert torch.equal(found["a"], torch.load(folder / case / "a.pt", weights_only=True))
    assert not found["changed"]


@pytest.mark.parametrize("way", ["restore", "by hand"])
@pytest.mark.parametrize("case", CASES)
def test_a_task_is_added_in_a_new_process(case, way, ended):
    folder, found = ended
    assert_added(case, found[case][way], folder)


def test_a_head_that_was_there_from_the_start_goes_on_from_the_checkpoint(ended):
    folder, found = ended
    assert_added("declared", found["declared"]["ckpt_path"], folder)


@pytest.mark.parametrize("case", ["grown", "own", "attributes"])
def test_resuming_with_a_head_more_says_what_to_do_instead(case, ended):
    error = ended[1][case]["ckpt_path"]["error"]
    assert re.search(r"a-ended.ckpt' lacks head(s.tasks.b|s.b|_b).weight, head.*bias, which this model has", error)
    assert "call rnf.restore(path, model) and then fit without ckpt_path" in error


@pytest.mark.parametrize("case", CASES)
def test_masks_without_their_weights_are_refused_in_a_new_process(case, ended):
    error = ended[1][case]["masks only"]["error"]
    assert "(of 'a' body.0, body." in error
    assert "rnf.restore('a-ended.ckpt', model)" in error
    assert "rnf.forget('a') or a new RelevanceFreezing" in error


def test_a_module_without_the_heads_of_finished_tasks_is_told_to_have_them(ended):
    model, rnf = Classifier(), RelevanceFreezing()
    del model.heads.tasks["a"]
    with pytest.raises(
        ValueError, match=r"lacks 'heads.tasks.a.weight', .*: it has to have the head of every finished task"
    ):
        rnf.restore(ended[0] / "grown" / "a-ended.ckpt", model)


def test_restore_refuses_what_is_not_its_model_and_changes_nothing(ended, tmp_path):
    path, model, rnf = ended[0] / "grown" / "a-ended.ckpt", Classifier(), RelevanceFreezing()
    model.body.insert(4, nn.Linear(40, 40))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"has a layer 'body.4' that it did not have"):
        rnf.restore(path, model)
    assert not rnf.state.tasks
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        rnf.restore(tmp_path / "b-ended.ckpt", model)
    other = Classifier()
    train(other, rnf, "c")
    with pytest.raises(ValueError, match=r"lacks 'c', finished here: load it into a new callback"):
        rnf.restore(path, other)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
def test_a_fit_without_an_epoch_left_says_so(tmp_path):
    model, rnf = Classifier(), RelevanceFreezing()
    saver = ModelCheckpoint(tmp_path)
    trainer(rnf, saver, enable_checkpointing=True).fit(model, datamodule=task_data("a"))
    again, other = Classifier(), RelevanceFreezing()
    again.heads.activate("b")
    with pytest.warns(
        UserWarning, match="nothing was trained, so 'b' has not ended: .* or of the checkpoint, count on"
    ):
        trainer(other).fit(again, datamodule=task_data("b"), ckpt_path=tmp_path / "a-ended.ckpt")
    assert list(other.state.tasks) == ["a"]


# -- other weights -----------------------------------------------------------------------------------------------------


@pytest.fixture
def finished():
    model, rnf = ConvClassifier(), RelevanceFreezing(criterion=0.05)
    train(model, rnf, "a", "b")
    return model, rnf


def test_a_fresh_model_with_an_old_callback_is_refused(finished):
    _, rnf = finished
    fresh = ConvClassifier()
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    with pytest.raises(ValueError, match=r"of 'b' body.1, body.3, body.7, heads.tasks.b differ; of 'a' heads.tasks.a"):
        train(fresh, rnf, "c")
    assert list(rnf.state.tasks) == ["a", "b"]
    assert all(torch.equal(value, before[name]) for name, value in fresh.state_dict().items())
    train(fresh, RelevanceFreezing(), "c")  # a way out that the sentence names


def test_weights_of_another_moment_are_refused_and_those_of_the_end_are_taken(finished):
    model, rnf = finished
    ended = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        model.body[3].weight[rnf.state.tasks["b"].relevant["body.3"].nonzero()[0]] *= 1.01
    with pytest.raises(ValueError, match=r"\(of 'b' body.3 differ\).*rnf.restore\('b-ended.ckpt', model\)"):
        train(model, rnf, "c")
    model.load_state_dict(ended)
    train(model, rnf, "c")
    assert not any(rnf.report(model).changed.values())


def test_a_finished_head_and_a_shared_parameter_are_looked_at_too(finished):
    model, rnf = finished
    with torch.no_grad():
        model.heads.tasks["a"].bias += 1
    with pytest.raises(ValueError, match=r"\(of 'a' heads.tasks.a differ\)"):
        train(model, rnf, "c")

    class Normed(Classifier):
        def __init__(self):
            super().__init__()
            self.body.insert(2, nn.LayerNorm(40))

    model, rnf = Normed(), RelevanceFreezing(norm_parameters="frozen")
    train(model, rnf, "a")
    with torch.no_grad():
        model.body[2].weight *= 1.01
    with pytest.raises(ValueError, match=r"\(of 'a' body.2.weight differ\)"):
        train(model, rnf, "b")


def test_what_is_free_may_be_anything(finished):
    model, rnf = finished
    frozen = rnf.state.frozen()
    with torch.no_grad():
        for layer in rnf.state.layers:
            for name in layer.parameters:
                model.get_parameter(name)[~frozen[layer.name]] += 0.01
    train(model, rnf, "c")
    assert list(rnf.state.tasks) == ["a", "b", "c"]


@pytest.mark.filterwarnings("ignore:elasticity=0.1")
@pytest.mark.filterwarnings("ignore:.* recall of .[ab]. is not what it was:UserWarning")
def test_elastic_rows_are_not_taken_for_others_nor_later_when_they_are_frozen():
    model, elastic = Classifier(), RelevanceFreezing(elasticity=0.1)
    train(model, elastic, "a", "b")
    assert any(elastic.report(model).changed["a"])  # they have moved
    frozen = RelevanceFreezing(freeze="units")
    frozen.load_state_dict(elastic.state_dict())
    rows = frozen_rows(model, frozen)
    train(model, frozen, "c")
    now = {name: model.get_parameter(name) for name in rows}
    layers = {name: layer.name for layer in frozen.state.layers for name in layer.parameters}
    before = {
        name: (frozen.state.tasks["a"].relevant[layers[name]] | frozen.state.tasks["b"].relevant[layers[name]])
        for name in rows
    }
    assert all(torch.equal(now[name][before[name]], value) for name, value in rows.items())
    with pytest.raises(ValueError, match=r"heads.tasks.a differ"):
        train(Classifier(), elastic, "c")


@pytest.mark.filterwarnings("ignore:.* recall of .[ab]. is not what it was:UserWarning")
def test_another_precision_is_a_warning_once():
    model, rnf = Classifier(), RelevanceFreezing()
    train(model, rnf, "a")
    with pytest.warns(UserWarning, match=r"precision than the finished tasks \['a'\] ended in \(float32 and float64\)"):
        train(model, rnf, "b", precision="64-true")
    train(model, rnf, "c", precision="64-true")
    assert list(rnf.state.tasks) == ["a", "b", "c"]


@pytest.mark.filterwarnings("ignore:.* recall of .[ab]. is not what it was:UserWarning")
def test_records_without_fingerprints_say_nothing(finished):
    _, rnf = finished
    for record in rnf.state.tasks.values():
        record.rows.clear()
    train(ConvClassifier(), rnf, "c")
    assert list(rnf.state.tasks) == ["a", "b", "c"]


# -- built late --------------------------------------------------------------------------------------------------------


class Late(Classifier):
    """Body and heads come with `configure_model`; a layer norm, so that something is frozen whole."""

    def __init__(self, *tasks):
        super().__init__(weight_decay=0.1)
        self.tasks, self.flags = tasks, {}
        del self.body, self.heads

    def build(self):
        if not hasattr(self, "body"):
            parts = (nn.Linear(6, 40), nn.LayerNorm(40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU())
            self.body, self.heads = nn.Sequential(*parts), MultiHead(40, dict.fromkeys(self.tasks, 2))
            self.heads.activate(self.tasks[-1])

    def configure_model(self):
        self.build()

    def configure_optimizers(self):
        self.flags = {name: one.requires_grad for name, one in self.named_parameters()}
        return super().configure_optimizers()


class LateInSetup(Late):
    configure_model = Classifier.configure_model

    def setup(self, stage):
        self.build()


@pytest.mark.parametrize("kind", [Late, LateInSetup])
def test_layers_that_are_built_late_are_there_before_they_are_checked(kind, tmp_path):
    model, rnf = kind("a"), RelevanceFreezing(norm_parameters="frozen")
    trainer(rnf).fit(model, datamodule=task_data("a"))
    with rnf.recall("a", model), torch.no_grad():
        expected = model(inputs())
    saved = {name: value.clone() for name, value in model.state_dict().items()}

    class Loaded(kind):
        def build(self):
            if not hasattr(self, "body"):
                super().build()
                self.load_state_dict(saved, strict=False)

    rnf.save(tmp_path / "masks.safetensors")
    later, other = Loaded("a", "b"), RelevanceFreezing(norm_parameters="frozen")
    other.load(tmp_path / "masks.safetensors")
    trainer(other).fit(later, datamodule=task_data("b"))
    assert list(other.state.tasks) == ["a", "b"]
    # What is frozen whole is out of training before the strategy wraps the model, with which optimizers come.
    assert {name for name, flag in later.flags.items() if not flag} == {
        *(f"heads.tasks.a.{key}" for key in ("weight", "bias")),
        *(f"body.1.{key}" for key in ("weight", "bias")),
        *(
            f"{layer.name}.{key}"
            for layer in rnf.state.layers
            for key in ("weight", "bias")
            if rnf.state.frozen()[layer.name].all()
        ),
    }
    with other.recall("a", later), torch.no_grad():
        assert torch.equal(later(inputs()), expected)
    assert not {"configure_model", "setup"} & set(vars(later))
    with pytest.raises(ValueError, match=r"this model's 'body.0.weight' has shape \(30, 6\)"):
        trainer(other).fit(_narrow(kind), datamodule=task_data("c"))


def _narrow(kind):
    class Narrow(kind):
        def build(self):
            super().build()
            self.body[0], self.body[3] = nn.Linear(6, 30), nn.Linear(30, 40)

    return Narrow("a", "c")


def test_a_build_that_fails_leaves_the_model_as_it_was():
    class Fails(Late):
        def setup(self, stage):
            raise RuntimeError("no disk")

    model = Fails("a")
    with pytest.raises(RuntimeError, match="no disk"):
        trainer(RelevanceFreezing()).fit(model, datamodule=task_data("a"))
    assert "configure_model" not in vars(model)


# -- another model -----------------------------------------------------------------------------------------------------


@pytest.fixture
def masks(tmp_path):
    model, rnf = Classifier(), RelevanceFreezing()
    train(model, rnf, "a")
    rnf.save(tmp_path / "masks.safetensors")
    return tmp_path / "masks.safetensors", model


def test_masks_of_a_model_with_a_layer_less_are_refused(masks):
    path, model = masks
    deeper = Classifier()
    deeper.load_state_dict(model.state_dict())
    deeper.body.append(nn.Linear(40, 40))
    with pytest.raises(ValueError, match=r"has a layer 'body.5' that it did not have when the finished tasks ended"):
        RelevanceFreezing().load(path, deeper)
    rnf = RelevanceFreezing()
    rnf.load(path)
    with (
        rnf.recall("a", deeper),
        pytest.raises(ValueError, match=r"'body.5' \(Linear\) runs in the recall of task 'a'"),
    ):
        deeper(inputs())
    with pytest.raises(ValueError, match=r"runs 'body.5', which it did not have"):
        rnf.export(deeper, "a")


def test_a_layer_beside_the_head_is_told_from_a_head_when_it_runs():
    class Flat(Classifier):
        def __init__(self):
            super().__init__()
            self.head_a = nn.Linear(40, 2)
            del self.heads

        def forward(self, x):
            x = self.body(x)
            return self.head_a(self.more(x) if hasattr(self, "more") else x)

    model, rnf = Flat(), RelevanceFreezing()
    trainer(rnf).fit(model, datamodule=task_data("a"))
    model.head_b = nn.Linear(40, 2)
    with rnf.recall("a", model), torch.no_grad():
        model(inputs())
    model.more = nn.Linear(40, 40)
    with rnf.recall("a", model), pytest.raises(ValueError, match=r"'more' \(Linear\) runs in the recall of task 'a'"):
        model(inputs())


def test_heads_of_tasks_to_come_and_modules_that_never_run_are_no_other_model(masks):
    path, model = masks
    model.heads.add("d", 7)
    model.heads.tasks["b"] = nn.Linear(40, 5)  # not trained yet: it may be any size
    model.distance = nn.PReLU()
    rnf = RelevanceFreezing()
    rnf.load(path, model)
    with rnf.recall("a", model), torch.no_grad():
        model(inputs())
    model.heads.activate("b")


def test_a_head_or_an_input_of_another_size_is_refused(masks):
    path, _ = masks
    other = Classifier()
    other.heads.tasks["a"] = nn.Linear(40, 3)
    with pytest.raises(
        ValueError, match=r"'heads.tasks.a.weight' of task 'a' had shape \(2, 40\).* \(3, 40\); a head that"
    ):
        RelevanceFreezing().load(path, other)
    other = Classifier()
    other.body[0] = nn.Linear(9, 40)
    with pytest.raises(
        ValueError, match=r"'body.0.weight' of layer 'body.0' .* had shape \(40, 6\).* it has \(40, 9\)"
    ):
        RelevanceFreezing().load(path, other)


# -- the task's name and its head --------------------------------------------------------------------------------------


def test_a_name_that_is_another_head_s_is_refused():
    model, rnf = Classifier(), RelevanceFreezing()
    sentence = r"the fit's task is 'b', but the active head of 'heads' is that of 'a': call heads.activate\('b'\)"
    with pytest.raises(ValueError, match=sentence):
        trainer(rnf).fit(model, datamodule=task_data("b"))
    model.heads.active = None
    with pytest.raises(ValueError, match=r"the active head of 'heads' is that of None"):
        trainer(rnf).fit(model, datamodule=task_data("b"))
    model.heads.activate("b")
    with warnings.catch_warnings():
        trainer(RelevanceFreezing(task="a name of no head"), max_epochs=1).fit(model, datamodule=task_data("b"))
