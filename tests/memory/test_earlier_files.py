"""Files of earlier builds load as they did. ``before_wings``: two tasks, by the build before there were wings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from training import ConvClassifier, inputs, task_data, trainer

from lightning_rnf import RelevanceFreezing

FILES = Path(__file__).parent / "files"


def is_same(one, other):
    """Dicts and lists all the way down, tensors bit by bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_same(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(is_same, one, other))
    return torch.equal(one, other) if isinstance(one, Tensor) else one == other


@pytest.fixture
def checkpoint():
    return torch.load(FILES / "before_wings.ckpt", weights_only=True)


@pytest.fixture
def model(checkpoint):
    model = ConvClassifier(optimizer=torch.optim.SGD, lr=0.1)
    model.load_state_dict(checkpoint["state_dict"])
    return model


def assert_recalled(rnf, model):
    expected = torch.load(FILES / "before_wings_logits.pt", weights_only=True)
    assert list(rnf.state.tasks) == list(expected) == ["a", "b"]
    for task, logits in expected.items():
        with rnf.recall(task, model), torch.no_grad():
            torch.testing.assert_close(model(inputs(8)), logits)  # bits are those of the processor that wrote it


def test_a_checkpoint_loads_unchanged(checkpoint, model):
    written = checkpoint["callbacks"]["RelevanceFreezing"]
    rnf = RelevanceFreezing()
    rnf.load_state_dict(written)
    assert is_same(written, rnf.state_dict())
    assert_recalled(rnf, model)
    report = rnf.report(model)
    assert not any(report.changed.values())
    assert not any(report.audit.unknown.values())


def test_a_file_of_masks_loads_unchanged(checkpoint, model):
    rnf, other = RelevanceFreezing(), RelevanceFreezing()
    rnf.load(FILES / "before_wings.safetensors", model)
    assert_recalled(rnf, model)
    other.load_state_dict(checkpoint["callbacks"]["RelevanceFreezing"])
    for name, record in other.state.tasks.items():
        assert is_same(dict(record.relevant), dict(rnf.state.tasks[name].relevant))
        assert is_same(dict(record.relevance), dict(rnf.state.tasks[name].relevance))
        assert record.rows == rnf.state.tasks[name].rows


@pytest.mark.filterwarnings("ignore:The loaded checkpoint was produced with Lightning")  # a newer one, in old legs
def test_a_fit_goes_on_from_it(model):
    rnf = RelevanceFreezing(criterion=0.05, recovery_epochs=1, ration=0.5, reset_free=True, fit_head=False)
    model.heads.activate("c")
    trainer(rnf, max_epochs=5).fit(model, datamodule=task_data("c"), ckpt_path=FILES / "before_wings.ckpt")
    assert list(rnf.state.tasks) == ["a", "b", "c"]
    assert not any(rnf.report(model).changed.values())
