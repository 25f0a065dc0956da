"""The examples' methods beside the peers that were run on the same streams: one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

OWN = ("naive", "separate", "default")
"""The examples' methods that are shown."""

Runs = Sequence[Mapping[str, Any]]


def compared(peers: Mapping[str, Any], summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """As Markdown: a line for each method of each stream that peers were run on.

    Args:
        peers: the content of ``peers_told_cpu.json``.
        summaries: contents of the examples' JSON files, by name; a stream that is none of these is called by its name.
    """
    of_streams: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for row in peers["rows"]:
        of_streams.setdefault(row["stream"], {}).setdefault(row["method"], []).append(row)
    lines = []
    for stream, theirs in of_streams.items():
        summary = summaries.get(stream, {"title": stream, "methods": {}})
        methods = summary["methods"]
        own = {name: methods[name]["runs"] for name in OWN if name in methods}
        lines.append(f"| **{summary['title']}** | | | | |")
        lines += [_line(f"Avalanche, {name}", runs) for name, runs in theirs.items()]
        lines += [_line(_called(name), runs) for name, runs in own.items()]
    head = "| method | average, % | forgetting, points | kept for a task, kB | seeds |"
    return "\n".join([head, "| --- | --- | --- | --- | --- |", *lines])


def mean_and_deviation(values: Sequence[float], digits: int = 2, *, signed: bool = False) -> str:
    """Mean, and with several values their standard deviation.

    >>> mean_and_deviation([97.5, 98.5])
    '98.00 ± 0.71'
    >>> mean_and_deviation([0.5], signed=True)
    '+0.50'
    """
    deviation = f" ± {torch.tensor(values, dtype=torch.float64).std().item():.{digits}f}" if len(values) > 1 else ""
    return f"{sum(values) / len(values):{'+' if signed else ''}.{digits}f}{deviation}"


def _called(method: str) -> str:
    return "**`RelevanceFreezing()`**" if method == "default" else f"Lightning, {method}"


def _line(name: str, runs: Runs) -> str:
    cells = [
        name,
        *(mean_and_deviation([100 * run[key] for run in runs]) for key in ("average", "forgetting")),
        f"{runs[0]['bytes'] / len(runs[0]['matrix']) / 1000:,.0f}" if "bytes" in runs[0] else "",
        ", ".join(str(run["seed"]) for run in runs) if len(runs) < 6 else f"{runs[0]['seed']} to {runs[-1]['seed']}",
    ]
    return f"| {' | '.join(cells)} |"
