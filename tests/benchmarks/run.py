"""All benchmarks of this project by one command, into one JSON, one Markdown and a figure. No test: run it apart.

    PYTHONPATH=tests/support:examples python tests/benchmarks/run.py --accelerator cpu --output tests/benchmarks/results
    PYTHONPATH=tests/support:examples python tests/benchmarks/run.py --against main --parts task_end --accelerator cpu
    PYTHONPATH=tests/support:examples python tests/benchmarks/run.py \
        --networks resnet50 vgg16 vit_b_16 --precision bf16-mixed \
        --parts step --output tests/benchmarks/results

The files are ``suite_cpu.json``, ``suite_cpu.md`` and ``growth_cpu.png``, on a GPU ``suite_gpu…``, with the precision
in the name if it is another than float32. Parts that are in them already and don't run again stay, with what they were
made with. What is written into the folder of results is put into this folder's README, too. Peers are measured by
``peers.py``, in an environment of their own.

``--against`` names a second build, a git reference: the scripts of this work tree measure the package of either one, in
turns, each part in processes of its own. Tables of both and of the ratio are printed, and nothing is written.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from against import compared
from attribution import ATTRIBUTION
from benchmark import add_common, prepare, surroundings, write_json
from growth import GROWTH
from measured import NETWORKS
from state import STATE
from step import STEP
from task_end import TASK_END

PARTS = {part.name: part for part in (STEP, TASK_END, ATTRIBUTION, STATE, GROWTH)}
RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent / "README.md"


def report(content: dict[str, Any], figures: dict[str, str]) -> str:
    """As Markdown.

    Args:
        content: of the JSON.
        figures: file names by part.
    """
    made_with = {name: found.get("made_with", content) for name, found in content["parts"].items()}
    said = {name: (_device(one), _process(one)) for name, one in made_with.items()}
    common = [lines[0] for lines in zip(*said.values(), strict=True) if len(set(lines)) == 1]
    lines = "\n\n".join(common).split("\n") if common else []
    if content["quick"]:
        lines[:0] = ["A quick run, to see that it works: the numbers mean nothing.", ""]
    for name, found in content["parts"].items():
        part = PARTS[name]
        lines += ["", f"### {part.title}", ""]
        for line in said[name]:
            lines += [] if line in common else [line, ""]
        lines += [part.columns, "", part.table(found["rows"])]
        if name in figures:
            lines += ["", f"![{part.title}]({figures[name]})"]
    return "\n".join(lines).lstrip("\n") + "\n"


def _device(made_with: dict[str, Any]) -> str:
    versions = ", ".join(f"{package} {number}" for package, number in made_with["versions"].items())
    return f"{made_with['device']}, {made_with['precision']}, threads: {made_with['threads']}; {versions}."


def _process(made_with: dict[str, Any]) -> str:
    settings = ", ".join(f"{name}={value or 'not set'}" for name, value in made_with["malloc"].items())
    return f"Environment: {settings}. {made_with['malloc_reason']}"


def kept(path: Path, made_with: dict[str, Any]) -> dict[str, Any]:
    """The parts that a file has of runs of this kind, quick or not, each with what it was made with."""
    if not path.exists():
        return {}
    content = json.loads(path.read_text())
    if content["quick"] != made_with["quick"]:
        return {}
    of_file = {key: value for key, value in content.items() if key != "parts"}
    return {name: {"made_with": of_file, **found} for name, found in content["parts"].items()}


def filled(text: str, name: str, report: str) -> str:
    """The text with the report in its marked block.

    Raises:
        ValueError: if there is no such block.
    """
    start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    before, found, rest = text.partition(start)
    _, found_end, after = rest.partition(end)
    if not (found and found_end):
        raise ValueError(f"the README has no block from {start!r} to {end!r}: add it where the tables should stand")
    return f"{before}{start}\n{report.strip()}\n\n{end}{after}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common(parser)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="(all)")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, help="(as the parts say)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder (%(default)s)")
    parser.add_argument("--against", metavar="REFERENCE", help="of git: compare with its package, and write nothing")
    parser.add_argument("--rounds", type=int, default=3, help="of --against (%(default)s)")
    options = parser.parse_args(arguments)
    prepare(options)
    parts = [PARTS[part] for part in options.parts]
    given = ["--accelerator", options.accelerator, "--precision", options.precision]
    given += ["--quick"] if options.quick else []
    given += ["--default-malloc"] if options.default_malloc else []
    given += ["--networks", *options.networks] if options.networks else []
    if options.against:
        compared(parts, options.against, options.rounds, given)
        return
    made_with = {**surroundings(options.accelerator), "precision": options.precision, "quick": options.quick}
    kind = "cpu" if made_with["device"].startswith("CPU") else "gpu"
    suffix = kind if options.precision == "32-true" else f"{kind}_{options.precision}"
    name = f"suite_{suffix}"
    options.output.mkdir(parents=True, exist_ok=True)
    content = {**made_with, "parts": kept(options.output / f"{name}.json", made_with)}
    figures = {part.name: f"{part.name}_{suffix}.png" for part in PARTS.values() if part.draw is not None}
    for part in parts:
        found = part.run(part.options(given))
        content["parts"] |= {part.name: {"made_with": made_with, **found}}
        content["parts"] = {one: content["parts"][one] for one in PARTS if one in content["parts"]}
        if part.draw is not None:
            part.draw(found["rows"], options.output / figures[part.name])
        # After each part, so that a run that is stopped has not been for nothing.
        write_json(options.output / f"{name}.json", content)
        (options.output / f"{name}.md").write_text(report(content, figures), encoding="utf-8")
        print(f"{part.title}: {found['seconds_in_all']:.0f} s\n{part.table(found['rows'])}\n", flush=True)
    if not options.quick and options.output.resolve() == RESULTS.resolve():
        in_readme = {part: f"{RESULTS.name}/{figure}" for part, figure in figures.items()}
        text = filled(README.read_text(encoding="utf-8"), name, report(content, in_readme))
        README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
