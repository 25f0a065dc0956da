"""A verdict is on all the data, and what is counted are targets: whatever `predict` makes of a batch."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from networks import CLASSES, mlp
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler, TensorDataset
from training import Classifier, clusters, trainer

from lightning_rnf import AccuracyDrop, RelevanceFreezing
from lightning_rnf.anatomy import UnitMap, measure
from lightning_rnf.memory import FreezeState
from lightning_rnf.recall import subnetwork
from lightning_rnf.runtime import Ranks
from lightning_rnf.tasks.reference import Reference
from lightning_rnf.tasks.selection import Selection

# -- any predict ------------------------------------------------------------------------------------------------------


def one_each(module, batch):
    x, y = batch
    return module(x[:, 0]), y[:, 0].clamp(min=0)


def flattened(module, batch):
    x, y = batch
    return module(x).flatten(0, 1), y.flatten().clamp(min=0)


def without_padding(module, batch):
    x, y = batch
    return module(x)[y >= 0], y[y >= 0]


def repeated(module, batch):
    logits, target = without_padding(module, batch)
    return logits.repeat_interleave(1 + target, 0), target.repeat_interleave(1 + target, 0)


def without_some_samples(module, batch):
    x, y = batch
    kept = x[:, 0, 0] > 0.5
    return flattened(module, (x[kept], y[kept]))


def several_labels(module, batch):
    logits, target = without_padding(module, batch)
    return logits, nn.functional.one_hot(target, CLASSES)


PREDICTS = (one_each, flattened, without_padding, repeated, without_some_samples, several_labels)


@dataclass
class Situation:
    """A network, sequences of places with labels (-1: padding) that it mostly knows, and how they are read."""

    predict: Callable
    batch_size: int
    tolerance: float
    net: nn.Module
    data: TensorDataset
    as_list: bool

    @classmethod
    def of(cls, predict, batch_size, tolerance, samples, places, padded, noise, as_list, seed):
        torch.manual_seed(seed)
        net, x = mlp(), torch.randn(samples, places, 4)
        y = net(x).argmax(2)
        # Samples differ in difficulty: a part of them can't tell how right the others are.
        noisy = torch.rand(samples, places) < noise * 2 * torch.rand(samples, 1)
        y = torch.where(noisy, torch.randint(CLASSES, y.shape), y)
        y[torch.rand(samples, places) < padded * 2 * torch.rand(samples, 1)] = -1
        return cls(predict, batch_size, tolerance, net, TensorDataset(x, y), as_list)

    @property
    def loader(self):
        batches = DataLoader(self.data, self.batch_size)
        return list(batches) if self.as_list else batches

    def drawn(self):
        reference = Reference(self.loader, None, 8, self.predict).draw_alone(self.net)
        targets = [self.predict(self.net, batch)[1] for batch in reference.batches]
        assume(sum(map(len, targets)) and sum(map(len, targets[: reference.attributed])))
        return reference

    def counted(self, batches):
        """Right answers and answers, one by one, and targets."""
        right = given = targets = 0
        with torch.no_grad():
            for batch in batches:
                for logits, target in zip(*self.predict(self.net, batch), strict=True):
                    targets += 1
                    answers = zip(logits > 0, target > 0, strict=True) if target.ndim else [(logits.argmax(), target)]
                    for answer, label in answers:
                        right += int(answer) == int(label)
                        given += 1
        return right / given, targets


SITUATIONS = st.builds(
    Situation.of,
    predict=st.sampled_from(PREDICTS),
    batch_size=st.integers(1, 9),
    tolerance=st.sampled_from([0.0, 0.02, 0.1, 0.3]),
    samples=st.integers(4, 24),
    places=st.integers(1, 12),
    padded=st.sampled_from([0.0, 0.4, 0.9]),
    noise=st.sampled_from([0.0, 0.3]),
    as_list=st.booleans(),
    seed=st.integers(0, 2**16),
)


class ToTheEnd(AccuracyDrop):
    def accuracy_limit(self, baseline):
        return None


@settings(max_examples=25, deadline=None, derandomize=True)
@given(SITUATIONS)
def test_what_is_recorded_is_what_recall_gives_on_all_of_the_reference_data(situation):
    net, reference, criterion = situation.net, situation.drawn(), AccuracyDrop(situation.tolerance)
    units = UnitMap.of(net, reference.example, situation.predict, heads="4")
    record, _ = Selection().select("a", net, units, reference, FreezeState(), criterion)
    whole, targets = situation.counted(reference.batches)
    assert (record.accuracy, record.samples) == (whole, targets)
    with subnetwork.recall(net, units.layers, record):
        assert record.subnetwork_accuracy == situation.counted(reference.batches)[0]
    assert record.accepted
    assert record.subnetwork_accuracy >= record.accuracy - situation.tolerance - 1e-12
    assert all(one.score.samples == targets for one in record.evaluations if one.accepted)
    # An evaluation that ends early changes no verdict.
    patient, _ = Selection().select("a", net, units, reference, FreezeState(), ToTheEnd(situation.tolerance))
    assert {one.score.samples for one in patient.evaluations} == {targets}
    assert [(one.score.cutoff, one.accepted) for one in record.evaluations] == [
        (one.score.cutoff, one.accepted) for one in patient.evaluations
    ]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(SITUATIONS, st.booleans(), st.sampled_from([0.0, 0.1, 1.0]))
def test_what_is_recorded_after_a_recovery_is_what_recall_gives(situation, milder, moved):
    net, reference, criterion = situation.net, situation.drawn(), AccuracyDrop(situation.tolerance)
    units = UnitMap.of(net, reference.example, situation.predict, heads="4")
    before, _ = Selection().select("a", net, units, reference, FreezeState(), AccuracyDrop(0.4), criterion)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += moved * torch.randn(parameter.shape)
    record, _ = Selection().settle(before, net, units, reference, FreezeState(), criterion, milder=milder)
    with subnetwork.recall(net, units.layers, record):
        accuracy, targets = situation.counted(reference.batches)
    assert (record.subnetwork_accuracy, record.samples) == (accuracy, targets)
    assert record.recovery[0].score.samples == targets
    if record.accepted:
        assert accuracy >= before.accuracy - situation.tolerance - 1e-12


class Shares:
    """Batches that give each rank's share in its turn."""

    def __init__(self, batches, size):
        self.turns = iter([Ranks(rank, size).share(batches) for rank in range(size)])

    def __iter__(self):
        return iter(next(self.turns))


class InTurn(Ranks):
    """Ranks that work one after the other, in one process."""

    def each(self, work):
        return [work() for _ in range(self.size)]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(SITUATIONS, st.integers(2, 4), st.floats(0, 1))
def test_several_ranks_count_what_one_counts(situation, size, lowest):
    batches = situation.drawn().batches
    accuracy, targets = situation.counted(batches)

    def measured(batches, **options):
        return measure(situation.net, batches, situation.predict, **options)

    together = measured(Shares(batches, size), ranks=InTurn(0, size))
    assert (together.accuracy, together.samples) == (accuracy, targets)
    alone = measured(batches, lowest=lowest, expected=targets)
    assert measured(Shares(batches, size), ranks=InTurn(0, size), lowest=lowest, expected=targets) == alone
    if accuracy < lowest - 1e-9:
        assert alone.accuracy < lowest
    else:
        assert (alone.accuracy, alone.samples) == (accuracy, targets)


# -- how far a loader is walked ---------------------------------------------------------------------------------------

GRAPHS = 96


def graphs(per_batch=8, nodes=7):
    """Batches of graphs, as libraries for them make one big graph of several: nodes first, then the graph of each."""
    generator = torch.Generator().manual_seed(0)
    for start in range(0, GRAPHS, per_batch):
        several = min(per_batch, GRAPHS - start)
        x = torch.randn(several * nodes, 6, generator=generator)
        graph = torch.arange(several).repeat_interleave(nodes)
        yield {"x": x, "edges": torch.zeros(2, 3 * several).long(), "graph": graph, "y": graph[::nodes] % 2}


def by_graph(module, batch):
    hidden = module.body(batch["x"])
    pooled = torch.zeros(len(batch["y"]), hidden.shape[1]).index_add(0, batch["graph"], hidden)
    return module.heads(pooled), batch["y"]


def by_node(module, batch):
    return module(batch["x"]), batch["y"][batch["graph"]]


class GraphLoader(DataLoader):
    """As such libraries have it: a subclass with a collate function of its own."""

    def __init__(self, batch_size):
        super().__init__(range(GRAPHS), batch_size, collate_fn=self.collate)
        self.batches = list(graphs(batch_size))

    def collate(self, indices):
        return self.batches[indices[0] // self.batch_size]


class Batches(IterableDataset):
    def __iter__(self):
        return graphs()


def targets_drawn(source, predict, **options):
    model = Classifier()
    model.heads.activate("a")
    drawn = Reference(source, predict=predict, **options).draw_alone(model)
    return tuple(sum(len(predict(model, one)[1]) for one in part) for part in (drawn.batches, drawn.for_attribution))


@pytest.mark.parametrize("source", [list(graphs()), GraphLoader(8), DataLoader(Batches(), None)], ids=type)
def test_a_batch_of_graphs_counts_as_its_graphs_and_not_as_its_nodes(source):
    assert targets_drawn(source, by_graph, samples=GRAPHS, attribution_samples=32) == (GRAPHS, 32)
    assert targets_drawn(source, by_graph, samples=50, attribution_samples=9) == (56, 16)  # whole batches
    assert targets_drawn(source, by_graph, samples=None, attribution_samples=None) == (GRAPHS, GRAPHS)


@pytest.mark.parametrize("source", [list(graphs()), GraphLoader(8)], ids=type)
def test_where_nodes_have_labels_so_many_of_them_are_drawn(source):
    assert targets_drawn(source, by_node, samples=300, attribution_samples=100) == (336, 112)


def test_a_loader_that_hides_batches_in_its_data_is_not_walked_to_its_end():
    """One datum of the loader is a batch: with its own number alone the walk would keep eight times what was asked."""
    hidden = DataLoader(Batches(), 1, collate_fn=lambda one: one[0])
    assert targets_drawn(hidden, by_graph, samples=50, attribution_samples=9) == (56, 16)


def test_pixels_are_no_data_and_what_has_hardly_any_target_is_not_walked_without_end():
    images = [(torch.randn(8, 5, 6), torch.zeros(8, 5).long()) for _ in range(6)]

    def pixels(module, batch):
        return module(batch[0]).flatten(0, 1), batch[1].flatten()

    def first_alone(module, batch):
        return module(batch[0][:1, 0]), batch[1][:1, 0]

    assert targets_drawn(images, pixels, samples=20, attribution_samples=16) == (3 * 40, 2 * 40)
    stated = DataLoader(TensorDataset(*map(torch.cat, zip(*images, strict=True))), 8, sampler=range(48))
    assert targets_drawn(stated, first_alone, samples=20, attribution_samples=16) == (3, 2)
    batches = DataLoader(stated.dataset, batch_sampler=BatchSampler(SequentialSampler(range(48)), 8, False))
    assert targets_drawn(batches, first_alone, samples=20, attribution_samples=16) == (3, 2)
    assert targets_drawn(images, first_alone, samples=2, attribution_samples=1) == (2, 1)


def test_drawing_leaves_the_model_and_the_user_s_batches_as_they_were():
    class Counting(Classifier):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            self.log("calls", self.calls)
            return super().forward(x)

        def on_after_batch_transfer(self, batch, dataloader_idx):
            batch["x"] += 1
            return batch

    model, source = Counting(), list(graphs())
    model.heads.activate("a")
    before = deepcopy(source[0])
    x = Reference(source, predict=by_node).draw_alone(model).batches[0]["x"]
    assert model.calls == 0
    assert torch.equal(x, before["x"] + 1)


def test_statistics_of_norms_are_estimated_from_batches_whose_size_cannot_be_seen():
    class Opaque:
        def __init__(self, x, y):
            self.x, self.y = x, y

    def collate(items):
        return Opaque(*(torch.stack(part) for part in zip(*items, strict=True)))

    source = DataLoader(clusters("a", 64), 16, collate_fn=collate)
    model = Classifier()
    model.body[2] = nn.BatchNorm1d(40)
    model.heads.activate("a")
    rnf = RelevanceFreezing(criterion=0.2, predict=lambda module, batch: (module(batch.x), batch.y))
    assert rnf.protect(model, source, name="a").samples == 64


# -- whether there are enough of them ---------------------------------------------------------------------------------


class Pixels(Classifier):
    """Labels for each place; -1 is not asked for."""

    def training_step(self, batch):
        logits, target = without_padding(self, batch)
        return nn.functional.cross_entropy(logits, target)

    def validation_step(self, batch):
        pass


def places(samples, each, labelled=lambda y: y, batch_size=4):
    x = torch.randn(samples, each, 6, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, labelled((x[..., 0] > 0).long())), batch_size)


def fitted(reference, **options):
    model = Pixels()
    model.heads.activate("a")
    rnf = RelevanceFreezing(reference, predict=without_padding, heads="heads.tasks.*", task="a", **options)
    trainer(rnf, max_epochs=1).fit(model, places(16, 8), places(16, 8))
    return rnf


def test_few_images_of_many_pixels_are_enough():
    rnf = fitted(places(24, 64))
    assert rnf.state.tasks["a"].samples == 24 * 64


@pytest.fixture
def untrained(monkeypatch):
    monkeypatch.setattr(Pixels, "training_step", lambda *args: pytest.fail("has trained"))


@pytest.mark.usefixtures("untrained")
def test_many_samples_with_few_targets_are_refused_before_the_training():
    def hardly(y):
        return torch.where(torch.arange(len(y))[:, None] % 2 == 0, y, -1)

    with pytest.raises(ValueError, match=r"reference data has 30 samples, so one weighs 3.3%.* at least 50 samples"):
        fitted(places(60, 1, hardly))


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize("as_list", [False, True])
def test_reference_data_without_any_target_are_refused_before_the_training(as_list):
    source = places(60, 2, lambda y: y - y - 1)
    with pytest.raises(ValueError, match="predict returns no target for any of the reference data"):
        fitted(list(source) if as_list else source)


@pytest.mark.parametrize("first", [0, 1])
def test_a_first_batch_with_fewer_targets_than_the_others_is_no_reason_to_refuse(first):
    """Four samples with ``first`` targets, 36 with five each."""

    def little(y):
        y[:4, first:] = -1
        return y

    assert fitted(places(40, 5, little)).state.tasks["a"].samples == 36 * 5 + 4 * first


def test_too_few_targets_that_nobody_could_know_of_are_a_warning_and_cost_no_task():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(places(6, 2).dataset)

    with pytest.warns(UserWarning, match="a: reference data has 12 samples, so one weighs 8.3%"):
        rnf = fitted(DataLoader(Stream(), 4))
    assert rnf.state.tasks["a"].samples == 12
