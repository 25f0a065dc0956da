"""Conditions that a pipeline fails on: each holds, fails, or can't be told, and says which."""

from __future__ import annotations

from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch
from records import Mlp, every_second, make, record_of, state_of

from lightning_rnf.memory.fingerprints import Audit
from lightning_rnf.memory.state import FreezeState
from lightning_rnf.report import RetentionReport, failing, junit, verdicts

NAN = float("nan")
MATRIX = torch.tensor([[0.97, NAN], [0.95, 0.8]])
FINE = {"first": (), "second": ()}


def report(matrix=MATRIX, audit=None, drift=0.0, **changes) -> RetentionReport:
    net = make(Mlp)
    second = record_of(net, "second", relevant=every_second(net.layers, 1), **changes)
    return RetentionReport.of(
        state_of(net, record_of(net), replace(second, drift={"first": drift})), matrix=matrix, audit=audit
    )


def failed(condition, **options) -> list[str]:
    return [one.of for one in verdicts(report(**options), [condition]) if one.fails]


def test_accuracies_below_a_limit_fail_by_task():
    assert failed("accuracy=0.8") == []
    assert failed("accuracy=0.9") == ["second"]
    assert failed("accuracy=0.96") == ["first", "second"]
    assert failed("accuracy=0.1", matrix=None) == ["first", "second"]  # nobody has tested them
    assert failed("accuracy=0", matrix=torch.tensor([[0.9, NAN], [NAN, 0.8]])) == ["first"]


def test_forgetting_above_a_limit_and_free_units_below_one_fail():
    assert failed("forgetting=0.03") == []
    assert failed("forgetting=0.01") == ["forgetting"]
    assert failed("forgetting=1", matrix=None) == ["forgetting"]
    free = report().numbers["free capacity"]
    assert failed(f"free={free}") == []
    assert failed(f"free={free + 0.01}") == ["free capacity"]


def test_the_first_task_can_not_have_been_forgotten():
    net = make(Mlp)
    alone = RetentionReport.of(state_of(net, record_of(net)), matrix=torch.tensor([[0.9]]))
    assert not failing(verdicts(alone, ["forgetting=0", "drift", "accuracy=0.9"]))


def test_rows_that_have_changed_fail_and_so_do_those_that_nobody_has_looked_at():
    assert failed("changed") == ["first", "second"]
    assert failed("changed", audit=Audit(FINE, FINE)) == []
    assert failed("changed", audit=Audit({**FINE, "first": ("fc1",)}, FINE)) == ["first"]
    assert failed("changed", audit=Audit(FINE, {**FINE, "second": ("fc2",)})) == ["second"]


def test_logits_that_have_drifted_fail_and_so_do_those_that_can_not_be_compared():
    assert failed("drift") == []  # nothing has come after the last task
    assert failed("drift", drift=1e-9) == ["first"]
    assert failed("drift", drift=NAN) == ["first"]
    net = make(Mlp)
    second = record_of(net, "second", relevant=every_second(net.layers, 1))
    gone = RetentionReport.of(state_of(net, record_of(net), replace(second, drift={})), matrix=MATRIX)
    assert [one.of for one in verdicts(gone, ["drift"]) if one.fails] == ["first"]


def test_a_criterion_that_was_not_met_fails():
    assert failed("criterion", accepted=True) == []
    assert failed("criterion", accepted=False) == ["second"]


def test_where_no_task_has_ended_nothing_has_been_shown():
    empty = RetentionReport.of(FreezeState())
    for condition in ("changed", "drift", "criterion", "accuracy=0", "forgetting=1", "free=0"):
        assert failing(verdicts(empty, [condition])) == [f"{condition}: all tasks: no task has ended"]


@pytest.mark.parametrize(
    "condition", ["", "dance", "changed=1", "accuracy", "accuracy=", "accuracy=x", "free=2", "free=-1", "free=nan"]
)
def test_a_condition_that_there_is_not_is_refused(condition):
    with pytest.raises(ValueError, match=f"^--fail-on {condition}: expected "):
        verdicts(report(), [condition])


def test_a_ci_system_reads_each_condition_and_task():
    found = verdicts(report(accepted=False), ["criterion", "accuracy=0.9", "free=0"])
    suite = ElementTree.fromstring(junit(found, "rnf report 'a<b>'"))
    assert (suite.tag, suite.get("name"), suite.get("tests"), suite.get("failures")) == (
        "testsuite",
        "rnf report 'a<b>'",
        "5",
        "2",
    )
    cases = [(case.get("classname"), case.get("name"), case.find("failure") is not None) for case in suite]
    assert cases == [
        ("rnf.criterion", "first", False),
        ("rnf.criterion", "second", True),
        ("rnf.accuracy=0.9", "first", False),
        ("rnf.accuracy=0.9", "second", True),
        ("rnf.free=0", "free capacity", False),
    ]
    messages = [case.find("failure").get("message") for case in suite if case.find("failure") is not None]
    assert [
        f"{one.condition}: {one.of}: {said}" for one, said in zip([f for f in found if f.fails], messages, strict=True)
    ] == failing(found)
