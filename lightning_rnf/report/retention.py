"""`RetentionReport`: what was kept, what it cost and what is left, as tables, data and pages."""

from __future__ import annotations

import importlib.util
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from os import PathLike
from os.path import commonprefix
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_rnf.memory import Audit, FreezeState, TaskRecord, masks
from lightning_rnf.metrics import average_accuracy, backward_transfer, forgetting, forward_transfer
from lightning_rnf.report.figures import StreamResult, plot_retention
from lightning_rnf.report.forecast import Forecast
from lightning_rnf.report.page import page
from lightning_rnf.report.tables import Rows, aligned, markdown, rich_tables, shown, side_by_side
from lightning_rnf.runtime import extras

if TYPE_CHECKING:
    import pandas
    from rich.console import Console, ConsoleOptions, RenderResult


@dataclass(frozen=True, eq=False)
class RetentionReport:
    """What `RelevanceFreezing.report` has to say. Printed, it is a few tables.

    Attributes:
        state: the finished tasks.
        matrix: entry ``[i, j]`` is the test accuracy of task j after training task i: ``(tasks, tasks)``, see
            `metrics`; None: nothing was tested.
        baseline: accuracy of each task before any training, ``(tasks,)``; None: not known.
        audit: of the frozen rows; None: there was no model to look at.
        drift: by task, the largest difference of a logit under recall from that at its end, in logits: at the end of
            each later task, and now on the model. Not in it are tasks that are not measured now, if the end of one of
            the later tasks, or of none, measured them.
        forecast: about how many more tasks fit; None: no task has ended.
    """

    state: FreezeState
    matrix: Tensor | None
    baseline: Tensor | None
    audit: Audit | None
    drift: Mapping[str, float]
    forecast: Forecast | None

    @classmethod
    def of(
        cls,
        state: FreezeState,
        *,
        matrix: Tensor | None = None,
        metric: str | None = None,
        baseline: Tensor | None = None,
        audit: Audit | None = None,
    ) -> RetentionReport:
        """Look through the records of finished tasks.

        Args:
            state: the finished tasks.
            matrix: accuracy ``(tasks, tasks)``; None: of the metrics that tests have logged.
            metric: which of those; None: the first with "acc" in its name.
            baseline: accuracy of each task before any training, ``(tasks,)``.
            audit: of a model; None: there is none to look at.

        Raises:
            ValueError: if matrix or baseline have another shape, or the metric was never logged.
        """
        tasks = len(state.tasks)
        if matrix is None:
            matrix = _tested(state, metric)
        elif tuple(matrix.shape) != (tasks, tasks):
            raise ValueError(
                f"the matrix has shape {tuple(matrix.shape)}, expected {(tasks, tasks)}: {tasks} tasks ended"
            )
        if baseline is not None and tuple(baseline.shape) != (tasks,):
            raise ValueError(
                f"the baseline has shape {tuple(baseline.shape)}, expected one accuracy per task: ({tasks},)"
            )
        return cls(state, matrix, baseline, audit, _drift(state, audit), Forecast.of(state))

    # -- numbers ------------------------------------------------------------------------------------------------------

    @property
    def numbers(self) -> dict[str, float]:
        """The numbers of the field that can be told: all in [-1, 1], by name."""
        found: dict[str, float] = {}
        if self.matrix is not None and len(self.matrix):
            found["average accuracy"] = float(average_accuracy(self.matrix)[-1])
            found["forgetting"] = float(forgetting(self.matrix))
            found["backward transfer"] = float(backward_transfer(self.matrix))
            if self.baseline is not None:
                found["forward transfer"] = float(forward_transfer(self.matrix, self.baseline))
        if self.state.tasks:
            found["free capacity"] = masks.free_capacity_over_tasks(self.state)[-1]
        return {name: value for name, value in found.items() if not math.isnan(value)}

    @property
    def not_known(self) -> dict[str, str]:
        """Why a number is missing, by its name: which entry of the matrix it would need."""
        names = list(self.state.tasks)
        last = len(names) - 1
        before = range(last)
        needed = {
            "average accuracy": [(last, task) for task in range(len(names))],
            "forgetting": [(after, task) for task in before for after in range(task, len(names))],
            "backward transfer": [(after, task) for task in before for after in (task, last)],
        }
        if self.baseline is not None:
            needed["forward transfer"] = [(after, after + 1) for after in before]
        found = {}
        for number, entries in needed.items() if names else ():
            if self.matrix is None:
                found[number] = "no test has logged an accuracy"
            elif gaps := [entry for entry in entries if math.isnan(self.matrix[entry])]:
                after, task = gaps[0]
                more = f", and {len(gaps) - 1} more" if len(gaps) > 1 else ""
                found[number] = f"{names[task]!r} was not tested after {names[after]!r}{more}"
        return found

    @property
    def changed(self) -> Mapping[str, Sequence[str]] | None:
        """By task, names of its layers, head and shared parameters that are not bit-equal to what they were at its end.

        None: there was no model to look at.
        """
        return None if self.audit is None else self.audit.changed

    @property
    def is_sound(self) -> bool | None:
        """Whether all frozen rows are bit-equal and no logit has drifted; None: not everything could be looked at."""
        changed = any((self.changed or {}).values())
        if changed or any(value != 0 for value in self.drift.values()):
            return False
        complete = self.audit is not None and not any(self.audit.unknown.values())
        return True if complete and set(self.drift) == set(self.state.tasks) else None

    @property
    def sections(self) -> dict[str, Rows]:
        """The tables by title; a value that is not known is None."""
        short = _without_prefix(list(self.state.tasks))
        found = {
            "tasks": [
                {_COLUMNS.get(key, key): row[key] for key in row if key != "of them new"} for row in self._tasks()
            ],
            "layers: units frozen first by each task, serving several, free": [
                {short.get(key, key): value for key, value in row.items()} for row in masks.claims_table(self.state)
            ],
            "embeddings: rows read first by each task, by none, and kept for earlier ones as they were": [
                {short.get(key, key): value for key, value in row.items()} for row in masks.tokens_table(self.state)
            ],
            "searches": self._searches(),
            "audit": self._audit(),
        }
        if self.matrix is not None:
            columns = masks.columns(list(short.values()), {"after"})
            found["accuracy of each task (column) after each task (row)"] = [
                {"after": name, **dict(zip(columns, _known(row), strict=True))}
                for name, row in zip(self.state.tasks, self.matrix, strict=True)
            ]
        found["not told the task, after the last one: right untold, right told, tasks found"] = self._untold()
        return {title: rows for title, rows in found.items() if rows}

    def _tasks(self) -> Rows:
        then = [None] * len(self.state.tasks) if self.matrix is None else _known(self.matrix.diagonal())
        now = [None] * len(self.state.tasks) if self.matrix is None else _known(self.matrix[-1])
        rows = []
        for index, row in enumerate(masks.tasks_table(self.state)):
            kept = (
                "task",
                "accuracy",
                "of the sub-network",
                "scored by",
                "accepted",
                "relevant units",
                "of them new",
                "free after it",
            )
            tested = {} if self.matrix is None else {"tested at its end": then[index], "tested now": now[index]}
            rows.append({key: row[key] for key in kept if key in row} | tested)
        return rows

    def _untold(self) -> Rows:
        """What the last task's tests say of each task where they were not told it: see `streams.fit_stream`."""
        tests = next(reversed(self.state.tasks.values())).tests if self.state.tasks else {}
        rows: Rows = []
        for task in self.state.tasks:
            logged = tests.get(task, {})
            kind = next((name for name in logged if f"{name}_told" in logged), None)
            if kind is not None and "tasks_found" in logged:
                shares = {"untold": logged[kind], "told": logged[f"{kind}_told"], "task found": logged["tasks_found"]}
                rows.append({"task": task, "scored by": kind, **shares})
        return rows

    def _searches(self) -> Rows:
        return [
            {
                "task": record.name,
                "cutoff": record.cutoff,
                "evaluations": len(record.evaluations) + len(record.recovery),
                "samples": record.samples,
                **{f"{what}, s": round(seconds, 3) for what, seconds in record.seconds.items()},
            }
            for record in self.state.tasks.values()
        ]

    def _audit(self) -> Rows:
        return [
            {
                "task": name,
                "frozen since its end": _said(self.audit, name),
                "largest drift of a logit": self.drift.get(name),
                "logits compared": self._compared(name),
            }
            for name in self.state.tasks
        ]

    def _compared(self, task: str) -> str:
        """When the logits of a task were compared with those of its end, or why they were not."""
        if self.audit is not None and task in self.audit.drift:
            return "now"
        if task in self.drift:
            return f"when {next(reversed(self.state.tasks))} ended"
        if self.audit is None and task == next(reversed(self.state.tasks)):
            return "not yet"
        return "no: its samples are gone, or its head does not run"

    # -- forms --------------------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        if not self.state.tasks:
            return "no finished task"
        if importlib.util.find_spec("rich") is None:
            parts = []
            for title, rows in self.sections.items():
                cells = aligned(rows)
                widths = {name: max(len(name), *(len(row[name]) for row in cells)) for name in rows[0]}
                parts += [title, *map(masks.as_text, side_by_side(cells, widths, 2, _WIDTH)), ""]
            return "\n".join([*parts, self.summary])
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=_WIDTH, color_system=None).print(self)
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines())

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        for title, rows in self.sections.items():
            yield Text(title, style="bold")
            yield from rich_tables(rows, options.max_width)
        yield Text(self.summary if self.state.tasks else str(self))

    @property
    def summary(self) -> str:
        """The numbers, why one is missing, and the forecast, a line for each."""
        lines = [", ".join(f"{name} {value:.4f}" for name, value in self.numbers.items())]
        for reason, missing in groupby(self.not_known.items(), key=lambda one: one[1]):
            *others, last = (name for name, _ in missing)
            lines.append(f"not known: {', '.join(others)}{' and ' if others else ''}{last} ({reason})")
        return "\n".join([*lines, str(self.forecast)] if self.forecast else lines)

    def to_dict(self) -> dict[str, Any]:
        """Dicts, lists and built-in types that JSON has; what is not known, or no number, is None."""
        found = {
            "tasks": self._tasks(),
            "layers": masks.claims_table(self.state) if self.state.tasks else [],
            "embeddings": masks.tokens_table(self.state),
            "capacity": masks.free_capacity_over_tasks(self.state),
            "overlap": masks.overlap(self.state).tolist(),
            "searches": [{**row, "curve": curve(self.state.task(row["task"]))} for row in self._searches()],
            "audit": self._audit(),
            "matrix": None if self.matrix is None else [_known(row) for row in self.matrix],
            "untold": self._untold(),
            "numbers": self.numbers,
            "not known": self.not_known,
            "forecast": None if self.forecast is None else vars(self.forecast),
        }
        plain: dict[str, Any] = _without_nan(found)
        return plain

    def to_json(self) -> str:
        """The same as text."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    def to_markdown(self) -> str:
        """The tables as GitHub shows them."""
        parts = []
        for title, rows in self.sections.items():
            lines = [[markdown(masks.printable(name)) for name in rows[0]], ["---"] * len(rows[0])]
            lines += [[markdown(shown(value)) for value in row.values()] for row in rows]
            table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
            parts.append(f"### {title.capitalize()}\n\n{table}")
        return "\n\n".join([*parts, self.summary.replace("\n", "\n\n")]) + "\n"

    def to_html(self) -> str:
        """One page with the tables and figures, that needs nothing from elsewhere and has a light and a dark form.

        Raises:
            ImportError: if matplotlib is not installed (extra ``plots``).
        """
        said = self.summary.splitlines()[1:]  # the first line has the numbers
        with extras.needed():
            return page(self.state, self.matrix, self.sections, self.numbers, self.is_sound, said)

    def to_pandas(self) -> dict[str, pandas.DataFrame]:
        """The tables as data frames, by title.

        Raises:
            ImportError: if pandas is not installed.
        """
        with extras.needed():
            import pandas

        return {title: pandas.DataFrame(rows) for title, rows in self.sections.items()}

    def plot(self, path: str | PathLike[str]) -> None:
        """Draw average accuracy and that of each task over the stream, with free capacity (the paper's Figure 2).

        Raises:
            ImportError: if matplotlib is not installed (extra ``plots``).
            ValueError: if nothing was tested.
        """
        if self.matrix is None:
            raise ValueError(
                "nothing to draw: no test has logged an accuracy; run trainer.test after each fit, or pass matrix="
            )
        capacity = masks.free_capacity_over_tasks(self.state)
        with extras.needed():
            plot_retention([StreamResult("relevance freezing", list(self.state.tasks), self.matrix, capacity)], path)


def curve(record: TaskRecord) -> Rows:
    """The search's accuracy over the cutoff, ascending; after a recovery, what was measured then follows."""
    searched = sorted(record.evaluations, key=lambda evaluation: evaluation.score.cutoff)
    return [
        {
            "cutoff": evaluation.score.cutoff,
            "accuracy": evaluation.score.accuracy,
            "accepted": evaluation.accepted,
            "after recovery": number >= len(searched),
        }
        for number, evaluation in enumerate([*searched, *record.recovery])
    ]


def accuracy_rows(result: StreamResult) -> Rows:
    """Accuracy in per cent of every task after every task, mean over seeds, the average, and free capacity."""
    prefix = commonprefix(result.tasks)  # noqa: RUF071 - of strings, not of paths
    names = [name.removeprefix(prefix) or name for name in result.tasks]
    averages, mean = result.averages.mean(dim=0), result.mean
    rows = []
    for index, name in enumerate(names):
        seen = [f"{100 * value:.1f}" for value in mean[index, : index + 1].tolist()]
        cells = dict(zip(names, [*seen, *[""] * (len(names) - index - 1)], strict=True))
        free = {"free units": f"{100 * result.free_capacity[index]:.0f}"} if len(result.free_capacity) else {}
        rows.append({f"after {prefix}…": name, **cells, "average": f"{100 * float(averages[index]):.1f}", **free})
    return rows


_WIDTH = 160
"""Of a report as plain text, in characters."""

_COLUMNS = {
    "of the sub-network": "sub-net",
    "accepted": "met",
    "relevant units": "units",
    "free after it": "free after",
    "tested at its end": "test then",
    "tested now": "test now",
}
"""Short names for narrow tables."""


def _without_prefix(names: Sequence[str]) -> dict[str, str]:
    """What tells names apart, for the columns of narrow tables: by name, what follows their common beginning."""
    prefix = commonprefix(names) if len(names) > 1 else ""  # noqa: RUF071 - of strings, not of paths
    prefix = prefix[: max(prefix.rfind(mark) for mark in "-_ ./") + 1]
    short = {name: name.removeprefix(prefix) or name for name in names}
    taken = {"layer", "units", "shared", "free", "after", "embedding", "rows", "unread", "kept"}
    return short if len(set(short.values()) - taken) == len(names) else {name: name for name in names}


def _tested(state: FreezeState, metric: str | None) -> Tensor | None:
    records = list(state.tasks.values())
    logged = list(dict.fromkeys(name for record in records for values in record.tests.values() for name in values))
    if metric is None:
        metric = next((name for name in logged if "acc" in name.lower()), None)
        if metric is None:
            return None
    elif metric not in logged:
        raise ValueError(f"no test has logged {metric!r}; logged were: {logged or 'nothing'}")
    nan = float("nan")
    return torch.tensor([[after.tests.get(task, {}).get(metric, nan) for task in state.tasks] for after in records])


def _known(values: Tensor) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values.tolist()]


def _drift(state: FreezeState, audit: Audit | None) -> dict[str, float]:
    """By task the largest drift of all that were measured; without a gap, if there is none of now."""
    found: dict[str, float] = {}
    records = list(state.tasks.values())
    for index, record in enumerate(records):
        later = [after.drift.get(record.name) for after in records[index + 1 :]]
        now = None if audit is None else audit.drift.get(record.name)
        known = [value for value in (*later, now) if value is not None]
        if now is not None or (later and None not in later):
            # A NaN is a drift, too, and max would pass over it.
            found[record.name] = math.nan if any(map(math.isnan, known)) else max(known)
    return found


def _said(audit: Audit | None, task: str) -> str:
    if audit is None:
        return "not looked at: no weights"
    parts = {"changed": audit.changed[task], "not known": audit.unknown[task]}
    return "; ".join(f"{what}: {', '.join(names)}" for what, names in parts.items() if names) or "bit-equal"


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
