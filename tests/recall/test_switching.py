"""A batch of several tasks: each sample runs as in the recall of its own task, and nothing of the model is changed."""

from __future__ import annotations

import math

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from snapshot import changes, snapshot
from torch import nn
from training import TASKS, Classifier, ConvClassifier, OwnHeads, clusters, frozen_entries, plain, train

from lightning_rnf import MultiHead, RelevanceFreezing
from lightning_rnf.recall.switching import Patch

pytestmark = pytest.mark.filterwarnings("ignore:no free units are left:UserWarning")

MIXED = ["b", "a", "a", "c", "b", "a", "c"]


@pytest.fixture(autouse=True)
def _seed():
    pl.seed_everything(0, verbose=False)


def samples(tasks=MIXED) -> torch.Tensor:
    return torch.stack([clusters(task, 10, seed=5)[index][0] for index, task in enumerate(tasks)])


def alone(rnf: RelevanceFreezing, model: nn.Module, x: torch.Tensor, tasks: list[str]) -> list[torch.Tensor]:
    """What each sample gets from the recall of its task, which runs the samples of that task as one batch."""
    logits: list[torch.Tensor] = [torch.empty(0)] * len(tasks)
    for task in set(tasks):
        places = [index for index, name in enumerate(tasks) if name == task]
        with rnf.recall(task, model), torch.no_grad():
            for index, row in zip(places, model(x[places]), strict=True):
                logits[index] = row
    return logits


def mixed(rnf: RelevanceFreezing, model: nn.Module, x: torch.Tensor, tasks: list[str]) -> torch.Tensor:
    with rnf.recall(tasks, model), torch.no_grad():
        return model(x)


class Recurrent(Classifier):
    """An LSTM over six numbers, and attention over what it says."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.LSTM(1, 20, batch_first=True)
        self.attention = nn.MultiheadAttention(20, 2, batch_first=True)
        self.norm = nn.LayerNorm(20)
        self.heads = MultiHead(20, dict.fromkeys(TASKS, 2))

    def forward(self, x):
        said = self.body(x.unsqueeze(-1))[0]
        return self.heads(self.norm(said + self.attention(said, said, said)[0]).mean(1))


class Words(Classifier):
    """Signs as words: rows of an embedding that a later task changes are brought back."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(12, 20)
        self.body = nn.Sequential(nn.Linear(120, 30), nn.ReLU())
        self.heads = MultiHead(30, dict.fromkeys(TASKS, 2))

    def forward(self, x):
        return self.heads(self.body(self.words((x > 0).long() + 2 * torch.arange(6)).flatten(1)))


@pytest.mark.parametrize("kind", [Classifier, ConvClassifier, Recurrent, Words])
def test_each_sample_of_a_batch_gets_the_bits_of_its_own_tasks_recall(kind):
    rnf, model = plain(), kind()
    train(model, rnf, *TASKS)
    x = samples()
    before = snapshot(model)
    found = mixed(rnf, model, x, MIXED)
    for row, expected in zip(found, alone(rnf, model, x, MIXED), strict=True):
        assert torch.equal(row, expected)
    assert not changes(before, snapshot(model))
    assert len({tuple(row.tolist()) for row in found}) == len(MIXED)


def test_free_weights_that_have_become_nan_are_not_heard():
    rnf, model = RelevanceFreezing(recovery_epochs=0), ConvClassifier()
    train(model, rnf, "a", "b")
    x = samples(tasks := ["a", "b", "a", "b"])
    before = alone(rnf, model, x, tasks)
    frozen = rnf.state.frozen()
    with torch.no_grad():
        for layer in rnf.state.layers:
            model.get_parameter(layer.weight)[~frozen[layer.name]] = math.nan
    found = mixed(rnf, model, x, tasks)
    assert all(torch.equal(row, expected) for row, expected in zip(found, before, strict=True))


def test_tasks_may_change_from_batch_to_batch_and_hooks_of_the_users_may_come():
    rnf, model = plain(), ConvClassifier()
    train(model, rnf, "a", "b")
    tasks, seen = ["a"], []
    with rnf.recall(tasks, model), torch.no_grad():
        first = model(samples(["a"]))
        handle = model.body[1].register_forward_hook(lambda *_: seen.append(1))
        tasks[:] = ["a", "b", "b"]
        second = model(samples(tasks))
        handle.remove()
        tasks[:] = ["b"]
        third = model(samples(["b"]))
    assert len(seen) == 2  # once for each task, and only while it hung there
    assert torch.equal(first[0], alone(rnf, model, samples(["a"]), ["a"])[0])
    assert torch.equal(third[0], alone(rnf, model, samples(["b"]), ["b"])[0])
    for row, expected in zip(second, alone(rnf, model, samples(["a", "b", "b"]), ["a", "b", "b"]), strict=True):
        assert torch.equal(row, expected)


class WithNorm(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 40), nn.LayerNorm(40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU())


def test_a_model_that_gets_another_dtype_inside_is_read_anew():
    rnf, model = plain(), WithNorm()
    train(model, rnf, "a", "b")
    x = samples(tasks := ["a", "b", "a"])
    with rnf.recall(tasks, model), torch.no_grad():
        model(x)
        found = model.double()(x.double())
    for row, expected in zip(found, alone(rnf, model, x.double(), tasks), strict=True):
        assert torch.equal(row, expected)


def test_buffers_that_are_loaded_inside_are_not_heard():
    rnf, model = plain(recalibrate_norm=False), ConvClassifier()  # so "b" has the model's own statistics, at first
    train(model, rnf, "a", "b")
    x = samples(tasks := ["a", "b", "a"])
    before = alone(rnf, model, x, tasks)
    others = {name: value + 1.5 if "running" in name else value for name, value in model.state_dict().items()}
    with rnf.recall(tasks, model), torch.no_grad():
        model(x)
        model.load_state_dict(others)
        found = model(x)
    assert all(torch.equal(row, expected) for row, expected in zip(found, before, strict=True))


def test_free_weights_that_become_nan_inside_are_not_heard():
    rnf, model = RelevanceFreezing(recovery_epochs=0), ConvClassifier()
    train(model, rnf, "a", "b")
    x = samples(tasks := ["a", "b", "a"])
    before = alone(rnf, model, x, tasks)
    held = frozen_entries(rnf, model)
    with rnf.recall(tasks, model), torch.no_grad():
        model(x)
        for layer in rnf.state.layers:
            model.get_parameter(layer.weight)[~held[layer.weight]] = math.nan
        found = model(x)
    assert all(torch.equal(row, expected) for row, expected in zip(found, before, strict=True))


def test_a_forward_for_inference_leaves_nothing_that_stops_a_later_backward_pass():
    rnf, model = plain(), ConvClassifier()
    train(model, rnf, "a", "b")
    x = samples(["a", "b", "a"]).requires_grad_()
    with rnf.recall(["a", "b", "a"], model):
        with torch.inference_mode():
            model(x)
        model(x).sum().backward()
    assert (x.grad != 0).any(1).all()


class KeptBeside(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(40))
        self.kept = [self.mean]

    def forward(self, x):
        said = self.body(x)
        if self.training:
            self.mean.lerp_(said.detach().mean(0), 0.1)
        return self.heads(said - self.kept[0])


def test_a_buffer_that_has_to_be_written_to_is_refused():
    rnf, model = plain(), KeptBeside()
    train(model, rnf, "a", "b")
    x, before = samples(["a", "b"]), snapshot(model)
    with rnf.recall(["a", "b"], model), pytest.raises(ValueError, match="'mean' is kept by another attribute"):
        model(x)
    assert not changes(before, snapshot(model))
    first = alone(rnf, model, x, ["a", "b"])
    model.mean.add_(1)
    second = alone(rnf, model, x, ["a", "b"])
    assert all(torch.equal(row, expected) for row, expected in zip(first, second, strict=True))


@pytest.mark.parametrize("make", [plain, RelevanceFreezing.paper])
@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_that_come_to_the_model_itself_run_once_for_the_whole_batch(make, register):
    rnf, model = make(), Classifier()
    train(model, rnf, "a", "b")
    seen = []
    with rnf.recall(["a", "b", "a"], model), torch.no_grad():
        model(samples(["a", "b", "a"]))
        getattr(model, register)(lambda module, args, *_: seen.append(len(args[0])))
        model(samples(["a", "b", "a"]))
    assert seen == [3]


def test_hooks_on_the_model_itself_run_once_for_the_whole_batch():
    rnf, model = plain(), Classifier()
    train(model, rnf, "a", "b")
    seen = []
    model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    model.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    mixed(rnf, model, samples(["a", "b", "a"]), ["a", "b", "a"])
    assert seen == [3, 3]


def test_classes_that_a_task_does_not_have_are_minus_infinity():
    rnf, model = plain(), Classifier()
    model.heads = MultiHead(40, {"a": 2, "b": nn.Linear(40, 4)})
    train(model, rnf, "a", "b")
    found = mixed(rnf, model, samples(["a", "b"]), ["a", "b"])
    assert found.shape == (2, 4)
    assert found[0, 2:].tolist() == [-math.inf] * 2
    assert found[1].isfinite().all()


def test_gradients_arrive_at_the_inputs_of_all_samples():
    rnf, model = plain(), Classifier()
    train(model, rnf, "a", "b")
    x = samples(["a", "b", "a"]).requires_grad_()
    with rnf.recall(["a", "b", "a"], model):
        model(x).sum().backward()
    assert (x.grad != 0).any(1).all()


class Outputs(Classifier):
    made = staticmethod(lambda logits: {"logits": logits, "scale": 1.0, "more": (logits, None)})

    def forward(self, x):
        logits = super().forward(x)
        return self.made(logits) if self.made else logits


def test_outputs_of_any_form_are_put_together():
    rnf, model = plain(predict=lambda module, batch: (module(batch[0])["logits"], batch[1])), Outputs()
    for task in ("a", "b"):
        model.heads.activate(task)
        rnf.protect(model, [tuple(clusters(task, 64).tensors)], name=task, criterion=0.5)
    found = mixed(rnf, model, samples(["a", "b", "a"]), ["a", "b", "a"])
    assert found["scale"] == 1.0
    assert found["more"][1] is None
    assert torch.equal(found["more"][0], found["logits"])


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda logits: (logits, logits.mean()), "one for a whole batch"),
        (lambda logits: (logits, logits.T), "only what has one entry for each sample"),
        (lambda logits: (logits, len(logits)), "one for a whole batch"),
    ],
)
def test_what_is_of_a_whole_batch_is_refused(made, message):
    rnf, model = plain(predict=lambda module, batch: (module(batch[0])[0], batch[1])), Outputs()
    model.made = made
    for task in ("a", "b"):
        model.heads.activate(task)
        rnf.protect(model, [tuple(clusters(task, 64).tensors)], name=task, criterion=0.5)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message), rnf.recall(["a", "b", "a"], model):
        model(samples(["a", "b", "a"]))
    assert not changes(before, snapshot(model))


def test_a_task_that_is_unknown_and_a_batch_of_another_size_are_refused():
    rnf, model = plain(), Classifier()
    train(model, rnf, "a")
    with pytest.raises(KeyError, match="'z'"), rnf.recall(["a", "z"], model):
        pass
    tasks = ["a"]
    with rnf.recall(tasks, model), pytest.raises(ValueError, match="tasks of 1 samples, but no tensor"):
        model(samples(["a", "a"]))
    with rnf.recall([], model), pytest.raises(ValueError, match="the tasks of no samples"):
        model(samples(["a"])[:0])
    with rnf.recall(tasks, model):
        tasks[:] = ["z"]
        with pytest.raises(KeyError, match="'z'"):
            model(samples(["a"]))


def test_names_may_be_an_array():
    rnf, model = plain(), Classifier()
    train(model, rnf, "a", "b")
    x = samples(tasks := ["b", "a"])
    found = mixed(rnf, model, x, np.array(tasks))
    assert torch.equal(found, mixed(rnf, model, x, tasks))


def test_heads_that_nobody_switches_are_refused():
    rnf, model = plain(), OwnHeads()
    for task in ("a", "b"):
        model.active = task
        rnf.protect(model, [tuple(clusters(task, 64).tensors)], name=task, criterion=0.5)
    with (
        rnf.recall(["a", "b"], model),
        pytest.raises(ValueError, match=r"the head of task 'a', 'heads.a', did not run"),
    ):
        model(samples(["a", "b"]))


def test_a_patch_is_put_on_and_taken_off_by_identity():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    other = torch.ones(2)

    class Context:
        def __enter__(self):
            self.handle = net[0].register_forward_hook(lambda *_: None)
            self.mean, net[1]._buffers["running_mean"] = net[1]._buffers["running_mean"], other
            net[1].extra = 5
            net[1]._buffers["more"] = other

        def __exit__(self, *_):
            self.handle.remove()
            del net[1]._buffers["more"]
            net[1]._buffers["running_mean"] = self.mean
            del net[1].extra

    before = snapshot(net)
    patch = Patch(net, Context())
    assert not changes(before, snapshot(net))
    assert patch.fits()
    with patch.on():
        assert net[1].running_mean is other
        assert net[1].extra == 5
        assert net[1].more is other
        assert len(net[0]._forward_hooks) == 1
    assert not changes(before, snapshot(net))
    net[0].register_forward_hook(lambda *_: None)
    assert not patch.fits()


def test_where_one_task_is_recalled_no_batch_of_several_is():
    rnf, model = plain(), Classifier()
    train(model, rnf, "a", "b")
    x = samples(["a", "b"])
    with rnf.recall("a", model):
        for refused in (lambda: rnf.recall(["a", "b"], model).__enter__(), lambda: rnf.infer_task(x, model)):
            with pytest.raises(ValueError, match="the model is in the recall of one task"):
                refused()
        with rnf.recall("b", model):
            pass
        with pytest.raises(ValueError, match="the model is in the recall of one task"):
            rnf.infer_task(x, model)
    expected = alone(rnf, model, x, ["a", "b"])
    assert all(torch.equal(row, one) for row, one in zip(mixed(rnf, model, x, ["a", "b"]), expected, strict=True))
