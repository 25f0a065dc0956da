"""The communication hook beside a process that exists on paper: it has three times these gradients, and sends as much.

What it is in two real processes is in test_communication.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_rnf.freezing.communication import reduce_free_rows

SEEDED = torch.Generator().manual_seed(0)
LAYOUTS = {
    "plain": torch.randn(6, 4, generator=SEEDED),
    "turned": torch.randn(4, 6, generator=SEEDED).t(),
    "last": torch.randn(5, 3, 2, 2, generator=SEEDED).to(memory_format=torch.channels_last),
    "columns": torch.randn(4, 3, 2, 2, generator=SEEDED).to(memory_format=torch.channels_last),
    "part": torch.randn(6, 8, generator=SEEDED)[:, :3],
    "one": torch.randn((), generator=SEEDED),
    "row": torch.randn(1, 7, generator=SEEDED),
    "wide row": torch.randn(2, 7, generator=SEEDED)[::2],
    "bias": torch.randn(5, generator=SEEDED),
}
"""Weights of every order in memory; ``part`` is no dense part of it, so DDP lays its gradient out by rows."""

FREE = {
    "plain": [[1], [4], [5]],
    "turned": [[0], [3]],
    "last": [[2], [3]],
    "columns": [[0, 1], [0, 2], [3, 0]],
    "part": [[5]],
    "bias": [[0], [4]],
}
"""Indices of what learns; of all others everything does."""


class Rows:
    """Knows them."""

    def __init__(self, free):
        self.free = free

    def free_rows(self, parameter):
        return self.free.get(parameter)


@pytest.fixture
def sent(monkeypatch):
    """How many numbers have travelled, by message."""
    numbers = []

    def all_reduce(tensor, *, async_op):
        assert async_op  # backward goes on meanwhile
        numbers.append(tensor.numel())
        tensor.add_(3 * tensor)
        future = torch.futures.Future()
        future.set_result([tensor])
        return SimpleNamespace(get_future=lambda: future)

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    return numbers


def bucket_of(tensors):
    """A bucket as DDP makes it: its flat buffer, the parameters, and the gradients by name, each a view of it."""
    parameters = {name: nn.Parameter(tensor) for name, tensor in tensors.items()}
    buffer = torch.randn(sum(tensor.numel() for tensor in tensors.values()), dtype=next(iter(tensors.values())).dtype)
    gradients, begin = {}, 0
    for name, one in parameters.items():
        dense = name != "part"
        strides = one.stride() if dense else torch.empty(one.shape).stride()
        gradients[name] = buffer.as_strided(one.shape, strides, begin)
        begin += one.numel()
    bucket = SimpleNamespace(buffer=lambda: buffer, parameters=lambda: list(parameters.values()))
    return bucket, parameters, gradients


def indices(rows):
    return torch.tensor(rows, dtype=torch.long) if rows else torch.empty(0, 1, dtype=torch.long)


def reduced(tensors, free):
    """Gradients before and after, and the buffer that the hook promises."""
    bucket, parameters, gradients = bucket_of(tensors)
    before = {name: gradient.clone() for name, gradient in gradients.items()}
    state = Rows({parameters[name]: indices(rows) for name, rows in free.items()})
    promised = reduce_free_rows(state, bucket).wait()
    assert promised.data_ptr() == bucket.buffer().data_ptr()
    assert promised.shape == bucket.buffer().shape
    return before, gradients


@pytest.mark.parametrize("names", [*([name] for name in LAYOUTS), list(LAYOUTS), list(reversed(LAYOUTS))], ids="+".join)
def test_the_mean_of_both_is_in_free_rows_and_all_others_are_as_they_were(names, sent):
    tensors = {name: LAYOUTS[name] for name in names}
    before, after = reduced(tensors, {name: FREE[name] for name in names if name in FREE})
    travelled = 0
    for name in names:
        learns = torch.ones_like(before[name], dtype=torch.bool)
        if name in FREE:
            learns = torch.zeros_like(learns)
            learns[tuple(torch.tensor(FREE[name]).unbind(1))] = True
        assert torch.equal(after[name], torch.where(learns, 2 * before[name], before[name])), name
        travelled += int(learns.sum())
    assert sent == [travelled]  # in one message


def test_what_is_free_as_a_whole_travels_as_it_is_and_what_is_frozen_as_a_whole_stays(sent):
    before, after = reduced({"plain": LAYOUTS["plain"], "bias": LAYOUTS["bias"]}, {"plain": []})
    assert torch.equal(after["plain"], before["plain"])
    assert torch.equal(after["bias"], 2 * before["bias"])
    assert sent == [5]
    before, after = reduced({"plain": LAYOUTS["plain"], "bias": LAYOUTS["bias"]}, {"plain": [], "bias": []})
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert sent == [5]


@pytest.mark.parametrize("free", [{}, {"bias": [[1], [2]]}], ids=["all", "some"])
def test_half_precision_does_not_overflow_on_the_way(free, sent, monkeypatch):
    bucket, parameters, gradients = bucket_of({"bias": torch.zeros(4, dtype=torch.float16)})
    gradients["bias"].fill_(30000.0)  # of both together half precision has no number
    state = Rows({parameters[name]: indices(rows) for name, rows in free.items()})
    reduce_free_rows(state, bucket).wait()
    assert gradients["bias"][1:3].tolist() == [60000.0] * 2


def test_who_knows_no_free_rows_is_named():
    with pytest.raises(TypeError, match=r"given a Linear that knows no free rows: use DDPStrategy\(ddp_comm_state=rnf"):
        reduce_free_rows(nn.Linear(2, 2), bucket_of({"bias": LAYOUTS["bias"]})[0])
