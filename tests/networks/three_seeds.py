"""Seven of the networks of `table`, three seeds each, with no argument and told that there will be two tasks.

    pip install timm transformers torch_geometric
    PYTHONPATH=tests/networks python tests/networks/three_seeds.py --output tests/networks/three_seeds.json
    PYTHONPATH=tests/networks python tests/networks/three_seeds.py --output tests/networks/three_seeds.json \
        --docs docs/networks.md

One seed of the large table is off by some points either way. And with no argument a task leaves half of what is free
to those that may come: ``tasks=2`` says that the second is the last. What the file has already is not run again.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from table import row, versions

NETWORKS = ("MLP, batch norm before its ReLU", "LSTM", "GRU", "GCNConv", "BERT", "ELECTRA", "vit")
SEEDS = (0, 1, 2)
SAID = {"no argument": None, "tasks=2": 2}
HEADER = (
    "| network | fresh model | second task, no argument | second task, `tasks=2` | first task, no argument |\n"
    "| --- | --- | --- | --- | --- |"
)
START, END = "<!-- three seeds -->", "<!-- /three seeds -->"


def percent(values: list[float]) -> str:
    return f"{100 * mean(values):.1f} ± {100 * stdev(values):.1f}"


def as_row(name: str, runs: dict[str, dict[str, Any]]) -> str:
    """Args: runs: by what was said, by seed."""
    silent, told = (list(runs[said].values()) for said in SAID)
    columns = (
        [run["fresh"] for run in silent],
        [run["second"]["accuracy"] for run in silent],
        [run["second"]["accuracy"] for run in told],
        [run["first"]["accuracy"] for run in silent],
    )
    return f"| {name} | {' | '.join(map(percent, columns))} |"


def as_table(found: dict[str, Any]) -> str:
    return "\n".join((HEADER, *(as_row(name, found["networks"][name]) for name in NETWORKS)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--docs", type=Path, help="nothing is run, the table in this file is written anew")
    options = parser.parse_args()
    found = json.loads(options.output.read_text()) if options.output.exists() else {"networks": {}}
    if options.docs:
        before, _, rest = options.docs.read_text(encoding="utf-8").partition(START)
        text = f"{before}{START}\n\n{as_table(found)}\n\n{END}{rest.partition(END)[2]}"
        options.docs.write_text(text, encoding="utf-8")
        return
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning_rnf").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for seed in SEEDS:
        for name in NETWORKS:
            for said, tasks in SAID.items():
                runs = found["networks"].setdefault(name, {}).setdefault(said, {})
                if str(seed) in runs:
                    continue
                runs[str(seed)] = row(name, seed, tasks)
                found["versions"] = versions()
                options.output.write_text(json.dumps(found, indent=1) + "\n")
                print(name, seed, said, runs[str(seed)], file=sys.stderr, flush=True)
    print(as_table(found))


if __name__ == "__main__":
    main()
