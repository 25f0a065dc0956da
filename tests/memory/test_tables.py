"""Tables of what tasks keep, of two small networks whose masks are written down by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from records import Mlp, make, record_of, state_of

from lightning_rnf.memory import masks
from lightning_rnf.memory.embeddings import OldRows
from lightning_rnf.memory.state import FreezeState


def mask(digits: str) -> torch.Tensor:
    return torch.tensor([digit == "1" for digit in digits])


FIRST = {"fc1": mask("110000"), "fc2": mask("00001")}
SECOND = {"fc1": mask("011000"), "fc2": mask("00000")}


def two_tasks(**second) -> FreezeState:
    net = make(Mlp)
    return state_of(net, record_of(net, relevant=FIRST), record_of(net, "second", relevant=SECOND, **second))


def test_a_unit_is_its_who_froze_it_first():
    claimed = {name: of_units.tolist() for name, of_units in masks.claims(two_tasks()).items()}
    assert claimed == {"fc1": [0, 0, 1, -1, -1, -1], "fc2": [-1, -1, -1, -1, 0]}
    assert masks.claims_table(two_tasks()) == [
        {"layer": "fc1", "units": 6, "first": 2, "second": 1, "shared": 1, "free": 3},
        {"layer": "fc2", "units": 5, "first": 1, "second": 0, "shared": 0, "free": 4},
    ]
    assert masks.overlap(two_tasks()).tolist() == [[3, 1], [1, 2]]
    assert masks.free_capacity_over_tasks(two_tasks()) == [8 / 11, 7 / 11]


def test_before_any_task_all_is_free_and_the_tables_are_empty():
    nothing = FreezeState()
    assert masks.overlap(nothing).shape == (0, 0)
    assert masks.free_capacity_over_tasks(nothing) == []
    assert masks.free_weights_of_layers(nothing) == {}
    assert masks.free_weights(nothing, {}) == 1.0
    for table in (masks.claims_table, masks.tasks_table, masks.layers_table, masks.tokens_table):
        assert table(nothing) == []
    assert masks.as_text([]) == ""


def test_units_relevant_to_each_task_or_to_one():
    assert masks.layers_table(two_tasks()) == [
        {"layer": "fc1", "units": 6, "first": 2, "second": 2, "free": 3},
        {"layer": "fc2", "units": 5, "first": 1, "second": 0, "free": 4},
    ]
    assert [list(row.values()) for row in masks.layers_table(two_tasks(), "second")] == [
        ["fc1", 6, 2, 3],
        ["fc2", 5, 0, 4],
    ]
    with pytest.raises(KeyError, match="'third'"):
        masks.layers_table(two_tasks(), "third")


def test_what_a_task_costs_is_what_none_before_it_had():
    rows = masks.tasks_table(two_tasks())
    assert [(row["relevant units"], row["of them new"], row["free after it"]) for row in rows] == [
        (3, 3, pytest.approx(8 / 11)),
        (2, 1, pytest.approx(7 / 11)),
    ]
    assert all("scored by" not in row for row in rows)
    assert [row["scored by"] for row in masks.tasks_table(two_tasks(scored="R²"))] == ["accuracy", "R²"]


def test_free_weights_are_what_the_last_record_says_or_free_rows():
    state = two_tasks()
    assert masks.free_weights_of_layers(state) == {"fc1": 0.5, "fc2": pytest.approx(0.8)}
    said = two_tasks(free_weights={"fc1": 0.75, "fc2": 0.25})
    assert masks.free_weights_of_layers(said) == {"fc1": 0.75, "fc2": 0.25}
    # By rows, six and five, where no form is known, and by weights, 24 and 30, where it is.
    assert masks.free_weights(said, {"fc1": 0.75, "fc2": 0.25}) == pytest.approx((6 * 0.75 + 5 * 0.25) / 11)
    said.forms = {"fc1.weight": "float32 (6, 4)", "fc2.weight": "float32 (5, 6)"}
    assert masks.free_weights(said, {"fc1": 0.75, "fc2": 0.25}) == pytest.approx((24 * 0.75 + 30 * 0.25) / 54)


def test_rows_of_tokens_by_who_was_the_first_to_read_them():
    table = "table.weight"
    state = two_tasks(tokens={table: mask("0111000")})
    state.embeddings, state.forms = (table, "other.weight"), {table: "float32 (7, 2)", "other.weight": "float32 (3, 2)"}
    old = {table: OldRows(torch.tensor([1, 2]), torch.zeros(2, 2))}
    state.tasks["third"] = replace(state.tasks["second"], name="third", tokens={table: mask("1100000")}, old_rows=old)
    state.tasks["fourth"] = replace(state.tasks["second"], name="fourth", tokens={})
    assert masks.tokens_table(state) == [
        {"embedding": "table", "rows": 7, "first": 0, "second": 3, "third": 1, "fourth": 0, "unread": 3, "kept": 2}
    ]
    assert masks.free_rows(state) == {"table": pytest.approx(3 / 7), "other": 1.0}
    of_rows = masks.free_weights(state, {"fc1": 1.0, "fc2": 1.0})
    assert of_rows == pytest.approx((11 + 14 * 3 / 7 + 6) / (11 + 14 + 6))


def test_states_differ_in_layers_of_tasks_and_what_can_not_be_compared_is_refused():
    one, other = two_tasks(), two_tasks()
    assert masks.difference(one, other) == []
    other.tasks["second"] = replace(other.tasks["second"], relevant={**SECOND, "fc1": mask("001110")})
    differing = {"task": "second", "layer": "fc1", "units": 6, "in both": 1, "only in the first": 1}
    assert masks.difference(one, other) == [{**differing, "only in the second": 2}]
    assert masks.difference(one, other, "first") == []
    del other.tasks["first"]
    with pytest.raises(ValueError, match=r"\['first', 'second'\] and \['second'\]; name one of both"):
        masks.difference(one, other)
    assert len(masks.difference(one, other, "second")) == 1
    with pytest.raises(KeyError, match="'first'"):
        masks.difference(one, other, "first")
    fc1, fc2 = one.layers
    with pytest.raises(ValueError, match="only one has 'fc2' with 5 units, 'fc2' with 7 units"):
        masks.difference(one, replace(one, layers=(fc1, replace(fc2, units=7))))
    with pytest.raises(ValueError, match="only one has its order of layers"):
        masks.difference(one, replace(one, layers=(fc2, fc1)))


def test_cells_are_on_one_line_and_under_their_names():
    rows = [{"task": "a\nb", "accepted": True, "accuracy": 0.25}, {"task": "c", "accepted": False, "accuracy": 1.0}]
    assert masks.as_text(rows).splitlines() == [
        "task  accepted  accuracy",
        "a\\nb       yes    0.2500",
        "c           no    1.0000",
    ]
