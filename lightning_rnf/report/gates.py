"""What a pipeline holds a report to: conditions, a verdict of each, and the form that CI systems read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from lightning_rnf.report.retention import RetentionReport

ROUNDING = 1e-6
"""Metrics are logged in single precision, where 0.9 is a little less."""


@dataclass(frozen=True)
class Verdict:
    """Whether a condition holds, and of what.

    Attributes:
        condition: as it was asked for: ``"accuracy=0.9"``.
        of: the task, or the name of a number that is about all of them.
        fails: also where it can't be told.
        said: what was found, in words.
    """

    condition: str
    of: str
    fails: bool
    said: str


def verdicts(report: RetentionReport, conditions: Sequence[str]) -> list[Verdict]:
    """Hold a report to conditions. What can't be told fails: nobody has seen that it holds. Limits count to six places.

    Args:
        report: of the finished tasks.
        conditions: ``"changed"``: rows, heads or shared parameters of a task are not bit-equal to those of its end;
            ``"drift"``: a logit under recall is not what it was; ``"criterion"``: a sub-network falls short of the
            task's tolerance; ``"accuracy=L"``: the last test of a task is below L, in [0, 1]; ``"forgetting=L"``: the
            mean over tasks is above L; ``"free=L"``: the share of units that are free is below L.

    Raises:
        ValueError: naming a condition that there is not, or whose limit is no number in [0, 1].
    """
    return [verdict for condition in conditions for verdict in _held(report, condition)]


def failing(found: Sequence[Verdict]) -> list[str]:
    """The conditions that don't hold, a sentence for each."""
    return [f"{one.condition}: {one.of}: {one.said}" for one in found if one.fails]


def junit(found: Sequence[Verdict], name: str) -> str:
    """The verdicts as JUnit's XML, a test case for each condition and task.

    Args:
        found: all of them.
        name: of the suite.
    """
    failures = sum(one.fails for one in found)
    suite = ElementTree.Element("testsuite", name=name, tests=str(len(found)), failures=str(failures), errors="0")
    for one in found:
        case = ElementTree.SubElement(suite, "testcase", classname=f"rnf.{one.condition}", name=one.of)
        if one.fails:
            ElementTree.SubElement(case, "failure", message=one.said)
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def _held(report: RetentionReport, condition: str) -> Iterator[Verdict]:
    kind, _, limit = condition.partition("=")
    bound = _bound(condition, kind, limit)
    if not report.state.tasks:
        yield Verdict(condition, "all tasks", True, "no task has ended")
    elif kind in _OF_TASKS:
        for task in report.state.tasks:
            yield Verdict(condition, task, *_OF_TASKS[kind](report, task))
    elif kind == "accuracy":
        now = [math.nan] * len(report.state.tasks) if report.matrix is None else report.matrix[-1].tolist()
        for task, value in zip(report.state.tasks, now, strict=True):
            said = "its last test is not known" if math.isnan(value) else f"{value:.4f} in the last test"
            yield Verdict(condition, task, value < bound - ROUNDING or math.isnan(value), said)
    else:
        name = {"forgetting": "forgetting", "free": "free capacity"}[kind]
        value = report.numbers.get(name, math.nan)
        if kind == "forgetting" and len(report.state.tasks) == 1:
            value = 0.0  # nothing has come after it
        above = value - bound if kind == "forgetting" else bound - value
        fails = math.isnan(value) or above > ROUNDING
        yield Verdict(
            condition, name, fails, report.not_known.get(name, "not known") if value != value else f"{value:.4f}"
        )


def _bound(condition: str, kind: str, limit: str) -> float:
    """The limit of a condition, in [0, 1]; of one without: 0."""
    if kind in _OF_TASKS and condition == kind:
        return 0.0
    if kind not in ("accuracy", "forgetting", "free"):
        known = ", ".join((*_OF_TASKS, "accuracy=0.9", "forgetting=0.01", "free=0.1"))
        raise ValueError(f"--fail-on {condition}: expected some of {known}")
    try:
        value = float(limit)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise ValueError(f"--fail-on {condition}: expected a limit in [0, 1], as in {kind}=0.9")
    return value


def _changed(report: RetentionReport, task: str) -> tuple[bool, str]:
    if report.audit is None:
        return True, "not looked at: there are no weights in a file of masks"
    changed, unknown = report.audit.changed[task], report.audit.unknown[task]
    if changed:
        return True, f"changed since its end: {', '.join(changed)}"
    return bool(unknown), f"not known: {', '.join(unknown)}" if unknown else "bit-equal"


def _drifted(report: RetentionReport, task: str) -> tuple[bool, str]:
    if task in report.drift:
        return report.drift[task] != 0, f"the largest drift of a logit is {report.drift[task]:.3g}"
    if task == next(reversed(report.state.tasks)):
        return False, "no task has come after it"
    return True, "not compared: its samples are gone, or its head does not run"


def _accepted(report: RetentionReport, task: str) -> tuple[bool, str]:
    record = report.state.task(task)
    of = f"accuracy {record.accuracy:.4f} of the whole network, {record.subnetwork_accuracy:.4f} of the sub-network"
    return not record.accepted, of


_OF_TASKS: dict[str, Callable[[RetentionReport, str], tuple[bool, str]]] = {
    "changed": _changed,
    "drift": _drifted,
    "criterion": _accepted,
}
