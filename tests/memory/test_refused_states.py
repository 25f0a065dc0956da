"""States that no model can have left, and models that a state is not of: each is refused by what is wrong in it."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from records import ConvNet, Mlp, every_second, make, record_of, state_of
from torch import nn

from lightning_rnf.anatomy import Wider
from lightning_rnf.anatomy.units import UnitLayer
from lightning_rnf.memory.state import VERSION, FreezeState

Plain = dict[str, Any]


def two_tasks(kind=Mlp) -> FreezeState:
    net = make(kind)
    return state_of(net, record_of(net), record_of(net, "second"))


def refusal(plain: Plain) -> str:
    with pytest.raises(ValueError, match=r"^not a state of lightning_rnf: ") as refused:
        FreezeState.from_plain(plain)
    return str(refused.value)


def version(plain):
    plain["version"] = 0


def resets_before_none(plain):
    plain["resets"] = -2


def resets_of_tasks_to_come(plain):
    plain["resets"] = 3


def initial_of_a_head(plain):
    plain["initial"] = {"heads.tasks.first.weight": torch.zeros(3, 5), "fc1.weight": torch.zeros(6, 4)}


def recovery_of_nothing(plain):
    plain["recovering"] = {**copy.deepcopy(plain["tasks"][1]), "name": "third", "evaluations": []}


def kept_and_not_shared(plain):
    plain["kept"] = ["norm.bias", "fc1.bias"]


def wider_unseen(plain):
    plain["tasks"][1]["widenings"] = 1


def head_elsewhere(plain):
    plain["tasks"][0]["head_parameters"] = ["heads.tasks.first.weight", "heads.tasks.firstborn.bias"]


def head_of_two_tasks(plain):
    plain["tasks"][1].update(head="heads.tasks.first", head_parameters=["heads.tasks.first.bias"])


def shared_unit(plain):
    plain["shared"].append("fc2.bias")


def fingerprint_of_a_stranger(plain):
    plain["tasks"][0]["rows"] = {"fc1": "0" * 16, "fc3": "0" * 16}


def another_axis(plain):
    plain["layers"][0]["axis"] = 1


def stranger_in_a_layer(plain):
    plain["layers"][0]["parameters"] += ("norm.weight",)


def no_weight(plain):
    plain["layers"][0]["parameters"] = ("fc1.bias",)


def packed_in_no_thirds(plain):
    plain["layers"][1]["packed"] = True  # 5 units


def packed_and_recurrent(plain):
    plain["layers"][0].update(packed=True, recurrent=[1, 1, 1])


def three_directions(plain):
    plain["layers"][0]["recurrent"] = [1, 1, 3]


def seven_gates(plain):
    plain["layers"][0]["recurrent"] = [7, 1, 1]


def cells_of_unequal_size(plain):
    plain["layers"][1]["recurrent"] = [4, 2, 1]  # 5 units


def connections_of_a_stranger(plain):
    plain["tasks"][1]["connections"] = ["fc1", "fc3"]


def connections_twice(plain):
    plain["tasks"][1]["connections"] = ["fc1", "fc1"]


REFUSED = {
    version: f"'version' is 0, expected 1 to {VERSION}",
    resets_before_none: "-2 resets after 2 tasks",
    resets_of_tasks_to_come: "3 resets after 2 tasks",
    initial_of_a_head: "['heads.tasks.first.weight'] belong to no unit",
    recovery_of_nothing: "'recovering' has no 'evaluations'",
    kept_and_not_shared: "'kept' has what is not in 'shared': ('norm.bias', 'fc1.bias')",
    wider_unseen: "it does not say where its model was made wider",
    head_elsewhere: "'head_parameters' of task 'first' has ['heads.tasks.firstborn.bias'], which is not in its head",
    head_of_two_tasks: "'heads.tasks.first.bias' belongs to two layers, heads or tasks",
    shared_unit: "'fc2.bias' belongs to two layers, heads or tasks",
    fingerprint_of_a_stranger: "'rows' of task 'first' has what it did not freeze",
    another_axis: "'axis' of 'fc1' is 1",
    stranger_in_a_layer: "'parameters' of 'fc1' should be those of the layer, its norm and its slopes",
    no_weight: "'parameters' of 'fc1' should be those of the layer, its norm and its slopes",
    packed_in_no_thirds: "'packed' are queries, keys and values, and no 5 units",
    packed_and_recurrent: "'packed' are queries, keys and values, and no 6 units",
    three_directions: "'recurrent' should be gates, layers and directions, cells of equal size of 6 units",
    seven_gates: "'recurrent' should be gates, layers and directions",
    cells_of_unequal_size: "'recurrent' should be gates, layers and directions, cells of equal size of 5 units",
    connections_of_a_stranger: "'connections' should be names of layers, it is ('fc1', 'fc3')",
    connections_twice: "'connections' should be names of layers, it is ('fc1', 'fc1')",
}


@pytest.mark.parametrize("damage", REFUSED, ids=lambda damage: damage.__name__)
def test_a_state_that_contradicts_itself_is_refused_by_what_is_wrong(damage):
    plain = copy.deepcopy(two_tasks().to_plain())
    FreezeState.from_plain(plain)
    damage(plain)
    assert REFUSED[damage] in refusal(plain)


def test_what_is_at_the_limits_is_no_contradiction():
    plain = copy.deepcopy(two_tasks().to_plain())
    plain.update(kept=["norm.bias"], initial={"fc1.weight": torch.zeros(6, 4)}, several=True, begun=4)
    for resets in (-1, 0, 2):
        plain["resets"] = resets
        found = FreezeState.from_plain(plain)
        assert (found.resets, found.kept, found.several, found.begun) == (resets, ("norm.bias",), True, 4)
        assert found.to_plain().keys() == plain.keys()
    unfinished = {**copy.deepcopy(plain["tasks"][1]), "name": "third"}
    assert FreezeState.from_plain(plain | {"recovering": unfinished}).recovering.name == "third"
    tasks_to_come = plain | {"tasks": [], "resets": 0, "initial": {"anything": torch.zeros(1)}}
    assert FreezeState.from_plain(tasks_to_come).initial.keys() == {"anything"}


# -- the model --------------------------------------------------------------------------------------------------------


def test_a_model_that_counts_where_it_averaged_is_refused_by_both_kinds():
    state = state_of(make(ConvNet))
    net = make(ConvNet)
    net.half().bn1.running_mean = net.bn1.running_mean.double()
    state.check_module(net)  # a conversion of the whole model is none
    net.bn1.register_buffer("running_mean", torch.zeros(4, dtype=torch.int64))
    said = "'bn1.running_mean' is of torch.int64 in this model, and was of torch.float32 when task 'first' ended"
    with pytest.raises(ValueError, match=re.escape(said)):
        state.check_module(net)


def test_a_model_without_what_free_units_are_to_be_reset_to_is_refused():
    state = state_of(make(Mlp))
    state.initial = {"fc1.weight": torch.zeros(6, 4)}
    state.check_module(make(Mlp))
    for name, value in (("fc1.weight", torch.zeros(6, 5)), ("fc9.weight", torch.zeros(6, 4))):
        state.initial = {name: value}
        said = f"this model has no {name!r} of shape {tuple(value.shape)} to reset free units of"
        with pytest.raises(ValueError, match=re.escape(said)):
            state.check_module(make(Mlp))


def test_a_model_without_a_task_s_head_module_or_with_another_kind_of_embedding_is_refused():
    class Headless(Mlp):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(7, 4)

    net = make(Headless)
    head = record_of(net, head="heads.tasks.other", head_parameters=())
    with pytest.raises(ValueError, match=r"lacks the module 'heads\.tasks\.other', the head of task 'first'"):
        FreezeState(layers=net.layers, tasks={"first": head}).check_module(net)
    state = replace(state_of(net), embeddings=("table.weight",))
    state.check_module(net)
    net.table = nn.Linear(4, 7)
    with pytest.raises(ValueError, match=r"'table\.weight' was the weight of an embedding when a task ended"):
        state.check_module(net)


def test_a_layer_that_no_finished_task_knows_is_refused_unless_it_may_be_a_head():
    net = make(Mlp)
    state = state_of(net)
    state.forms = {name: f"float32 {tuple(value.shape)}" for name, value in net.named_parameters()}
    net.heads.tasks["third"] = nn.Linear(5, 3)
    state.check_whole(net)
    net.body = nn.Sequential(nn.ReLU(), nn.Linear(5, 3))
    with pytest.raises(ValueError, match=r"this model has a layer 'body\.1' that it did not have"):
        state.check_whole(net)
    state.check_module(net)


# -- what is free, and what is left of a fit ---------------------------------------------------------------------------


def test_capacity_after_a_task_is_what_neither_it_nor_one_before_needs():
    net = make(Mlp)
    state = state_of(net)  # 0, 2, 4 of six, 0, 2, 4 of five
    odd = every_second(net.layers, 1)
    assert state.capacity_after(odd) == {"fc1": 0.0, "fc2": 0.0}
    assert state.capacity_after(every_second(net.layers)) == {"fc1": 0.5, "fc2": pytest.approx(0.4)}
    assert FreezeState().capacity_after(odd) == {"fc1": 0.5, "fc2": pytest.approx(0.6)}


def test_of_a_fit_that_is_given_up_nothing_is_left_and_finished_tasks_stay():
    state = two_tasks()
    left = {"training": "third", "several": True, "begun": 3, "learned": {"table.weight": torch.ones(7) > 0}}
    for begun in (replace(state, **left, resets=2), replace(FreezeState(layers=state.layers), **left, resets=1)):
        begun.recover(replace(state.tasks["first"], name="third"), make(Mlp).units())
        begun.initial = {"fc1.weight": torch.zeros(6, 4)}
        begun.forget_unfinished()
        assert (begun.training, begun.recovering, begun.several, begun.begun) == (None, None, False, 0)
        assert begun.learned == {}
        kept = bool(begun.tasks)
        assert (bool(begun.layers), bool(begun.initial), begun.resets) == (kept, kept, 2 if kept else 0)
    given_up = replace(FreezeState(layers=state.layers), initial={"fc1.weight": torch.zeros(6, 4)}, resets=-1)
    given_up.forget_unfinished()  # its tasks were given up: free units are still to go back to where they began
    assert given_up.layers == state.layers
    assert given_up.resets == -1


def test_layers_that_were_frozen_whole_or_that_no_task_ran_stay_whole():
    net = make(Mlp)
    state = state_of(net)
    late = UnitLayer("late", 5, -1, ("late.weight", "late.bias"))
    ran = replace(net.units("second"), layers=(*net.layers, late))
    with pytest.raises(ValueError, match=r"\['late'\] ran for one task and not for another"):
        state.completed(ran)
    state.forms = dict.fromkeys(late.parameters, "float32 (5,)")  # the model had it, and no task ran it
    completed = state.completed(ran)
    assert completed.layers == net.layers
    assert {name: completed.reasons[name] for name in late.parameters} == dict.fromkeys(
        late.parameters, "ran for no earlier task"
    )
    assert set(late.parameters) <= set(completed.shared)
    state.shared, state.forms = (*state.shared, *late.parameters), {}
    whole = state.completed(ran)
    assert whole.layers == net.layers
    assert set(late.parameters) <= set(whole.shared)


def test_layers_and_embeddings_that_an_earlier_task_froze_whole_stay_so_and_say_why():
    net = make(Mlp)
    late = UnitLayer("late", 5, -1, ("late.weight", "late.bias"))
    state = replace(state_of(net), embeddings=("rows.weight",))
    state.shared = (*state.shared, *late.parameters, "table.weight")
    ran = replace(
        net.units("second"),
        layers=(*net.layers, late),
        embeddings=("table.weight",),
        shared=(*net.shared, "rows.weight"),  # in this trace, and by rows when the first task ended
    )
    completed = state.completed(ran)
    why = "frozen whole since an earlier task"
    assert {name: completed.reasons[name] for name in (*late.parameters, "table.weight")} == {
        "late.weight": why,
        "late.bias": why,
        "table.weight": why,
    }
    assert completed.embeddings == ("rows.weight",)
    assert set(completed.shared) == {*net.shared, *late.parameters, "table.weight"}


def test_what_follows_a_layer_since_an_earlier_task_is_not_its_own():
    net = make(Mlp)
    fc1, fc2 = net.layers
    state = state_of(net)
    followers = ("bn.weight", "bn.bias"), ("slope.weight",)
    for norm, slopes, own in (
        ("bn", None, followers[0]),
        (None, "slope", followers[1]),
        ("bn", "slope", sum(followers, ())),
    ):
        since = replace(fc1, norm=norm, slopes=slopes, parameters=(*fc1.parameters, *own))
        completed = state.completed(replace(net.units("second"), layers=(since, fc2)))
        assert completed.layers == net.layers
        assert {name: completed.reasons[name] for name in own} == dict.fromkeys(
            own, "no unit's when an earlier task ended"
        )
        assert set(own) <= set(completed.shared)
    known = FreezeState(layers=(replace(fc1, slopes="slope", parameters=(*fc1.parameters, "slope.weight")), fc2))
    known.tasks["first"] = state.tasks["first"]
    same = replace(net.units("second"), layers=known.layers)
    assert known.completed(same).layers == known.layers  # they followed it then


def test_two_layers_that_differ_are_both_named_with_what_became_of_them():
    net = make(Mlp)
    state = state_of(net)
    whole = {"fc1": "runs twice", "fc2": "shares its weight"}
    with pytest.raises(ValueError, match=re.escape("another (here, layer 'fc1' runs twice) (here, layer 'fc2'")):
        state.completed(replace(net.units("second"), layers=(), whole=whole))


def test_a_record_is_stamped_with_how_often_the_model_was_wider_and_own_rows_come_back():
    net = make(Mlp)
    state = FreezeState(widenings=(Wider({}, {}, {}), Wider({}, {}, {})))
    record = record_of(net)
    state.add(record, net.units())
    assert (record.widenings, state.tasks["first"].widenings) == (0, 2)
    assert state.tasks["first"].relevant is record.relevant
    assert state.later(record) == state.widenings
    assert state.later(state.tasks["first"]) == ()
    state = two_tasks()
    state.forms = {name: f"float32 {tuple(value.shape)}" for name, value in net.named_parameters()}
    state.embeddings, state.own_rows = ("table.weight",), ("table.weight",)
    state.forms["table.weight"] = "float32 (7, 4)"
    assert FreezeState.from_plain(state.to_plain()).own_rows == ("table.weight",)


def test_a_parameter_that_stands_in_two_places_is_found_in_both():
    net = make(Mlp)
    state = state_of(net)
    net.norm.weight = net.fc1.bias  # fc1's comes first, and torch names a parameter once
    assert "norm.weight" not in dict(net.named_parameters())
    state.check_module(net)
