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

TRUE_OF_ALL_RUNS = ("stand_in", "reduced", "run_with", "tested_on", "tuning")
"""What a file says of its runs, beside title and methods; null, or a sentence."""
OF_EACH_RUN = ("seed", "device", "versions", "tasks", "matrix", "average", "forgetting", "free_capacity", "accepted")


def read(path: Path) -> dict[str, Any]:
    """What a file of results holds.

    Raises:
        ValueError: if it holds something else, naming the file and what is wrong.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): move it away") from error
    wrong = _what_is_wrong(content)
    if wrong:
        raise ValueError(f"{path} holds no results of an experiment: {wrong}; move it away")
    found: dict[str, Any] = content
    return found


def _what_is_wrong(content: Any) -> str | None:
    if not isinstance(content, dict):
        return f"it is a {type(content).__name__}"
    missing = [key for key in ("title", *TRUE_OF_ALL_RUNS, "methods") if key not in content]
    if missing:
        return f"it lacks {', '.join(missing)}"
    methods = content["methods"]
    if not isinstance(methods, dict) or not methods:
        return "it has no methods"
    tasks = None
    for name, method in methods.items():
        runs = method.get("runs") if isinstance(method, dict) else None
        if not isinstance(runs, list) or not runs or not isinstance(method.get("settings"), dict):
            return f"methods.{name} lacks settings or runs"
        for number, run in enumerate(runs):
            where = f"methods.{name}.runs[{number}]"
            missing = [key for key in OF_EACH_RUN if not isinstance(run, dict) or key not in run]
            if missing:
                return f"{where} lacks {', '.join(missing)}"
            tasks = run["tasks"] if tasks is None else tasks
            if run["tasks"] != tasks:
                return f"{where} has other tasks than the first run"
            rows = run["matrix"] if isinstance(run["matrix"], list) else []
            if [len(row) if isinstance(row, list) else 0 for row in rows] != [len(tasks)] * len(tasks):
                return f"{where}.matrix has not a row and a column for each of {len(tasks)} tasks"
    return None


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
            raise ValueError(
                f"{self.path} has runs of {method} that were made with {', '.join(differing)}: name another --output"
            )

    def has(self, method: str, seed: int) -> bool:
        """Whether a run is there."""
        return any(run["seed"] == seed for run in self.read()["methods"].get(method, {"runs": []})["runs"])

    def add(self, method: str, made_with: Mapping[str, Any], run: Mapping[str, Any]) -> None:
        """Add a run, or put it in the place of the same seed's: another process may have been faster."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_suffix(".lock")):
            self._add(method, made_with, run)

    def _add(self, method: str, made_with: Mapping[str, Any], run: Mapping[str, Any]) -> None:
        summary = self.read()
        of_method = summary["methods"].setdefault(method, {"settings": dict(made_with), "runs": []})
        others = [one for one in of_method["runs"] if one["seed"] != run["seed"]]
        of_method["runs"] = sorted([*others, dict(run)], key=lambda one: one["seed"])
        written = self.path.with_suffix(f".{os.getpid()}")
        written.write_text(as_text(summary), encoding="utf-8")
        os.replace(written, self.path)


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
    kept.write_text(json.dumps(made_with), encoding="utf-8")
    return False


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
