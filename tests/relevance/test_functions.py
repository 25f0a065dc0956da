from __future__ import annotations

import gc
import weakref
from functools import partial

import pytest
import torch
from networks import CLASSES, Built, labelled
from torch import nn
from torch.utils.checkpoint import checkpoint
from zennit.composites import EpsilonPlus

from lightning_rnf.anatomy.units import UnitMap
from lightning_rnf.relevance.attribution import attribute
from lightning_rnf.relevance.functions import FunctionRules
from lightning_rnf.relevance.splits import WrittenToError


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def mutate(x, y):
    x = x.clone()
    x.add_(y)
    return x


def augment(x, y):
    x = x.clone()
    x += y
    return x


def through_a_view(x, y):
    x = x.clone()
    x.view(-1).add_(y.view(-1))
    return x


SUMS = {
    "operator": lambda x, y: x + y,
    "function": torch.add,
    "method": lambda x, y: x.add(y),
    "augmented": augment,
    "in place": mutate,
    "through a view": through_a_view,
}


def leaves(*shape):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2)]


@pytest.mark.parametrize("how", SUMS)
def test_a_sum_splits_relevance_by_contribution(how):
    x, y = leaves(5, 7)
    relevance = torch.rand(5, 7, dtype=torch.float64)
    with FunctionRules():
        total = SUMS[how](x, y)
    assert torch.equal(total, x + y)
    of_x, of_y = torch.autograd.grad(total, [x, y], relevance)
    expected = [(part / (x + y) * relevance).detach() for part in (x, y)]
    torch.testing.assert_close(of_x, expected[0], rtol=1e-3, atol=1e-3)  # but for the stabiliser
    torch.testing.assert_close(of_y, expected[1], rtol=1e-3, atol=1e-3)


def test_a_factor_on_the_second_summand_counts():
    x, y = (part.abs().detach().requires_grad_() for part in leaves(4))
    with FunctionRules():
        total = torch.add(x, y, alpha=3)
    assert torch.equal(total, x + 3 * y)
    (of_x,) = torch.autograd.grad(total, [x], torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(of_x, (x / (x + 3 * y)).detach(), rtol=1e-4, atol=1e-6)


def test_a_sum_of_zeros_has_nothing_to_split():
    x, y = (torch.zeros(3, requires_grad=True) for _ in range(2))
    with FunctionRules():
        total = x + y
    for part in torch.autograd.grad(total, [x, y], torch.zeros(3)):
        assert torch.equal(part, torch.zeros(3))


def relevance_of(function, *tensors, relevance, aware=True):
    """Through the rules, to each tensor; the function's value has to be the plain one."""
    with FunctionRules(aware=aware):
        value = function(*tensors)
    assert torch.equal(value, function(*tensors))
    return torch.autograd.grad(value, tensors, relevance)


def positive(*shape):
    return [part.detach().abs().add(0.1).requires_grad_() for part in leaves(*shape)]


def close(found, *expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-4, atol=1e-5)


def test_what_was_broadcast_gets_the_sum_of_its_shares():
    (x, _), (_, y) = positive(5, 7), positive(5, 1)
    relevance = torch.rand(5, 7, dtype=torch.float64)
    expected = (x / (x + y) * relevance, (y / (x + y) * relevance).sum(1, keepdim=True))
    close(relevance_of(torch.add, x, y, relevance=relevance), *expected)
    close(relevance_of(augment, x, y, relevance=relevance), *expected)


def test_the_sum_of_a_tensor_and_itself_hands_it_the_whole():
    (x, _), relevance = positive(5), torch.rand(5, dtype=torch.float64)
    close(relevance_of(lambda x: x + x, x, relevance=relevance), relevance)


def test_a_difference_splits_by_signed_contribution():
    (x, y), relevance = positive(5, 7), torch.rand(5, 7, dtype=torch.float64)
    for function in (torch.sub, lambda x, y: x - y, lambda x, y: x.clone().sub_(y)):
        close(
            relevance_of(function, x + 2, y, relevance=relevance),
            (x + 2) / (x + 2 - y) * relevance,
            -y / (x + 2 - y) * relevance,
        )
    close(relevance_of(lambda x: 1 - x, x, aware=False, relevance=relevance), relevance)


PRODUCTS = {
    "operator": lambda x, y: x * y,
    "function": torch.mul,
    "method": lambda x, y: x.multiply(y),
    "in place": lambda x, y: x.clone().mul_(y),
    "augmented": lambda x, y: _augmented_product(x.clone(), y),
}


def _augmented_product(x, y):
    x *= y
    return x


@pytest.mark.parametrize("how", PRODUCTS)
def test_a_product_hands_each_factor_half(how):
    x, y = leaves(5, 7)
    relevance = torch.rand(5, 7, dtype=torch.float64)
    close(relevance_of(PRODUCTS[how], x, y, relevance=relevance), relevance / 2, relevance / 2)


def test_a_gate_gets_half_of_all_that_it_gates():
    (x, _), (_, gate) = leaves(2, 3, 4, 4), leaves(2, 3, 1, 1)
    relevance = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    found = relevance_of(lambda x, gate: gate * x, x, gate, relevance=relevance)
    close(found, relevance / 2, relevance.sum((2, 3), keepdim=True) / 2)


def test_constant_factors_take_nothing():
    (x, _), relevance = leaves(5, 7), torch.rand(5, 7, dtype=torch.float64)
    scale = torch.randn(7, dtype=torch.float64)
    for function in (lambda x: 3 * x, lambda x: x * scale, lambda x: x / scale, lambda x: x.clone().div_(2), torch.neg):
        close(relevance_of(function, x, relevance=relevance), relevance)


def test_beside_a_composite_of_the_users_own_a_quotient_of_two_is_left_alone():
    (x, y), relevance = positive(5, 7), torch.rand(5, 7, dtype=torch.float64)
    found = relevance_of(torch.div, x, y, relevance=relevance, aware=False)
    close(found, relevance / y, -relevance * x / y**2)


def test_a_product_of_matrices_splits_by_contribution_half_to_each():
    x, _ = positive(3, 4)
    _, y = positive(4, 5)
    relevance = torch.rand(3, 5, dtype=torch.float64)
    share = torch.einsum("ik,kj,ij->ikj", x, y, relevance / (x @ y)) / 2
    for function in (torch.matmul, lambda x, y: x @ y, lambda x, y: torch.einsum("ik,kj->ij", x, y)):
        close(relevance_of(function, x, y, relevance=relevance), share.sum(2), share.sum(0))


def test_a_functional_linear_layer_has_the_epsilon_rule():
    (x, _), relevance = leaves(6, 4), torch.rand(6, 3, dtype=torch.float64)
    weight, bias = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    z = x @ weight.T + bias
    found = relevance_of(lambda x: nn.functional.linear(x, weight, bias), x, relevance=relevance)
    close(found, x * (relevance / z @ weight))


AFFINE = {
    "addmm": lambda x, y: torch.addmm(y.detach()[0], x, y.detach().T @ y.detach()),
    "addmm, scaled": lambda x, y: x.addmm(x, y.detach().T @ y.detach(), beta=0.5, alpha=2.0),
    "addmm, of a factor": lambda x, y: torch.addmm(y[:, :5], y.detach(), x.T),
    "baddbmm": lambda x, y: torch.baddbmm(y[None, :, :5], x[None], y.detach().T[None]),
    "addmv": lambda x, y: torch.addmv(y.detach()[:, 0], x, y.detach()[0]),
    "in place": lambda x, y: y.detach().clone()[:, :5].addmm_(x, y.detach().T),
}


@pytest.mark.parametrize("how", AFFINE)
def test_a_sum_with_a_product_has_the_epsilon_rule(how):
    x, y = leaves(5, 7)
    with FunctionRules():
        output = AFFINE[how](x, y)
    relevance = torch.rand_like(output)
    found = torch.autograd.grad(output, [x, y], relevance, allow_unused=True)
    # By hand: each contribution over what they come to, constants included.
    plain_x, plain_y = (one.detach().clone().requires_grad_() for one in (x, y))
    total = AFFINE[how](plain_x, plain_y)
    share = relevance / total.detach()
    by_hand = torch.autograd.grad(total, [plain_x, plain_y], share, allow_unused=True)
    for one, gradient, leaf in zip(found, by_hand, (plain_x, plain_y), strict=True):
        assert (one is None) == (gradient is None)
        if gradient is not None:
            torch.testing.assert_close(one, leaf.detach() * gradient, rtol=1e-4, atol=1e-4)


INDEX = torch.tensor([0, 2, 0, 1, 2])
GATHERED = {
    "scatter_add": lambda x: torch.zeros(3, 7, dtype=x.dtype).scatter_add_(0, INDEX[:, None].expand(5, 7), x),
    "scatter_add, function": lambda x: torch.scatter_add(torch.zeros(3, 7).double(), 0, INDEX[:, None].expand(5, 7), x),
    "index_add": lambda x: torch.zeros(3, 7, dtype=x.dtype).index_add_(0, INDEX, x),
    "mean": lambda x: torch.zeros(3, 7).double().scatter_reduce_(0, INDEX[:, None].expand(5, 7), x, reduce="mean"),
    "largest": lambda x: torch.zeros(3, 7).double().scatter_reduce(0, INDEX[:, None].expand(5, 7), x, "amax"),
}


@pytest.mark.parametrize("how", GATHERED)
def test_messages_that_are_put_together_split_by_contribution(how):
    x = leaves(5, 7)[0]
    with FunctionRules():
        output = GATHERED[how](x)
    relevance = torch.rand(3, 7, dtype=torch.float64)
    (found,) = torch.autograd.grad(output, x, relevance)
    if how == "largest":
        of_group = torch.stack([x[group == INDEX].amax(0).clamp(min=0) for group in range(3)])
        expected = torch.where((x == of_group[INDEX]) & (x > 0), relevance[INDEX], 0.0)
    else:
        totals = torch.stack([x[group == INDEX].sum(0) for group in range(3)])
        expected = (x / totals[INDEX] * relevance[INDEX]).detach()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


POOLINGS = {
    "mean": (lambda x: x.mean((2, 3)), (2, 3)),
    "sum": (lambda x: torch.sum(x, dim=(2, 3)), (2, 3)),
    "sum of all": (lambda x: x.sum(), (0, 1, 2, 3)),
    "average": (lambda x: nn.functional.adaptive_avg_pool2d(x, 1).flatten(1), (2, 3)),
}


@pytest.mark.parametrize("how", POOLINGS)
def test_pooling_splits_by_contribution(how):
    pool, dim = POOLINGS[how]
    x, _ = positive(2, 3, 4, 4)
    relevance = torch.rand_like(pool(x))
    expected = x / x.sum(dim, keepdim=True) * (relevance[..., None, None] if relevance.ndim else relevance)
    close(relevance_of(pool, x, relevance=relevance), expected)


ACTIVATIONS = {
    "sigmoid": torch.sigmoid,
    "method": lambda x: x.tanh(),
    "silu": nn.functional.silu,
    "by name in place": lambda x: nn.functional.silu(x.clone(), inplace=True),
    "by position in place": lambda x: nn.functional.hardtanh(x.clone(), -1.0, 1.0, True),
    "in place": lambda x: x.clone().sigmoid_(),
    "relu6": nn.functional.relu6,
    "mish": nn.functional.mish,
    "clamp": lambda x: x.clamp(max=0.5),
}


@pytest.mark.parametrize("how", ACTIVATIONS)
def test_activations_let_relevance_pass(how):
    (x, _), relevance = leaves(5, 7), torch.rand(5, 7, dtype=torch.float64)
    close(relevance_of(ACTIVATIONS[how], x, relevance=relevance), relevance)


def test_what_is_written_to_is_written_to():
    x, y = leaves(5, 7)
    with FunctionRules():
        written = x * 1
        view = written[0]
        nn.functional.silu(written, inplace=True)
        written += y
    assert torch.equal(written, nn.functional.silu(x) + y)
    assert torch.equal(view, written[0])


def test_operands_may_be_written_to_afterwards():
    (x, y), relevance = positive(5), torch.rand(5, dtype=torch.float64)
    rules = FunctionRules()
    for rules.copies in (False, True):
        with rules:
            first, second = x * 1, y * 1
            total = first + second
            first.mul_(7)
            second.relu_()
        if not rules.copies:  # what `attribute` takes copies for
            with pytest.raises(WrittenToError, match="modified by an inplace operation"):
                torch.autograd.grad(total, [x, y], relevance)
    close(torch.autograd.grad(total, [x, y], relevance), x / (x + y) * relevance, y / (x + y) * relevance)


def test_a_network_that_writes_to_operands_has_the_relevance_of_one_that_does_not():
    def forward(net, x, write):
        first, second = net.first(x), net.second(x)
        total = first + second
        later = write(first)
        return net.head(total.relu() + later.relu())

    parts = {"first": nn.Linear(4, 6), "second": nn.Linear(4, 6), "head": nn.Linear(6, CLASSES)}
    writing = Built(partial(forward, write=lambda x: x.mul_(0.5)), **parts)
    copying = Built(partial(forward, write=lambda x: x * 0.5), **parts)
    batches = [labelled(5, 4, seed=seed) for seed in range(3)]
    layers = UnitMap.of(copying, batches[0]).layers
    found, expected = (attribute(net, layers, batches) for net in (writing, copying))
    for layer in layers:
        assert torch.equal(found.relevance[layer.name], expected.relevance[layer.name])
    assert found.conservation.ratios == expected.conservation.ratios


def test_without_a_graph_nothing_happens():
    x, y = leaves(5)
    with FunctionRules(), torch.no_grad():
        assert not (x * y).requires_grad
    with FunctionRules():
        assert type((x * y).grad_fn).__name__ == "EvenlyBackward"
    assert type((x * y).grad_fn).__name__ == "MulBackward0"


def test_modules_with_rules_of_their_own_compute_in_peace():
    net = nn.Sequential(nn.SiLU(), nn.Sequential(nn.SiLU()))
    (x, _), rules = leaves(5), FunctionRules()
    with rules.attached(net, {"0"}), rules:
        assert type(net[0](x).grad_fn).__name__ == "SiluBackward0"
        assert type(net[1](x).grad_fn).__name__ == "EvenlyBackward"
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.gate = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

    def forward(self, x):
        return x + nn.functional.silu(self.linear(x)) * self.gate(x).sigmoid()


def test_checkpointed_blocks_have_the_relevance_of_plain_ones():
    torch.manual_seed(0)
    parts = {"stem": nn.Linear(4, 8), "block": Gated(), "head": nn.Linear(8, CLASSES)}
    plain = Built(lambda net, x: net.head(net.block(net.stem(x).relu())), **parts)
    again = Built(lambda net, x: net.head(checkpoint(net.block, net.stem(x).relu(), use_reentrant=False)), **parts)
    batch = labelled(8, 4)
    layers = UnitMap.of(plain, batch).layers
    expected = attribute(plain, layers, [batch] * 2)
    found = attribute(again, layers, [batch] * 2)
    for name, relevance in expected.relevance.items():
        assert torch.equal(found.relevance[name], relevance)
    assert found.conservation == expected.conservation


def test_functions_and_modules_have_the_same_relevance():
    torch.manual_seed(0)
    parts = {"first": nn.Conv2d(2, 4, 3), "second": nn.Conv2d(4, 5, 3), "head": nn.Linear(5, CLASSES)}
    functions = Built(
        lambda net, x: net.head(nn.functional.silu(net.second(nn.functional.silu(net.first(x)))).mean((2, 3))), **parts
    )
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    modules = nn.Sequential(parts["first"], nn.SiLU(), parts["second"], nn.SiLU(), *pool, parts["head"])
    batch = labelled(8, 2, 6, 6)
    found = attribute(functions, UnitMap.of(functions, batch).layers, [batch]).relevance
    expected = attribute(modules, UnitMap.of(modules, batch).layers, [batch], composite=EpsilonPlus()).relevance
    for one, other in zip(found.values(), expected.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_beside_a_composite_of_the_users_own_constants_are_added_as_ever():
    x, _ = leaves(5, 7)
    with FunctionRules(aware=False):
        totals = [x + 1.0, 1.0 + x, x + torch.ones(5, 7), torch.add(x, 2), sum([x, x.detach()])]
    for total in totals:
        (gradient,) = torch.autograd.grad(total.sum(), [x], retain_graph=True)
        assert torch.equal(gradient, torch.ones_like(x))


class Residual(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how = SUMS[how]
        self.stem = nn.Linear(6, 8, bias=False)
        self.blocks = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(4))
        self.head = nn.Linear(8, 3, bias=False)

    def forward(self, x):
        x = self.stem(x).relu()
        for block in self.blocks:
            x = self.how(block(x).relu(), x)
        return self.head(x)


@pytest.mark.parametrize("how", SUMS)
def test_relevance_is_conserved_through_residual_sums(how):
    torch.manual_seed(0)
    net = Residual(how)
    x, y = torch.randn(16, 6), torch.arange(16) % 3
    logits = net(x).gather(1, y[:, None]).sum()
    relevance = attribute(net, UnitMap.of(net, (x, y)).layers, [(x, y)]).relevance
    assert relevance["stem"].sum().item() == pytest.approx(logits.item(), rel=1e-3)


class WrittenInPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.head = nn.Linear(3, CLASSES)

    def forward(self, x):
        x = self.stem(x)
        out = self.body(x)
        out += x
        out *= torch.sigmoid(out)
        return self.head(nn.functional.silu(out, inplace=True).mean((2, 3)))


def test_the_graph_of_what_is_written_in_place_is_freed():
    """It held itself, where Python's collector can't see it: every batch stayed in memory."""

    class Mark:
        pass

    marks = []

    def mark(module, args, output):
        found = Mark()
        output.grad_fn.metadata["mark"] = found  # lives as long as the node
        marks.append(weakref.ref(found))

    module = WrittenInPlace().eval()
    batches = [(torch.randn(2, 3, 4, 4), torch.zeros(2, dtype=torch.long)) for _ in range(3)]
    units = UnitMap.of(module, batches[0])
    with module.body.register_forward_hook(mark):
        attribute(module, units.layers, batches)
    gc.collect()
    assert len(marks) == len(batches)
    assert not any(found() for found in marks)
