from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_rnf.anatomy.units import UnitMap
from lightning_rnf.memory.state import FreezeState
from lightning_rnf.recall.prefix import FEWEST_WEIGHTS, Prefix
from lightning_rnf.recall.subnetwork import silence
from lightning_rnf.search.criteria import AccuracyDrop
from lightning_rnf.tasks.reference import ReferenceData
from lightning_rnf.tasks.selection import Selection


class Counted(nn.Module):
    """Two convolutions and two linear layers, written to in place; counts what its convolutions compute."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(32, 32, 3), nn.Conv2d(32, 32, 3)
        self.norm = nn.BatchNorm2d(32)
        self.third, self.head = nn.Linear(32, 300), nn.Linear(300, 4)
        calls = []
        self.calls = lambda: calls  # what a module holds is put back after a search
        for layer in (self.first, self.second):
            layer._conv_forward = self.counting(layer._conv_forward, calls)

    def counting(self, convolve, calls):
        def count(*args):
            calls.append(1)
            return convolve(*args)

        return count

    def forward(self, x):
        x = self.first(x).relu_()
        x = self.norm(self.second(x)).relu_()
        return self.head(self.third(x.mean((2, 3))).relu_())


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Counted().eval()


@pytest.fixture
def batches():
    torch.manual_seed(1)
    return [(torch.randn(8, 32, 7, 7), torch.randint(4, (8,))) for _ in range(3)]


@torch.no_grad()
def walked(net, batches):
    return [net(x) for x, _ in batches]


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_what_reads_the_same_is_not_computed_again_and_has_the_same_bits(net, batches):
    expected = walked(net, batches)
    prefix = Prefix(net, ["first", "second"])
    net.calls().clear()
    for _ in range(3):
        with prefix.spared("accuracy"):
            assert equal(walked(net, batches), expected)
    assert len(net.calls()) == 2 * 3
    assert prefix.hits == {"first": 6, "second": 6}
    assert not any("forward" in vars(layer) for layer in net.modules())


def test_what_reads_something_else_is_computed(net, batches):
    units = UnitMap.of(net, batches[0])
    prefix = Prefix(net, ["first", "second", "third"])
    for step in range(6):
        relevant = {layer.name: torch.ones(layer.units, dtype=torch.bool) for layer in units.layers}
        relevant["first"][:step] = False
        with silence(net, units.layers, relevant):
            expected = walked(net, batches)
            with prefix.spared("accuracy"):
                assert equal(walked(net, batches), expected)
    assert set(prefix.hits) == {"first"}


def test_a_walk_may_end_early_and_others_have_batches_of_their_own(net, batches):
    prefix = Prefix(net, ["first", "second"])
    for walk, some in (("accuracy", batches), ("statistics", batches[1:]), ("accuracy", batches[:1])):
        with prefix.spared(walk):
            assert equal(walked(net, some), walked(net, some))
    with prefix.spared("accuracy"):
        assert equal(walked(net, batches), walked(net, batches))


def test_weights_of_the_graph_and_forwards_of_ones_own_are_left_alone(net, batches):
    prefix = Prefix(net, ["first", "second"])
    net.second.forward = own = lambda x: nn.Conv2d.forward(net.second, x)
    for _ in range(2):
        with prefix.spared("accuracy"):
            net(batches[0][0]).sum().backward()
    assert net.second.forward is own
    assert not prefix.hits
    assert net.first.weight.grad is not None


def test_no_more_is_kept_than_allowed(net, batches):
    for limit, hits in ((0, set()), (90_000, {"first"})):
        prefix = Prefix(net, ["first", "second"], limit)
        for _ in range(2):
            with prefix.spared("accuracy"):
                walked(net, batches)
        assert set(prefix.hits) == hits
        assert sum(x.nbytes + y.nbytes for x, y in prefix._known.values()) <= limit


def test_a_part_of_something_larger_is_computed_and_not_kept():
    net = nn.Linear(300, 4)
    prefix, tokens = Prefix(nn.Sequential(net), ["0"]), torch.randn(8, 5, 300)
    with torch.no_grad():
        expected = net(tokens[:, 0])
        for _ in range(3):
            with prefix.spared("accuracy"):
                assert torch.equal(net(input=tokens[:, 0]), expected)
    assert not prefix._known


def test_cheap_layers_are_not_kept():
    few = FEWEST_WEIGHTS - 1
    net = nn.Sequential(nn.Conv2d(few, 8, 1), nn.Linear(few, 4), nn.Conv2d(few + 1, 8, 1), nn.Linear(few + 1, 4))
    prefix = Prefix(net, ["0", "1", "2", "3"])
    with prefix.spared("accuracy"):
        assert ["forward" in vars(layer) for layer in net] == [False, False, True, True]


@pytest.mark.parametrize("full", [["first"], ["first", "second"]])
def test_a_search_finds_the_same_and_computes_less(net, batches, monkeypatch, full):
    units = UnitMap.of(net, batches[0])
    net.train()
    reference = ReferenceData(batches, 2)
    before, _ = Selection().select("a", net, units, reference, FreezeState(), AccuracyDrop(0.5))
    relevant = {name: torch.full_like(mask, name in full) for name, mask in before.relevant.items()}
    state = FreezeState()
    state.add(type(before)(**{**vars(before), "relevant": relevant}), units)

    def selected():
        net.calls().clear()
        record, _ = Selection().select("b", net, units, reference, state, AccuracyDrop(0.1))
        return record, len(net.calls())

    record, computed = selected()
    monkeypatch.setattr("lightning_rnf.tasks.candidates.Prefix", lambda module, layers: Prefix(module, []))
    plain, computed_plain = selected()
    assert [vars(one.score) for one in record.evaluations] == [vars(one.score) for one in plain.evaluations]
    assert record.norm_statistics.keys() == plain.norm_statistics.keys()
    assert equal(record.norm_statistics.values(), plain.norm_statistics.values())
    assert computed < 0.8 * computed_plain
