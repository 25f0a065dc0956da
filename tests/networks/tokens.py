"""What a second task makes of words that the first did not have: the table in docs/networks.md.

``python tests/networks/tokens.py --seeds 3`` prints a line for each network, way and seed. Texts have ten words, each
of which speaks for one of two classes; the two tasks have 120 words each, 40 of them in common, and a word says
something else in each.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from pathlib import Path

import torch
from torch.utils.data import TensorDataset

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from texts import LENGTH, Attending, Reader
from training import TASKS, trainer

from lightning_rnf import RelevanceFreezing
from lightning_rnf.streams import TaskDataModule

WORDS = 220
VOCABULARY = {"a": range(1, 121), "b": range(81, 201)}
"""Nobody has those from 201 on."""

NETWORKS = {"mean": (Reader, {"width": 8}), "attention": (Attending, {"width": 16})}
WAYS = {
    "default": {},
    "frozen": {"embeddings": "frozen"},
    "whole": {"units": ["!embedding", "!words", "!places"]},
    "naive": None,
    "fresh": None,
}
"""What the callback is told; None: there is none."""


def texts(task: str, samples: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(1000 * TASKS.index(task) + seed)
    words = torch.tensor(VOCABULARY[task])
    x = words[torch.randint(len(words), (samples, LENGTH), generator=generator)]
    weight = torch.randn(WORDS, generator=torch.Generator().manual_seed(TASKS.index(task)))
    return TensorDataset(x, (weight[x].sum(1) > 0).long())


def data(task: str, seed: int) -> TaskDataModule:
    sizes = (4000, 1000, 2000)
    return TaskDataModule(
        task, 2, *(texts(task, size, 10 * seed + part) for part, size in enumerate(sizes)), batch_size=64
    )


def accuracy(model, task: str, seed: int) -> float:
    x, y = data(task, seed).test.tensors
    model.heads.activate(task)
    model.eval()
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


def run(network: str, way: str, seed: int, epochs: int) -> str:
    kind, options = NETWORKS[network]
    torch.manual_seed(seed)
    model = kind(words=WORDS, lr=1e-2, **options)
    said_to = WAYS[way]
    if said_to is not None and "units" in said_to:
        said_to = {"units": [glob for glob in said_to["units"] if hasattr(model, glob[1:])]}
    rnf = None if said_to is None else RelevanceFreezing(**said_to)
    x = torch.randint(1, WORDS, (2000, LENGTH), generator=torch.Generator().manual_seed(99))
    said, of_first = [], torch.empty(0)
    for task in "ab" if way != "fresh" else "b":
        model.heads.activate(task)
        torch.manual_seed(seed + 7)
        trainer(*([rnf] if rnf else []), max_epochs=epochs).fit(model, datamodule=data(task, seed))
        if rnf is None:
            said.append(f"{task} {accuracy(model, task, seed):.3f}")
            continue
        with rnf.recall(task, model), torch.no_grad():
            said.append(f"{task} {accuracy(model, task, seed):.3f}")
            of_first = model(x) if task == "a" else of_first
    if rnf is None:
        return ", ".join(said) + (f", a after b {accuracy(model, 'a', seed):.3f}" if way == "naive" else "")
    with rnf.recall("a", model), torch.no_grad():
        said.append(
            f"a after b {accuracy(model, 'a', seed):.3f}, bit-equal for any words {torch.equal(model(x), of_first)}"
        )
    kept = rnf.state.tasks["a"].old_rows
    size = sum(one.values.nbytes + one.rows.nbytes for one in kept.values())
    left = {name: f"{share:.2f}" for name, share in rnf.weights_left().items()}
    return ", ".join(said) + f", kept {sum(len(one.rows) for one in kept.values())} rows ({size} bytes), free {left}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--ways", nargs="*", default=list(WAYS))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    for network in options.networks:
        for way in options.ways:
            for seed in range(options.seeds):
                print(f"{network}, {way}, seed {seed}: {run(network, way, seed, options.epochs)}", flush=True)


if __name__ == "__main__":
    main()
