"""What a task's end sees on all of its reference data, and that nothing after its record costs the task."""

from __future__ import annotations

import math
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import DataLoader, TensorDataset
from training import Classifier, clusters, frozen_rows, inputs, loader, plain, task_data, train, trainer

from lightning_rnf import MultiHead, RelevanceFreezing
from lightning_rnf.streams import TaskDataModule
from lightning_rnf.tasks.foresight import Sight, of_drift
from lightning_rnf.tasks.loaders import fingerprint

# A sum of experts' outputs by index has no rule of its own; where they are disjoint it hands relevance on.
pytestmark = pytest.mark.filterwarnings("ignore:.*relevance is not conserved:UserWarning")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Experts(Classifier):
    """Two experts by the sign of the last input, of which few samples have a negative one; run if there are any."""

    def __init__(self, **options):
        super().__init__(**options)
        self.body = nn.Sequential(nn.Linear(6, 40), nn.ReLU())
        self.experts = nn.ModuleList(nn.Linear(40, 24) for _ in range(2))
        self.heads = MultiHead(24, dict.fromkeys("abc", 2))

    def forward(self, x):
        hidden, to = self.body(x), (x[:, 5] < -1.2).long()
        out = hidden.new_zeros(len(x), 24)
        for number, expert in enumerate(self.experts):
            rows = (to == number).nonzero().view(-1)
            if len(rows):
                out = out.index_add(0, rows, expert(hidden[rows]).relu())
        return self.heads(out)


def data(task, batch_size=32):
    return TaskDataModule(task, 2, *(clusters(task, 320, seed) for seed in range(3)), batch_size=batch_size)


def fit(model, rnf, task, batch_size=32, **options):
    model.heads.activate(task)
    trainer(rnf, **options).fit(model, datamodule=data(task, batch_size))


def rare(samples=200):
    x = inputs(samples)
    x[:, 5] = -2.0
    return x


@pytest.mark.parametrize("sizes", [(4, 4), (64, 64), (4, 64), (64, 4)])
def test_what_any_batch_runs_belongs_to_the_task_whatever_their_size(sizes):
    torch.manual_seed(0)
    model, rnf = Experts(), RelevanceFreezing()
    fit(model, rnf, "a", sizes[0], max_epochs=2)
    assert {layer.name for layer in rnf.state.layers} == {"body.0", "experts.0", "experts.1"}
    assert rnf.state.shared == ()
    with rnf.recall("a", model), torch.no_grad():
        before = model(rare())
    rows = frozen_rows(model, rnf)
    fit(model, rnf, "b", sizes[1], max_epochs=2)
    assert all(torch.equal(frozen_rows_of(model, rnf, "a")[name], value) for name, value in rows.items())
    with rnf.recall("a", model), torch.no_grad():
        assert torch.equal(model(rare()), before)
    assert rnf.report(model).is_sound


def frozen_rows_of(model, rnf, task):
    record, parameters = rnf.state.tasks[task], dict(model.named_parameters())
    return {
        name: parameters[name].detach()[record.relevant[layer.name]]
        for layer in rnf.state.layers
        for name in layer.parameters
    }


def test_the_same_batches_in_another_order_give_the_same_units():
    found = []
    for reverse in (False, True):
        torch.manual_seed(0)
        model, rnf = Experts(), RelevanceFreezing()
        batches = [(x, y) for x, y in DataLoader(clusters("a", 320, 1), batch_size=8)]
        rnf.reference = batches[::-1] if reverse else batches
        fit(model, rnf, "a", max_epochs=1)
        found.append({layer.name: layer.units for layer in rnf.state.layers})
    assert found[0] == found[1] == {"body.0": 40, "experts.0": 24, "experts.1": 24}


def test_a_task_that_never_runs_a_known_layer_ends_and_leaves_it_alone():
    torch.manual_seed(0)
    model, rnf = Experts(weight_decay=0.1), RelevanceFreezing()
    fit(model, rnf, "a", max_epochs=2)
    with rnf.recall("a", model), torch.no_grad():
        before = model(rare())
    common = [clusters("b", 320, seed).tensors for seed in range(3)]
    parts = [TensorDataset(x.index_fill(1, torch.tensor([5]), 1.0), y) for x, y in common]
    model.heads.activate("b")
    trainer(rnf, max_epochs=2).fit(model, datamodule=TaskDataModule("b", 2, *parts, batch_size=32))
    assert not (rnf.state.tasks["b"].relevant["experts.1"] & ~rnf.state.tasks["a"].relevant["experts.1"]).any()
    with rnf.recall("a", model), torch.no_grad():
        assert torch.equal(model(rare()), before)


class Branches(Experts):
    """The weight of the second expert is used outside of it, too: no layer of units can be made of it."""

    def forward(self, x):
        hidden, is_rare = self.body(x), x[:, 5] < -1.2
        out = self.experts[0](hidden).relu()
        if is_rare.any():
            extra = self.experts[1](hidden)
            again = nn.functional.linear(hidden.flip(1), self.experts[1].weight)
            out = out + (extra + again) * is_rare.view(-1, 1)
        return self.heads(out)


def test_what_can_not_be_made_of_units_is_frozen_whole_with_the_task_by_name():
    torch.manual_seed(0)
    model, rnf = Branches(), RelevanceFreezing()
    x, y = clusters("a", 320, 1).tensors
    order = x[:, 5].argsort(descending=True)  # the rare ones last: the batch that is traced has none
    rnf.reference = list(zip(x[order].split(32), y[order].split(32), strict=True))
    assert (rnf.reference[-1][0][:, 5] < -1.2).any()
    model.heads.activate("a")
    with pytest.warns(UserWarning, match=r"a: experts\.1 ran on some batches .* frozen whole with the task"):
        trainer(rnf, max_epochs=1).fit(model, datamodule=data("a"))
    assert set(rnf.state.shared) == {"experts.1.weight", "experts.1.bias"}
    with rnf.recall("a", model), torch.no_grad():
        before = model(rare())
    rnf.reference = None
    model.heads.activate("b")
    trainer(rnf, max_epochs=1).fit(model, datamodule=data("b", 4))
    with rnf.recall("a", model), torch.no_grad():
        assert torch.equal(model(rare()), before)


class Late(Experts):
    """A third expert that no sample of the first task is sent to."""

    def __init__(self):
        super().__init__()
        self.experts.append(nn.Linear(40, 24))

    def forward(self, x):
        hidden, to = self.body(x), (x[:, 5] < -1.2).long()
        to = to.masked_fill(x[:, 0] > 50, 2)
        out = hidden.new_zeros(len(x), 24)
        for number, expert in enumerate(self.experts):
            rows = (to == number).nonzero().view(-1)
            if len(rows):
                out = out.index_add(0, rows, expert(hidden[rows]).relu())
        return self.heads(out)


@pytest.mark.filterwarnings("ignore:.*ran on some batches of the reference data only:UserWarning")
@pytest.mark.parametrize("place", ["first", "last", "everywhere"])
def test_an_expert_that_only_a_later_task_runs_is_frozen_whole_wherever_its_samples_stand(place):
    model, rnf = Late(), RelevanceFreezing()
    fit(model, rnf, "a", 64, max_epochs=1)
    with rnf.recall("a", model), torch.no_grad():
        before = model(rare())
    x, y = clusters("b", 320, 1).tensors
    chosen = {"first": slice(0, 20), "last": slice(300, 320), "everywhere": slice(0, 320, 4)}[place]
    x[chosen, 0] = 100.0
    rnf.reference = DataLoader(TensorDataset(x, y), 16)
    fit(model, rnf, "b", 64, max_epochs=1)
    assert {"experts.2.weight", "experts.2.bias"} <= set(rnf.state.shared)
    assert {layer.name for layer in rnf.state.layers} == {"body.0", "experts.0", "experts.1"}
    with rnf.recall("b", model), torch.no_grad():
        of_b = model(x)
    rnf.reference = None
    fit(model, rnf, "c", 64, max_epochs=1)
    with torch.no_grad():
        with rnf.recall("a", model):
            assert torch.equal(model(rare()), before)
        with rnf.recall("b", model):
            assert torch.equal(model(x), of_b)


@pytest.mark.filterwarnings("ignore:no free units are left:UserWarning")
def test_a_layer_that_runs_twice_on_some_batches_costs_no_task():
    class Twice(Classifier):
        def forward(self, x):
            hidden = self.body(x)
            if (x[:, 0] > 1.5).any():
                hidden = self.body[3](hidden).relu()
            return self.heads(hidden)

    model, rnf = Twice(), RelevanceFreezing()
    x, y = clusters("a", 320, 1).tensors
    order = x[:, 0].argsort()  # rehearsed on the first batch; the end's first, drawn at random, runs it twice
    rnf.reference = DataLoader(TensorDataset(x[order], y[order]), 32)
    fit(model, rnf, "a", max_epochs=1)
    with rnf.recall("a", model), torch.no_grad():
        before = model(x)
    fit(model, rnf, "b", max_epochs=1)
    assert list(rnf.state.tasks) == ["a", "b"]
    with rnf.recall("a", model), torch.no_grad():
        assert torch.equal(model(x), before)


class Optional(Classifier):
    """Parameters of its own that functions read on some batches only."""

    def __init__(self, form):
        super().__init__()
        self.form = form
        self.extra = nn.Parameter(torch.randn(40) * 0.1)
        self.several = nn.ParameterList(torch.randn(40, 40) * 0.1 for _ in range(2))

    def forward(self, x):
        hidden, high = self.body(x), x[:, :1] > 1.2
        if self.form == "parameter" and high.any():
            hidden = hidden + self.extra * high
        if self.form == "list":
            hidden = hidden + (hidden @ self.several[0]).relu() * ~high
            if high.any():
                hidden = hidden + (hidden @ self.several[1]).relu() * high
        return self.heads(hidden)


@pytest.mark.parametrize("form", ["parameter", "list"])
def test_parameters_that_only_some_batches_read_belong_to_the_task(form):
    model, rnf = Optional(form), RelevanceFreezing()
    x, y = clusters("a", 320, 1).tensors
    order = x[:, 0].argsort()
    rnf.reference = list(zip(x[order].split(32), y[order].split(32), strict=True))
    fit(model, rnf, "a", max_epochs=1)
    assert {"parameter": "extra", "list": "several.1"}[form] in rnf.state.shared
    rnf.reference = None
    with rnf.recall("a", model), torch.no_grad():
        before = model(x)
    fit(model, rnf, "b", max_epochs=1)
    with rnf.recall("a", model), torch.no_grad():
        assert torch.equal(model(x), before)


class Routed(Experts):
    """Sent by what the body says: silence moves it."""

    threshold = -1.0

    def forward(self, x):
        hidden = self.body(x)
        to = (hidden.mean(-1) < self.threshold).long()
        out = hidden.new_zeros(len(x), 24)
        for number, expert in enumerate(self.experts):
            chosen = (to == number).unsqueeze(-1)
            if chosen.any():
                out = out + expert(hidden).relu() * chosen
        return self.heads(out)


def test_what_only_the_sub_network_runs_belongs_to_the_task():
    x = clusters("a", 320, 1).tensors[0]

    class Sets(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            with torch.no_grad():  # just below the least of the whole network
                pl_module.threshold = float(pl_module.body(x).mean(-1).min()) - 1e-4

    model, rnf = Routed(), plain(criterion=0.1)
    model.heads.activate("a")
    with pytest.warns(UserWarning, match=r"a: experts\.1 ran on some batches"):
        trainer(Sets(), rnf, max_epochs=3).fit(model, datamodule=data("a"))
    assert "experts.1.weight" in rnf.state.shared
    with rnf.recall("a", model), torch.no_grad():
        before = model(x)
    fit(model, rnf, "b", max_epochs=1)
    with rnf.recall("a", model), torch.no_grad():
        assert torch.equal(model(x), before)


def test_an_input_that_runs_what_no_reference_sample_has_run_is_told_of_in_recall():
    model, rnf = Routed(), RelevanceFreezing(criterion=0.1)
    model.threshold = -math.inf
    fit(model, rnf, "a")
    assert "experts.1.weight" not in {name for layer in rnf.state.layers for name in layer.parameters}
    x = clusters("a", 320, 1).tensors[0]
    with rnf.recall("a", model), torch.no_grad():
        model(x)  # not a word: as the reference data
        model.threshold = math.inf
        with pytest.warns(
            UserWarning, match=r"'experts.1' \(Linear\) runs in the recall of 'a', but ran on none of its"
        ):
            model(x)
        model(x)  # once


# -- drift ------------------------------------------------------------------------------------------------------------


class Dropping(Classifier):
    def forward(self, x):
        return self.heads(nn.functional.dropout(self.body(x), 0.2))  # training=True: in eval mode, too


def test_one_sample_a_batch_does_not_hide_that_runs_differ():
    model, rnf = Dropping(), RelevanceFreezing(reference_samples=64)
    model.heads.activate("a")
    with pytest.warns(UserWarning, match="a: two runs of its sub-network on the same samples differ by up to"):
        trainer(rnf, max_epochs=1).fit(model, datamodule=data("a", 1))


class Counting(Classifier):
    runs = 0

    def forward(self, x):
        self.runs += 1
        return self.heads(self.body(x) * (1 + 0.01 * self.runs))


@pytest.mark.parametrize("kind", [Dropping, Counting])
def test_what_two_runs_do_not_agree_about_is_said_when_the_task_ends(kind):
    with pytest.warns(UserWarning, match="a: two runs of its sub-network on the same samples differ by up to"):
        train(kind(), rnf := RelevanceFreezing(criterion=0.3), "a", max_epochs=1)
    assert list(rnf.state.tasks) == ["a"]
    assert rnf.report().is_sound is None  # not known, and not called drift


def test_whatever_is_not_as_it_was_is_named_with_its_likely_causes():
    with pytest.warns(
        UserWarning, match=r"c: recall of 'a' is not .* a logit by 0.5 and weights .* in body.0 changed\. L"
    ):
        of_drift("c", Sight({"a": 0.5, "b": 0.0}, 0.0), {"a": ["body.0"], "b": []})
    of_drift("c", Sight({"a": 0.0}, 0.0), {"a": []})


@pytest.mark.parametrize("options", [{"retention": "paper"}, {"elasticity": 0.1}])
def test_where_drift_is_no_surprise_nothing_is_said_of_it(options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*recall will not be exact")
        rnf = RelevanceFreezing(**options)
    model = Classifier(lr=0.05)
    train(model, rnf, "a", "b")
    assert rnf.state.tasks["b"].drift["a"] > 0


def test_weights_that_are_written_after_the_record_are_said():
    class Swaps(Classifier):
        def on_train_end(self):
            with torch.no_grad():
                self.body[0].weight.mul_(1.5)

    with pytest.warns(UserWarning, match=r"a: weights were written after the task's record was made \(body.0\)"):
        train(Swaps(), rnf := RelevanceFreezing(), "a")
    assert list(rnf.state.tasks) == ["a"]


# -- an audit costs no task -------------------------------------------------------------------------------------------


class OwnHeads(Classifier):
    def __init__(self, classes):
        super().__init__()
        self.heads = nn.ModuleDict({task: nn.Linear(40, number) for task, number in classes.items()})
        self.task = "a"

    def forward(self, x):
        return self.heads[self.task](self.body(x))


@pytest.mark.parametrize("classes", [{"a": 2, "b": 2}, {"a": 2, "b": 3}])
def test_probes_whose_head_does_not_run_are_not_compared(classes):
    model, rnf = OwnHeads(classes), RelevanceFreezing(heatmaps=0)
    for task in "ab":
        model.task = rnf.task = task
        trainer(rnf).fit(model, loader(task), loader(task))
    assert rnf.state.tasks["b"].drift == {}
    assert rnf.report(model).is_sound is None
    model.task = "a"
    assert rnf.report(model).drift == {"a": 0.0}  # and b's was only compared at its own end


class Failing(Classifier):
    """Forwards of few samples fail once the training has ended."""

    def forward(self, x):
        if len(x) <= 8 and getattr(self, "ended", False):
            raise RuntimeError("too few samples\nto go on")
        return self.heads(self.body(x))

    def on_train_end(self):
        self.ended = True


@pytest.mark.filterwarnings("ignore:no free units are left:UserWarning")
def test_a_probe_that_fails_is_a_warning_and_the_task_is_in_its_checkpoint(tmp_path, monkeypatch):
    class Ended(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            pl_module.ended = True

    model, rnf = Failing(), RelevanceFreezing(reference_samples=64)
    model.heads.activate("a")
    data = TaskDataModule("a", 2, *(clusters("a", 64, seed) for seed in range(3)), batch_size=64)
    options = {"enable_checkpointing": True, "max_epochs": 1}
    fitting = trainer(Ended(), rnf, ModelCheckpoint(tmp_path), **options)
    fitting.fit(model, datamodule=data)  # the cut batch fails, so the whole one is kept
    assert len(rnf._witnesses.probes["a"].logits) == 64
    checkpoint = torch.load(tmp_path / "a-ended.ckpt", weights_only=True)
    assert [task["name"] for task in checkpoint["callbacks"]["RelevanceFreezing"]["tasks"]] == ["a"]

    def fails(*args, **kwargs):
        raise RuntimeError("no such\nsample")

    model.heads.activate("b")
    monkeypatch.setattr("lightning_rnf.tasks.witnesses.taken", fails)
    fitting = trainer(rnf, ModelCheckpoint(tmp_path), **options)
    with pytest.warns(UserWarning, match=r"b: a few samples could not be kept.*RuntimeError: no such sample"):
        fitting.fit(model, datamodule=task_data("b"))
    checkpoint = torch.load(tmp_path / "b-ended.ckpt", weights_only=True)
    assert [task["name"] for task in checkpoint["callbacks"]["RelevanceFreezing"]["tasks"]] == ["a", "b"]


class Graph(Classifier):
    """One graph is one batch: rows of all its tensors are no smaller graph."""

    def forward(self, x, adjacency):
        for layer in (self.body[0], self.body[3]):
            x = (adjacency @ layer(x)).relu()
        return self.heads(x)

    def training_step(self, batch):
        return nn.functional.cross_entropy(self(batch["x"], batch["adjacency"]), batch["y"])

    def validation_step(self, batch): ...


@pytest.mark.filterwarnings("ignore:no free units are left:UserWarning")
@pytest.mark.parametrize("form", ["dense", "sparse", "too large"])
def test_what_can_not_be_cut_into_samples_is_kept_whole_or_not_at_all(form, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x, y = clusters("a", 60).tensors
    adjacency = torch.eye(60) + (torch.rand(60, 60, generator=generator) < 0.02).float()
    graph = {"x": x, "adjacency": adjacency if form == "dense" else adjacency.to_sparse(), "y": y}
    loader = DataLoader([graph], batch_size=None)
    rnf = RelevanceFreezing(predict=lambda module, batch: (module(batch["x"], batch["adjacency"]), batch["y"]))
    rnf.task = "a"
    model = Graph()
    model.heads.activate("a")
    if form == "too large":
        monkeypatch.setattr("lightning_rnf.tasks.probes.LARGEST", 100)
        with pytest.warns(UserWarning, match="a: its reference data can't be cut into samples and are too large"):
            trainer(rnf).fit(model, loader, loader)
    else:
        trainer(rnf).fit(model, loader, loader)
    assert list(rnf.state.tasks) == ["a"]
    assert rnf.report(model).drift == ({} if form == "too large" else {"a": 0.0})


class Packed(Classifier):
    """Samples of unequal lengths, of which the last steps count; a layer has a forward of its own."""

    class Itself(nn.Linear):
        def forward(self, steps: PackedSequence):
            data = nn.functional.linear(steps.data, self.weight, self.bias).relu()
            return PackedSequence(data, steps.batch_sizes, steps.sorted_indices, steps.unsorted_indices)

    def __init__(self, **options):
        super().__init__(**options)
        self.body, self.first = nn.Sequential(nn.Linear(6, 24), nn.ReLU()), self.Itself(6, 6)
        self.heads = MultiHead(24, dict.fromkeys("abc", 2))

    def forward(self, x):
        steps, lengths = nn.utils.rnn.pad_packed_sequence(self.first(x), batch_first=True)
        return self.heads(self.body(steps[torch.arange(len(steps)), lengths - 1]))


def test_packed_sequences_are_kept_whole():
    x, y = clusters("a", 60).tensors
    steps = [(one.repeat(1 + place % 3, 1), label) for place, (one, label) in enumerate(zip(x, y, strict=True))]

    def packed(samples):
        return pack_sequence([one for one, _ in samples], enforce_sorted=False), torch.stack([y for _, y in samples])

    data = DataLoader(steps, 20, collate_fn=packed)
    rnf = RelevanceFreezing(heads="heads.tasks.*", task="a")
    model = Packed()
    trainer(rnf).fit(model, data, data)
    assert rnf.report(model).drift == {"a": 0.0}
    assert len(fingerprint(next(iter(data)))) == 5  # of all tensors of the sequence, and of the labels


# -- what will disappoint ---------------------------------------------------------------------------------------------


def test_a_constant_answer_that_meets_the_criterion_is_said_with_the_way_out():
    def imbalanced(seed):
        x, _ = clusters("a", 400, seed).tensors
        return TensorDataset(x, (x.sum(1) > 5.9).long())

    model, rnf = Classifier(), RelevanceFreezing()
    model.heads.activate("a")
    shares = imbalanced(1).tensors[1].double().mean()
    assert 0 < shares < 0.02
    data = TaskDataModule("a", 2, *(imbalanced(seed) for seed in range(3)), batch_size=32)
    with pytest.warns(UserWarning, match=r"a: an answer that is always the same has an accuracy of 0\.9.*'macro'"):
        trainer(rnf, max_epochs=1).fit(model, datamodule=data)


def test_a_task_at_chance_is_said():
    model, rnf = Classifier(lr=0.0), RelevanceFreezing(criterion=0.05, fit_head=False)
    with pytest.warns(
        UserWarning, match="a: an answer that is always the same has an accuracy of 0.5.* so the task is at chance"
    ):
        train(model, rnf, "a", max_epochs=1)


@pytest.mark.filterwarnings("ignore:no free units are left:UserWarning")
def test_a_criterion_that_lets_nothing_go_is_said():
    class Nothing:
        def __call__(self, score):
            return False

    with pytest.warns(UserWarning, match=r"a: not one of 80 free units can go"):
        train(Classifier(), RelevanceFreezing(criterion=Nothing()), "a", max_epochs=1)


def test_a_task_without_a_unit_is_said():
    with pytest.warns(UserWarning, match=r"a: no unit is relevant"):
        train(Classifier(), RelevanceFreezing(criterion=lambda score: True), "a", max_epochs=1)


def test_a_network_that_is_mostly_shared_is_said_before_the_first_training():
    class Recurrent(Classifier):
        def __init__(self):
            super().__init__()
            self.memory = nn.LSTMCell(6, 30)  # a step that somebody else repeats; of an nn.LSTM there are units
            self.body = nn.Sequential(nn.Linear(30, 40), nn.ReLU())

        def forward(self, x):
            return self.heads(self.body(self.memory(x)[0]))

    started = []

    class Watch(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            started.append(len(caught))

    model, rnf = Recurrent(), RelevanceFreezing()
    model.heads.activate("a")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(rnf, Watch(), max_epochs=1).fit(model, datamodule=task_data("a"))
    said = [str(one.message) for one in caught[: started[0]] if "belong to no unit" in str(one.message)]
    assert len(said) == 1
    assert said[0].startswith("79% of the parameters outside of heads")
    assert "memory (4,560" in said[0]


def test_a_full_layer_is_said_with_the_way_out():
    rnf = plain(criterion=0.0, search="linear", resolution=80)
    with pytest.warns(UserWarning, match=r"no free units are left in body.0, body.3: .*ration= or recovery_epochs="):
        train(Classifier(), rnf, "a", max_epochs=1)
