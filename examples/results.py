"""Tables and figures of all experiments, made from the JSON files that they have written.

    python examples/results.py                # examples/results/*.json: figures beside them, tables into the README
    python examples/results.py FOLDER         # of a folder of yours: figures beside the files, tables on the screen
    python examples/results.py --check        # exit with 1 if the README does not show what the files hold

In the README, what stands between ``<!-- results:NAME -->`` and ``<!-- /results -->`` belongs to ``NAME.json``.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_rnf.figures import StreamResult, retention

OWN = Path(__file__).parent
DRAWN = ("naive", "paper", "exact", "best")
_BLOCK = re.compile(r"(<!-- results:(\S+) -->\n)(.*?)(<!-- /results -->)", flags=re.DOTALL)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=OWN / "results", help="with JSON files (%(default)s)")
    parser.add_argument("--readme", type=Path, help="with blocks for the tables; of the examples' own folder: theirs")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if anything would change")
    options = parser.parse_args(arguments)
    readme = options.readme or (OWN / "README.md" if options.folder == OWN / "results" else None)
    summaries = {
        path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(options.folder.glob("*.json"))
    }
    if not summaries:
        parser.error(f"{options.folder} has no JSON file")
    if not options.check:
        for name, summary in summaries.items():
            draw(summary, options.folder / f"{name}.png")
    if readme is None:
        print("\n\n".join(table(summary) for summary in summaries.values()))
        return
    before = readme.read_text(encoding="utf-8")
    try:
        after = filled(before, summaries, options.folder.relative_to(readme.parent).as_posix())
    except ValueError as error:
        sys.exit(f"{readme}: {error}")
    if options.check:
        missing = [
            name for name in summaries if drawn(summaries[name]) and not (options.folder / f"{name}.png").exists()
        ]
        if before != after or missing:
            sys.exit(f"{readme} or its figures are not what {options.folder} holds: run examples/results.py")
    else:
        readme.write_text(after, encoding="utf-8")


def filled(text: str, summaries: Mapping[str, Mapping[str, Any]], folder: str) -> str:
    """The text with the tables and figures of all results in their blocks.

    Args:
        text: Markdown with a block for each result.
        summaries: contents of the JSON files, by name.
        folder: where the figures are, as a link in the text has it.

    Raises:
        ValueError: if a block has no result, or a result no block.
    """
    blocks = [found[2] for found in _BLOCK.finditer(text)]
    without = sorted(set(blocks) ^ set(summaries))
    if without:
        raise ValueError(f"blocks and JSON files don't belong together: only one of the two for {', '.join(without)}")

    def fill(found: re.Match[str]) -> str:
        name = found[2]
        figure = f"\n![{caption(summaries[name])}]({folder}/{name}.png)\n" if drawn(summaries[name]) else ""
        return f"{found[1]}\n{table(summaries[name])}\n{figure}\n{found[4]}"

    return _BLOCK.sub(fill, text)


def caption(summary: Mapping[str, Any]) -> str:
    """What is shown: the title, and every way in which it is not the whole experiment on its own data."""
    parts = [summary["title"]]
    parts += [f"stand-in: {summary['stand_in']}"] if summary["stand_in"] else []
    parts += [f"reduced: {summary['reduced']}"] if summary["reduced"] else []
    parts += [] if summary["tested_on"] == "test data" else [f"tested on {summary['tested_on']}"]
    return "; ".join(parts)


def table(summary: Mapping[str, Any]) -> str:
    """Means and standard deviations over the seeds, with how they were made, as Markdown."""
    methods = {name: method for name, method in summary["methods"].items() if method["runs"]}
    parts = [f"**{caption(summary)}**", _overview(methods), _at_the_end(methods)]
    if any("drift" in run for method in methods.values() for run in method["runs"]):
        parts.append(_drift(methods))
    parts.append("\n".join(_made_with(summary, methods)))
    return "\n\n".join(parts)


def mean_and_deviation(values: Sequence[float], digits: int = 2) -> str:
    """Mean, and with several values their standard deviation.

    >>> mean_and_deviation([97.5, 98.5])
    '98.00 ± 0.71'
    """
    deviation = f" ± {torch.tensor(values, dtype=torch.float64).std().item():.{digits}f}" if len(values) > 1 else ""
    return f"{sum(values) / len(values):.{digits}f}{deviation}"


def drawn(summary: Mapping[str, Any]) -> list[StreamResult]:
    """What the figure shows of a result; nothing if none of the methods that are compared in figures was run."""
    results = []
    for name in DRAWN:
        runs = summary["methods"].get(name, {"runs": []})["runs"]
        if runs:
            free = torch.tensor([run["free_capacity"] for run in runs])
            shares = free.mean(dim=0).tolist() if free.numel() else []
            results.append(StreamResult(name, runs[0]["tasks"], torch.stack([matrix(run) for run in runs]), shares))
    return results


def draw(summary: Mapping[str, Any], path: Path) -> None:
    """The paper's Figure 2: with several seeds, in bands of a standard deviation."""
    results = drawn(summary)
    if results:
        figure = retention(results)
        seeds = {len(result.matrices) for result in results}
        number = f"{min(seeds)} to {max(seeds)} seeds" if len(seeds) > 1 else f"{max(seeds)} seeds"
        figure.suptitle(f"{caption(summary)}; {'1 seed' if seeds == {1} else number}", fontsize=9, wrap=True)
        figure.savefig(path, dpi=110)


def matrix(run: Mapping[str, Any]) -> Tensor:
    """The accuracy matrix of a run: ``(tasks, tasks)``, NaN above the diagonal."""
    return torch.tensor([[float("nan") if entry is None else entry for entry in row] for row in run["matrix"]])


def _overview(methods: Mapping[str, Any]) -> str:
    titles = (
        "method",
        "average, %",
        "forgetting, points",
        "task 1 at the end, %",
        "free units after each task, %",
        "seeds",
    )
    lines = [f"| {' | '.join(titles)} |"]
    for name, method in methods.items():
        runs = method["runs"]
        columns = [
            [100 * run["average"] for run in runs],
            [100 * run["forgetting"] for run in runs],
            [100 * run["matrix"][-1][0] for run in runs],
        ]
        free = torch.tensor([run["free_capacity"] for run in runs])
        shares = ", ".join(f"{100 * share:.0f}" for share in free.mean(dim=0).tolist()) if free.numel() else "100"
        lines.append(f"| {name} | {' | '.join(map(mean_and_deviation, columns))} | {shares} | {len(runs)} |")
    return _ruled(lines)


def _at_the_end(methods: Mapping[str, Any]) -> str:
    tasks = range(len(next(iter(methods.values()))["runs"][0]["tasks"]))
    lines = ["| each task at the end, % | " + " | ".join(str(task + 1) for task in tasks) + " |"]
    for name, method in methods.items():
        cells = [mean_and_deviation([100 * run["matrix"][-1][task] for run in method["runs"]], 1) for task in tasks]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return _ruled(lines)


def _drift(methods: Mapping[str, Any]) -> str:
    lines = ["| relevance of the pixels, at the first task's end and after all | cosine | same sign, % |"]
    for name, method in methods.items():
        last = [run["drift"][-1] for run in method["runs"]]
        cosine = mean_and_deviation([drift["cosine"] for drift in last], 3)
        signs = mean_and_deviation([100 * drift["signs"] for drift in last], 1)
        lines.append(f"| {name} | {cosine} | {signs} |")
    return _ruled(lines)


def _ruled(lines: list[str]) -> str:
    return "\n".join([lines[0], "|" + " --- |" * (lines[0].count("|") - 1), *lines[1:]])


def _made_with(summary: Mapping[str, Any], methods: Mapping[str, Any]) -> list[str]:
    runs = [run for method in methods.values() for run in method["runs"]]
    common = next(iter(methods.values()))["settings"]
    lines = [f"- All: {_settings(common)}."]
    for name, method in methods.items():
        made_with = method["settings"]
        changed = {
            part: {key: value for key, value in (made_with.get(part) or {}).items() if value != common[part].get(key)}
            for part in ("network", "training")
        }
        own = _settings(changed)
        lines.append(f"- {name}: {_callback(made_with)}{f'; {own}' if own else ''}.")
    devices = sorted({run["device"] for run in runs})
    packages = sorted({f"{name} {number}" for run in runs for name, number in run["versions"].items()})
    lines.append(f"- {', '.join(devices)}; {', '.join(packages)}.")
    if summary["tuning"]:
        lines.append(f"- How settings were chosen: {summary['tuning']}.")
    return lines


def _settings(made_with: Mapping[str, Any]) -> str:
    parts = [(part, made_with.get(part) or {}) for part in ("stream", "network", "training")]
    said = [f"{part} {_arguments(values, ' ')}" for part, values in parts if values]
    said += [f"{key} {made_with[key]}" for key in ("precision",) if made_with.get(key, "32-true") != "32-true"]
    return "; ".join(said)


def _callback(made_with: Mapping[str, Any]) -> str:
    if "paper" in made_with:
        return f"`RelevanceFreezing.paper({_arguments(made_with['paper'])})`"
    return f"`RelevanceFreezing({_arguments(made_with['freezing'])})`" if "freezing" in made_with else "fine-tuning"


def _arguments(values: Mapping[str, Any], sign: str = "=") -> str:
    return ", ".join(f"{key}{sign}{value!r}" if sign == "=" else f"{key}{sign}{value}" for key, value in values.items())


if __name__ == "__main__":
    main()
