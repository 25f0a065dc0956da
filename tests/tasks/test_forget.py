from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from training import TASKS, Classifier, ConvClassifier, inputs, task_data, train, trainer

from lightning_rnf import RelevanceFreezing

ROWS = {"freeze": "units", "fit_head": False}
"""Whole rows are compared, and whole heads: of what is fitted to silent units no weight would move."""


def trained(model_type=Classifier, *, tasks=TASKS, **options):
    """Tasks of which each needs units that no other does, and shares others with them."""
    torch.manual_seed(0)
    model, rnf = (
        model_type(),
        RelevanceFreezing(**ROWS | {"candidates": "all", "criterion": lambda score: score.relevant >= 24} | options),
    )
    train(model, rnf, *tasks, max_epochs=1)
    return model, rnf


def logits(model, rnf, tasks):
    found = {}
    for task in tasks:
        with torch.no_grad(), rnf.recall(task, model):
            found[task] = model(inputs())
    return found


def masks_of(rnf, tasks):
    """By layer, the units that these tasks need, by hand."""
    records = [rnf.state.tasks[task] for task in tasks]
    return {layer.name: sum(one.relevant[layer.name].int() for one in records) > 0 for layer in rnf.state.layers}


def equal(one, other):
    return all(torch.equal(value, other[task]) for task, value in one.items())


@pytest.mark.filterwarnings("ignore:no free units")
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("model_type", [Classifier, ConvClassifier])
def test_what_no_other_task_uses_is_free_again_and_the_others_are_recalled_to_the_bit(model_type, task, tmp_path):
    model, rnf = trained(model_type)
    others = [name for name in TASKS if name != task]
    expected = logits(model, rnf, others)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    kept, own = masks_of(rnf, others), masks_of(rnf, [task])
    freed = rnf.forget(task)

    assert freed == {name: int((own[name] & ~kept[name]).sum()) for name in kept}
    assert sum(freed.values()) > 0
    free, units = (sum(int(count(mask)) for mask in kept.values()) for count in (lambda one: (~one).sum(), len))
    assert rnf.free_capacity == pytest.approx(free / units)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert equal(expected, logits(model, rnf, others))
    assert rnf.report(model).is_sound
    assert [row["task"] for row in rnf.report(model).to_dict()["tasks"]] == others

    # In files it is gone, too, and what comes back from them is the same.
    rnf.save(tmp_path / "masks.safetensors")
    loaded = RelevanceFreezing()
    loaded.load(tmp_path / "masks.safetensors", model)
    restored = RelevanceFreezing()
    restored.load_state_dict(rnf.state_dict())
    for one in (loaded, restored):
        assert list(one.state.tasks) == others
        assert equal(expected, logits(model, one, others))
        assert not any(one.report(model).changed.values())

    # It is trained once more, with its old head: freed units and head move, nothing of the others does.
    train(model, rnf, task, max_epochs=1)
    now = model.state_dict()
    assert (now[f"heads.tasks.{task}.weight"] != weights[f"heads.tasks.{task}.weight"]).all()
    moved = {name: (now[f"{name}.weight"] != weights[f"{name}.weight"]).flatten(1).any(dim=1) for name in kept}
    assert any((moved[name] & own[name] & ~kept[name]).any() for name in kept)
    assert not any((moved[name] & kept[name]).any() for name in kept)
    assert list(rnf.state.tasks) == [*others, task]
    assert equal(expected, logits(model, rnf, others))
    report = rnf.report(model)
    assert report.is_sound
    assert list(report.changed) == [*others, task]


@pytest.mark.filterwarnings("ignore:.*the ration of 0.2 falls short")
def test_with_free_candidates_the_last_task_gives_back_and_others_say_that_they_do_not():
    model, rnf = trained(candidates="free", criterion=0.02, ration=0.2)
    expected = logits(model, rnf, TASKS)
    own = masks_of(rnf, ["c"])
    kept = masks_of(rnf, ["a", "b"])
    with pytest.warns(UserWarning, match=r"'a' is forgotten, but no unit is free again: .*\('b', 'c'\).*the last task"):
        assert not any(rnf.forget("a").values())
    freed = rnf.forget("c")
    assert freed == {name: int((own[name] & ~kept[name]).sum()) for name in kept}
    assert sum(freed.values()) > 0
    assert sum(rnf.forget("b").values()) == sum(int(mask.sum()) for mask in kept.values())
    assert rnf.free_capacity == 1.0
    assert str(rnf.report()) == "no finished task"
    train(model, rnf, "b", max_epochs=1)  # as the first task of all
    assert not equal(expected, {**expected, **logits(model, rnf, ["b"])})
    assert rnf.report(model).is_sound


def test_its_head_may_be_removed():
    model, rnf = trained()
    expected = logits(model, rnf, "ac")
    rnf.forget("b")
    model.heads.activate("a")
    del model.heads.tasks["b"]
    assert equal(expected, logits(model, rnf, "ac"))
    model.heads.add("d", 2)
    model.heads.activate("d")
    data = task_data("b")
    data.task = "d"
    trainer(rnf, max_epochs=1).fit(model, datamodule=data)
    assert equal(expected, logits(model, rnf, "ac"))
    assert rnf.report(model).is_sound


def test_units_that_are_free_again_start_from_their_initial_values():
    model, rnf = trained(reset_free=True, over_samples="signed")
    initial = rnf.state.initial["body.0.weight"].clone()
    own, kept = masks_of(rnf, ["b"])["body.0"], masks_of(rnf, ["a", "c"])["body.0"]
    rnf.forget("b")
    seen = {}

    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            seen["weight"] = pl_module.body[0].weight.detach().clone()

    before = model.body[0].weight.detach().clone()
    model.heads.activate("b")
    trainer(rnf, Look(), max_epochs=1).fit(model, datamodule=task_data("b"))
    assert (own & ~kept).any()
    assert torch.equal(seen["weight"][~kept], initial[~kept])
    assert torch.equal(seen["weight"][kept], before[kept])
    assert rnf.state.resets == 2


def test_units_start_anew_though_no_task_is_left():
    model, rnf = trained(tasks="a", reset_free=True)
    initial = {name: value.clone() for name, value in rnf.state.initial.items()}
    rnf.forget("a")
    seen = {}

    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            seen.update({name: value.clone() for name, value in pl_module.state_dict().items()})

    trainer(rnf, Look(), max_epochs=1).fit(model, datamodule=task_data("a"))
    assert all(torch.equal(seen[name], value) for name, value in initial.items())
    assert list(rnf.state.tasks) == ["a"]


def test_what_tests_have_logged_of_it_is_in_no_later_report():
    model, rnf = trained(tasks="a")
    for task in "bc":
        train(model, rnf, task, max_epochs=1)
        for tested in TASKS[: TASKS.index(task) + 1]:
            trainer(rnf).test(model, datamodule=task_data(tested), verbose=False)
    rnf.forget("b")
    train(model, rnf, "b", max_epochs=1)
    report = rnf.report(model)
    assert list(rnf.state.tasks) == ["a", "c", "b"]
    assert report.matrix[1].isnan().tolist() == [False, False, True]  # b was tested after c, but not this b
    assert "b" not in rnf.state.tasks["c"].tests


def test_tasks_without_a_name_go_on_being_told_apart():
    model = Classifier()
    rnf = RelevanceFreezing(candidates="all", criterion=lambda score: score.relevant >= 24)
    for head in TASKS[:2]:
        model.heads.activate(head)
        data = task_data(head)
        trainer(rnf, max_epochs=1).fit(model, data.train_dataloader(), data.val_dataloader())
    rnf.forget("task-0")
    model.heads.activate("a")
    data = task_data("a")
    trainer(rnf, max_epochs=1).fit(model, data.train_dataloader(), data.val_dataloader())
    assert list(rnf.state.tasks) == ["task-1", "task-2"]


def test_an_unknown_task_and_a_fit_under_way():
    model, rnf = trained(tasks="a")
    with pytest.raises(KeyError, match=r"no finished task 'z'; finished tasks: \['a'\]"):
        rnf.forget("z")
    said = []

    class Forget(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            with pytest.raises(RuntimeError) as caught:
                rnf.forget("a")
            said.append(str(caught.value))

    model.heads.activate("b")
    trainer(Forget(), rnf, max_epochs=1).fit(model, datamodule=task_data("b"))
    assert said == ["a fit is under way: forget 'a' before it, or after its end"]
    assert list(rnf.state.tasks) == ["a", "b"]
