"""Which of a task's data its portrait is drawn of: some of all of them, in whatever order they come."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from apart import shifted
from torch import Tensor
from training import Classifier, plain

from lightning_rnf import RelevanceFreezing
from lightning_rnf.memory import Gaussians
from lightning_rnf.tasks import portraying

pytestmark = pytest.mark.filterwarnings("ignore:.*falls short of the criterion:UserWarning")


def protected(batches: list[tuple[Tensor, Tensor]]) -> tuple[Classifier, RelevanceFreezing]:
    pl.seed_everything(0, verbose=False)
    model, rnf = Classifier(), plain(portraits=True)
    model.heads.activate("a")
    rnf.protect(model, batches, name="a", criterion=lambda score: score.cutoff <= 10)
    return model, rnf


def classes_of(rnf: RelevanceFreezing) -> Gaussians:
    portrait = rnf.state.tasks["a"].portrait
    assert portrait is not None
    return portrait.classes["a"]


def in_order(order: str, batch_size: int) -> list[tuple[Tensor, Tensor]]:
    x, y = shifted("a", 5000).tensors
    indices = y.argsort(stable=True)
    if order == "turns":  # class by class, a batch each
        first, second = ((y == label).nonzero().view(-1)[:2304].split(batch_size) for label in (0, 1))
        indices = torch.cat([part for pair in zip(first, second, strict=True) for part in pair])
    return list(zip(x[indices].split(batch_size), y[indices].split(batch_size), strict=True))


@pytest.mark.parametrize(("order", "batch_size"), [("sorted", 50), ("sorted", 2500), ("turns", 64)])
def test_all_classes_of_many_samples_are_drawn_in_whatever_order_they_come(order, batch_size):
    model, rnf = protected(in_order(order, batch_size))
    counts = classes_of(rnf).counts.tolist()
    assert sum(counts) == 2000
    assert counts == pytest.approx([1000, 1000], abs=400)  # of some batches: as they fall
    x, y = shifted("a", 1000, seed=9).tensors
    found = rnf.infer_task(x, model, unknown=True)
    for label in (0, 1):
        known = [name for name, one in zip(found.names, y.tolist(), strict=True) if one == label]
        assert known.count("a") > 0.9 * len(known)


def test_it_is_the_same_draw_however_data_are_cut_into_batches(monkeypatch):
    monkeypatch.setattr(portraying, "SAMPLES", 70)
    monkeypatch.setattr(portraying, "BATCHES", 301)  # of all of them
    x, y = shifted("a", 301).tensors
    one, other = (classes_of(protected(list(zip(x.split(size), y.split(size), strict=True)))[1]) for size in (301, 7))
    assert one.counts.sum() == 70
    assert one.counts.tolist() == other.counts.tolist()
    assert torch.allclose(one.means, other.means, atol=1e-5)
    assert torch.allclose(one.covariances, other.covariances, atol=1e-5)


@pytest.mark.parametrize(("batch_size", "run"), [(50, 40), (500, 10), (200, 16)])
def test_no_more_batches_are_run_than_samples_or_sorted_data_need(batch_size, run, monkeypatch):
    ran, own_pass = [], portraying._Portraying._own_pass

    def counting(self, record, read, data, batches):
        ran.append(len(batches))
        return own_pass(self, record, read, data, batches)

    monkeypatch.setattr(portraying._Portraying, "_own_pass", counting)
    protected(in_order("sorted", batch_size))
    assert ran[0] == run


def test_few_data_are_all_drawn():
    x, y = shifted("a", 301).tensors
    assert classes_of(protected([(x, y)])[1]).counts.tolist() == y.bincount().tolist()
