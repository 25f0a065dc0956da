"""Layers that compute some of their rows: the rows are right, the rest is zero, and the layer comes back."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from lightning_rnf.rows import FEWEST, LARGEST_SHARE, can_choose_rows, computed

LAYERS = {
    "linear": (lambda: nn.Linear(6, 10), (40, 6)),
    "linear without bias": (lambda: nn.Linear(6, 10, bias=False), (40, 6)),
    "linear over positions": (lambda: nn.Linear(6, 10), (8, 5, 6)),
    "conv1d": (lambda: nn.Conv1d(3, 10, 3, padding=1), (4, 3, 20)),
    "conv2d": (lambda: nn.Conv2d(3, 10, 3, stride=2, bias=False), (4, 3, 9, 9)),
    "conv2d, reflected": (lambda: nn.Conv2d(3, 10, 3, padding=1, padding_mode="reflect"), (4, 3, 9, 9)),
    "conv3d": (lambda: nn.Conv3d(2, 10, 2), (2, 2, 5, 5, 5)),
}


def counted(module, x):
    """The output, and with how many rows torch was asked to multiply."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        found = module(x)
    return found, counter.get_total_flops()


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("kept", [1, 5, 9])
def test_relevant_rows_are_computed_and_no_others(kind, kept):
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    layer, x = make(), torch.randn(*shape)
    relevant = torch.zeros(10, dtype=torch.bool)
    relevant[torch.randperm(10)[:kept]] = True
    axis = -1 if isinstance(layer, nn.Linear) else 1
    whole, all_flops = counted(layer, x)
    with computed(layer, relevant):
        found, flops = counted(layer, x)
        again, _ = counted(layer, x)
    assert found.shape == whole.shape
    assert torch.equal(found, again)
    chosen, rest = relevant.nonzero().view(-1), (~relevant).nonzero().view(-1)
    torch.testing.assert_close(found.index_select(axis, chosen), whole.index_select(axis, chosen))
    assert not found.index_select(axis, rest).any()
    assert flops * 10 == all_flops * kept
    assert "forward" not in vars(layer)
    assert torch.equal(counted(layer, x)[0], whole)


def test_memory_format_and_precision_stay():
    layer = nn.Conv2d(4, 10, 3).to(memory_format=torch.channels_last)
    x = torch.randn(4, 4, 8, 8).contiguous(memory_format=torch.channels_last)
    relevant = torch.arange(10) < 4
    with computed(layer, relevant), torch.no_grad():
        assert layer(x).is_contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16


def test_rows_that_are_not_numbers_do_not_matter_where_they_are_silent():
    layer = nn.Linear(6, 10)
    relevant = torch.arange(10) < 5
    layer.weight.data[5:] = float("nan")
    with computed(layer, relevant), torch.no_grad():
        assert layer(torch.randn(40, 6)).isfinite().all()


def test_new_weights_count_at_once():
    layer, x, relevant = nn.Linear(6, 10), torch.randn(40, 6), torch.arange(10) < 5
    with computed(layer, relevant), torch.no_grad():
        before = layer(x)
        layer.weight.data.mul_(2)
        layer.bias.data.mul_(2)
        torch.testing.assert_close(layer(x), 2 * before)


class OwnLinear(nn.Linear):
    pass


def patched():
    layer = nn.Linear(6, 10)
    layer.forward = lambda x: x
    return layer


def parametrized():
    return nn.utils.parametrizations.weight_norm(nn.Linear(6, 10))


@pytest.mark.parametrize(
    "make",
    [lambda: OwnLinear(6, 10), patched, parametrized, lambda: nn.Conv2d(4, 10, 1, groups=2), lambda: nn.ReLU()],
)
def test_other_layers_are_left_alone(make):
    layer = make()
    before = dict(vars(layer))
    assert not can_choose_rows(layer)
    with computed(layer, torch.arange(10) < 5):
        assert vars(layer) == before


@pytest.mark.parametrize("kept", [0, 10])
def test_nothing_to_gain_nothing_done(kept):
    layer = nn.Linear(6, 10)
    with computed(layer, torch.arange(10) < kept):
        assert "forward" not in vars(layer)
    assert LARGEST_SHARE < 1


@pytest.mark.parametrize(("samples", "context"), [(FEWEST - 1, torch.no_grad), (40, nullcontext)])
def test_few_vectors_and_gradients_take_the_whole_layer(samples, context):
    layer, x = nn.Linear(6, 10), torch.randn(samples, 6)
    with computed(layer, torch.arange(10) < 5), context():
        found = layer(x)
    assert torch.equal(found, layer(x))


def test_an_exception_gives_the_layer_back():
    layer = nn.Linear(6, 10)
    with pytest.raises(ValueError, match="inside"), computed(layer, torch.arange(10) < 5):
        raise ValueError("inside")
    assert "forward" not in vars(layer)


def test_contexts_may_be_nested():
    layer, x = nn.Linear(6, 10), torch.randn(40, 6)
    with computed(layer, torch.arange(10) < 8), computed(layer, torch.arange(10) < 5), torch.no_grad():
        assert layer(x)[:, :8].any()
    assert "forward" not in vars(layer)
