"""Rows of an embedding stay as they are until they are read, whatever the optimizer does to them."""

from __future__ import annotations

import pytest
import torch
from test_freezer import OPTIMIZERS
from torch import nn

from lightning_rnf.freezing import Freezer, Unread

ROWS, WIDTH = 20, 4
READ_BEFORE = torch.arange(ROWS) < 5


def steps(weight, optimizers, words, count=12):
    generator = torch.Generator().manual_seed(0)
    words = torch.tensor(words)
    for _ in range(count):
        ids = words[torch.randint(len(words), (16,), generator=generator)]

        def closure(ids=ids):
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss = (nn.functional.embedding(ids, weight) - 1).square().mean()
            loss.backward()
            return loss

        for optimizer in optimizers:
            optimizer.step(closure)


def held(weight, optimizers, read, learned=None):
    net = nn.Module()
    net.register_parameter("weight", weight)
    freezer = Freezer(net, {} if read is None else {"weight": (~read).float()})
    freezer.unread["weight"] = unread = Unread(weight, read, learned)
    freezer.attach(optimizers)
    return freezer, unread


@pytest.mark.parametrize("read", [None, READ_BEFORE, READ_BEFORE | True], ids=["first task", "later", "all read"])
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "muon"])
def test_only_rows_that_are_read_and_free_move(name, read):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(ROWS, WIDTH))
    before = weight.detach().clone()
    optimizers = OPTIMIZERS[name]([weight])
    freezer, unread = held(weight, optimizers, read)
    steps(weight, optimizers, [2, 3, 7, 8, 9])
    steps(weight, optimizers, [2, 3, 7])  # momentum goes on with what was read before
    freezer.detach()
    moved = (weight != before).any(dim=1).nonzero().view(-1).tolist()
    expected = [] if read is not None and read.all() else [7, 8, 9] if read is not None else [2, 3, 7, 8, 9]
    assert moved == expected
    assert unread.learned().nonzero().view(-1).tolist() == expected
    old = unread.before()
    assert old.rows.tolist() == expected
    assert torch.equal(old.values, before[expected])


def test_what_was_read_before_a_stop_goes_on():
    weight = nn.Parameter(torch.randn(ROWS, WIDTH))
    before = weight.detach().clone()
    optimizers = [torch.optim.AdamW([weight], lr=0.1, weight_decay=0.5)]
    freezer, unread = held(weight, optimizers, READ_BEFORE, torch.arange(ROWS) == 11)
    steps(weight, optimizers, [2, 7])
    freezer.detach()
    assert (weight != before).any(dim=1).nonzero().view(-1).tolist() == [7, 11]
    assert unread.learned().nonzero().view(-1).tolist() == [7, 11]


def test_another_size_is_refused():
    with pytest.raises(ValueError, match="an embedding had 3 rows, here it has 20"):
        Unread(nn.Parameter(torch.randn(ROWS, WIDTH)), None, torch.ones(3, dtype=torch.bool))


def test_in_several_processes_a_gradient_that_another_has_read_counts_and_nothing_else_writes():
    weight = nn.Parameter(torch.randn(ROWS, WIDTH))
    before = weight.detach().clone()
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    freezer, _ = held(weight, [optimizer], READ_BEFORE)
    weight.grad = torch.zeros_like(weight)
    weight.grad[9] = 0.5  # the average; this process has not run anything
    optimizer.step()
    with torch.no_grad():
        weight[12] += 1
        weight.data[13] += 1
    freezer.pin()
    assert (weight != before).any(dim=1).nonzero().view(-1).tolist() == [9]
    freezer.detach()


def test_a_row_whose_gradient_is_nan_is_kept_and_one_that_is_infinite():
    weight = nn.Parameter(torch.randn(ROWS, WIDTH))
    before = weight.detach().clone()
    optimizer = torch.optim.SGD([weight], lr=0.1)
    freezer, unread = held(weight, [optimizer], None)
    weight.grad = torch.zeros_like(weight)
    weight.grad[9, 1], weight.grad[3, 0] = float("nan"), float("inf")
    optimizer.step()
    assert unread.before().rows.tolist() == [3, 9]
    assert torch.equal(unread.before().values, before[[3, 9]])
    freezer.detach()


class Dropping(torch.optim.SGD):
    """Gives its gradients up when it has made its step."""

    def step(self, closure=None):
        loss = super().step(closure)
        self.zero_grad()
        return loss


@pytest.mark.parametrize("read", [None, READ_BEFORE], ids=["first task", "later task"])
def test_rows_are_read_where_an_optimizer_drops_its_gradients(read):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(ROWS, WIDTH))
    optimizers = [Dropping([weight], lr=0.1)]
    before = weight.detach().clone()
    _, unread = held(weight, optimizers, read)
    steps(weight, optimizers, [6, 7])
    moved = (weight != before).any(dim=1)
    assert moved.nonzero().view(-1).tolist() == [6, 7]
    assert torch.equal(unread.learned(), moved)
