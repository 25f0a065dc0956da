from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from lightning_rnf.attribution import attribute
from lightning_rnf.functions import FunctionRules
from lightning_rnf.units import UnitMap


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


def test_constants_are_added_as_ever():
    x, _ = leaves(5, 7)
    with FunctionRules():
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


@pytest.mark.parametrize("architecture", ["resnet18", "vgg16_bn"])
def test_relevance_is_conserved_through_networks_that_people_use(architecture):
    torch.manual_seed(0)
    net = torchvision.models.get_model(architecture, weights=None, num_classes=4)
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            nn.init.zeros_(module.bias)  # a bias takes relevance of its own
    x, y = torch.randn(2, 3, 48, 48), torch.tensor([1, 3])
    net.eval()
    logits = net(x).gather(1, y[:, None]).sum()
    layers = UnitMap.of(net, (x, y)).layers
    relevance = attribute(net, layers, [(x, y)]).relevance
    assert relevance[layers[0].name].sum().item() == pytest.approx(logits.item(), rel=0.01)
