"""Flags of parameters: recall says the same bits, whoever else learns, and gives every flag back."""

from __future__ import annotations

import pytest
import torch
from records import bare_record
from torch import nn

from lightning_rnf import UnitMap
from lightning_rnf.recall.gradients import asking_none
from lightning_rnf.recall.subnetwork import recall


class OverPositions(nn.Module):
    """Its head reads ``(N, T, C)`` that is not contiguous, as behind convolutions over time."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv1d(8, 24, 3), nn.ReLU())
        self.head = nn.Linear(24, 6)
        self.fails = False

    def forward(self, x):
        found = self.head(self.body(x).transpose(1, 2))
        if self.fails:
            raise ValueError("on purpose")
        return found.flatten(0, 1)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return OverPositions()


def recalled(net, x):
    units = UnitMap.of(net, (x, torch.zeros(len(x) * 9, dtype=torch.long)))
    record = bare_record(units, {layer.name: torch.arange(layer.units) % 3 > 0 for layer in units.layers}, {})
    return recall(net, units.layers, record)


@pytest.mark.parametrize("samples", [1, 3, 16, 64])
def test_recall_is_the_same_bits_whatever_learns(net, samples):
    x = torch.randn(samples, 8, 11)
    with recalled(net, x), torch.no_grad():
        expected = net(x)
    for flags in ((False, True), (True, False), (False, False)):
        for part, flag in zip((net.body, net.head), flags, strict=True):
            part.requires_grad_(flag)
        with recalled(net, x), torch.no_grad():
            assert torch.equal(net(x), expected)
            assert torch.equal(net.head(net.body(x).transpose(1, 2)).flatten(0, 1), expected)
        assert [parameter.requires_grad for parameter in net.parameters()] == [flags[0]] * 2 + [flags[1]] * 2


def test_inside_no_parameter_asks_and_with_gradients_all_do_that_did(net):
    seen = []
    net.head.register_forward_hook(lambda *call: seen.append([p.requires_grad for p in net.parameters()]))
    net.head.bias.requires_grad_(False)
    x = torch.randn(2, 8, 11)
    with asking_none(net):
        with torch.no_grad():
            net(x)
        net(x).sum().backward()
        net.fails = True
        with torch.no_grad(), pytest.raises(ValueError, match="on purpose"):
            net(x)
        assert [parameter.requires_grad for parameter in net.parameters()] == [True, True, True, False]
    assert seen == [[False] * 4, [True, True, True, False], [False] * 4]
    assert net.body[0].weight.grad is not None
    assert not net._forward_hooks
    assert not net._forward_pre_hooks


def test_between_two_parts_no_parameter_asks_either():
    class Between(nn.Module):
        """Reads a parameter of its own behind one part and before another."""

        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x):
            x = self.first(x)
            asked.append(self.scale.requires_grad)
            return self.second(x * self.scale)

    asked, net = [], Between()
    with asking_none(net), torch.no_grad():
        net(torch.randn(2, 3))
    assert asked == [False]
    assert net.scale.requires_grad


def test_a_forward_that_is_broken_off_leaves_the_flags_as_they_were(net):
    def stop(*call):
        raise KeyboardInterrupt

    x = torch.randn(2, 8, 11)
    handle = net.head.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt), asking_none(net), torch.no_grad():
        net(x)
    handle.remove()
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_parts_that_run_with_gradients_inside_have_their_flags(net):
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.seen = net, []

        def forward(self, x):
            with torch.enable_grad():
                self.seen.append(self.net.body(x).requires_grad)
            return self.net(x)

    whole, x = Inner(), torch.randn(2, 8, 11)
    net.head.register_forward_hook(lambda *call: whole.seen.append(net.head.weight.requires_grad))
    with asking_none(whole), torch.no_grad():
        whole(x)
    assert whole.seen == [True, False]
    assert all(parameter.requires_grad for parameter in whole.parameters())


def test_transforms_of_functions_run_inside(net):
    x = torch.randn(3, 2, 8, 11)
    with asking_none(net), torch.no_grad():
        found = torch.func.vmap(net)(x)
        torch.testing.assert_close(found, torch.stack([net(one) for one in x]))


def test_what_was_broken_off_holds_nobody_up(net):
    def stop(*call):
        raise KeyboardInterrupt

    x = torch.randn(2, 8, 11)
    with asking_none(net):
        handle = net.head.register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt), torch.no_grad():
            net(x)
        handle.remove()
        assert net(x).requires_grad
