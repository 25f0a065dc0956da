"""Tables and figures of all experiments, made from the JSON files that they have written.

    python examples/results.py                # examples/results/*.json: figures beside them, tables into the README
    python examples/results.py FOLDER         # of a folder of yours: figures beside the files, tables on the screen
    python examples/results.py --check        # exit with 1 if a page or a figure shows other results than the files

In the README, what stands between ``<!-- results:NAME -->`` and ``<!-- /results -->`` belongs to ``NAME.json``.
Between ``<!-- overview -->`` and ``<!-- /overview -->`` is a line for each, between ``<!-- costs -->`` and ``<!--
/costs -->`` what they took (`costs.py`), between ``<!-- peers -->`` and ``<!-- /peers -->`` what others' methods reach
on the same streams (`compared.py`). Numbers in sentences, there and on the project's other pages, are written and
checked, too: see `prose.py`.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import prose
import torch
from compared import compared, mean_and_deviation
from costs import costs
from images import from_text
from PIL import Image
from result_files import read
from torch import Tensor

from lightning_rnf import Drift, StreamResult, compare_heatmaps
from lightning_rnf.report.figures import retention

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OWN = Path(__file__).parent
ROOT = OWN.resolve().parent
COMPARED = ("naive", "paper", "exact", "default", "tuned")
_OVERVIEW = re.compile(r"(<!-- overview -->\n)(.*?)(<!-- /overview -->)", flags=re.DOTALL)
_COSTS = re.compile(r"(<!-- costs -->\n)(.*?)(<!-- /costs -->)", flags=re.DOTALL)
_PEERS = re.compile(r"(<!-- peers -->\n)(.*?)(<!-- /peers -->)", flags=re.DOTALL)
_BLOCK = re.compile(r"(<!-- results:(\S+) -->\n)(.*?)(<!-- /results -->)", flags=re.DOTALL)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=OWN / "results", help="with JSON files (%(default)s)")
    parser.add_argument("--readme", type=Path, help="with a block for each file; none given: the examples' own")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if other results are shown")
    options = parser.parse_args(arguments)
    is_own = options.folder.resolve() == OWN / "results"
    readme = options.readme or (OWN / "README.md" if is_own else None)
    paths = sorted(options.folder.glob("*.json"))
    try:
        summaries = {path.stem: read(path) for path in paths}
    except ValueError as error:
        sys.exit(str(error))
    if not summaries:
        parser.error(f"{options.folder} holds no JSON file")
    pictures = {
        file: (make, _fingerprint(file, summary, make.func))
        for name, summary in summaries.items()
        for file, make in figures(name, summary).items()
    }
    try:
        texts, sentences = _pages(readme, summaries, options.folder, is_own=is_own)
    except ValueError as error:
        sys.exit(str(error))
    stale = [file for file, (_, source) in pictures.items() if not _shows(options.folder / file, source)]
    if options.check:
        stale += [str(page) for page, text in texts.items() if page.read_text(encoding="utf-8") != text]
        shown = f"what {options.folder} holds is not shown by {', '.join(stale)}: run examples/results.py"
        if stale or sentences:
            sys.exit("\n".join([*map(str, sentences), *([shown] if stale else [])]))
        return
    for file, figure in {file: pictures[file][0]() for file in stale}.items():
        figure.savefig(options.folder / file, dpi=110, metadata={"Source": pictures[file][1]})
    for page, text in texts.items():
        page.write_text(text, encoding="utf-8")
    if readme is None:
        print("\n\n".join(table(summary) for summary in summaries.values()))
    for sentence in sentences:
        print(f"{'written, read it again' if sentence.is_mended else 'to be written by hand'}: {sentence}")
    if not all(sentence.is_mended for sentence in sentences):
        sys.exit(1)


def _pages(
    readme: Path | None, summaries: Mapping[str, Mapping[str, Any]], folder: Path, *, is_own: bool
) -> tuple[dict[Path, str], list[prose.Problem]]:
    """What the pages should be, and which of their sentences are not as they should be."""
    texts, problems = {}, []
    known = prose.names(summaries)
    for page in ([readme] if readme else []) + (
        [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))] if is_own else []
    ):
        text = page.read_text(encoding="utf-8")
        try:
            if page == readme:
                text = filled(text, summaries, folder.resolve().relative_to(page.parent.resolve()).as_posix())
                text = _COSTS.sub(lambda found: f"{found[1]}\n{costs(OWN, summaries)}\n\n{found[3]}", text)
                text = _PEERS.sub(lambda found: f"{found[1]}\n{_beside_peers(summaries)}\n\n{found[3]}", text)
            texts[page], wrong = prose.corrected(text, known, os.path.relpath(page), all_bound=page.name == "README.md")
        except ValueError as error:
            raise ValueError(f"{page}: {error}") from error
        problems += wrong
    return texts, problems


def _beside_peers(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    return compared(prose.recorded("peers_told_cpu"), summaries)


def filled(text: str, summaries: Mapping[str, Mapping[str, Any]], folder: str) -> str:
    """The text with the tables and figures of all results in their blocks.

    Args:
        text: Markdown with a block for each result; one without a result says so.
        summaries: contents of the JSON files, by name.
        folder: where the figures are, as a link in the text has it.

    Raises:
        ValueError: if a result has no block.
    """
    homeless = sorted(set(summaries) - {found[2] for found in _BLOCK.finditer(text)})
    if homeless:
        raise ValueError(f"no block for {', '.join(homeless)}: write <!-- results:NAME --> and <!-- /results -->")

    def fill(found: re.Match[str]) -> str:
        name = found[2]
        if name not in summaries:
            return f"{found[1]}\nNot run yet.\n\n{found[4]}"
        links = [f"![{caption(summaries[name])}]({folder}/{file})" for file in figures(name, summaries[name])]
        return found[1] + "\n" + "\n\n".join([table(summaries[name]), *links, found[4]])

    ran = [found[2] for found in _BLOCK.finditer(text) if found[2] in summaries]
    lines = overview([summary for summary in map(summaries.__getitem__, ran) if _is_stream(summary)])
    return _OVERVIEW.sub(lambda found: f"{found[1]}\n{lines}\n\n{found[3]}", _BLOCK.sub(fill, text))


def overview(summaries: Sequence[Mapping[str, Any]]) -> str:
    """Each experiment in a line: mean accuracies with their seeds, the goal, and the best published figure."""
    rows = []
    for summary in summaries:
        marks = [mark for mark, key in (("stand-in", "stand_in"), ("reduced", "reduced")) if summary[key]]
        marks += [f"run with {summary['run_with']}"] if summary["run_with"] else []
        marks += [summary["tested_on"]] if summary["tested_on"] != "test data" else []
        title = summary["title"] + f" ({', '.join(marks)})" * bool(marks)
        cells = [
            f"{mean_and_deviation([100 * run['average'] for run in runs])} ({_range([run['seed'] for run in runs])})"
            if runs
            else ""
            for runs in (summary["methods"].get(method, {}).get("runs") for method in COMPARED)
        ]
        goal = summary.get("goal")
        rows.append(
            f"| {' | '.join([title, *cells, '' if goal is None else str(goal), summary.get('published') or ''])} |"
        )
    titles = f"| average accuracy at the end, % (seeds) | {' | '.join(COMPARED)} | goal | best published |"
    return _ruled(titles, rows)


def caption(summary: Mapping[str, Any]) -> str:
    """What is shown: the title, and every way in which it is not the whole experiment on its own data."""
    parts = [summary["title"]]
    parts += [f"stand-in: {summary['stand_in']}"] if summary["stand_in"] else []
    runs = _runs(summary["methods"])
    altered = {f"{data} {how}": data for run in runs for data, how in run.get("data", {}).items()}
    parts += [
        said + " in some runs" * any(data not in run.get("data", {}) for run in runs)
        for said, data in sorted(altered.items())
    ]
    parts += [f"reduced: {summary['reduced']}"] if summary["reduced"] else []
    parts += [f"run with {summary['run_with']}"] if summary["run_with"] else []
    parts += [f"tested on {summary['tested_on']}"] if summary["tested_on"] != "test data" else []
    return "; ".join(parts)


def table(summary: Mapping[str, Any]) -> str:
    """Means and standard deviations over the seeds, with how they were made, as Markdown."""
    summary = {**summary, "methods": _in_order(summary["methods"])}
    methods = summary["methods"]
    parts = [f"**{caption(summary)}**", _overview(methods), _at_the_end(methods)]
    if _has("drift", methods):
        parts.append(_drift(methods))
    if _has("held_out", methods):
        parts.append(_held_out(methods))
    parts.append("\n".join(f"- {line}" for line in _made_with(summary)))
    return "\n\n".join(parts)


def figures(name: str, summary: Mapping[str, Any]) -> dict[str, partial[Figure]]:
    """What there is to draw of a result: functions that do, by the name of the file."""
    found: dict[str, partial[Figure]] = {}
    if len(_drawn(summary)) > 1:
        found[f"{name}.png"] = partial(_retention, summary)
    if _has("heatmaps", summary["methods"]):
        found[f"{name}_maps.png"] = partial(_heatmaps, summary)
    return found


def _fingerprint(file: str, summary: Mapping[str, Any], make: Callable[[Mapping[str, Any]], Figure]) -> str:
    """Of a figure's results, title and drawing code; the figure carries it, as the same gives other pixels elsewhere.

    The code is the project's own: another Matplotlib draws no other figure.
    """
    drawn_by = (make, _drawn, _left_out, _free, *map(inspect.getmodule, (retention, compare_heatmaps)))
    code = [inspect.getsource(part) for part in drawn_by if part is not None]
    said = [caption(summary), _seeds(summary["methods"])]
    return hashlib.sha256(json.dumps([file, summary, said, code]).encode()).hexdigest()


def _shows(figure: Path, source: str) -> bool:
    """Whether there is a whole figure, and of these results."""
    try:
        with Image.open(figure) as picture:
            picture.load()
            return picture.info.get("Source") == source
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # what Pillow says of no PNG
        return False


def matrix(run: Mapping[str, Any]) -> Tensor:
    """The accuracy matrix of a run: ``(tasks, tasks)``, NaN above the diagonal."""
    return torch.tensor([[float("nan") if entry is None else entry for entry in row] for row in run["matrix"]])


def _retention(summary: Mapping[str, Any]) -> Figure:
    """The paper's Figure 2: with several seeds, in bands of a standard deviation."""
    results = []
    for name in _drawn(summary):
        runs = summary["methods"][name]["runs"]
        results.append(StreamResult(name, runs[0]["tasks"], torch.stack([matrix(run) for run in runs]), _free(runs)))
    figure = retention(results, methods=[method for method in COMPARED if method != _left_out(summary)])
    figure.suptitle(f"{caption(summary)}; {_seeds(summary['methods'])}", fontsize=9, wrap=True)
    return figure


def _heatmaps(summary: Mapping[str, Any]) -> Figure:
    """The images of one seed with what was relevant in them, by each method."""
    first = {name: method["runs"][0] for name, method in summary["methods"].items() if "heatmaps" in method["runs"][0]}
    maps = {
        name: {when: from_text(of_images) for when, of_images in run["heatmaps"].items()} for name, run in first.items()
    }
    drifts = {name: [Drift(**drift) for drift in run["drift"]] for name, run in first.items()}
    run = next(iter(first.values()))
    figure = compare_heatmaps(from_text(run["images"]), maps, drifts)
    figure.suptitle(f"{caption(summary)}; 1 seed, drift over {run['images compared']} images", fontsize=9)
    return figure


def _overview(methods: Mapping[str, Any]) -> str:
    naive = {run["seed"]: run["average"] for run in methods.get("naive", {"runs": []})["runs"]}
    rows = []
    for name, method in methods.items():
        runs = method["runs"]
        over = [100 * (run["average"] - naive[run["seed"]]) for run in runs if run["seed"] in naive]
        row = {
            "method": name,
            "average, %": mean_and_deviation([100 * run["average"] for run in runs]),
            "over naive, same seeds": _over(over, len(runs)) if over and name != "naive" else "",
            "forgetting, points": mean_and_deviation([100 * run["forgetting"] for run in runs]),
            "task 1 at the end, %": mean_and_deviation([100 * run["matrix"][-1][0] for run in runs]),
            "free units after each task, %": ", ".join(f"{100 * share:.0f}" for share in _free(runs)) or "100",
            "seeds": f"{len(runs)} ({_range([run['seed'] for run in runs])})",
        }
        if not naive:
            del row["over naive, same seeds"]
        if _has("accuracy_told", methods):
            row["where the task is told, %"] = _mean_of("accuracy_told", runs)
            row["task found, %"] = _mean_of("tasks_found", runs)
        rows.append(row)
    return _ruled(f"| {' | '.join(rows[0])} |", [f"| {' | '.join(row.values())} |" for row in rows])


def _mean_of(key: str, runs: Sequence[Mapping[str, Any]]) -> str:
    """Of all tasks, at the end; empty for fine-tuning, which nobody asks for a task."""
    means = [100 * sum(run[key]) / len(run[key]) for run in runs if run.get(key)]
    return mean_and_deviation(means) if means else ""


def _over(differences: Sequence[float], runs: int) -> str:
    few = f" ({len(differences)} of {runs})" if len(differences) < runs else ""
    return mean_and_deviation(differences, signed=True) + few


def _at_the_end(methods: Mapping[str, Any]) -> str:
    names = next(iter(methods.values()))["runs"][0]["tasks"]
    rows = []
    for name, method in methods.items():
        last = [run["matrix"][-1] for run in method["runs"]]
        cells = [mean_and_deviation([100 * row[task] for row in last], 1) for task in range(len(names))]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return _ruled(f"| each task at the end, % | {' | '.join(names)} |", rows)


def _drift(methods: Mapping[str, Any]) -> str:
    rows = []
    for name, method in methods.items():
        last = [run["drift"][-1] for run in method["runs"] if "drift" in run]
        if not last:
            continue
        cosine = mean_and_deviation([drift["cosine"] for drift in last], 3)
        signs = mean_and_deviation([100 * drift["signs"] for drift in last], 1)
        rows.append(f"| {name} | {cosine} | {signs} |")
    return _ruled("| relevance of the first task's pixels, then and at the end | cosine | same sign, % |", rows)


def _held_out(methods: Mapping[str, Any]) -> str:
    rows = []
    for name, method in methods.items():
        found = [run["held_out"] for run in method["runs"] if "held_out" in run]
        if not found:
            continue
        cells = [mean_and_deviation([100 * shares[at] for shares in found]) for at in (0, -1)]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return _ruled("| first task on images that nothing was chosen by, % | at its end | at the end |", rows)


def _made_with(summary: Mapping[str, Any]) -> list[str]:
    methods = summary["methods"]
    settings = {name: _parts(method["settings"]) for name, method in methods.items()}
    first, *others = settings.values()
    common = {key: value for key, value in first.items() if all(key in one and one[key] == value for one in others)}
    lines = ["; ".join(filter(None, (_seeds(methods), _settings(common))))]
    for name, method in methods.items():
        own = {key: value for key, value in settings[name].items() if key not in common}
        accepted = [one for run in method["runs"] for one in run["accepted"]]
        said = [_callback(method["settings"]), _settings(own)]
        said.append(f"the criterion was met in {sum(accepted)} of {len(accepted)} tasks" if accepted else "")
        lines.append(f"{name}: {'; '.join(filter(None, said))}")
    devices = sorted({run["device"] for run in _runs(methods)})
    packages = sorted({f"{package} {number}" for run in _runs(methods) for package, number in run["versions"].items()})
    lines.append(", ".join([*devices, *packages]))
    lines += [f"how settings were chosen: {summary['tuning']}"] if summary["tuning"] else []
    return lines


def _parts(settings: Mapping[str, Any]) -> dict[tuple[str, str], Any]:
    """Settings that differ between methods or don't, each by the part that it stands in and its name."""
    found = {
        (part, key): value
        for part in ("stream", "network", "training")
        for key, value in (settings.get(part) or {}).items()
    }
    precision = settings.get("precision", "32-true")
    return {**found, **({("precision", precision): ""} if precision != "32-true" else {})}


def _settings(parts: Mapping[tuple[str, str], Any]) -> str:
    """As ``network: width 400; precision bf16-mixed``."""
    said = []
    for part in dict.fromkeys(part for part, _ in parts):
        values = ", ".join(f"{key} {value}".strip() for (of, key), value in parts.items() if of == part)
        said.append(f"{part} {values}" if part == "precision" else f"{part}: {values}")
    return "; ".join(said)


def _callback(settings: Mapping[str, Any]) -> str:
    for key, name in (("paper", "RelevanceFreezing.paper"), ("freezing", "RelevanceFreezing")):
        if key in settings:
            return f"`{name}({', '.join(f'{argument}={value!r}' for argument, value in settings[key].items())})`"
    return "a network for each task" if settings.get("separate") else "fine-tuning"


def _free(runs: Sequence[Mapping[str, Any]]) -> list[float]:
    """Share of free units after each task, mean over runs; nothing for a method that freezes none."""
    shares = torch.tensor([run["free_capacity"] for run in runs], dtype=torch.float64)
    return shares.mean(dim=0).tolist() if shares.numel() else []


def _seeds(methods: Mapping[str, Any]) -> str:
    """Those of all methods; each method's own, where they differ."""
    of = {name: _range([run["seed"] for run in method["runs"]]) for name, method in methods.items()}
    if len(set(of.values())) == 1:
        (seeds,) = set(of.values())
        return f"seed {seeds}" if seeds.isdigit() else f"seeds {seeds}"
    return f"seeds of {', '.join(f'{name}: {seeds}' for name, seeds in of.items())}"


def _range(seeds: Sequence[int]) -> str:
    """As ``0 to 19``, or ``0, 7``."""
    seeds = sorted(seeds)
    is_range = len(seeds) > 2 and seeds == list(range(seeds[0], seeds[-1] + 1))
    return f"{seeds[0]} to {seeds[-1]}" if is_range else ", ".join(map(str, seeds))


def _is_stream(summary: Mapping[str, Any]) -> bool:
    """Whether it is one that methods, or a goal, are compared on; not what compares something else."""
    return len(_drawn(summary)) > 1 or summary.get("goal") is not None


def _drawn(summary: Mapping[str, Any]) -> list[str]:
    return [method for method in COMPARED if method in summary["methods"] and method != _left_out(summary)]


def _left_out(summary: Mapping[str, Any]) -> str:
    """Figures have four methods, no more can be told apart: `default` takes the place of `exact` where it was run."""
    return "exact" if "default" in summary["methods"] else "default"


def _runs(methods: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [run for method in methods.values() for run in method["runs"]]


def _in_order(methods: Mapping[str, Any]) -> dict[str, Any]:
    """Those that are drawn first: a file has them as they were run."""
    return {name: methods[name] for name in (*COMPARED, *methods) if name in methods}


def _has(key: str, methods: Mapping[str, Any]) -> bool:
    return any(key in run for run in _runs(methods))


def _ruled(titles: str, rows: Sequence[str]) -> str:
    return "\n".join([titles, "|" + " --- |" * (titles.count("|") - 1), *rows])


if __name__ == "__main__":
    main()
