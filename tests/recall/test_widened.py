"""A model in its earlier shape: for a while, and then the very same objects again."""

from __future__ import annotations

import pytest
import torch
from nets_to_widen import CLASSES, convolutions

from lightning_rnf import RelevanceFreezing
from lightning_rnf.recall import as_it_was
from lightning_rnf.runtime import sharding

pytestmark = pytest.mark.filterwarnings("ignore:no free units", "ignore:.*answer that is always", "ignore:.*not one of")


@pytest.fixture
def widened():
    torch.manual_seed(0)
    model, rnf = convolutions(), RelevanceFreezing(criterion=lambda score: score.cutoff <= 3)
    rnf.protect(model, [(torch.randn(64, 2, 6, 6), torch.randint(CLASSES, (64,)))], name="a")
    shapes = [sizes(model)]
    for _ in range(2):
        rnf.widen(model, 0.5, layers="*")
        shapes.append(sizes(model))
    return model, rnf.state.widenings, shapes


def sizes(model):
    tensors = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    counts = {
        (name, key): value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, int) and key != "training"
    }
    return tensors, counts


def objects(model):
    return [id(value) for value in (*model.parameters(), *model.buffers())]


def test_any_shape_inside_of_any_other(widened):
    model, widenings, shapes = widened
    before, state = objects(model), {name: value.clone() for name, value in model.state_dict().items()}
    for outer in range(3):
        for inner in range(3):
            with as_it_was(model, widenings, outer):
                assert sizes(model) == shapes[outer]
                with pytest.raises(ZeroDivisionError), as_it_was(model, widenings, inner):
                    assert sizes(model) == shapes[inner]
                    model.eval()(torch.randn(2, 2, 6, 6))
                    raise ZeroDivisionError
                assert sizes(model) == shapes[outer]
            assert sizes(model) == shapes[2]
            assert objects(model) == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_what_is_written_to_copies_is_lost(widened):
    model, widenings, _ = widened
    mean = model.body[1].running_mean.clone()
    with as_it_was(model, widenings, 0), torch.no_grad():
        model.body[1].running_mean.fill_(7)
        model.body[0].weight.fill_(7)
    assert torch.equal(model.body[1].running_mean, mean)
    assert not (model.body[0].weight == 7).any()


def test_a_sharded_model_is_refused(widened, monkeypatch):
    model, widenings, _ = widened
    monkeypatch.setattr(sharding, "is_sharded", lambda module: True)
    with (
        pytest.raises(ValueError, match="can't be recalled while the model is sharded"),
        as_it_was(model, widenings, 1),
    ):
        pass
    with as_it_was(model, widenings, 2):
        pass
