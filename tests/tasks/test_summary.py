"""The model summary's columns of units."""

from __future__ import annotations

import logging

import pytest
import torch
from lightning.pytorch.callbacks import ModelSummary
from training import Classifier, task_data, train, trainer

from lightning_rnf import RelevanceFreezing, RichUnitSummary, UnitSummary


def summary_of(callback, rnf, model, caplog, capsys):
    caplog.clear()
    model.heads.activate("b")
    logger = logging.getLogger("lightning.pytorch.callbacks.model_summary")
    with caplog.at_level(logging.INFO, logger.name):  # other tests may have silenced the ones above
        options = {"max_epochs": 1, "fast_dev_run": True, "enable_model_summary": True}
        trainer(*([rnf] if rnf else []), callback, **options).fit(model, datamodule=task_data("b"))
    return caplog.text + capsys.readouterr().out


@pytest.mark.parametrize("kind", [UnitSummary, RichUnitSummary])
def test_modules_have_the_units_of_the_layers_inside(kind, caplog, capsys):
    torch.manual_seed(0)
    model, rnf = Classifier(), RelevanceFreezing()
    train(model, rnf, "a", max_epochs=1)
    text = summary_of(kind(max_depth=2), rnf, model, caplog, capsys)
    frozen = rnf.state.frozen()
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.count("|") > 4}
    if kind is UnitSummary:
        assert "Units" in text
        assert "80 units" in rows["body"]
        assert f"{rnf.free_capacity:.0%} free" in rows["body"]
        assert f"{float((~frozen['body.0']).float().mean()):.0%} free" in rows["body.0"]
        assert "units" not in rows["heads"]
    assert text.count("40 units") == 2


@pytest.mark.parametrize("with_callback", [True, False])
def test_before_the_first_task_it_is_lightnings_own(with_callback, caplog, capsys):
    torch.manual_seed(0)
    model = Classifier()
    rnf = RelevanceFreezing() if with_callback else None
    found, own = (summary_of(kind(), rnf, model, caplog, capsys) for kind in (UnitSummary, ModelSummary))
    assert "units" not in found
    table = [[line for line in text.splitlines() if "|" in line] for text in (found, own)]
    assert table[0] == table[1]
    assert len(table[0]) > 2
