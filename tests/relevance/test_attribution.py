from __future__ import annotations

import copy
import gc
import math
from typing import Any

import pytest
import torch
from networks import CLASSES, Built, convnet, labelled, mlp, split
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle
from zennit.canonizers import SequentialMergeBatchNorm
from zennit.composites import EpsilonPlus

from lightning_rnf.anatomy.units import UnitLayer, UnitMap
from lightning_rnf.relevance.attribution import attribute

# -- the oracle: the paper's equations in matrix form, in double precision --------------------------------------------

EPSILON = 1e-6


def oracle(net: nn.Sequential, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Relevance at the output of every linear layer and convolution, summed over samples and positions."""
    net = copy.deepcopy(net).double().eval()
    seen = []
    a = x.double()
    with torch.no_grad():
        for name, layer in net.named_children():
            seen.append((name, layer, a))
            a = layer(a.clone())  # an in-place function must not reach what was seen
        relevance = (nn.functional.one_hot(y, a.shape[1]) if y.ndim == 1 else y) * a
        by_layer = {}
        for name, layer, a in reversed(seen):
            if isinstance(layer, nn.Linear):
                rows = relevance.flatten(0, -2)
                by_layer[name] = rows.sum(0)
                relevance = epsilon_rule(a.flatten(0, -2), layer.weight, bias_of(layer), rows).view_as(a)
            elif isinstance(layer, (nn.Conv1d, nn.Conv2d)):
                by_layer[name] = relevance.flatten(2).sum((0, 2))
                relevance = z_plus_rule(a.flatten(1), *as_matrix(layer, a), relevance.flatten(1)).view_as(a)
            elif isinstance(layer, nn.Flatten):
                relevance = relevance.view_as(a)
            elif isinstance(layer, nn.MaxPool2d):
                relevance = to_winners(layer, a, relevance)
            # Activations, dropout and batch norms hand relevance through.
    return by_layer


def epsilon_rule(a: Tensor, w: Tensor, b: Tensor, relevance: Tensor) -> Tensor:
    """Equation 2. The bias is one more contribution, whose share of relevance is lost."""
    z = a @ w.T + b
    return a * ((relevance / stabilised(z)) @ w)


def z_plus_rule(a: Tensor, w: Tensor, b: Tensor, relevance: Tensor) -> Tensor:
    """In proportion to the contributions a·w that are positive, be both factors positive or both negative."""
    a_plus, a_minus, w_plus, w_minus = a.clamp(min=0), a.clamp(max=0), w.clamp(min=0), w.clamp(max=0)
    z = a_plus @ w_plus.T + a_minus @ w_minus.T + b.clamp(min=0)
    share = relevance / stabilised(z)
    return a_plus * (share @ w_plus) + a_minus * (share @ w_minus)


def stabilised(z: Tensor) -> Tensor:
    return torch.where(z < 0, z - EPSILON, z + EPSILON)


def as_matrix(conv: nn.Conv1d | nn.Conv2d, a: Tensor) -> tuple[Tensor, Tensor]:
    """The convolution as a linear layer of flattened activations: weight (outputs, inputs) and bias (outputs,)."""
    unbiased = copy.deepcopy(conv)
    unbiased.bias = None
    basis = torch.eye(a[0].numel(), dtype=a.dtype).view(-1, *a.shape[1:])
    columns = unbiased(basis)
    return columns.flatten(1).T, bias_of(conv).repeat_interleave(columns[0, 0].numel())


def bias_of(layer: nn.Module) -> Tensor:
    return layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias


def to_winners(pool: nn.MaxPool2d, a: Tensor, relevance: Tensor) -> Tensor:
    _, winners = nn.functional.max_pool2d(a, pool.kernel_size, return_indices=True)
    return nn.functional.max_unpool2d(relevance, winners, pool.kernel_size, output_size=a.shape)


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest over all layers of one, relative to the layer's largest relevance."""
    return max(float((found[name] - expected[name]).abs().max() / expected[name].abs().max()) for name in found)


# -- builders ---------------------------------------------------------------------------------------------------------


def unit_relevance(net: nn.Module, *batches: tuple[Tensor, Tensor], **options) -> dict[str, Tensor]:
    return attribute(net, UnitMap.of(net, batches[0]).layers, batches, **options).relevance


def negative_inputs() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(27, 3))


def odd_convolutions() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(4, 6, 2, groups=2, dilation=2, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24, CLASSES),
    )


def one_dimensional() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv1d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv1d(4, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(20, CLASSES)
    )


def linear_at_positions() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6), nn.ReLU(), nn.Flatten(), nn.Linear(18, CLASSES))


def normed(*, bias: bool = True) -> nn.Sequential:
    """Convolutions with batch norms that do something."""
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=bias),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 5, 3, bias=bias),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Dropout(),
        nn.Flatten(),
        nn.Linear(20, CLASSES),
    )
    for norm in (net[1], net[4]):
        nn.init.normal_(norm.running_mean)
        for scale in (norm.running_var, norm.weight):
            nn.init.uniform_(scale, 0.5, 2.0)
        nn.init.normal_(norm.bias)
    return net


def folded(net: nn.Sequential) -> nn.Sequential:
    """``normed()`` with its norms folded into its convolutions."""
    net = copy.deepcopy(net)
    for conv, norm in ((net[0], net[1]), (net[3], net[4])):
        scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach()
        bias = 0.0 if conv.bias is None else conv.bias.detach()
        conv.bias = nn.Parameter((bias - norm.running_mean) * scale + norm.bias.detach())
        conv.weight = nn.Parameter(conv.weight.detach() * scale.view(-1, 1, 1, 1))
    net[1], net[4] = nn.Identity(), nn.Identity()
    return net


IMAGES = (2, 6, 6)
NETWORKS = {
    "mlp": (mlp, (4,)),
    "convnet": (convnet, IMAGES),
    "convnet in place": (lambda: convnet(inplace=True), IMAGES),
    "negative inputs": (negative_inputs, IMAGES),
    "stride, padding, groups, dilation": (odd_convolutions, IMAGES),
    "one-dimensional": (one_dimensional, IMAGES[:2]),
    "batch norm": (normed, IMAGES),
    "linear at three positions": (linear_at_positions, (3, 4)),
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# -- what relevance is ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["single", "double"]
)
@pytest.mark.parametrize("network", NETWORKS)
def test_relevance_is_that_of_the_equations(network, dtype, tolerance):
    build, shape = NETWORKS[network]
    net = build().to(dtype)
    x, y = labelled(9, *shape)

    found = unit_relevance(net, *split((x.to(dtype), y), [5, 1, 3]))

    expected = oracle(folded(net) if network == "batch norm" else net, x, y)
    assert list(found) == list(expected)[:0:-1]  # all but the head, in execution order
    assert all(relevance.dtype == torch.float64 for relevance in found.values())
    assert difference(found, expected) < tolerance


@pytest.mark.parametrize("network", ["mlp", "convnet"])
def test_absolute_relevance_is_that_of_each_sample_by_its_size(network):
    build, shape = {"mlp": (mlp, (4,)), "convnet": (convnet, IMAGES)}[network]
    net, (x, y) = build(), labelled(9, *shape)
    layers = UnitMap.of(net, (x, y)).layers
    batches = list(split((x, y), [5, 1, 3]))
    found = attribute(net, layers, batches, over_samples="absolute")
    alone = [oracle(net, *one) for one in split((x, y), [1] * 9)]
    expected = {name: sum(one[name].abs() for one in alone) for name in found.relevance}
    assert difference(found.relevance, expected) < 1e-5
    assert found.conservation.ratios == attribute(net, layers, batches).conservation.ratios


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("build", "shape"), [(mlp, (4,)), (convnet, IMAGES)], ids=["mlp", "convnet"])
def test_without_biases_every_layer_has_the_relevance_of_the_logits(build, shape, seed):
    torch.manual_seed(seed)
    net = build(bias=False)
    x, y = labelled(16, *shape, seed=seed)

    found = unit_relevance(net, *split((x, y), [10, 6]))

    true_logits = net(x)[torch.arange(16), y].sum().item()
    for relevance in found.values():
        assert relevance.sum().item() == pytest.approx(true_logits, rel=1e-4)


@pytest.mark.parametrize(("build", "shape"), [(mlp, (4,)), (convnet, IMAGES)], ids=["mlp", "convnet"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool], ids=str)
def test_with_several_labels_relevance_starts_at_all_of_them(build, shape, dtype):
    net, (x, _) = build(), labelled(9, *shape)
    y = torch.rand(9, 3) > 0.5
    y[:2] = torch.tensor([[False], [True]])  # one sample without a label, one with all

    found = unit_relevance(net, (x, y.to(dtype)))

    assert difference(found, {name: value for name, value in oracle(net, x, y).items() if name in found}) < 1e-4


def test_relevance_starts_at_the_true_class_alone():
    net = mlp()
    x, y = labelled(8, 4)
    other = copy.deepcopy(net)
    with torch.no_grad():
        other[4].weight[2] += 1.0
        other[4].bias[2] += 1.0
    is_other_class = y != 2

    before, after = (unit_relevance(model, (x[is_other_class], y[is_other_class])) for model in (net, other))

    assert difference(after, before) == 0.0


@pytest.mark.parametrize("activation", [nn.ReLU(True), torch.relu, torch.relu_], ids=["module", "function", "in place"])
def test_the_form_of_the_activation_makes_no_difference(activation):
    net = Built(
        lambda net, x: net.head(activation(net.second(activation(net.first(x))))),
        first=nn.Linear(4, 8),
        second=nn.Linear(8, 6),
        head=nn.Linear(6, CLASSES),
    )
    batch = labelled(8, 4)
    plain = nn.Sequential(net.first, nn.ReLU(), net.second, nn.ReLU(), net.head)

    found, expected = unit_relevance(net, batch), unit_relevance(plain, batch)

    for name, other in (("first", "0"), ("second", "2")):
        torch.testing.assert_close(found[name], expected[other], rtol=1e-5, atol=0.0)


class OtherOrder(nn.Module):
    """The network of `normed`, with norms registered away from the convolutions that they follow."""

    def __init__(self, parts: nn.Sequential) -> None:
        super().__init__()
        self.second_norm, self.second, self.first_norm, self.first = parts[4], parts[3], parts[1], parts[0]
        self.head = parts[8]

    def forward(self, x: Tensor) -> Tensor:
        x = self.first_norm(self.first(x)).relu_()
        return self.head(self.second_norm(self.second(x)).relu().flatten(1))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_norms_merge_into_the_layers_that_they_follow_in_the_forward(bias, affine):
    parts, batch = normed(bias=bias), labelled(9, *IMAGES)
    for norm in (parts[1], parts[4]) if not affine else ():
        nn.init.ones_(norm.weight)
        nn.init.zeros_(norm.bias)
    expected = oracle(folded(parts), *batch)
    for norm in (parts[1], parts[4]) if not affine else ():
        norm.weight = norm.bias = None

    found = unit_relevance(OtherOrder(parts), *split(batch, [5, 1, 3]))

    assert difference({"0": found["first"], "3": found["second"]}, expected) < 1e-5


def test_norms_merge_where_torch_takes_no_epsilon_of_zero(monkeypatch):
    """As torch 2.11 does, in evaluation, too."""
    parts, batch = normed(), labelled(9, *IMAGES)
    expected, plain = unit_relevance(OtherOrder(parts), batch), nn.functional.batch_norm

    def batch_norm(*args, eps=1e-5, **options):
        eps = args[-1] if len(args) == 8 else eps
        if eps <= 0:
            raise ValueError(f"batch_norm eps must be positive, but got {eps}")
        return plain(*args, **({} if len(args) == 8 else {"eps": eps}), **options)

    monkeypatch.setattr(nn.functional, "batch_norm", batch_norm)
    found = unit_relevance(OtherOrder(parts), batch)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_norm_after_a_linear_layer_merges_too():
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, CLASSES))
    with torch.no_grad():
        for tensor in (net[1].running_mean, net[1].bias):
            tensor.normal_()
        for tensor in (net[1].running_var, net[1].weight):
            tensor.uniform_(0.5, 2.0)
        scale = net[1].weight / (net[1].running_var + net[1].eps).sqrt()
        merged = copy.deepcopy(net)
        merged[0].weight.mul_(scale[:, None])
        merged[0].bias.sub_(net[1].running_mean).mul_(scale).add_(net[1].bias)
    merged[1] = nn.Identity()
    batch = labelled(9, 4)

    found = attribute(net, UnitMap.of(net, batch).layers, [batch])
    expected = attribute(merged, UnitMap.of(merged, batch).layers, [batch])

    assert difference(found.relevance, expected.relevance) < 1e-5
    assert found.conservation.ratios == pytest.approx(expected.conservation.ratios, rel=1e-5)


def test_a_norm_that_uses_the_batch_or_does_not_follow_a_layer_stays():
    for net in (
        nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.ReLU(), nn.Linear(6, CLASSES)),
        nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.BatchNorm1d(6), nn.Linear(6, CLASSES)),
    ):
        batch = labelled(9, 4)
        passed = unit_relevance(net, batch, composite=EpsilonPlus())
        assert difference(unit_relevance(net, batch), passed) == 0.0


def test_a_composite_of_the_users_own_is_used_as_it_is():
    net, batch = normed(), labelled(9, *IMAGES)
    assert difference(unit_relevance(net, batch, composite=EpsilonPlus()), oracle(net, *batch)) < 1e-5
    assert difference(oracle(folded(net), *batch), oracle(net, *batch)) > 1e-2  # the two differ


@pytest.mark.parametrize("bias", [True, False])
def test_a_canonizer_that_folds_norms_gives_the_relevance_of_the_folded_network(bias):
    net = normed(bias=bias)
    x, y = labelled(9, *IMAGES)
    composite = EpsilonPlus(canonizers=[SequentialMergeBatchNorm()])

    for _ in range(2):  # the composite can be used again
        found = unit_relevance(net, *split((x, y), [5, 1, 3]), composite=composite)
        assert difference(found, oracle(folded(net), x, y)) < 1e-5


# -- layers that compute their weight in a forward of their own -------------------------------------------------------


def standardised(weight: Tensor) -> Tensor:
    """Row by row, as timm's ``ScaledStdConv2d`` does it."""
    rows = weight.flatten(1)
    scaled = (rows - rows.mean(1, keepdim=True)) / (rows.std(1, keepdim=True, correction=0) + 1e-5)
    return scaled.view_as(weight)


class StandardisedLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, standardised(self.weight), self.bias)


class StandardisedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, standardised(self.weight), self.bias)


def plain(layer: nn.Module) -> nn.Module:
    """A layer of torch that computes the same."""
    twin = copy.deepcopy(layer)
    twin.__class__ = type(layer).__bases__[0]
    with torch.no_grad():
        twin.weight.copy_(standardised(layer.weight))
    return twin


def test_a_linear_layer_that_computes_its_weight_is_propagated_through_with_that_weight():
    net = nn.Sequential(StandardisedLinear(4, 8), nn.ReLU(), StandardisedLinear(8, 6), nn.ReLU(), nn.Linear(6, CLASSES))
    batch = labelled(9, 4)
    found = attribute(net, UnitMap.of(net, batch).layers, [batch])
    same = nn.Sequential(plain(net[0]), nn.ReLU(), plain(net[2]), nn.ReLU(), net[4])
    assert difference(found.relevance, oracle(same, *batch)) < 1e-5
    assert found.conservation.notes == ()
    assert found.conservation.loss() is None  # what is lost is the biases' share


@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_that_computes_its_weight_has_epsilon_for_that_weight_and_a_note(bias):
    net = nn.Sequential(
        StandardisedConv(2, 4, 3, bias=bias),
        nn.BatchNorm2d(4),  # merged into the weight that the other is computed of, it would be another function
        nn.ReLU(),
        StandardisedConv(4, 5, 3, bias=bias),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(20, CLASSES, bias=bias),
    )
    with torch.no_grad():
        net[1].running_var.uniform_(0.5, 2.0)
        net[1].weight.uniform_(0.5, 2.0)
    batch = labelled(9, *IMAGES)
    layers = UnitMap.of(net, batch).layers
    assert [(layer.name, layer.norm) for layer in layers] == [("0", "1"), ("3", None)]

    found = attribute(net, layers, [batch])

    x = batch[0]
    with torch.no_grad():
        outputs = [x := module(x) for module in net.eval()]
        relevance = nn.functional.one_hot(batch[1], CLASSES) * outputs[6]
        expected = {"3": epsilon_rule(outputs[5], net[6].weight, bias_of(net[6]), relevance)}
        a = outputs[2].flatten(1)
        expected["0"] = epsilon_rule(a, *as_matrix(plain(net[3]), outputs[2]), expected["3"])
        expected = {name: at.view_as(outputs[int(name)]).sum((0, 2, 3)) for name, at in expected.items()}
    assert difference(found.relevance, expected) < 1e-4
    assert found.conservation.notes == (
        "no rule is made for the own forward of StandardisedConv (0, 3): relevance is approximate there",
    )
    if not bias:
        assert found.conservation.ratios["0"] == pytest.approx(1.0, abs=1e-3)
    assert found.conservation.loss() is None or bias


# -- what it does not depend on ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [convnet, normed])
def test_relevance_does_not_depend_on_batch_size_or_order(build):
    net = build().double()
    x, y = labelled(12, *IMAGES)
    batch = x.double(), y
    at_once = unit_relevance(net, batch)

    one_by_one = unit_relevance(net, *split(batch, [1] * 12))
    backwards = unit_relevance(net, (batch[0].flip(0), y.flip(0)))

    assert difference(one_by_one, at_once) < 1e-12
    assert difference(backwards, at_once) < 1e-12


def test_training_mode_autocast_and_no_grad_around_it_make_no_difference():
    net = normed()
    batch = labelled(8, *IMAGES)
    expected = unit_relevance(net.eval(), batch)

    net.train()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = unit_relevance(net, batch)

    assert difference(found, expected) == 0.0


def test_frozen_parameters_make_no_difference():
    net = convnet()
    batch = labelled(8, *IMAGES)
    expected = unit_relevance(net, batch)

    found = unit_relevance(net.requires_grad_(False), batch)

    assert difference(found, expected) == 0.0
    assert not any(parameter.requires_grad for parameter in net.parameters())


@pytest.mark.parametrize("inputs", [torch.float32, "the module's"], ids=str)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_a_half_precision_module_is_attributed_in_single_precision(half, inputs):
    net = normed().to(half)
    x, y = labelled(8, *IMAGES)
    x = x.to(half)  # round the numbers, whatever type they come in
    layers = UnitMap.of(net, (x, y)).layers
    expected = attribute(copy.deepcopy(net).float(), layers, [(x.float(), y)]).relevance
    tensors = [*net.parameters(), *net.buffers()]
    before = [(tensor.dtype, tensor.data_ptr(), tensor.detach().clone()) for tensor in tensors]

    found = attribute(net, layers, [(x.float() if inputs == torch.float32 else x, y)]).relevance

    assert difference(found, expected) == 0.0
    for tensor, now, (dtype, address, values) in zip(tensors, [*net.parameters(), *net.buffers()], before, strict=True):
        assert now is tensor
        assert (tensor.dtype, tensor.data_ptr()) == (dtype, address)
        assert torch.equal(tensor, values)


class Cast(nn.Module):
    """A forward that names a dtype of its own accord, and a network in that dtype."""

    def __init__(self, dtype: torch.dtype, how: str) -> None:
        super().__init__()
        self.dtype, self.how = dtype, how
        self.first = nn.Linear(4, 8)  # stays in single precision if the model has several dtypes
        self.rest = nn.Sequential(nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, CLASSES)).to(dtype)
        if how != "several dtypes":
            self.first.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "method":
            x = {torch.bfloat16: x.bfloat16, torch.float16: x.half, torch.float64: x.double}[self.dtype]()
        elif self.how == "type":
            x = x.type(self.dtype)
        elif self.how == "new tensor":
            x = torch.zeros(x.shape, dtype=self.dtype).copy_(x) if not x.requires_grad else x
        elif self.how != "several dtypes":
            x = x.to(self.dtype) if self.how == "to" else x.to(dtype=self.dtype, copy=True)
        return self.rest(self.first(x).to(self.dtype)).float()


@pytest.mark.parametrize("how", ["to", "keyword", "method", "type", "new tensor", "several dtypes"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_forward_that_casts_is_attributed_in_at_least_single_precision(dtype, how):
    torch.manual_seed(0)
    net, batch = Cast(dtype, how), labelled(8, 4)
    if dtype != torch.float64:
        batch = batch[0].to(dtype).float(), batch[1]
    layers = UnitMap.of(net, batch).layers
    logits = net(batch[0])
    plain = nn.Sequential(*(copy.deepcopy(part).double() for part in (net.first, *net.rest)))
    expected = oracle(plain, *batch)

    found = attribute(net, layers, [batch]).relevance

    assert difference(found, {"first": expected["0"], "rest.1": expected["2"]}) < 1e-4
    assert net.rest[1].weight.dtype == dtype
    assert torch.equal(net(batch[0]), logits)  # what is measured and recalled is as it was


@pytest.mark.parametrize("half", [False, True])
def test_an_autocast_inside_of_the_forward_is_attributed_in_single_precision(half):
    def forward(net: Built, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return net.rest(x).float()

    net = Built(forward, rest=mlp().bfloat16() if half else mlp())
    batch = labelled(8, 4)
    layers = UnitMap.of(net, batch).layers
    expected = oracle(copy.deepcopy(net.rest).double(), *batch)
    found = attribute(net, layers, [batch]).relevance
    assert difference(found, {f"rest.{name}": of_layer for name, of_layer in expected.items()}) < 1e-4


def test_a_default_dtype_of_half_precision_makes_no_difference():
    net = Built(lambda net, x: net.rest(torch.cat([x, torch.ones(len(x), 1)], 1)[:, :4]), rest=mlp())
    batch = labelled(8, 4)
    expected = unit_relevance(net, batch)
    net.bfloat16()
    torch.set_default_dtype(torch.bfloat16)
    try:
        layers = UnitMap.of(net, (batch[0].bfloat16(), batch[1])).layers
        found = attribute(net, layers, [batch]).relevance
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    assert difference(found, expected) < 0.1  # the weights were rounded


class Insisting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.bfloat16, "a kernel for bfloat16 alone"
        return self.inner(x)


def test_a_forward_that_insists_on_half_precision_is_refused_in_one_sentence_that_names_it():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), Insisting(), nn.ReLU(), nn.Linear(8, CLASSES)).bfloat16()
    x, y = labelled(8, 4)
    layers = UnitMap.of(net, (x.bfloat16(), y)).layers
    with pytest.raises(
        ValueError, match=r"in single precision, and the forward of '2' \(Insisting\) insists on half precision"
    ) as refusal:
        attribute(net, layers, [(x.bfloat16(), y)])
    assert is_one_sentence(refusal.value)
    assert net[0].weight.dtype == torch.bfloat16


def test_another_failure_of_a_forward_is_not_blamed_on_precision():
    def forward(net: Built, x: Tensor) -> Tensor:
        if x.requires_grad or net.broken:
            raise KeyError("of the user's")
        return net.rest(x)

    net = Built(forward, rest=mlp())
    net.broken = False
    layers = UnitMap.of(net, labelled(8, 4)).layers
    net.broken = True
    with pytest.raises(KeyError, match="of the user's"):
        attribute(net, layers, [labelled(8, 4)])


def test_token_inputs_are_attributed_from_the_first_layer_on():
    embedded = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, CLASSES))
    net = Built(lambda net, x: net.rest(net.embedding(x).mean(1)), embedding=nn.Embedding(10, 4), rest=embedded)
    tokens, y = torch.randint(10, (9, 5)), labelled(9, 1)[1]

    found = unit_relevance(net, *split((tokens, y), [4, 5]))

    expected = oracle(embedded, net.embedding(tokens).mean(1).detach(), y)
    assert list(found) == ["rest.0"]
    assert difference(found, {"rest.0": expected["0"]}) < 1e-5


@pytest.mark.parametrize("wants", ["inputs", "embedded tokens"])
def test_inputs_that_want_a_gradient_make_no_difference(wants):
    net = Built(
        lambda net, x: net.rest(x if x.is_floating_point() else net.embedding(x).mean(1)),
        embedding=nn.Embedding(10, 4),
        rest=mlp(),
    )
    x, y = labelled(8, 4)
    if wants == "embedded tokens":
        x = torch.randint(10, (8, 5))
    expected = unit_relevance(net, (x, y))

    if wants == "inputs":
        x.requires_grad_()
    else:  # what is done to fine-tune with checkpointed blocks
        net.embedding.register_forward_hook(lambda module, args, output: output.requires_grad_())
    found = unit_relevance(net, (x, y))

    assert difference(found, expected) == 0.0
    assert x.grad is None


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32], ids=str)
def test_the_integer_type_of_labels_makes_no_difference(dtype):
    net = mlp()
    x, y = labelled(8, 4)
    assert difference(unit_relevance(net, (x, y.to(dtype))), unit_relevance(net, (x, y))) == 0.0


def test_a_layer_called_by_keyword_is_attributed_or_refused_by_name():
    parts = {"first": nn.Linear(4, 8), "second": nn.Linear(8, 6), "head": nn.Linear(6, CLASSES)}
    batch = labelled(8, 4)
    expected = unit_relevance(Built(lambda net, x: net.head(net.second(net.first(x).relu()).relu()), **parts), batch)
    net = Built(lambda net, x: net.head(net.second(input=net.first(x).relu()).relu()), **parts)
    assert_attributed_or_refused(net, batch, "second", expected)


def test_a_backbone_that_runs_without_a_graph_is_no_obstacle_once_it_is_left_out():
    def forward(net: Built, x: Tensor) -> Tensor:
        with torch.no_grad():
            features = net.backbone(x).relu()
        return net.rest(features)

    net, batch = Built(forward, backbone=nn.Linear(4, 4), rest=mlp()), labelled(8, 4)
    expected = unit_relevance(net.rest, (net.backbone(batch[0]).relu().detach(), batch[1]))
    expected = {f"rest.{name}": relevance for name, relevance in expected.items()}

    layers = UnitMap.of(net, batch, units="rest.*").layers

    assert difference(attribute(net, layers, [batch]).relevance, expected) == 0.0
    assert_attributed_or_refused(net, batch, "backbone", expected)


def checkpointed(*, first: bool, use_reentrant: bool) -> tuple[nn.Module, nn.Sequential]:
    """A network with one of its two blocks checkpointed, and the same network without."""

    def forward(net: Built, x: Tensor) -> Tensor:
        if first:
            return net.head(net.second(checkpoint(net.first, x, use_reentrant=use_reentrant)))
        return net.head(checkpoint(net.second, net.first(x), use_reentrant=use_reentrant))

    blocks = nn.Sequential(nn.Linear(4, 8), nn.ReLU()), nn.Sequential(nn.Linear(8, 6), nn.ReLU())
    head = nn.Linear(6, CLASSES)
    return Built(forward, first=blocks[0], second=blocks[1], head=head), nn.Sequential(*blocks[0], *blocks[1], head)


@pytest.mark.parametrize("first", [True, False], ids=["first block", "second block"])
def test_a_checkpointed_block_has_the_relevance_of_a_plain_one(first):
    net, plain = checkpointed(first=first, use_reentrant=False)
    batch = labelled(8, 4)
    expected = oracle(plain, *batch)

    found = unit_relevance(net, batch)

    assert difference(found, {"first.0": expected["0"], "second.0": expected["2"]}) < 1e-5


def test_reentrant_checkpointing_is_attributed_or_refused_by_the_name_of_the_layer():
    # It hides the block from autograd, so the hooks that propagate relevance find no graph to hang on.
    net, plain = checkpointed(first=False, use_reentrant=True)
    batch = labelled(8, 4)
    expected = oracle(plain, *batch)
    assert_attributed_or_refused(net, batch, "second.0", {"first.0": expected["0"], "second.0": expected["2"]})


def assert_attributed_or_refused(net: nn.Module, batch: Any, layer: str, expected: dict[str, Tensor]) -> None:
    try:
        found = unit_relevance(net, batch)
    except ValueError as refusal:
        assert repr(layer) in str(refusal)  # noqa: PT017
    else:
        assert difference(found, expected) < 1e-5


# -- how it goes ------------------------------------------------------------------------------------------------------


def test_progress_is_told_the_samples_so_far_after_each_batch():
    told = []
    unit_relevance(mlp(), *split(labelled(9, 4), [5, 1, 3]), progress=told.append)
    assert told == [5, 6, 9]


def test_memory_is_that_of_one_batch():
    net = convnet()
    layers = UnitMap.of(net, labelled(2, *IMAGES)).layers
    storages, alive, handles = [], [], []
    for submodule in net:
        submodule.register_forward_hook(
            lambda module, args, output: storages.append(StorageWeakRef(output.untyped_storage()))
        )

    def count(samples: int) -> None:
        alive.append(sum(not storage.expired() for storage in storages))
        handles.append(sum(type(found) is RemovableHandle for found in gc.get_objects()))

    attribute(net, layers, (labelled(4, *IMAGES, seed=seed) for seed in range(6)), progress=count)

    assert len(storages) == 6 * len(net)
    assert max(alive) <= len(net)  # those of the batch that has just been attributed
    assert len(set(handles[1:])) == 1
    assert all(storage.expired() for storage in storages)


# -- what is refused --------------------------------------------------------------------------------------------------


def is_one_sentence(error: Exception) -> bool:
    return "\n" not in str(error) and ". " not in str(error)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["0.weight", "2.bias", "8.weight", "inputs"])
def test_numbers_that_are_not_finite_are_refused(where, bad):
    net = convnet()
    layers = UnitMap.of(net, labelled(2, *IMAGES)).layers
    x, y = labelled(4, *IMAGES)
    with torch.no_grad():
        (x if where == "inputs" else net.get_parameter(where)).view(-1)[0] = bad

    with pytest.raises(ValueError, match="not finite") as refusal:
        attribute(net, layers, [(x, y)])
    assert is_one_sentence(refusal.value)


def largest_logits(net: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    x, y = batch
    logits = net(x)
    return logits / logits.detach().abs().max() * 1e38, y


def test_relevance_that_overflows_is_refused_by_the_name_of_the_layer():
    net = mlp()
    with torch.no_grad():
        net[4].weight *= 1e-3
        net[4].bias *= 1e-3
    with pytest.raises(ValueError, match=r"relevance of layer '[02]' is not finite") as refusal:
        unit_relevance(net, labelled(4, 4), predict=largest_logits)
    assert is_one_sentence(refusal.value)


@pytest.mark.parametrize("empty_batches", [0, 1, 3])
@pytest.mark.parametrize(("build", "shape"), [(mlp, (4,)), (convnet, IMAGES)], ids=["mlp", "convnet"])
def test_no_sample_is_refused(build, shape, empty_batches):
    net = build()
    layers = UnitMap.of(net, labelled(2, *shape)).layers
    with pytest.raises(ValueError, match="no reference sample") as refusal:
        attribute(net, layers, [labelled(0, *shape)] * empty_batches)
    assert is_one_sentence(refusal.value)


def test_an_empty_batch_among_others_adds_nothing():
    net = convnet()
    batch = labelled(4, *IMAGES)
    assert difference(unit_relevance(net, batch, labelled(0, *IMAGES)), unit_relevance(net, batch)) == 0.0


@pytest.mark.parametrize("label", [CLASSES, 255, -1])
def test_a_label_outside_the_head_is_refused(label):
    x, y = labelled(4, 4)
    y[1] = label
    net = mlp()
    layers = UnitMap.of(net, labelled(2, 4)).layers
    with pytest.raises(ValueError, match=f"labels range .*{label}.*{CLASSES} outputs") as refusal:
        attribute(net, layers, [(x, y)])
    assert is_one_sentence(refusal.value)


def test_a_layer_that_the_logits_do_not_depend_on_is_refused_by_name():
    net = Built(
        lambda net, x: net.head(net.used(x).relu() + 0.0 * net.detached(x).detach()),
        used=nn.Linear(4, 5),
        detached=nn.Linear(4, 5),
        head=nn.Linear(5, CLASSES),
    )
    layers = [UnitLayer(name, 5, -1, (f"{name}.weight", f"{name}.bias")) for name in ("used", "detached")]
    with pytest.raises(ValueError, match="'detached'"):
        attribute(net, layers, [labelled(4, 4)])
    assert [layer.name for layer in UnitMap.of(net, labelled(4, 4)).layers] == ["used"]  # so none is made of it


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_layer_that_runs_several_times_has_the_relevance_of_as_many_layers(checkpointed):
    # Zennit's rules know what a module read last: with that of one run the others' relevance would be split.
    torch.manual_seed(0)
    batches = [labelled(6, 4, seed=seed) for seed in range(2)]

    def network(forward):
        return Built(
            forward, stem=nn.Linear(4, 6), again=nn.Linear(6, 6), last=nn.Linear(6, 5), head=nn.Linear(5, CLASSES)
        )

    def run(net, x):
        x = net.stem(x).relu()
        for _ in range(3):
            x = checkpoint(net.again, x, use_reentrant=False) if checkpointed else net.again(x)
            x = x.relu()
        return net.head(net.last(x).relu())

    def unrolled(net, x):
        x = net.stem(x).relu()
        for layer in (net.again, net.second, net.third):
            x = layer(x).relu()
        return net.head(net.last(x).relu())

    net = network(run)
    other = copy.deepcopy(net)
    other.compute, other.second, other.third = unrolled, copy.deepcopy(net.again), copy.deepcopy(net.again)
    units, of_runs = UnitMap.of(net, batches[0]), ("again", "second", "third")
    assert [layer.name for layer in units.layers] == ["stem", "again", "last"]
    found = attribute(net, units.layers, batches)
    expected = attribute(other, UnitMap.of(other, batches[0]).layers, batches)
    summed = {**expected.relevance, "again": sum(expected.relevance[name] for name in of_runs)}
    for name, relevance in found.relevance.items():
        torch.testing.assert_close(relevance, summed[name], rtol=1e-4, atol=1e-7)
    ratios = expected.conservation.ratios
    ratios = {**ratios, "again": sum(ratios[name] for name in of_runs)}
    assert found.conservation.ratios == pytest.approx(
        {name: ratios[name] for name in found.conservation.ratios}, rel=1e-4
    )
    assert "again" not in found.conservation.cuts  # each run may have all of it
    assert found.conservation.notes == ()
    assert "again" in found.conservation.causes["stem"]["a bias"]
