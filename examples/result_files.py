"""The JSON files that hold an experiment's runs: read or refused, and added to by one process at a time."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import BaseModel, Field, ValidationError, model_validator

TRUE_OF_ALL_RUNS = ("stand_in", "reduced", "run_with", "tested_on", "tuning")
"""What a file says of its runs, beside title and methods; null, or a sentence."""


class _Checked(BaseModel, strict=True, extra="allow", allow_inf_nan=False):
    """What tables and figures stand on; more may be there."""


class _Run(_Checked):
    seed: int
    device: str
    versions: dict[str, str]
    data: dict[str, str] = {}
    tasks: list[str] = Field(min_length=1)
    matrix: list[list[float | None]]
    average: float
    forgetting: float
    free_capacity: list[float]
    accepted: list[bool]

    @model_validator(mode="after")
    def _is_whole(self) -> _Run:
        tasks = len(self.tasks)
        if [len(row) for row in self.matrix] != [tasks] * tasks or None in self.matrix[-1]:
            raise ValueError(f"matrix has not a row for each of {tasks} tasks with the last one filled")
        if len(self.free_capacity) not in {0, tasks}:
            raise ValueError(f"free_capacity has {len(self.free_capacity)} numbers for {tasks} tasks")
        return self


class _Settings(_Checked):
    stream: dict[str, Any] | None = None
    network: dict[str, Any] | None = None
    training: dict[str, Any]
    freezing: dict[str, Any] | None = None
    paper: dict[str, Any] | None = None
    precision: str = "32-true"


class _Method(_Checked):
    settings: _Settings
    runs: list[_Run] = Field(min_length=1)


class _File(_Checked):
    title: str
    stand_in: str | None
    reduced: str | None
    run_with: str | None
    tested_on: str
    tuning: str | None
    goal: float | None = None
    published: str | None = None
    methods: dict[str, _Method] = Field(min_length=1)

    @model_validator(mode="after")
    def _has_one_stream(self) -> _File:
        if len({tuple(run.tasks) for method in self.methods.values() for run in method.runs}) > 1:
            raise ValueError("its runs have different tasks")
        return self


def read(path: Path) -> dict[str, Any]:
    """What a file of results holds.

    Raises:
        ValueError: if it holds something else, naming the file and what is wrong.
    """
    text = path.read_bytes()
    try:
        _File.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        wrong = ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"])))
        raise ValueError(f"{path} holds no results of an experiment: {wrong}; move it away") from error
    found: dict[str, Any] = json.loads(text)
    return found


class Results:
    """The JSON of an experiment: what it is about, and for each method its settings and runs.

    The file is read again before each run is added, and replaced in one step, by one process at a time.

    Args:
        path: of the file; it need not be there.
        about: what the experiment is, and in which way it is not the paper's.
    """

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self.path = path
        self.about = dict(about)

    def read(self) -> dict[str, Any]:
        """What is there, with this experiment's description; no methods if there is no file.

        Raises:
            ValueError: if the file holds something else.
        """
        return {**self.about, "methods": read(self.path)["methods"] if self.path.exists() else {}}

    def check(self, method: str, made_with: Mapping[str, Any]) -> None:
        """Check that runs of a method may join those that are there.

        Raises:
            ValueError: if those were made with other settings, or the file says of all its runs what is not true of
                these, such as how settings were chosen; naming what differs.
        """
        if not self.path.exists():
            return
        there = read(self.path)
        old = {**there["methods"].get(method, {}).get("settings", made_with)}
        old |= {key: there[key] for key in TRUE_OF_ALL_RUNS}
        new = {**made_with, **{key: self.about[key] for key in TRUE_OF_ALL_RUNS}}
        differing = [f"{key} {old.get(key)}" for key in {**old, **new} if old.get(key) != new.get(key)]
        if differing:
            raise ValueError(f"{self.path} has runs that were made with {', '.join(differing)}: name another --output")

    def has(self, method: str, seed: int) -> bool:
        """Whether a run is there."""
        return any(run["seed"] == seed for run in self.read()["methods"].get(method, {"runs": []})["runs"])

    def add(self, method: str, made_with: Mapping[str, Any], run: Mapping[str, Any]) -> None:
        """Add a run, or put it in the place of the same seed's: another process may have been faster.

        Raises:
            ValueError: if another process has added runs since that this one may not join; see `check`.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_suffix(".lock")):
            self._add(method, made_with, run)

    def _add(self, method: str, made_with: Mapping[str, Any], run: Mapping[str, Any]) -> None:
        self.check(method, made_with)
        summary = self.read()
        of_method = summary["methods"].setdefault(method, {"settings": dict(made_with), "runs": []})
        others = [one for one in of_method["runs"] if one["seed"] != run["seed"]]
        of_method["runs"] = sorted([*others, dict(run)], key=lambda one: one["seed"])
        _write(self.path, as_text(summary))


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Inside the context no other process goes on with the run in this folder; a killed one leaves it free.

    Raises:
        SystemExit: if another process is at it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "lock", timeout=0):
            yield
    except Timeout:
        sys.exit(f"{folder}: another process is at this run: let it end, or take other methods or seeds here")


def begun(folder: Path, made_with: Mapping[str, Any]) -> bool:
    """Whether a run has begun in a folder that can be gone on with; if not, it begins now.

    Raises:
        SystemExit: if it was begun with other settings.
    """
    kept = folder / "settings.json"
    if kept.exists():
        if json.loads(kept.read_text(encoding="utf-8")) != made_with:
            raise SystemExit(f"{folder} holds a run that was begun with other settings: delete it, or go on with those")
        return True
    folder.mkdir(parents=True, exist_ok=True)
    _write(kept, json.dumps(made_with))
    return False


def _write(path: Path, text: str) -> None:
    """In one step: killed at any time, what was there before is there, or the whole text."""
    written = path.with_suffix(f".{os.getpid()}")
    written.write_text(text, encoding="utf-8")
    os.replace(written, path)


def as_text(summary: Mapping[str, Any]) -> str:
    """JSON with every list and mapping of plain values on one line.

    >>> print(as_text({"runs": [{"seed": 0}], "shares": [0.5, 0.25]}), end="")
    {
     "runs": [
      { "seed": 0 }
     ],
     "shares": [ 0.5, 0.25 ]
    }
    """
    text = json.dumps(summary, indent=1, ensure_ascii=False)
    return _PLAIN.sub(lambda found: " ".join(line.strip() for line in found[0].splitlines()), text) + "\n"


_PLAIN = re.compile(r"[\[{]\n[^\[\]{}]*[\]}]")
