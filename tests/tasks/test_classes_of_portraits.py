"""Portraits of a task that has few of many classes."""

from __future__ import annotations

import lightning.pytorch as pl
from training import Classifier, clusters, plain

from lightning_rnf import MultiHead
from lightning_rnf.inference import Sums


def test_a_portrait_is_of_the_classes_that_there_are(monkeypatch):
    """Of all 21,841 the sums alone took 280 MB, in 40 dimensions, and were copied with each batch."""
    pl.seed_everything(0, verbose=False)
    made, none = [], Sums.none
    monkeypatch.setattr(Sums, "none", lambda classes, dimensions: made.append(classes) or none(classes, dimensions))
    rnf, model = plain(portraits=True, criterion=lambda score: score.cutoff <= 20), Classifier()
    model.heads = MultiHead(40, {"a": 21_841})
    x, y = clusters("a", 96).tensors
    rnf.protect(model, list(zip(x.split(32), (y * 21_840).split(32), strict=True)), name="a")
    portrait = rnf.state.task("a").portrait
    assert set(made) == {2}
    assert portrait.classes["a"].counts.tolist() == [int((y == label).sum()) for label in (0, 1)]
    assert rnf.infer_task(x, model).names == ("a",) * 96
