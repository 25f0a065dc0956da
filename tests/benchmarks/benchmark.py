"""What benchmarks have in common: how one is described, run and written, alone or in the suite."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import allocator
import torch
from experiment import environment
from lightning.pytorch import Callback, Trainer

PROCESSES = int(os.environ.get("WORLD_SIZE", 1))

Rows = list[dict[str, Any]]

_NOT_OF_THE_RESULT = {"output", "default_malloc", "quick"}


@dataclass(frozen=True)
class Benchmark:
    """One kind of measurement.

    Attributes:
        name: in the JSON, and of files.
        title: over its table.
        columns: what they mean, for readers of the table.
        arguments: adds options of its own.
        quick: arguments of a run that only shows that it works.
        of_row: keys of what a row is about, which other runs have, too.
        once: arguments of one round of `run.py --against`, which makes rounds of its own.
        measure: options to rows, each a dict for the JSON.
        table: rows to Markdown.
        draw: rows to a figure in a file; None: there is none.
    """

    name: str
    title: str
    columns: str
    arguments: Callable[[argparse.ArgumentParser], object]
    quick: Sequence[str]
    of_row: Sequence[str]
    once: Sequence[str]
    measure: Callable[[argparse.Namespace], Rows]
    table: Callable[[Rows], str]
    draw: Callable[[Rows, Path], None] | None = None

    def options(self, arguments: Sequence[str], description: str | None = None) -> argparse.Namespace:
        """Parse; what ``arguments`` name counts in a quick run, too."""
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        add_common(parser)
        parser.add_argument("--batch-size", type=int, default=128, help="(%(default)s; None: of each network its own)")
        parser.add_argument("--output", type=Path, help="JSON; a figure comes beside it")
        self.arguments(parser)
        options = parser.parse_args(arguments)
        return parser.parse_args([*self.quick, *arguments]) if options.quick else options

    def run(self, options: argparse.Namespace) -> dict[str, Any]:
        """Measure: options, seconds and rows."""
        started = time.perf_counter()
        rows = self.measure(options)
        chosen = {key: value for key, value in vars(options).items() if key not in _NOT_OF_THE_RESULT}
        return {"options": chosen, "seconds_in_all": time.perf_counter() - started, "rows": rows}

    def main(self, description: str | None) -> None:
        """Run it alone: print the table, write JSON and figure."""
        options = self.options(sys.argv[1:], description)
        prepare(options)
        found = self.run(options)
        if os.environ.get("RANK", "0") != "0":
            return
        print(self.table(found["rows"]))
        if options.output:
            write_json(options.output, surroundings(options.accelerator) | found)
            if self.draw is not None:
                self.draw(found["rows"], options.output.with_suffix(".png"))


def add_common(parser: argparse.ArgumentParser) -> None:
    """Options of every run."""
    parser.add_argument("--quick", action="store_true", help="only to see that it works")
    parser.add_argument("--accelerator", default="auto", help="of the Trainer: cpu, gpu (%(default)s)")
    parser.add_argument("--precision", default="32-true", help="of the Trainer: bf16-mixed, … (%(default)s)")
    parser.add_argument("--default-malloc", action="store_true", help="leave the environment of the process alone")


def add_data(
    parser: argparse.ArgumentParser, samples: int | None, reference: int | None, attributed: int | None
) -> None:
    """Options of runs that end tasks, with these defaults; None: each network has its own (`SIZES`)."""
    parser.add_argument("--samples", type=int, default=samples, help="trained on in an epoch (%(default)s)")
    parser.add_argument("--reference", type=int, default=reference, help="samples for accuracy (%(default)s)")
    parser.add_argument("--attributed", type=int, default=attributed, help="of them for relevance (%(default)s)")


def prepare(options: argparse.Namespace) -> None:
    """Start again in the environment that times are comparable in, and say nothing but results."""
    if not options.default_malloc:
        allocator.restart_with_settings()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def trainer(options: argparse.Namespace, callbacks: Sequence[Callback], **changes: Any) -> Trainer:
    """For one epoch, without all that is not measured."""
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    of_run = {"accelerator": options.accelerator, "precision": options.precision, "devices": 1, "max_epochs": 1}
    return Trainer(callbacks=list(callbacks), **of_run | quiet | changes)


def surroundings(accelerator: str) -> dict[str, Any]:
    """Versions, device, and the process."""
    process = {"processes": PROCESSES, "threads": torch.get_num_threads(), "malloc": allocator.settings()}
    return {**environment(accelerator), **process, "malloc_reason": allocator.REASON}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """As the other results are."""
    path.write_text(json.dumps(content, indent=1) + "\n")


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def spread(values: Sequence[float], digits: int = 2) -> str:
    """``"1.01 (0.98 to 1.02)"``: the median, the least, the most."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"
