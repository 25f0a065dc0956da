"""Layers that compute or learn some of their rows: these are right, the rest is zero, and the layer comes back."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_rnf.freezing import rows
from lightning_rnf.freezing.rows import FEWEST, LARGEST_SHARE, can_choose_rows, computed, learning

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
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        found = module(x)
    return found, counter.get_total_flops()


@pytest.fixture
def one_by_one(monkeypatch):
    """Convolutions work on single channels."""
    monkeypatch.setattr(rows, "BLOCK", 1)


@pytest.mark.usefixtures("one_by_one")
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


PLAIN, LAST = torch.contiguous_format, torch.channels_last


@pytest.mark.parametrize(
    ("memory_format", "kept"),  # where no row is left, one is computed, and of one channel both formats are the same
    [(PLAIN, 0), *((one, kept) for one in (PLAIN, LAST) for kept in (1, 4, 16, 20))],
)
def test_memory_format_and_precision_stay(memory_format, kept):
    layer = nn.Conv2d(4, 40, 3).to(memory_format=memory_format)
    x = torch.randn(4, 4, 8, 8).contiguous(memory_format=memory_format)
    whole = layer(x)
    with computed(layer, torch.arange(40) < kept) as is_done, torch.no_grad():
        found = layer(x)
        assert is_done()
        assert found.stride() == whole.stride()
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


def test_nothing_to_gain_nothing_done():
    layer = nn.Linear(6, 10)
    with computed(layer, torch.ones(10, dtype=torch.bool)):
        assert "forward" not in vars(layer)
    assert LARGEST_SHARE < 1


@pytest.mark.parametrize(("kept", "paid"), [(3, 16), (16, 16), (17, 32), (33, 40)])
def test_rows_of_a_convolution_come_in_blocks(kept, paid):
    torch.manual_seed(0)
    layer, x = nn.Conv2d(40, 40, 3), torch.randn(4, 40, 9, 9)
    relevant = torch.zeros(40, dtype=torch.bool)
    relevant[torch.randperm(40)[:kept]] = True
    whole, all_flops = counted(layer, x)
    with torch.no_grad():
        layer.weight[~relevant] = layer.bias[~relevant] = torch.nan  # what fills a block is of no account
    with computed(layer, relevant) as is_done:
        found, flops = counted(layer, x)
        assert is_done() == (paid < 40)
    assert flops * 40 == all_flops * paid
    torch.testing.assert_close(found[:, relevant], whole[:, relevant])
    assert paid == 40 or not found[:, ~relevant].any()


def test_channels_that_a_convolution_reads_come_in_blocks():
    torch.manual_seed(0)
    layer, x = nn.Conv2d(40, 40, 3), torch.randn(4, 40, 9, 9)
    x[:, :21] = 0.0
    relevant = torch.ones(40, dtype=torch.bool)
    whole, all_flops = counted(layer, x)
    with computed(layer, relevant, by_columns=lambda: True):
        found, flops = counted(layer, x)
    assert flops * 40 == all_flops * 32  # 19 speak
    torch.testing.assert_close(found, whole)


@pytest.mark.parametrize("kind", LAYERS)
def test_no_row_at_all_costs_what_one_costs_for_one_sample(kind):
    make, shape = LAYERS[kind]
    layer, x = make(), torch.randn(*shape)
    whole, all_flops = counted(layer, x)
    with torch.no_grad():
        next(layer.parameters())[0] = torch.nan
    with computed(layer, torch.zeros(10, dtype=torch.bool)) as is_done:
        found, flops = counted(layer, x)
        assert is_done()
    assert torch.equal(found, torch.zeros_like(whole))
    assert flops * 10 * len(x) == all_flops


@pytest.mark.usefixtures("one_by_one")
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("kept", [4, 10])
def test_channels_that_are_zero_need_not_be_heard(kind, kept):
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    layer, x = make(), torch.randn(*shape)
    axis = -1 if isinstance(layer, nn.Linear) else 1
    x.index_fill_(axis, torch.tensor([0]), 0.0)
    channels = x.shape[axis]
    if channels > 2:  # spoken to by one sample alone, and not by the first
        x.index_fill_(axis, torch.tensor([2]), 0.0)
        x.select(axis, 2)[-1] = 1.0
    relevant = torch.arange(10) < kept
    with computed(layer, relevant), torch.no_grad():
        expected = layer(x)
    quick = [True]
    with computed(layer, relevant, by_columns=lambda: quick[0]):
        found, flops = counted(layer, x)
        torch.testing.assert_close(found, expected)
        assert flops * 10 * channels == counted(make(), x)[1] * kept * (channels - 1)
        quick[0] = False
        assert torch.equal(counted(layer, x)[0], expected)
    with computed(layer, relevant, by_columns=lambda: True), torch.no_grad():
        silent, flops = counted(layer, torch.zeros_like(x))
        assert flops * 10 * channels == counted(make(), x)[1] * kept  # one of them is heard
        x.select(axis, 0).fill_(torch.nan)
        assert layer(x).isnan().any()
    with computed(layer, relevant), torch.no_grad():
        torch.testing.assert_close(silent, layer(torch.zeros_like(x)))


def test_a_layer_that_hears_nothing_at_all_says_its_bias():
    with pytest.warns(UserWarning, match="zero-element"):
        layer = nn.Linear(0, 10)
    with torch.no_grad(), computed(layer, torch.arange(10) < 4, by_columns=lambda: True):
        found = layer(torch.zeros(40, 0))
    assert torch.equal(found[:, :4], layer.bias[:4].expand(40, 4))
    assert not found[:, 4:].any()


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


LEARNING = {
    "linear": (partial(nn.Linear, 6, 10), (40, 6)),
    "linear without bias": (partial(nn.Linear, 6, 10, bias=False), (40, 6)),
    "linear over positions": (partial(nn.Linear, 6, 10), (4, 5, 6)),
    "conv1d": (partial(nn.Conv1d, 3, 10, 3, padding=1), (4, 3, 20)),
    "conv2d": (partial(nn.Conv2d, 3, 10, 3, stride=2, dilation=2, bias=False), (4, 3, 9, 9)),
    "conv3d": (partial(nn.Conv3d, 2, 10, 2, padding=(1, 0, 1)), (2, 2, 5, 5, 5)),
}

FROZEN = torch.tensor([True, False, True, True, False, True, False, True, True, True])


@pytest.fixture
def always_pays(monkeypatch):
    """Small layers, too."""
    monkeypatch.setattr(rows, "LARGEST_LEARNING_SHARE", {"linear": 1.0, "convolution": 1.0})
    monkeypatch.setattr(rows, "FEWEST_PRODUCTS", 0)
    monkeypatch.setattr(rows, "FEWEST_WEIGHTS", 0)


def gradients(layer, x, context=nullcontext):
    """The output, and what arrives at the input and at the parameters, behind an activation that works in place."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    with context():
        output = layer(x)
        found = output.detach().clone()
        loss = (nn.functional.relu_(output) ** 2).sum()
    loss.backward()
    return found, x.grad, *(parameter.grad for parameter in layer.parameters())


@pytest.mark.usefixtures("always_pays")
@pytest.mark.parametrize("kind", LEARNING)
@pytest.mark.parametrize("context", [nullcontext, partial(torch.autocast, "cpu", torch.bfloat16)])
def test_only_free_rows_of_the_weight_get_a_gradient_and_nothing_else_differs(kind, context):
    torch.manual_seed(0)
    make, shape = LEARNING[kind]
    layer, x = make(), torch.randn(*shape)
    output, at_x, at_weight, *at_bias = gradients(layer, x, context)
    with learning(layer, FROZEN)[1]:
        found = gradients(layer, x, context)
    assert torch.equal(found[0], output)  # the forward is the layer's own
    tolerance = {} if context is nullcontext else {"rtol": 0.02, "atol": 0.05}
    torch.testing.assert_close(found[1], at_x, **tolerance)
    torch.testing.assert_close(found[2][~FROZEN], at_weight[~FROZEN], **tolerance)
    assert at_weight[FROZEN].any()
    assert not found[2][FROZEN].any()
    assert found[2].dtype == layer.weight.dtype
    torch.testing.assert_close(list(found[3:]), at_bias, **tolerance)
    again = gradients(layer, x, context)
    assert torch.equal(again[2], at_weight)  # the hook is gone


@pytest.mark.usefixtures("always_pays")
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_frozen_rows_cost_nothing_in_the_weights_gradient(kind):
    make, shape = LEARNING[kind]
    layer, x = make(), torch.randn(*shape)
    with FlopCounterMode(display=False) as forward:
        layer(x)
    with learning(layer, FROZEN)[1], FlopCounterMode(display=False) as all_of_it:
        layer(x).sum().backward()  # x needs none
    share = float((~FROZEN).double().mean())
    assert all_of_it.get_total_flops() == pytest.approx((1 + share) * forward.get_total_flops())


@pytest.mark.usefixtures("always_pays")
@pytest.mark.parametrize("kind", ["linear", "linear over positions", "conv2d"])
def test_gradients_of_gradients_are_right(kind):
    make, shape = LEARNING[kind]
    layer, x = make().double(), torch.randn(*shape).double().requires_grad_()

    def penalty():
        layer.zero_grad()
        of_weight, of_x = torch.autograd.grad(layer(x).tanh().sum(), (layer.weight, x), create_graph=True)
        (of_weight[~FROZEN].square().sum() + of_x.square().sum()).backward()
        return layer.weight.grad

    whole = penalty()
    with learning(layer, FROZEN)[1]:
        torch.testing.assert_close(penalty()[~FROZEN], whole[~FROZEN])


@pytest.mark.usefixtures("always_pays")
def test_what_is_added_to_the_gradient_is_told_from_it():
    layer, x = nn.Linear(6, 10), torch.randn(40, 6)
    hook, handle = learning(layer, FROZEN)
    with handle:
        layer(x).sum().backward()
        assert hook.has_made(layer.weight.grad)
        assert not hook.has_made(layer.weight.grad)  # asked once
        layer(x).sum().backward()  # accumulated
        assert not hook.has_made(layer.weight.grad)
        layer.zero_grad()
        (layer(x).sum() + layer.weight.square().sum()).backward()
        assert not hook.has_made(layer.weight.grad)


@pytest.mark.usefixtures("always_pays")
def test_hooks_of_the_users_see_what_the_gradient_arrives_at():
    layer, x, seen = nn.Linear(6, 10), torch.randn(40, 6), []
    layer.register_forward_hook(lambda module, args, output: output.retain_grad() or seen.append(output))
    layer.register_full_backward_hook(lambda module, into, outof: seen.append((into, outof)))
    with learning(layer, FROZEN)[1]:
        layer(x.requires_grad_()).sum().backward()
    assert torch.equal(seen[0].grad, torch.ones(40, 10))
    assert torch.equal(seen[1][0][0], x.grad)


@pytest.mark.usefixtures("always_pays")
def test_copies_learn_by_their_own_weights():
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 10), torch.randn(40, 6)
    with learning(layer, FROZEN)[1]:
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            other.weight.data.mul_(2)
            other(x).square().sum().backward()
            assert layer.weight.grad is None
            expected = 2 * ((2 * x @ layer.weight.T + layer.bias).T @ x)
            torch.testing.assert_close(other.weight.grad[~FROZEN], expected[~FROZEN])


def test_small_layers_many_rows_and_what_is_called_by_keyword_learn_as_ever():
    big, x = nn.Linear(512, 512), torch.randn(128, 512)
    frozen = torch.arange(512) < 200
    for layer, own, share in ((nn.Linear(6, 10), torch.randn(40, 6), FROZEN), (big, x, torch.arange(512) < 10)):
        expected = gradients(layer, own)[2]
        with learning(layer, share)[1]:
            assert torch.equal(gradients(layer, own)[2], expected)
    with learning(big, frozen)[1]:
        assert not gradients(big, x)[2][frozen].any()  # this one is large enough
        big.zero_grad()
        big(input=x).sum().backward()
        assert big.weight.grad[frozen].any()
        big.requires_grad_(False)
        assert not big(x).requires_grad
        with torch.no_grad():
            assert not big(x).requires_grad


@pytest.mark.usefixtures("always_pays")
def test_transforms_of_functions_see_the_layer_as_it_is():
    layer, x = nn.Linear(6, 10), torch.randn(40, 6)
    with learning(layer, FROZEN)[1]:
        found = torch.func.grad(lambda w: torch.func.functional_call(layer, {"weight": w}, x).sum())(layer.weight)
    assert found[FROZEN].any()


@pytest.mark.usefixtures("always_pays")
def test_a_compiled_layer_is_one_graph_and_has_all_gradients():
    layer, x = nn.Linear(6, 10), torch.randn(40, 6)
    with learning(layer, FROZEN)[1]:
        torch.compile(layer, backend="eager", fullgraph=True)(x).sum().backward()
    assert layer.weight.grad[FROZEN].any()


@pytest.mark.usefixtures("always_pays")
def test_one_vector_is_no_batch():
    layer, x = nn.Linear(6, 10), torch.randn(6)
    expected = gradients(layer, x)[2]
    with learning(layer, FROZEN)[1]:
        assert torch.equal(gradients(layer, x)[2], expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda: OwnLinear(6, 10),
        patched,
        parametrized,
        lambda: nn.Conv2d(4, 10, 1, groups=2),
        lambda: nn.Conv2d(4, 10, 3, padding=1, padding_mode="reflect"),
        lambda: nn.Conv2d(4, 10, 3, padding="same"),
        lambda: nn.ConvTranspose2d(10, 4, 3),
        lambda: nn.BatchNorm1d(10),
    ],
)
def test_layers_of_which_less_is_known_learn_as_ever(make):
    assert learning(make(), FROZEN) is None


@pytest.mark.parametrize("frozen", [torch.zeros(10, dtype=torch.bool), torch.ones(10, dtype=torch.bool)])
def test_where_all_or_none_learn_there_is_nothing_to_do(frozen):
    assert learning(nn.Linear(6, 10), frozen) is None
