"""Two tasks in each network of `specimens`, with no argument: what runs, what is free, what the second task reaches.

    pip install timm transformers peft torch_geometric
    PYTHONPATH=tests/networks python tests/networks/table.py [name ...] --output tests/networks/two_tasks.json
    PYTHONPATH=tests/networks python tests/networks/table.py --docs docs/networks.md \
        --output tests/networks/two_tasks.json

A network that the file has already is not run again, so a run that was stopped goes on. Each is trained on the first
task and on the second with one `RelevanceFreezing()`, and, for comparison, a network from the same weights on the
second task alone. A row says

* *free*: the share of weights that may still move after the first task, and after both;
* *second, fresh*: accuracy in the second task, of its sub-network in recall and of the network that learned it alone
  (of numbers the share of the variance that is explained; of pixels, tokens and labels the share of them);
* *recall*: are the first task's logits, of its test data, the same bits after the second task;
* *export*: does a module of its own say what recall says, to 1e-5 of the largest logit.

Not collected by pytest; `tests/across/test_two_tasks.py` runs what is plain torch.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import platform
import signal
import sys
import time
import traceback
import warnings
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import specimens
import torch
from specimens import TASKS, Specimen
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_rnf import MultiHead, RelevanceFreezing

PACKAGES = ("torch", "lightning", "zennit", "timm", "transformers", "peft", "torchvision", "torch_geometric")
PARTS = {"train": 384, "validation": 192, "test": 256}
"""How many samples: of what is trained on, of reference data, of test data."""
EPOCHS, BATCH, RATE = 20, 32, 2e-3
HEADER = "| network | free | first | second, fresh | recall | export |\n| --- | --- | --- | --- | --- | --- |"
START, END = "<!-- two tasks -->", "<!-- /two tasks -->"
MOST_TOLD = 150
"""Of a refusal, in letters: the file has all of it."""
LARGE = ("timm", "torchvision")
"""Families whose networks take a core minutes: a third of the epochs on two thirds of the data."""


class Module(pl.LightningModule):
    """Of somebody who has a network and a loss."""

    def __init__(self, net: nn.Module, loss: Any) -> None:
        super().__init__()
        self.net, self.loss = net, loss

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any) -> Tensor:
        return self.loss(self(batch[0]), batch[1])

    def validation_step(self, batch: Any) -> None:
        self.log("loss", self.loss(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([one for one in self.parameters() if one.requires_grad], RATE)


def with_heads(specimen: Specimen, seed: int) -> Module:
    """The network, a `MultiHead` in the place of its last layer."""
    torch.manual_seed(seed)
    net = specimen.build()
    place, head = [
        (name, layer)
        for name, layer in net.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d, nn.Conv1d)) and layer.weight.shape[0] == specimen.outputs
    ][-1]
    second = copy.deepcopy(head)
    second.weight = nn.Parameter(torch.empty_like(second.weight))  # of its own, where the first is tied
    second.reset_parameters()
    heads = MultiHead(head.weight.shape[1], {"first": head, "second": second})
    above, _, own = place.rpartition(".")
    parent = net.get_submodule(above)
    if isinstance(parent, nn.Sequential):
        parent[int(own)] = heads
    else:
        setattr(parent, own, heads)
    return Module(net, specimen.loss)


def loader(specimen: Specimen, task: str, part: str, seed: int) -> DataLoader:
    samples = PARTS[part] * 2 // 3 if specimen.family in LARGE else PARTS[part]
    x, y = specimen.data(task, samples, 10 * seed + list(PARTS).index(part))
    return DataLoader(TensorDataset(x, y), BATCH, shuffle=part == "train")


def fitted(module: Module, specimen: Specimen, task: str, seed: int, *callbacks: pl.Callback) -> None:
    next(part for part in module.modules() if isinstance(part, MultiHead)).activate(task)
    torch.manual_seed(seed)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    epochs = max(2, EPOCHS // 3) if specimen.family in LARGE else EPOCHS
    trainer = pl.Trainer(max_epochs=epochs, accelerator="cpu", logger=False, callbacks=list(callbacks), **quiet)
    trainer.fit(module, *(loader(specimen, task, part, seed) for part in ("train", "validation")))


@torch.no_grad()
def logits(module: nn.Module, specimen: Specimen, task: str, seed: int) -> tuple[Tensor, Tensor]:
    module.eval()
    said = [(module(x), y) for x, y in loader(specimen, task, "test", seed)]
    return torch.cat([one for one, _ in said]), torch.cat([one for _, one in said])


def accuracy(said: Tensor, target: Tensor) -> float:
    if target.is_floating_point() and bool(((target == 0) | (target == 1)).all()):
        return float(((said > 0) == target.bool()).float().mean())
    if target.is_floating_point():
        return 1 - float(((said - target) ** 2).sum() / ((target - target.mean(0)) ** 2).sum())
    return float((said.argmax(-1 if said.ndim == 3 else 1) == target).float().mean())


def told(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:800]}"


def row(name: str, seed: int = 0, tasks: int | None = None) -> dict[str, Any]:
    """What became of a network: see the module's docstring; ``tasks``: how many the callback is told there will be."""
    specimen = specimens.ALL[name]
    about: dict[str, Any] = {"family": specimen.family}
    start, rnf, module = time.perf_counter(), RelevanceFreezing(tasks=tasks), with_heads(specimen, seed)
    about["parameters"] = sum(parameter.numel() for parameter in module.net.parameters())
    said = {}
    for task in TASKS:
        rnf.task = task
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                fitted(module, specimen, task, seed, rnf)
        except Exception as error:
            if task in rnf.state.tasks or not isinstance(error, (ValueError, TypeError)):
                about["crashed"] = f"{task} task: {told(error)}"
                about["where"] = traceback.format_exc(limit=-3)
            else:
                about["refused"] = f"{task} task: {told(error)}"
            return about
        about.setdefault("warned", []).extend(
            sorted(
                {" ".join(str(one.message).split())[:300] for one in caught if one.filename.find("lightning_rnf") >= 0}
            )
        )
        record = rnf.state.tasks[task]
        with rnf.recall(task, module):
            said[task], target = logits(module, specimen, task, seed)
        about[task] = {
            "accuracy": accuracy(said[task], target),
            "free_units": rnf.free_capacity,
            "free_weights": rnf.free_weights,
            "accepted": record.accepted,
        }
    with rnf.recall("first", module):
        again, _ = logits(module, specimen, "first", seed)
    about["recall"] = torch.equal(again, said["first"]) and rnf.report(module).is_sound
    about["export"] = exported(rnf, module, specimen, seed, said["first"])
    alone = with_heads(specimen, seed)
    fitted(alone, specimen, "second", seed)
    about["fresh"] = accuracy(*logits(alone, specimen, "second", seed))
    about["seconds"] = round(time.perf_counter() - start)
    return about


def exported(rnf: RelevanceFreezing, module: Module, specimen: Specimen, seed: int, recalled: Tensor) -> str:
    x = specimen.data("first", 8, seed)[0]
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            small = rnf.export(module, "first", example=(x,))
            said, _ = logits(small, specimen, "first", seed)
    except Exception as error:
        return told(error)
    apart = float((said - recalled).abs().max() / recalled.abs().max())
    if apart > 1e-5:
        return f"differs by {apart:.1g}"
    whole = sum(one.numel() for one in module.parameters())
    share = sum(one.numel() for one in small.parameters()) / whole
    return f"{share:.2f}" + (" (zeros)" if any("zeros" in str(one.message) for one in caught) else "")


@contextmanager
def at_most(seconds: int) -> Any:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"not ended in {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def as_row(name: str, about: dict[str, Any]) -> str:
    if "second" not in about:
        why = about.get("refused") or about.get("crashed", "")
        return f"| {name} | {why if len(why) < MOST_TOLD else why[:MOST_TOLD] + '…'} | | | | |"
    first, second = about["first"], about["second"]
    return (
        f"| {name} | {first['free_weights']:.2f}, {second['free_weights']:.2f} | {first['accuracy']:.2f} | "
        f"{second['accuracy']:.2f}, {about['fresh']:.2f} | {'bit-equal' if about['recall'] else 'CHANGED'} | "
        f"{about['export']} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="networks; none: all")
    parser.add_argument("--output", type=Path, default=Path("two_tasks.json"))
    parser.add_argument("--again", action="store_true", help="run those that the file has, too")
    parser.add_argument("--family", nargs="*", help="only those of these packages")
    parser.add_argument("--docs", type=Path, help="nothing is run, the table in this file is written anew")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning_rnf").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = json.loads(options.output.read_text()) if options.output.exists() else {"networks": {}}
    names = options.names or [
        name for name, one in specimens.ALL.items() if not options.family or one.family in options.family
    ]
    for name in () if options.docs else names:
        if name in found["networks"] and not options.again:
            continue
        try:
            with at_most(600):
                found["networks"][name] = row(name)
        except Exception as error:
            found["networks"][name] = {"crashed": told(error), "where": traceback.format_exc(limit=-4)}
        found["versions"] = versions()
        options.output.write_text(json.dumps(found, indent=1) + "\n")
        print(as_row(name, found["networks"][name]), file=sys.stderr, flush=True)
    rows = [as_row(name, found["networks"][name]) for name in specimens.ALL if name in found["networks"]]
    lines = "\n".join((HEADER, *rows))
    if options.docs:
        text = options.docs.read_text(encoding="utf-8")
        before, _, rest = text.partition(START)
        options.docs.write_text(f"{before}{START}\n\n{lines}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    else:
        print(lines)


if __name__ == "__main__":
    main()
