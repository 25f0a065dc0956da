"""The head fitted to its sub-network: which heads, on which data, and that it is what is recorded and recalled."""

from __future__ import annotations

import copy
from functools import reduce
from operator import add

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchmetrics.classification import MulticlassRecall
from training import Classifier, ConvClassifier, clusters, inputs, task_data, train, trainer

from lightning_rnf import MetricDrop, MultiHead, RelevanceFreezing
from lightning_rnf.runtime import Ranks
from lightning_rnf.streams import TaskDataModule
from lightning_rnf.tasks import fitting
from lightning_rnf.tasks.fitting import SCALES, STEEP, Fitting, Head, last_layer, scale_of
from lightning_rnf.tasks.leastsquares import Moments, scales, weights
from lightning_rnf.tasks.reference import ReferenceData

FEW = {"recovery_epochs": 0, "ration": None, "reset_free": False, "criterion": 0.02, "fit_head": "auto"}
"""Nothing but the search and the head."""


def accuracy(model, task, seed=1):
    x, y = clusters(task, 320, seed).tensors
    return float((model(x).argmax(1) == y).float().mean())


def ended(model=None, *tasks, **options):
    torch.manual_seed(0)
    model = model or Classifier()
    rnf = RelevanceFreezing(**{**FEW, **options})
    train(model, rnf, *(tasks or ("a",)))
    return model, rnf


@pytest.mark.parametrize("network", [Classifier, ConvClassifier])
def test_what_is_recorded_is_what_recall_measures(network):
    torch.manual_seed(0)  # before the network is made: some begin so that they need all of their units
    model, rnf = ended(network())
    record = rnf.state.task("a")
    assert set(record.whole) == {"trained", "fitted"}
    assert record.accuracy == max(record.whole.values()) == record.evaluations[0].score.accuracy
    with rnf.recall("a", model), torch.no_grad():
        assert accuracy(model, "a") == pytest.approx(record.subnetwork_accuracy, abs=1e-6)  # the validation data
    assert record.evaluations[-1].score.accuracy == record.subnetwork_accuracy
    assert record.accepted
    assert record.accuracy - record.subnetwork_accuracy <= 0.02 + 1e-6


def test_fewer_units_are_kept_than_with_the_head_as_it_was_trained():
    kept = {}
    for fit in ("auto", False):
        _, rnf = ended(fit_head=fit)
        kept[fit] = sum(int(mask.sum()) for mask in rnf.state.task("a").relevant.values())
    assert kept["auto"] < kept[False], kept


class Trained(pl.Callback):
    """Keeps the heads as the training has left them."""

    def on_train_end(self, trainer, pl_module):
        self.heads = copy.deepcopy(pl_module.heads.state_dict())


def same(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("options", [{"fit_head": False}, {"retention": "paper"}, {}])
def test_the_head_stays_as_it_was_trained_where_nobody_asked(options):
    rnf = RelevanceFreezing(**{**FEW, **options}) if options else RelevanceFreezing.paper()
    model, before = Classifier(), Trained()
    trainer(before, rnf).fit(model, datamodule=task_data("a"))
    assert rnf.state.task("a").whole == {}
    assert same(model.heads.state_dict(), before.heads)


def test_only_the_last_layer_of_the_task_s_own_head_is_written():
    model, before, rnf = Classifier(), Trained(), RelevanceFreezing(**FEW)
    model.heads = MultiHead(40, {"a": nn.Sequential(nn.Linear(40, 9), nn.Tanh(), nn.Linear(9, 2)), "b": 2})
    trainer(before, rnf).fit(model, datamodule=task_data("a"))
    written = {name for name, value in model.heads.state_dict().items() if not torch.equal(value, before.heads[name])}
    assert written == {"tasks.a.2.weight", "tasks.a.2.bias"}


def test_recall_export_and_checkpoint_have_the_fitted_head(tmp_path):
    model, rnf = ended(None, "a")
    with rnf.recall("a", model), torch.no_grad():
        before = model(inputs())
    head = copy.deepcopy(model.heads.tasks["a"].state_dict())
    train(model, rnf, "b")
    with rnf.recall("a", model), torch.no_grad():
        assert torch.equal(model(inputs()), before)
    small = rnf.export(model, "a")
    with torch.no_grad():
        assert (small(inputs()) - before).abs().max() < 1e-4 * before.abs().max()
    assert same(model.heads.tasks["a"].state_dict(), head)
    assert not any(rnf.report(model).audit.changed.values())


def test_a_head_without_bias_is_fitted_too():
    model = Classifier()
    model.heads = MultiHead(40, {"a": nn.Linear(40, 2, bias=False)})
    _, rnf = ended(model)
    assert rnf.state.task("a").whole


# -- which heads -----------------------------------------------------------------------------------------------------


class Pixels(nn.Module):
    """Two classes for each pixel, some of which have no label."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.head(self.body(x))


def labelled_pixels(module, batch):
    x, y = batch
    logits = module(x).permute(0, 2, 3, 1)
    return logits[y >= 0], y[y >= 0]


def pixels(seed=0, samples=12):
    x = torch.randn(samples, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    y = (x[:, 0] + x[:, 1] > 0).long()
    y[:, :2] = -1
    return x, y


def test_pixels_that_have_a_label():
    torch.manual_seed(0)
    module = Pixels().eval()
    data = ReferenceData([pixels(seed) for seed in range(6)], 6, labelled_pixels)
    fitted = Fitting.of(module, "head", data)
    assert fitted is not None
    fitted.write(fitted.fit(all_data=True))
    # What another way of least squares gives on the same pixels: no weaker ridge can leave less.
    features = torch.cat([module.body(pixels(seed)[0]).permute(0, 2, 3, 1)[pixels(seed)[1] >= 0] for seed in range(6)])
    wanted = nn.functional.one_hot(torch.cat([y[y >= 0] for _, y in map(pixels, range(6))]), 2).float()
    columns = torch.cat([features, torch.ones(len(features), 1)], dim=1).detach()
    best = torch.linalg.lstsq(columns, wanted).solution
    weight, bias = module.head.weight.flatten(1), module.head.bias
    ours = ((features @ weight.T + bias - wanted) ** 2).sum()
    assert ours < 1.02 * ((columns @ best - wanted) ** 2).sum()


def test_a_sample_that_weighs_eight_times_as_much_is_eight_samples():
    x, y = torch.randn(40, 5), nn.functional.one_hot(torch.arange(40) % 2, 2)
    scale, heavy = scales(x.abs().amax(dim=0).double()), torch.tensor([1.0, 8.0])[torch.arange(40) % 2]
    often = torch.arange(40).repeat_interleave(heavy.long())
    assert torch.equal(Moments.of(x, y, scale, heavy).sums, Moments.of(x[often], y[often], scale).sums)


def test_classes_weigh_the_same_however_many_samples_they_have():
    counts = torch.tensor([4000, 250, 0, 17, 1])
    found = weights(counts)
    assert torch.equal(found, torch.tensor([0.25, 4.0, 1.0, 16.0, 16.0], dtype=torch.float64))
    assert torch.equal(weights(torch.full((10,), 33)), torch.ones(10, dtype=torch.float64))


def rare(samples, seed):
    """A third class that few samples have, and that is hard to tell."""
    x, y = clusters("a", samples, seed).tensors
    y = torch.where((torch.arange(samples) % 20 == 0) & (x[:, 0] + x[:, 1] > 0), 2, y)
    return TensorDataset(x + (y == 2)[:, None] * torch.tensor([1.0, 1.0, 0, 0, 0, 0]), y)


@pytest.mark.parametrize("balanced", [False, True])
def test_a_criterion_with_a_metric_has_its_classes_weigh_the_same(balanced):
    torch.manual_seed(0)
    model = Classifier()
    model.heads = MultiHead(40, {"a": 3})
    recall = MulticlassRecall(3, average="macro")
    criterion = (lambda score: score.accuracy >= score.baseline - 0.02) if not balanced else MetricDrop(recall, 0.05)
    rnf = RelevanceFreezing(criterion=criterion, recovery_epochs=0)
    data = TaskDataModule("a", 3, *(rare(640, seed) for seed in range(3)), batch_size=32)
    trainer(rnf, max_epochs=1).fit(model, datamodule=data)
    x, y = rare(4000, 9).tensors
    with torch.no_grad():
        hits = model(x)[y == 2].argmax(1) == 2
    assert (hits.float().mean() > 0.6) == balanced


def test_several_labels_each_have_their_own_yes():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 3))
    x = torch.randn(500, 6)
    y = (x[:, :3] > 0).long()
    data = ReferenceData([(x[start : start + 50], y[start : start + 50]) for start in range(0, 500, 50)], 10)
    fitted = Fitting.of(module, "2", data)
    assert fitted is not None
    fitted.write(fitted.fit(all_data=True))
    assert ((module(x) > 0) == y.bool()).float().mean() > 0.85


class Odd(nn.Module):
    """Heads whose last layer's output is not the logits."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.body = nn.Linear(6, 8)
        self.head = nn.Sequential(nn.Linear(8, 2), nn.Softmax(1)) if kind == "softmax" else nn.Linear(8, 2)
        if kind == "normalised":
            self.head = nn.utils.parametrizations.weight_norm(self.head)
        if kind == "wide kernel":
            self.head = nn.Sequential(nn.Unflatten(1, (1, 8)), nn.Conv1d(1, 2, 8), nn.Flatten())

    def forward(self, x):
        x = self.head(self.body(x).relu())
        return x * 3 if self.kind == "scaled" else x


@pytest.mark.parametrize("kind", ["softmax", "normalised", "wide kernel", "scaled"])
def test_others_are_left_alone(kind):
    torch.manual_seed(0)
    module = Odd(kind)
    before = copy.deepcopy(module.state_dict())
    data = ReferenceData([(torch.randn(16, 6), torch.arange(16) % 2)], 1)
    assert Fitting.of(module, "head", data) is None
    assert same(module.state_dict(), before)
    assert last_layer(Odd("plain"), "head", data) == "head"


def test_a_layer_that_a_finished_task_has_too_or_that_does_not_learn_is_left_alone():
    torch.manual_seed(0)
    model, rnf = Classifier(), RelevanceFreezing(**FEW)
    last = nn.Linear(16, 2)
    for task in "ab":
        model.heads.tasks[task] = nn.Sequential(nn.Linear(40, 16), nn.ReLU(), last)
    train(model, rnf, "a")
    before = last.weight.detach().clone()
    with rnf.recall("a", model), torch.no_grad():
        logits = model(inputs())
    train(model, rnf, "b")
    assert torch.equal(last.weight, before)
    with rnf.recall("a", model), torch.no_grad():
        assert torch.equal(model(inputs()), logits)
    assert rnf.state.task("b").whole == {}

    model, rnf = Classifier(), RelevanceFreezing(**FEW)
    model.heads.activate("a")
    head = model.heads.tasks["a"].requires_grad_(False)
    before = head.weight.clone()
    trainer(rnf).fit(model, datamodule=task_data("a"))
    assert torch.equal(head.weight, before)


def test_a_head_that_trains_on_is_no_steeper_than_it_was_and_answers_the_same():
    trained = Head(torch.ones(2, 4), torch.zeros(2))
    steep = Head(1000 * torch.randn(2, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([7.0, -9.0]))
    flat = steep.as_flat_as(trained)
    assert STEEP / 2 < float(flat.weight.norm() / trained.weight.norm()) <= STEEP
    factor = flat.weight / steep.weight
    assert torch.equal(factor, factor[:1, :1].expand(2, 4))
    assert torch.equal(flat.bias, steep.bias * factor[0, 0])
    assert trained.as_flat_as(steep) is trained


def test_a_recovery_that_begins_with_a_fitted_head_does_not_diverge():
    """A large rate, momentum and labels of which some are wrong: features of few units are small and much alike."""
    torch.manual_seed(0)
    model, losses = Classifier(torch.optim.SGD, lr=0.1, momentum=0.9), []
    x, y = clusters("a", 320).tensors
    y = torch.where(torch.rand(320, generator=torch.Generator().manual_seed(0)) < 0.1, 1 - y, y)
    model.heads.activate("a")

    class Losses(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            losses.append((trainer.current_epoch, float(outputs["loss"])))

    rnf = RelevanceFreezing(task="a")
    trainer(Losses(), rnf, max_epochs=8).fit(
        model, DataLoader(TensorDataset(x, y), 32), DataLoader(clusters("a", 320, 1), 32)
    )
    recovery = [loss for epoch, loss in losses if epoch >= 6]
    assert max(recovery) < 3 * max(loss for epoch, loss in losses if epoch in (4, 5))


def test_a_head_that_hears_too_much_stays(monkeypatch):
    monkeypatch.setattr(fitting, "WIDEST", 10)
    _, rnf = ended(None, "a", criterion=0.0)
    assert rnf.state.task("a").whole == {}


# -- on which data ---------------------------------------------------------------------------------------------------


class Unlabelled(TensorDataset):
    """Training data of another kind than the validation data: two views of each sample, no label."""

    def __getitem__(self, index):
        return self.tensors[0][index], self.tensors[0][index]


class Endless(IterableDataset):
    seen = ()

    def __iter__(self):
        if isinstance(self.seen, list):
            self.seen.append(1)
        x, y = clusters("a", 320).tensors
        while True:
            yield from zip(x, y, strict=True)


class SelfTaught(Classifier):
    """Is trained without the labels that it is tested with."""

    def training_step(self, batch):
        x, other = batch
        return nn.functional.mse_loss(self(x), other[:, :2])


def test_where_predict_can_t_do_with_the_training_data_half_of_the_reference_is_fitted_on():
    model = SelfTaught()
    training = DataLoader(Unlabelled(*clusters("a", 320).tensors), batch_size=32)
    rnf = RelevanceFreezing(**{**FEW, "criterion": 0.1}, task="a")
    trainer(rnf).fit(model, training, DataLoader(clusters("a", 320, 1), batch_size=32))
    record = rnf.state.task("a")
    assert record.whole
    assert record.samples == 160


def test_one_batch_of_reference_data_can_t_be_parted_so_the_head_stays():
    model, rnf = SelfTaught(), RelevanceFreezing(**FEW, task="a")
    training = DataLoader(Unlabelled(*clusters("a", 320).tensors), batch_size=32)
    trainer(rnf).fit(model, training, DataLoader(clusters("a", 320, 1), batch_size=320))
    assert rnf.state.task("a").whole == {}


def test_nothing_is_taken_out_of_a_stream_that_the_fit_reads():
    stream, seen = Endless(), []
    stream.seen = seen
    model, rnf = Classifier(), RelevanceFreezing(criterion=0.1, task="a", fit_samples=100)
    trainer(rnf, limit_train_batches=10, max_epochs=4).fit(
        model, DataLoader(stream, batch_size=32), DataLoader(clusters("a", 320, 1), batch_size=32)
    )
    assert len(seen) == 4  # once for each epoch
    record = rnf.state.task("a")
    assert record.recovery_epochs == 2
    assert (bool(record.whole), record.samples) == (True, 160)  # on half of the reference data
    options = {"fit_data": DataLoader(Endless(), batch_size=32), "fit_samples": 100}
    model, rnf = Classifier(), RelevanceFreezing(**FEW, **options)
    train(model, rnf, "a")
    assert rnf.state.task("a").samples == 320


def test_data_of_the_user_s_own_are_fitted_on(monkeypatch):
    seen = []
    original = Fitting._in_front

    def in_front(self, batch, *most):
        seen.append(len(batch[0]))
        return original(self, batch, *most)

    monkeypatch.setattr(Fitting, "_in_front", in_front)
    _, rnf = ended(None, "a", fit_data=DataLoader(clusters("a", 90, 3), batch_size=45))
    assert set(seen) == {45}
    assert rnf.state.task("a").whole
    with pytest.raises(ValueError, match="fit_samples"):
        RelevanceFreezing(fit_samples=0)
    with pytest.raises(ValueError, match="fit_head"):
        RelevanceFreezing(fit_head=True)


def test_shares_of_three_processes_give_what_one_process_gives():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 3))
    batches = [(torch.randn(16, 6), torch.randint(3, (16,))) for _ in range(7)]
    fitted = Fitting(module, "2", ReferenceData(batches, 7))
    seen = [fitted._in_front(batch) for batch in batches]
    scale = scales(torch.cat([features for features, _ in seen]).abs().amax(dim=0).double())
    of_each = [Moments.of(*one, scale) for one in seen]
    of_ranks = [reduce(add, Ranks(rank, 3).share(of_each)) for rank in range(3)]
    assert torch.equal(reduce(add, of_ranks).sums, reduce(add, of_each).sums)


# -- how large the logits are ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("several", [False, True])
def test_the_scale_is_the_power_of_two_that_surprises_least(several):
    generator = torch.Generator().manual_seed(0)
    truth = 4 * torch.randn(4000, 3, generator=generator)
    if several:
        target = (torch.rand(4000, 3, generator=generator) < truth.sigmoid()).long()
    else:
        target = torch.multinomial(truth.softmax(1), 1, generator=generator).view(-1)
    assert scale_of(truth / 32, target) == 32.0
    assert scale_of(truth * 8, target) == 0.125


def test_scaled_logits_give_the_same_answers():
    torch.manual_seed(0)
    model, rnf = ended()
    with rnf.recall("a", model), torch.no_grad():
        x, y = clusters("a", 320, 1).tensors
        logits = model(x)
    losses = [float(nn.functional.cross_entropy(factor * logits, y)) for factor in (0.25, 0.5, 1.0, 2.0, 4.0)]
    assert losses[2] == min(losses), "neither flat nor saturated"
    assert 2.0 ** SCALES[0] < 1 < 2.0 ** SCALES[-1]
