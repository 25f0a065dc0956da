from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_rnf import MultiHead


def test_only_the_active_head_runs_and_trains():
    heads = MultiHead(4, {"a": 2, "b": 3})
    assert heads.active == "a"
    heads.activate("b")
    x = torch.randn(5, 4)
    assert torch.equal(heads(x), heads.tasks["b"](x))
    heads(x).sum().backward()
    assert heads.tasks["a"].weight.grad is None
    assert {name for name, parameter in heads.named_parameters() if parameter.requires_grad} == {
        "tasks.b.weight",
        "tasks.b.bias",
    }


def test_an_inactive_head_stays_bit_equal_under_weight_decay():
    heads = MultiHead(4, {"a": 2, "b": 2})
    before = heads.tasks["b"].weight.detach().clone()
    optimizer = torch.optim.AdamW(heads.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        heads(torch.randn(5, 4)).sum().backward()
        optimizer.step()
    assert torch.equal(heads.tasks["b"].weight, before)


def test_running_a_head_for_a_while_changes_nothing_of_what_is_trained():
    heads = MultiHead(4, {"a": 2, "b": 2})
    flags = [parameter.requires_grad for parameter in heads.parameters()]
    with pytest.raises(RuntimeError, match="inside"), heads.running("b"):
        assert heads.active == "b"
        raise RuntimeError("inside")
    assert heads.active == "a"
    assert [parameter.requires_grad for parameter in heads.parameters()] == flags


def test_heads_are_made_as_the_user_says():
    heads = MultiHead(
        4, {"a": 2}, make_head=lambda features, classes: nn.Sequential(nn.ReLU(), nn.Linear(features, classes))
    )
    assert heads(torch.randn(3, 4)).shape == (3, 2)


def test_a_head_that_is_there_is_taken_as_it_is_and_waits_like_the_others():
    fc = nn.Linear(4, 10)
    heads = MultiHead(4, {"imagenet": fc, "ages": 3})
    x = torch.randn(5, 4)
    assert heads.tasks["imagenet"] is fc
    assert torch.equal(heads(x), fc(x))
    heads.activate("ages")
    assert not any(parameter.requires_grad for parameter in fc.parameters())
    heads.add("flowers", nn.Sequential(nn.ReLU(), nn.Linear(4, 2)))
    heads.activate("flowers")
    assert heads(x).shape == (5, 2)
    with pytest.raises(ValueError, match="is that of 'imagenet': give a copy"):
        heads.add("again", fc)


def test_wrong_use_is_refused_in_a_sentence():
    heads = MultiHead(4)
    with pytest.raises(RuntimeError, match="no head is active"):
        heads(torch.randn(1, 4))
    heads.add("a", 2)
    with pytest.raises(ValueError, match="task 'a' has a head already"):
        heads.add("a", 2)
    for name in ("a.b", "", "pop", 3):
        with pytest.raises(ValueError, match="without dots"):
            heads.add(name, 2)
    with pytest.raises(KeyError, match="no head for task 'z'"):
        heads.activate("z")


def test_a_head_that_continues_another_begins_as_a_copy_of_it():
    heads = MultiHead(4, {"day": nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))})
    heads.add("night", continues="day")
    x = torch.randn(5, 4)
    with heads.running("day"):
        before = heads(x)
    heads.activate("night")
    assert torch.equal(heads(x), before)
    with torch.no_grad():
        for parameter in heads.tasks["night"].parameters():
            parameter.add_(1.0)
    with heads.running("day"):
        assert torch.equal(heads(x), before)


def test_a_head_continues_a_task_or_has_classes():
    heads = MultiHead(4, {"day": 2})
    with pytest.raises(KeyError, match="no head for task 'dusk'"):
        heads.add("night", continues="dusk")
    for given in ({}, {"classes": 2, "continues": "day"}):
        with pytest.raises(TypeError, match="either classes, or the name"):
            heads.add("night", **given)
