from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from records import ConvNet, Mlp, make, record_of

from lightning_rnf.memory import Audit, FreezeState, fingerprints, moved, without

NAMES = ("a", "b", "c")


def ended(net, shared_at=dict) -> FreezeState:
    """Three tasks, each with a third of the units and one of the next; ``shared_at`` says what each one shares."""
    state = FreezeState()
    for index, name in enumerate(NAMES):
        relevant = {
            layer.name: torch.isin(torch.arange(layer.units) % 3, torch.tensor([index, (index + 1) % 3]))
            if index < 2
            else torch.arange(layer.units) % 3 == 2
            for layer in net.layers
        }
        units = replace(net.units(), head=name, head_parameters=(), shared=shared_at().get(name, net.shared))
        seen = {one: {"acc": 0.5 + index / 10} for one in NAMES[: index + 1]}
        drift = dict.fromkeys(NAMES[:index], 0.0)
        record = record_of(net, "first", relevant, name=name, head=name, head_parameters=(), tests=seen, drift=drift)
        record = replace(record, rows=fingerprints(net, units, record, state))
        state.add(replace(record, capacity=state.capacity_after(relevant)), units)
    return state


def parameters(net):
    return dict(net.named_parameters())


@pytest.mark.parametrize("kind", [Mlp, ConvNet])
@pytest.mark.parametrize("task", NAMES)
def test_the_rest_is_as_if_the_task_had_never_ended(kind, task):
    net = make(kind)
    state = ended(net)
    before = state.to_plain()
    left = without(state, task)
    assert list(left.tasks) == [name for name in NAMES if name != task]
    for layer in net.layers:
        expected = torch.zeros(layer.units, dtype=torch.bool)
        for name, record in left.tasks.items():
            assert record.relevant[layer.name] is state.tasks[name].relevant[layer.name]
            expected |= record.relevant[layer.name]
            assert record.capacity[layer.name] == pytest.approx(1 - float(expected.double().mean()))
            assert task not in record.tests
            assert task not in record.drift
        assert torch.equal(left.frozen()[layer.name], expected)
    assert str(state.to_plain()) == str(before)  # the given one stays as it is
    again = FreezeState.from_plain(left.to_plain())
    assert str(again.to_plain()) == str(left.to_plain())


@pytest.mark.parametrize("task", NAMES)
def test_shared_parameters_go_on_being_frozen_and_compared(task):
    net = make(Mlp)
    left = without(ended(net), task)
    assert left.shared == net.shared
    audit = Audit.of(parameters(net), left)
    assert not any(audit.changed.values())
    assert not any(audit.unknown.values())
    with torch.no_grad():
        net.norm.bias[0] += 1e-6
    changed = Audit.of(parameters(net), left).changed
    assert changed == {name: ("norm.bias",) if name == next(iter(left.tasks)) else () for name in left.tasks}


def test_what_only_the_last_task_shares_is_free_again_and_what_a_later_one_may_read_is_not():
    def shared() -> dict[str, tuple[str, ...]]:
        return {"a": (), "b": ("norm.weight",), "c": ("norm.weight", "norm.bias")}

    net = make(Mlp)
    state = ended(net, shared)
    assert without(state, "a").shared == ("norm.weight", "norm.bias")
    assert without(state, "b").shared == ("norm.weight", "norm.bias")  # c has read both
    assert "norm.weight" in without(state, "b").tasks["c"].rows
    last = without(state, "c")
    assert last.shared == ("norm.weight",)
    assert without(last, "b").shared == ()
    assert without(without(state, "b"), "c").shared == ()


def test_fingerprints_of_before_there_were_any_stay_unknown():
    net = make(Mlp)
    state = ended(net)
    for name in NAMES:
        state.tasks[name] = replace(state.tasks[name], rows={})
    for task in NAMES:
        left = without(state, task)
        assert left.shared == net.shared
        unknown = Audit.of(parameters(net), left).unknown
        assert set(net.shared) <= set(unknown[next(iter(left.tasks))])


def test_without_its_only_task_a_state_is_a_new_one():
    net = make(Mlp)
    state = ended(net)
    for task in NAMES:
        state = without(state, task)
    assert str(state.to_plain()) == str(FreezeState().to_plain())
    with pytest.raises(KeyError, match=r"no finished task 'a'; finished tasks: \[\]"):
        without(state, "a")


def test_free_units_are_to_be_reset_once_more():
    net = make(Mlp)
    state = ended(net)
    state.initial = {"fc1.bias": torch.zeros(6)}
    for resets in (0, 2, 3):
        state.resets = resets
        left = without(state, "b")
        assert left.resets not in (len(left.tasks), resets)
        assert FreezeState.from_plain(left.to_plain()).resets == left.resets
    for task in NAMES:
        state = without(state, task)
    assert (state.layers, list(state.initial)) == (net.layers, ["fc1.bias"])
    state.forget_unfinished()  # as the next fit does
    assert list(state.initial) == ["fc1.bias"]


def test_what_has_moved_is_told_of_the_task_at_whose_end_it_had_not():
    net = make(Mlp)
    state = ended(net)
    assert moved(parameters(net), state) == {}
    with torch.no_grad():
        net.fc1.weight[2] += 1.0  # b's and c's
    assert moved(parameters(net), state) == {"b": ["fc1"], "c": ["fc1"]}
    assert moved(parameters(net), state, learning=["fc1"]) == {}
    with torch.no_grad():
        net.fc2.bias[0] += 1.0  # a's alone, of its layer
        net.norm.bias[0] += 1.0  # frozen by the first task
    found = moved(parameters(net), state)
    assert found == {"a": ["fc2", "norm.bias"], "b": ["fc1"], "c": ["fc1"]}
    assert moved(parameters(net), state, learning=["fc2", "norm.bias"]) == {"b": ["fc1"], "c": ["fc1"]}
    record = state.tasks["a"]
    for entries in ({}, {"fc1": record.rows["fc1"]}):  # a file from before fingerprints, or one that lacks some
        state.tasks["a"] = replace(record, rows=entries)
        assert moved(parameters(net), state) == {"b": ["fc1"], "c": ["fc1"]}


def test_what_had_moved_at_a_later_task_s_end_was_told_of_then():
    net = make(Mlp)
    state = ended(net)
    with torch.no_grad():
        net.fc1.weight[1] += 1.0  # a's and b's
    units = replace(net.units(), head="b", head_parameters=(), shared=())
    state.tasks["b"] = replace(state.tasks["b"], rows=fingerprints(net, units, state.tasks["b"], state))
    assert moved(parameters(net), state) == {"a": ["fc1"]}
    with torch.no_grad():
        net.fc1.weight[5] += 1.0  # c's and b's
    assert moved(parameters(net), state) == {"a": ["fc1"], "b": ["fc1"], "c": ["fc1"]}
