"""The package of this work tree and that of another git reference, measured in turns by the same scripts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from benchmark import Benchmark, Rows, markdown, spread

BENCHMARKS = Path(__file__).parent
ROOT = BENCHMARKS.parents[1]
HERE = "here"

Numbers = dict[tuple[str, str], float]
"""By a row's name and a number's."""


@contextmanager
def work_tree(reference: str) -> Iterator[Path]:
    """A work tree of its own, of this git reference, which is gone afterwards.

    Raises:
        subprocess.CalledProcessError: if git has no such reference.
    """
    git = ["git", "-C", str(ROOT), "worktree"]
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        subprocess.run([*git, "add", "--quiet", "--detach", tree, reference], check=True)
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", tree], check=True)


def python(tree: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run it with the package of a tree; all else is of this one: what measures has to be the same."""
    path = os.pathsep.join(map(str, (tree, ROOT / "tests" / "support", ROOT / "examples")))
    environment = os.environ | {"PYTHONPATH": path}
    return subprocess.run([sys.executable, *command], env=environment, cwd=BENCHMARKS, capture_output=True, text=True)


def check_package(tree: Path) -> None:
    """Check that processes get the tree's package, and not one that is installed.

    Raises:
        RuntimeError: if not.
    """
    asked = "from importlib.util import find_spec; print(getattr(find_spec('lightning_rnf'), 'origin', None))"
    origin = python(tree, "-c", asked).stdout.strip()
    if Path(origin) != tree / "lightning_rnf" / "__init__.py":
        raise RuntimeError(f"a process that should have the package of {tree} has that of {origin}")


def measured(
    part: Benchmark, trees: dict[str, Path], rounds: int, arguments: Sequence[str]
) -> dict[str, list[Numbers]] | str:
    """What a part has found with each tree, by rounds, every other one the other way round.

    Or why it can't be run with one that is not this one.

    Raises:
        RuntimeError: if it fails with this one.
    """
    found: dict[str, list[Numbers]] = {build: [] for build in trees}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "found.json"
        script = [str(BENCHMARKS / f"{part.name}.py"), *part.once, *arguments, "--output", str(output)]
        for number in range(rounds):
            for build in reversed(trees) if number % 2 else trees:
                print(f"{part.name}, round {number + 1} of {rounds}: {build}", file=sys.stderr, flush=True)
                ended = python(trees[build], *script)
                if ended.returncode and build == HERE:
                    raise RuntimeError(f"{part.name} fails:\n{ended.stderr}")
                if ended.returncode:
                    return (ended.stderr.strip() or f"exit code {ended.returncode}").splitlines()[-1]
                found[build].append(numbers(json.loads(output.read_text())["rows"], part.of_row))
    return found


def numbers(rows: Rows, of_row: Sequence[str]) -> Numbers:
    """Medians of all numbers of rows that have the same name.

    Args:
        rows: of a benchmark.
        of_row: the keys that name one.
    """
    found: dict[tuple[str, str], list[float]] = {}

    def add(row: str, number: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, part in value.items():
                add(row, f"{number}, {key}", part)
        elif isinstance(value, list):
            for one in value:
                add(row, number, one)
        elif isinstance(value, int | float):
            found.setdefault((row, number), []).append(value)

    for row in rows:
        name = ", ".join(f"{key} {row[key]}" if isinstance(row[key], int) else row[key] for key in of_row if key in row)
        for key in row.keys() - {*of_row, "seed"}:
            add(name, key, row[key])
    return {key: median(values) for key, values in found.items()}


def table(reference: str, found: dict[str, list[Numbers]]) -> str:
    """Both builds' numbers and the ratio of each round: the median of the rounds (the least to the most).

    Numbers that are the same in all rounds of both are left out, and so are those that only one of them has.
    """
    theirs, ours = found[reference], found[HERE]
    shared = [key for key in sorted(ours[0]) if all(key in one for one in (*theirs, *ours))]
    moved = [key for key in shared if len({one[key] for one in (*theirs, *ours)}) > 1]

    if not moved:
        return "All numbers are the same."

    def digits(values: Sequence[float]) -> int:
        return 0 if median(values) >= 1000 else 3

    def cells(key: tuple[str, str]) -> list[str]:
        sides = [[one[key] for one in side] for side in (theirs, ours)]
        ratios = [new / old for old, new in zip(*sides, strict=True)] if all(sides[0]) else []
        return [*key, *(spread(side, digits(side)) for side in sides), spread(ratios) if ratios else "–"]

    return markdown(["of", "number", reference, HERE, f"{HERE} / {reference}"], map(cells, moved))


def compared(parts: Sequence[Benchmark], reference: str, rounds: int, arguments: Sequence[str]) -> None:
    """Print a table for each part.

    Args:
        parts: to be measured, each in processes of its own.
        reference: what git calls the other build.
        rounds: how often, with each build.
        arguments: of each part.
    """
    with work_tree(reference) as tree:
        trees = {reference: tree, HERE: ROOT}
        for one in trees.values():
            check_package(one)
        for part in parts:
            found = measured(part, trees, rounds, arguments)
            said = f"{reference} can't run it: {found}" if isinstance(found, str) else table(reference, found)
            print(f"### {part.title}\n\n{said}\n", flush=True)
