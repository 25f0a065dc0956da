"""The `rnf` command."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lightning_rnf import __version__


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: None: those of the process.
    """
    parser = argparse.ArgumentParser(
        prog="rnf", description="Relevance-based Neural Freezing: keep old tasks while learning new ones."
    )
    parser.add_argument("--version", action="version", version=f"lightning-rnf {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo", help="five tasks of handwritten digits, naive fine-tuning beside relevance freezing; under a minute"
    )
    demo.add_argument("--output", type=Path, default=Path("retention.png"), help="the figure to write (%(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="of weights and batches (%(default)s)")
    options = parser.parse_args(arguments)

    from lightning_rnf.demo import run  # takes seconds to import: not for --help

    run(options.output, options.seed)
