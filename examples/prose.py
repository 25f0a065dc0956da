"""Numbers in sentences, each bound to what it is taken from: `results.py` writes and checks them.

A comment below a paragraph, a list's item or a table, which no reader sees, has its numbers in their order, each with
an expression in Python over the results::

    `paper` is 1.7 points above naive fine-tuning in the mean, and below it in six of 20 seeds (the paper: 4 above).
    <!-- numbers of mnist_split
    1.7: paper.over(naive).mean(); six: sum(paper.over(naive) < 0); 20: len(paper.seeds); 4: "the paper"
    -->

- A number has to be the value at the digits shown; a word from zero to twelve is a number, too.
- Where the value is true or false it has to be true, and what is before the colon may be any words:
  ``a third: 30 < share < 36``.
- A text in quotes is where a number is from that no result here has: a publication, a name; or "not recorded".

Names are the methods of the experiment that the comment names (`Method`), every experiment by the name of its file, and
`rows` and `recorded` of any other JSON. The expressions are the repository's own, as a doctest's are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Number
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
OTHER = ("tests/benchmarks/results", "tests/networks", "docs")
_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
_NUMERAL = re.compile(r"(?<![\w.,])(?<!\w[-–])(?:(?<=[\s(])[+-])?\d(?:[\d,]*\d)?(?:\.\d+)?(?!\w|[.,]\d|-\w)")
_IS_MEASURED = re.compile(r"(?:(?:,| to| and| or|, and)\s+[+-]?\d[\d.,]*)*\s*(?:%|points?\b)")
_IS_NAME = re.compile(r"(?:Section|Figure|[Ss]eeds?|[Tt]asks?)\s+(?:[\d,]+(?:,| to| and)\s+)*$")
_MASKED = re.compile(r"`[^`]*`|\]\([^)]*\)|\bal\.\s+\d{4}|[A-Z]\w+\s(?:19|20)\d\d\b|<!--.*?-->", re.DOTALL)
_COMMENT = re.compile(r"\s*<!-- numbers(?: of (?P<of>[\w-]+))?\n(?P<items>.*?)\n\s*-->[ \t]*\n", flags=re.DOTALL)
_GENERATED = re.compile(r"<!-- (?:results:\S+|overview) -->.*?<!-- /(?:results|overview) -->", flags=re.DOTALL)


class Method:
    """The runs of a method, in %: a number for each seed (`pandas.Series`), or for each seed and task (`DataFrame`)."""

    def __init__(self, method: Mapping[str, Any]) -> None:
        self.runs: Sequence[Mapping[str, Any]] = method["runs"]
        self.settings: Mapping[str, Any] = method["settings"]
        self.seeds = [run["seed"] for run in self.runs]

    @property
    def average(self) -> pd.Series:
        return self.each("average")

    @property
    def forgetting(self) -> pd.Series:
        return self.each("forgetting")

    @property
    def end(self) -> pd.DataFrame:
        """Accuracy of each task at the end; tasks count from 1."""
        return self._by_task([run["matrix"][-1] for run in self.runs])

    @property
    def learned(self) -> pd.DataFrame:
        """Accuracy of each task right after its own training."""
        return self._by_task([[row[task] for task, row in enumerate(run["matrix"])] for run in self.runs])

    @property
    def lost(self) -> pd.DataFrame:
        """What each task has lost since."""
        return self.learned - self.end

    @property
    def free(self) -> pd.DataFrame:
        """Free units after each task."""
        return self._by_task([run["free_capacity"] for run in self.runs])

    @property
    def missed(self) -> pd.DataFrame:
        """Whether each task's sub-network did not meet the criterion."""
        return self._by_task([run["accepted"] for run in self.runs]).eq(0)

    def each(self, key: str) -> pd.Series:
        """Any other share of each run; the mean of its tasks, if it is a list."""
        return pd.Series({run["seed"]: 100 * float(np.mean(run[key])) for run in self.runs if key in run})

    def raw(self, key: str) -> pd.DataFrame:
        """Any other numbers of each run as they are recorded, not in %."""
        rows = [np.atleast_1d(run[key]) for run in self.runs]
        return pd.DataFrame(rows, index=self.seeds, columns=range(1, 1 + len(rows[0])))

    def over(self, other: Method) -> pd.Series:
        """Points of average accuracy above another method, for each seed that both have."""
        return (self.average - other.average).dropna()

    def _by_task(self, rows: Sequence[Sequence[float]]) -> pd.DataFrame:
        return 100 * pd.DataFrame(rows, index=self.seeds, columns=range(1, 1 + len(rows[0])), dtype=float)


@dataclass(frozen=True)
class Experiment:
    """Its methods are attributes, too, with underscores in their names where they have blanks."""

    goal: float | None
    methods: Mapping[str, Method]

    def __getattr__(self, name: str) -> Method:
        try:
            return self.methods[name]
        except KeyError:
            raise AttributeError(f"no method {name} among {', '.join(self.methods)}") from None


@dataclass
class Problem:
    """What is wrong with a number, and what would be right, as far as that can be told."""

    page: str
    line: int
    said: str
    sentence: str
    is_mended: bool = False

    def __str__(self) -> str:
        return f"{self.page}, line {self.line}: {self.said}, in: {self.sentence}"


def names(summaries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What expressions may name: experiments, other recorded files, and what counts and compares."""
    experiments = {
        _identifier(name): Experiment(
            summary.get("goal"), {_identifier(method): Method(runs) for method, runs in summary["methods"].items()}
        )
        for name, summary in summaries.items()
    }
    known = {function.__name__: function for function in (abs, all, any, len, max, min, round, sorted, sum)}
    return {**known, "experiments": experiments, "recorded": recorded, "rows": rows, **experiments}


def recorded(name: str) -> Any:
    """The content of a JSON file beside the benchmarks, the tests of networks or the documentation."""
    paths = [path for path in (ROOT / folder / f"{name}.json" for folder in OTHER) if path.exists()]
    if not paths:
        raise ValueError(f"no {name}.json in {', '.join(OTHER)}")
    return json.loads(paths[0].read_text(encoding="utf-8"))


def rows(name: str, *inside: str, of_lists: str = "mean", **where: Any) -> pd.DataFrame:
    """The rows of such a file that have these values.

    Args:
        name: of the file.
        inside: keys that lead to what has the rows.
        of_lists: what a list becomes, "mean" or "median"; a matrix is taken by its last row.
        where: values by column.
    """
    content = recorded(name)
    for key in inside:
        content = content[key]
    found = [row for row in content["rows"] if all(row.get(key) == value for key, value in where.items())]
    if not found:
        raise ValueError(f"{name}.json has no row with {where}")
    return pd.DataFrame([{key: _one(value, of_lists) for key, value in row.items()} for row in found])


def corrected(text: str, known: Mapping[str, Any], page: str, *, all_bound: bool = True) -> tuple[str, list[Problem]]:
    """The text with the numbers that its expressions have now, and what was or is wrong.

    Args:
        text: Markdown.
        known: see `names`.
        page: its name, for messages.
        all_bound: whether a number with a decimal point, with % or with points may stand in no comment's list. In a
            paragraph that has a comment, no number may.
    """
    edits: list[tuple[int, int, str]] = []
    problems: list[Problem] = []
    for start, end, comment in _blocks(text):
        block = _masked(text[start:end])

        def report(said: str, at: int, is_mended: bool = False, start: int = start, end: int = end) -> None:
            line = text.count("\n", 0, start + at) + 1
            problems.append(Problem(page, line, said, _sentence(text[start:end], at), is_mended))

        bound, at = [], 0
        for where, key, expression in _items(comment) if comment else ():
            found = re.compile(_bounded(key)).search(block, at)
            if found is None:
                report(f"{key!r}, which is bound to {expression}, does not stand behind what is bound before it", at)
                continue
            bound.append(found.span())
            at = found.end()
            try:
                right = _right(key, _value(expression, known, comment["of"]))
            except Exception as error:  # whatever an expression does wrong, it is named
                report(f"{key}: {expression} has no value ({type(error).__name__}: {error})", found.start())
                continue
            if right is None:
                report(f"{key!r} is not true: {expression}", found.start())
            elif right != key:
                report(f"{key} should be {right} ({expression})", found.start(), is_mended=True)
                edits += [(start + found.start(), start + found.end(), right), (where, where + len(key), right)]
        is_table = block.lstrip().startswith("|")
        for found in _NUMERAL.finditer(block):
            is_demanded = (comment is not None) or (all_bound and _is_measured(found))
            is_bound = any(first <= found.start() and found.end() <= last for first, last in bound)
            if is_demanded and not is_bound and not is_table and not _IS_NAME.search(block[: found.start()]):
                report(f"{found[0]} is bound to no result", found.start())
    for first, last, right in sorted(edits, reverse=True):
        text = text[:first] + right + text[last:]
    return text, problems


def numerals(text: str, *, measured: bool = False) -> Iterator[tuple[int, int]]:
    """Where numbers stand in paragraphs and items, but for names; or those alone with a decimal point, % or points."""
    for start, end, _ in _blocks(text):
        block = _masked(text[start:end])
        for found in _NUMERAL.finditer(block):
            is_name = bool(_IS_NAME.search(block[: found.start()]))
            if not block.lstrip().startswith("|") and not is_name and (not measured or _is_measured(found)):
                yield start + found.start(), start + found.end()


def _blocks(text: str) -> Iterator[tuple[int, int, re.Match[str] | None]]:
    """Start and end of each paragraph, item and table, and its comment."""
    hidden = _GENERATED.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text)
    hidden = re.sub(r"^( *)```.*?^\1```", lambda found: re.sub(r"[^\n]", " ", found[0]), hidden, flags=re.M | re.S)
    lines = re.compile(r"[^\n]*\n|[^\n]+$")
    start, position = None, 0
    while found := lines.match(hidden, position):
        line = found[0].strip()
        comment = _COMMENT.match(hidden, position) if line.startswith("<!-- numbers") else None
        ends = comment or not line or line.startswith(("#", "<!--")) or re.match(r"(?:[-*]|\d+\.)\s", line)
        is_below = start is not None
        if start is not None and ends:
            yield start, position, comment
            start = None
        if line.startswith("<!-- numbers"):
            if comment is None or not is_below:
                raise ValueError(f"{line!r} is not below a paragraph, or has no lines of items before its last")
            position = comment.end()
            continue
        if line and not line.startswith(("#", "<!--")) and start is None:
            start = position
        position = found.end()
    if start is not None:
        yield start, position, None


def _masked(block: str) -> str:
    """Of the same length; code, links and years of publications are no numbers."""
    return _MASKED.sub(lambda found: re.sub(r"[^\n]", "`", found[0]), block)


def _items(comment: re.Match[str]) -> Iterator[tuple[int, str, str]]:
    """Where each item stands, what it is about and its expression."""
    for found in re.finditer(r"(?:^|(?<=; ))[ \t]*(?P<key>[^:;\n]+): (?P<value>[^;\n]+)", comment["items"], flags=re.M):
        yield comment.start("items") + found.start("key"), found["key"], found["value"].strip()


def _bounded(key: str) -> str:
    """A pattern for a key: words may be in two lines, and a number is no part of another."""
    sign = "" if key[0] in "+-" else r"(?<![\w.,])(?<!\w[-–])"
    return sign + r"\s+".join(map(re.escape, key.split())) + r"(?!\w|[.,]\d)"


def _value(expression: str, known: Mapping[str, Any], of: str | None) -> Any:
    named: Mapping[str, Any] = {}
    if of is not None:
        if _identifier(of) not in known:
            raise ValueError(f"there is no experiment {of}")
        named = known[_identifier(of)].methods
    return eval(expression, {"__builtins__": {}, **known, **named})


def _right(key: str, value: Any) -> str | None:
    """What the key should be; nothing, if it can't be told but is wrong."""
    if isinstance(value, str):
        return key
    if isinstance(value, (bool, np.bool_)):
        return key if value else None
    if not isinstance(value, (Number, np.number)) or value != value:
        raise TypeError(f"{value!r} is no number, text, true or false")
    if key.lower() in _WORDS:
        index = round(float(value))
        word = _WORDS[index] if value == index and 0 <= index < len(_WORDS) else str(value)
        return word.capitalize() if key[0].isupper() else word
    digits = len(key.partition(".")[2])
    if abs(float(key.replace(",", "")) - float(value)) <= 0.5 * 10.0**-digits + 1e-9:  # a half goes either way
        return key
    return f"{float(value):{'+' if key[0] in '+-' else ''}{',' if ',' in key else ''}.{digits}f}"


def _is_measured(found: re.Match[str]) -> bool:
    return "." in found[0] or bool(_IS_MEASURED.match(found.string, found.end()))


def _sentence(block: str, at: int) -> str:
    """The one that a position is in, on one line."""
    ends = [0, *(found.end() for found in re.finditer(r"(?<!al)[.;]\s+", block)), len(block)]
    start = max(end for end in ends if end <= at)
    return " ".join(block[start : min((end for end in ends if end > at), default=len(block))].split())


def _one(value: Any, of_lists: str) -> Any:
    while isinstance(value, list) and value and isinstance(value[-1], list):
        value = value[-1]
    is_numbers = isinstance(value, list) and value and all(isinstance(entry, (int, float)) for entry in value)
    return float(getattr(np, of_lists)(value)) if is_numbers else value


def _identifier(name: str) -> str:
    return re.sub(r"\W+", "_", name)
