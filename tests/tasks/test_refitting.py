"""Rows that are fitted to a sub-network: the optimum of what they are fitted for, and nothing else moves."""

from __future__ import annotations

import copy
from dataclasses import replace

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from training import Classifier, ConvClassifier, frozen_entries, task_data, trainer

from lightning_rnf import RelevanceFreezing, UnitMap
from lightning_rnf.recall import subnetwork
from lightning_rnf.tasks import refitting
from lightning_rnf.tasks.leastsquares import Moments
from lightning_rnf.tasks.reference import ReferenceData
from lightning_rnf.tasks.refitting import RIDGE, Refitting


def two_dimensional(**options):
    return nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 5, **options), nn.ReLU(), nn.Flatten())


NETS = {
    "linear": (lambda: nn.Sequential(nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU()), (7,)),
    "no bias": (lambda: nn.Sequential(nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 5, bias=False), nn.ReLU()), (7,)),
    "tokens": (lambda: nn.Sequential(nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Flatten()), (3, 7)),
    "convolution": (lambda: two_dimensional(kernel_size=3), (2, 5, 5)),
    "strided": (lambda: two_dimensional(kernel_size=(3, 2), stride=(1, 2), padding=(1, 0)), (2, 5, 5)),
    "dilated": (lambda: two_dimensional(kernel_size=2, dilation=2, padding="same"), (2, 5, 5)),
    "circular": (lambda: two_dimensional(kernel_size=3, padding=1, padding_mode="circular"), (2, 5, 5)),
    "three-dimensional": (
        lambda: nn.Sequential(nn.Conv3d(2, 6, 2), nn.ReLU(), nn.Conv3d(6, 5, (1, 2, 1)), nn.ReLU(), nn.Flatten()),
        (2, 3, 4, 3),
    ),
    "one-dimensional": (
        lambda: nn.Sequential(
            nn.Conv1d(2, 6, 3), nn.ReLU(), nn.Conv1d(6, 5, 3, padding=2, dilation=2), nn.ReLU(), nn.Flatten()
        ),
        (2, 9),
    ),
}


def made(kind, batches=4, size=50):
    """A network with a head, its units, and data."""
    torch.manual_seed(0)
    make, shape = NETS[kind]
    body = make()
    width = body(torch.zeros(2, *shape)).shape[1:].numel()
    net = nn.Sequential(body, nn.Flatten(), nn.Linear(width, 2)).eval()
    data = ReferenceData([(torch.randn(size, *shape), torch.arange(size) % 2) for _ in range(batches)], batches)
    return net, UnitMap.of(net, data.batches[0]), data


def halves(units):
    return {layer.name: torch.arange(layer.units) % 2 == 0 for layer in units.layers}


def answers(layer, heard):
    """What each weight of a row is multiplied with, ``(places, weights)``: the answers of rows that have one weight."""
    asked = copy.deepcopy(layer)
    every = torch.eye(layer.weight[0].numel()).view(-1, *layer.weight.shape[1:])
    asked.weight, asked.bias = nn.Parameter(every), None
    return in_rows(asked(heard), layer)


def in_rows(values, layer):
    axis = -1 if isinstance(layer, nn.Linear) else 1
    return values.detach().movedim(axis, -1).flatten(0, -2).double()


@pytest.mark.parametrize("kind", NETS)
def test_rows_are_those_of_another_way_of_least_squares(kind, monkeypatch):
    monkeypatch.setattr(refitting, "PLACES", 1000)  # all of them
    net, units, data = made(kind)
    trained, last, relevant = copy.deepcopy(net), units.layers[1], halves(units)
    fitting = Refitting(net, units.layers, {}, data)
    fitting.look()
    with subnetwork.silence(net, units.layers, relevant), fitting.wearing(relevant):
        fitted = copy.deepcopy(net.get_submodule(last.name).state_dict())
        heard = net[0][:2](torch.cat([x for x, _ in data.batches])).detach()
    before = trained.get_submodule(last.name)
    layer = copy.deepcopy(before)
    layer.load_state_dict(fitted)
    said = in_rows(before(trained[0][:2](torch.cat([x for x, _ in data.batches]))), layer)
    columns, claimed = answers(layer, heard), relevant[last.name]
    speaks = columns.abs().amax(dim=0) > 0
    assert 0 < speaks.sum() < len(speaks)
    columns, lacks = columns[:, speaks], (said - in_rows(before(heard), layer))[:, claimed]
    if layer.bias is not None:
        columns, mean = columns - columns.mean(dim=0), lacks.mean(dim=0)
        lacks = lacks - mean
    ridge = (RIDGE * (columns**2).sum(dim=0).mean()).sqrt() * torch.eye(columns.shape[1])
    drawn = torch.cat([lacks, torch.zeros(len(ridge), lacks.shape[1])])
    expected = torch.linalg.lstsq(torch.cat([columns, ridge]), drawn).solution.T
    found = (layer.weight - before.weight).detach().flatten(1).double()
    torch.testing.assert_close(found[claimed][:, speaks], expected, rtol=1e-2, atol=1e-3)
    assert not found[~claimed].any()
    assert not found[:, ~speaks].any()
    if layer.bias is not None:
        after = (said - in_rows(layer(heard), layer))[:, claimed]
        torch.testing.assert_close(after.mean(dim=0), torch.zeros(int(claimed.sum())).double(), rtol=0, atol=1e-3)


class Doubled(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, 2 * self.weight, self.bias)


class Mixed(nn.Module):
    """A grouped layer, one with a forward of its own, and one that can be fitted."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv1d(2, 6, 1)
        self.grouped = nn.Conv1d(6, 6, 1, groups=2)
        self.own = Doubled(6, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        x = self.grouped(self.first(x).relu()).relu()
        return self.head(self.own(x.mean(dim=-1)).relu())


def test_layers_that_can_not_be_fitted_stay_as_they_were_trained():
    torch.manual_seed(0)
    net = Mixed().eval()
    data = ReferenceData([(torch.randn(20, 2, 5), torch.arange(20) % 2) for _ in range(3)], 3)
    units = UnitMap.of(net, data.batches[0])
    fitting = Refitting(net, units.layers, {}, data)
    fitting.look()
    assert list(fitting.layers) == ["first"]
    runs_twice = replace(data, predict=lambda module, batch: (module(batch[0]) + module(-batch[0]), batch[1]))
    fitting = Refitting(net, units.layers, {}, runs_twice)
    fitting.look()
    assert list(fitting.layers) == []
    with fitting.wearing(halves(units)) as rows:
        assert rows == []


class Strict(Classifier):
    """A forward that turns every error into its own, and one that sends on what is loud enough."""

    kind = ""

    def forward(self, x):
        try:
            h = self.body[:3](x)
            if self.kind == "depth" and h.abs().sum() < 8 * len(h):
                return self.heads(h)
            if self.kind == "selected":
                keep, out = h.sum(dim=1) > h.sum(dim=1).mean(), torch.zeros_like(h)
                out[keep] = self.body[3](h[keep]).relu()
                return self.heads(out)
            return self.heads(self.body[3:](h))
        except Exception as error:
            raise ValueError("bad input") from error


@pytest.mark.parametrize("kind", ["errors", "depth", "selected", "solver"])
def test_no_fit_ends_for_rows_that_can_not_be_fitted(kind, monkeypatch):
    if kind == "solver":
        monkeypatch.setattr(Moments, "drawn", lambda *args, **options: torch.linalg.cholesky(torch.zeros(2, 2)))
    torch.manual_seed(0)
    model, rnf = Strict(), RelevanceFreezing(criterion=0.5, units="body.*")
    model.kind = kind
    for task in "ab":
        model.heads.activate(task)
        trainer(rnf, max_epochs=4).fit(model, datamodule=task_data(task))
    assert list(rnf.state.tasks) == ["a", "b"]


def test_layers_that_do_not_learn_or_hear_what_they_heard_stay():
    net, units, data = made("linear")
    net[0][2].requires_grad_(False)
    fitting = Refitting(net, units.layers, {}, data)
    fitting.look()
    assert list(fitting.layers) == ["0.0"]
    with subnetwork.silence(net, units.layers, halves(units)), fitting.wearing(halves(units)) as rows:
        assert rows == []


def test_rows_of_finished_tasks_stay_and_the_context_gives_everything_back():
    net, units, data = made("convolution")
    before, relevant = copy.deepcopy(net.state_dict()), halves(units)
    frozen = {layer.name: torch.arange(layer.units) < 3 for layer in units.layers}
    fitting = Refitting(net, units.layers, frozen, data)
    fitting.look()
    with subnetwork.silence(net, units.layers, relevant), fitting.wearing(relevant) as rows:
        worn = copy.deepcopy(net.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    moved = {name: (worn[name] != value).flatten(1).any(dim=1) for name, value in before.items() if value.ndim > 1}
    for layer in units.layers[1:]:  # the first one hears what it heard before
        claimed = relevant[layer.name] & ~frozen[layer.name]
        assert torch.equal(moved[f"{layer.name}.weight"], claimed)
    assert not moved["2.weight"].any()
    for one in rows:
        one.write()
    assert all(torch.equal(value, worn[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("samples", [1, 3])
def test_more_rows_than_samples_and_what_is_always_silent(samples):
    net, units, _ = made("linear")
    net[0][0].weight.data.zero_()
    net[0][0].bias.data.fill_(-1.0)  # nothing reaches the second layer
    data = ReferenceData([(torch.randn(samples, 7), torch.zeros(samples, dtype=torch.long))], 1)
    fitting = Refitting(net, units.layers, {}, data)
    fitting.look()
    with fitting.wearing(halves(units)):
        assert all(bool(value.isfinite().all()) for value in net.state_dict().values())


class Seen(pl.Callback):
    """The accuracy of the sub-network when its recovery begins, and what is in it of frozen entries."""

    def __init__(self, rnf):
        self.rnf, self.found = rnf, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        record = self.rnf.state.recovering
        if record is not None and batch_idx == 0 and record.recovery_epochs == 1:
            x, y = trainer.datamodule.validation.tensors
            pl_module.eval()
            own = dict(pl_module.named_parameters()) | dict(pl_module.named_buffers())
            before = {name: own[name].detach().clone() for name in record.norm_statistics}
            with torch.no_grad():
                for name, value in record.norm_statistics.items():
                    own[name].copy_(value)
                hits = (pl_module(x).argmax(1) == y).float().mean()
                for name, value in before.items():
                    own[name].copy_(value)
            pl_module.train()
            self.found.append((float(hits), record.subnetwork_accuracy))


@pytest.mark.parametrize("kind", [Classifier, ConvClassifier])
def test_a_recovery_goes_on_from_the_rows_that_its_sub_network_was_measured_with(kind, monkeypatch):
    fitted = []
    original = Refitting.wearing
    monkeypatch.setattr(Refitting, "wearing", lambda *args: fitted.append(1) or original(*args))
    torch.manual_seed(0)
    model, rnf = kind(), RelevanceFreezing()
    for task in "ab":
        model.heads.activate(task)
        frozen = frozen_entries(rnf, model) if rnf.state.tasks else {}
        before = {name: model.get_parameter(name).detach().clone() for name in frozen}
        trainer(seen := Seen(rnf), rnf, max_epochs=4).fit(model, datamodule=task_data(task))
        assert fitted
        ((found, recorded),) = seen.found
        assert found == pytest.approx(recorded, abs=1e-6)
        for name, mask in frozen.items():
            assert torch.equal(model.get_parameter(name)[mask], before[name][mask])


def test_without_a_recovery_or_a_fitted_head_rows_stay(monkeypatch):
    monkeypatch.setattr(Refitting, "wearing", lambda *args: 1 / 0)
    for options in ({"recovery_epochs": 0}, {"fit_head": False}):
        model, rnf = Classifier(), RelevanceFreezing(**options)
        model.heads.activate("a")
        trainer(rnf, max_epochs=2).fit(model, datamodule=task_data("a"))
