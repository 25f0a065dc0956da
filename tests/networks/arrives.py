"""How much relevance arrives in networks that people have, and how much capacity one task leaves free.

    pip install timm transformers
    PYTHONPATH=tests/networks python tests/networks/arrives.py [name ...] [--importance lrp taylor ...] [--seeds 3]

For each architecture of `zoo` in a tiny form with random weights it prints

* *at zero biases*: the relevance at the network's input (of tokens: where they are embedded) per unit of it at the
  logits, with nothing added to the stream: 1 is right;
* *trained*: the same after one toy task with biases, which take their share; nothing else may;
* *free*: the share of units that the task leaves free at a tolerance of 0.02, for each importance and seed, and the
  accuracy of the sub-network.

Not collected by pytest. Takes about 20 s for each architecture, importance and seed on one core.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings

import lightning.pytorch as pl
import torch
import zoo
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_rnf import RelevanceFreezing
from lightning_rnf.anatomy.units import UnitMap
from lightning_rnf.relevance.attribution import attribute
from lightning_rnf.relevance.conservation import INPUT


class Module(pl.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def head_of(name: str) -> str | None:
    """Where the trace doesn't find it: logits that are picked by position."""
    return "*score" if name in {"Llama", "Qwen3", "GPT-2"} else None


def at_zero_biases(name: str) -> float:
    net, batch = zoo.without_biases(name)
    batch = (batch[0], net(batch[0]).argmax(1))  # logits that don't cancel
    units = UnitMap.of(net, batch, heads=head_of(name))
    return attribute(net, units.layers, [batch]).conservation.ratios[INPUT]


def learned(name: str, seed: int, epochs: int) -> tuple[Module, DataLoader, DataLoader]:
    """A network that has learned the toy task, the data that it was trained on and others."""
    pl.seed_everything(seed, verbose=False)
    module = Module(zoo.built(name, seed)).train()
    trained_on, others = (
        DataLoader(TensorDataset(*zoo.batch_of(name, samples, 10 * seed + part)), 32, shuffle=not part)
        for part, samples in enumerate((512, 256))
    )
    optimizer = torch.optim.AdamW(module.parameters(), 2e-3)
    for _ in range(epochs):
        for x, y in trained_on:
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(x), y).backward()
            optimizer.step()
    return module.eval(), trained_on, others


def kept(name: str, learned: tuple[Module, DataLoader, DataLoader], importance: str) -> tuple[float, float, float]:
    """What arrives, what is free, and the sub-network's accuracy."""
    module, trained_on, others = learned
    rnf = RelevanceFreezing(importance=importance, heads=head_of(name), ration=None, fit_data=trained_on)
    record = rnf.protect(module, others, name="toy")
    return record.conservation.get(INPUT, float("nan")), rnf.free_capacity, record.subnetwork_accuracy


def told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:90]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="architectures; none: all")
    parser.add_argument("--importance", nargs="*", default=["lrp"])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=6)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print("| network | at zero biases | trained | free (accuracy) |\n| --- | --- | --- | --- |", flush=True)
    for name in options.names or zoo.BUILD:
        start = time.perf_counter()
        try:
            arrives = f"{at_zero_biases(name):.3g}"
        except Exception as error:
            arrives = told(error)
        left, free = [], {importance: [] for importance in options.importance}
        for seed in range(options.seeds):
            module = learned(name, seed, options.epochs)
            for importance, shares in free.items():
                try:
                    at_input, share, accuracy = kept(name, module, importance)
                except Exception as error:
                    shares.append(told(error))
                    continue
                shares.append(f"{share:.2f} ({accuracy:.2f})")
                if importance == "lrp":
                    left.append(f"{at_input:.3g}")
        of_all = "; ".join(
            f"{importance} {', '.join(shares)}" if len(free) > 1 else ", ".join(shares)
            for importance, shares in free.items()
        )
        print(f"| {name} | {arrives} | {', '.join(left)} | {of_all} |", flush=True)
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
