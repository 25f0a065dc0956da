"""What the experiments cost, and which of their runs are missing: a line for each file of settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import settings as yaml_settings

WAYS = {"-class": "--scenario class"}
"""Ends of a result's name, and the option that it was made with."""


def costs(folder: Path, summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """As Markdown: the command, minutes of a run by method, hours of all recorded runs, and what has not been run.

    Args:
        folder: with the scripts and their settings.
        summaries: contents of the JSON files, by name.
    """
    scripts = {path.stem for path in folder.glob("*.py")}
    rows = []
    for path in sorted(folder.glob("*.yaml")):
        script = max((one for one in scripts if path.stem.startswith(one)), key=len)
        given = "" if script == path.stem else f" --settings {path.name}"
        found = {end: summaries[path.stem + end] for end in ("", *WAYS) if path.stem + end in summaries}
        for end, summary in (found or {"": {"methods": {}}}).items():
            command = " ".join(filter(None, [f"{script}.py{given}", WAYS.get(end)]))
            methods = {name: method["runs"] for name, method in summary["methods"].items()}
            missing = [] if end else _missing(yaml_settings.read(path), methods)
            rows.append(f"| `{command}` | {_minutes(methods)} | {_hours(methods)} | {'; '.join(missing)} |")
    titles = "| command | minutes of a run | hours of all runs | not run |"
    return "\n".join([titles, "| --- | --- | --- | --- |", *rows])


def _minutes(methods: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The median of each method; of the least and the most where there are many methods."""
    timed = {name: [run["seconds"] / 60 for run in runs if run["seconds"]] for name, runs in methods.items()}
    medians = {name: median(minutes) for name, minutes in timed.items() if minutes}
    if len(medians) > 3:
        shown = sorted(medians, key=medians.__getitem__)
        medians = {name: medians[name] for name in (shown[0], shown[-1])}
    return ", ".join(f"{name} {minutes:.{int(minutes < 10)}f}" for name, minutes in medians.items())


def _hours(methods: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    seconds = [run["seconds"] for runs in methods.values() for run in runs]
    if not seconds:
        return ""
    untimed = f" ({seconds.count(None)} of {len(seconds)} not timed)" if None in seconds else ""
    return f"{sum(filter(None, seconds)) / 3600:.1f}{untimed}"


def _missing(settings: Mapping[str, Any], methods: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """As ``paper, default: all``, or ``tuned: 2 of 5``: methods alike together."""
    wanted = settings.get("seeds") or 1
    found: dict[str, list[str]] = {}
    for name in settings["methods"]:
        lacks = wanted - len(methods.get(name, ()))
        if lacks > 0:
            found.setdefault("all" if lacks == wanted else f"{lacks} of {wanted} seeds", []).append(name)
    if list(found) == ["all"] and len(found["all"]) == len(settings["methods"]):
        return ["all"]
    return [f"{', '.join(names)}: {lacks}" for lacks, names in found.items()]
