"""What test_ddp runs in several processes, and in one: ``processes.py folder``, started by ``launched``."""

from __future__ import annotations

import copy
import os
import sys
import time
import warnings
from functools import cache
from pathlib import Path
from unittest import mock

import lightning.pytorch as pl
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchmetrics.classification import MulticlassAUROC
from training import Classifier, ConvClassifier, clusters, frozen_entries, loader, task_data, trainer

from lightning_rnf import RelevanceFreezing
from lightning_rnf.recall.norms import recalibrated
from lightning_rnf.runtime.ranks import Ranks
from lightning_rnf.search.criteria import AccuracyDrop, ComputeBudget, MetricDrop
from lightning_rnf.streams import TaskDataModule
from lightning_rnf.tasks.candidates import Subnetworks

WORLD = int(os.environ.get("WORLD_SIZE", 1))
RANK = int(os.environ.get("RANK", 0))


class Apart(pl.Callback):
    """Running statistics that differ by rank, as training leaves them; those of rank 0 are right."""

    def on_train_end(self, trainer, pl_module):
        for norm in pl_module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.running_mean += RANK
                norm.running_var += RANK


def fit(model, rnf, task="a", *callbacks, **options):
    model.heads.activate(task)
    strategy = {"strategy": "ddp", "devices": WORLD} if WORLD > 1 else {}
    trainer(*callbacks, rnf, **{"max_epochs": 1, **strategy, **options}).fit(model, datamodule=task_data(task))


def trained(model_type=ConvClassifier):
    """The same weights in any number of processes, and a fit that leaves them as they are."""
    torch.manual_seed(0)
    return copy.deepcopy(_trained(model_type))


@cache
def _trained(model_type):
    model = model_type(optimizer=torch.optim.SGD, lr=0.0)
    model.heads.activate("a")
    x, y = clusters("a", 320).tensors
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0  # what one process sees in training is not what several see
    return model


class ByHand(pl.Callback):
    """Ends the task in the middle of a fit."""

    def __init__(self, rnf):
        self.rnf = rnf

    def on_train_epoch_end(self, trainer, pl_module):
        try:
            self.rnf.end_task()
        except ValueError as error:
            self.sentence = str(error)


class Stream(IterableDataset):
    """All of a data set, or every ``step``-th sample from a start."""

    def __init__(self, samples, start=0, step=1):
        self.data, self.start, self.step = clusters("a", samples), start, step

    def __iter__(self):
        return (self.data[i] for i in range(self.start, len(self.data), self.step))


def small(samples, batch_size=8):
    return DataLoader(clusters("a", samples), batch_size)


def by_weight_and_data(module, layers, batches, predict):
    """An importance that is no sum over batches."""
    mean = torch.cat([x for x, _ in batches]).mean(0).abs().sum().double()
    return {
        layer.name: module.get_parameter(f"{layer.name}.weight").detach().flatten(1).norm(dim=1).double() * mean
        for layer in layers
    }


def as_often_as_it_says(module, batch):
    """Leaves samples out and repeats others: no batch has as many targets as samples."""
    x, y = batch
    often = (3 * x[:, 0].abs()).long()
    return module(x).repeat_interleave(often, 0), y.repeat_interleave(often)


SAME = {
    "many": {"criterion": 0.05},
    "odd": {"criterion": 0.05, "reference": small(77), "attribution_samples": 43},
    "seven": {"criterion": 0.2, "reference": small(7, 2), "attribution_samples": 5},
    "one batch": {"criterion": 0.2, "reference": small(7)},
    "two samples": {"criterion": 0.5, "reference": small(2, 1)},
    "stream": {"criterion": 0.1, "reference": DataLoader(Stream(100), 8), "attribution_samples": 40},
    "targets": {
        "criterion": 0.02,
        "reference": small(77),
        "predict": as_often_as_it_says,
        "heads": "heads.tasks.*",
    },
    "sampler": {"criterion": 0.1, "reference": DataLoader(clusters("a", 100), 8, sampler=range(60, 0, -1))},
    "metric": {
        "criterion": MetricDrop(MulticlassAUROC(num_classes=2), 0.02) & AccuracyDrop(0.1),
        "reference": small(77),
    },
    "few for a metric": {"criterion": MetricDrop(MulticlassAUROC(num_classes=2), 0.2), "reference": small(16, 16)},
    "budget": {"criterion": ComputeBudget(0.5), "reference": small(77)},
    "taylor": {"criterion": 0.1, "importance": "taylor"},
    "random": {"criterion": 0.1, "importance": "random"},
    "own": {"criterion": 0.1, "importance": by_weight_and_data, "reference": small(77)},
    "ration": {"criterion": 0.1, "ration": 0.3, "search": "linear", "resolution": 20, "recalibrate_norm": False},
}


IN_THREE = ("odd", "seven", "one batch", "stream", "targets")
IN_TWO = tuple(name for name in SAME if name not in IN_THREE)


def records(names=tuple(SAME)):
    """One record by name of what was tried, all made with the same weights."""
    found = {}
    for name in names:
        options = SAME[name]
        model, rnf = trained(), RelevanceFreezing(**options)
        before = {key: value.clone() for key, value in model.state_dict().items() if "num_batches" not in key}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            seed_everything(3, verbose=False)
            fit(model, rnf, "a", Apart())
        record, after = rnf.state_dict()["tasks"][0], model.state_dict()
        for key in before.keys() - set(record["head_parameters"]):
            expected = before[key] + RANK if "running" in key else before[key]
            assert torch.equal(after[key], expected), (name, key)
        record["fitted"] = {key: after[key].clone() for key in record["head_parameters"]}
        record["warned"] = [str(one.message) for one in caught if "can't be indexed" in str(one.message)]
        found[name] = record
    return found


def recovered():
    """A task whose rows are fitted to its sub-network before a recovery in which nothing moves: what it is then."""
    model, rnf = trained(), RelevanceFreezing(criterion=0.1)
    seed_everything(3, verbose=False)
    with mock.patch.object(Subnetworks, "_gains", return_value=True):
        fit(model, rnf, "a", max_epochs=2)
    record = rnf.state.tasks["a"]
    assert record.recovery
    return {
        "weights": {name: value.detach().clone() for name, value in model.named_parameters()},
        "evaluations": [one.score.accuracy for one in (*record.evaluations, *record.recovery)],
        "moved": not torch.equal(model.body[7].weight, trained().body[7].weight),
    }


class Kinds(Classifier):
    """Signs of six numbers as tokens, read by attention, by an LSTM, and by a layer that runs twice."""

    def __init__(self, **options):
        super().__init__(**options)
        self.embed = nn.Embedding(12, 16)
        self.block = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True)
        self.lstm, self.same = nn.LSTM(16, 20, batch_first=True), nn.Linear(20, 20)
        self.body = nn.Sequential(nn.Linear(20, 40), nn.ReLU())

    def forward(self, x):
        hidden = self.lstm(self.block(self.embed((x > 0) + 2 * torch.arange(6))))[0].amax(1)
        return self.heads(self.body(self.same(self.same(hidden).relu()).relu()))


def sequence(freeze, model_type=ConvClassifier):
    """Two tasks, trained in earnest, with norms, recovery and pinned statistics."""
    seed_everything(1, verbose=False)
    model = model_type(weight_decay=0.1)
    rnf = RelevanceFreezing(
        criterion=0.1, recovery_epochs=1, ration=0.5, norm_statistics="pinned", reset_free=True, freeze=freeze
    )
    fit(model, rnf, "a", max_epochs=3)
    frozen = frozen_entries(rnf, model)
    named = dict(model.named_parameters())
    entries = {name: named[name][mask].clone() for name, mask in frozen.items()}
    x = clusters("c", 50).tensors[0]
    with rnf.recall("a", model), torch.no_grad():
        before = model(x)
    fit(model, rnf, "b", max_epochs=3)
    held = all(torch.equal(named[name][mask], entries[name]) for name, mask in frozen.items())
    with rnf.recall("a", model), torch.no_grad():
        after = model(x)
    return {
        "held": held,
        "by entries": sorted(name for name, mask in frozen.items() if mask.ndim > 1),
        "exact": torch.equal(before, after),
        "logits": after,
        "state": rnf.state_dict(),
        "weights": {name: value.detach().clone() for name, value in named.items()},
    }


def protected():
    """A task that each process has kept by itself, from other samples than the others, before they train together."""
    model = trained()
    rnf = RelevanceFreezing(criterion=0.1, reference_samples=32, attribution_samples=8, seed=RANK, freeze="units")
    own = rnf.protect(model, task_data("a").val_dataloader(), name="a").relevant
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    model.options["lr"] = 0.1
    fit(model, rnf, "b")
    relevant = rnf.state.tasks["a"].relevant
    after = dict(model.named_parameters())
    held = all(
        torch.equal(after[name][relevant[layer.name]], before[name][relevant[layer.name]])
        for layer in rnf.state.layers
        for name in layer.parameters
    )
    return {
        "own": own,
        "relevant": relevant,
        "held": held,
        "moved": not torch.equal(after["body.1.weight"], before["body.1.weight"]),
    }


def pictured():
    """Two tasks whose samples rank 0 keeps: drift of the logits, what is kept here, and drift of the heatmaps."""
    seed_everything(1, verbose=False)
    model, rnf = ConvClassifier(), RelevanceFreezing(criterion=0.1, heatmaps=2)
    model.body[0] = nn.Identity()
    strategy = {"strategy": "ddp", "devices": WORLD} if WORLD > 1 else {}
    for task in ("a", "b"):
        parts = [clusters(task, 96, seed).tensors for seed in range(3)]
        images = [TensorDataset(x.view(-1, 1, 1, 6), y) for x, y in parts]
        model.heads.activate(task)
        data = TaskDataModule(task, 2, *images, batch_size=32)
        trainer(rnf, max_epochs=1, **strategy).fit(model, datamodule=data)
    return {
        "drift": [record.drift for record in rnf.state.tasks.values()],
        "maps": {task: list(maps) for task, maps in rnf._witnesses.gallery.maps.items()},
        "cosine": [rnf._witnesses.gallery.drift(task).cosine for task in rnf._witnesses.gallery.maps],
        "report": rnf.report(model).drift,
    }


def recalled(rnf, model):
    with rnf.recall("a", model), torch.no_grad():
        return model(clusters("c", 50).tensors[0])


def saved(folder):
    """A task that ends in all processes and is kept in one file."""
    seed_everything(1, verbose=False)
    model, rnf = ConvClassifier(), RelevanceFreezing(criterion=0.1)
    fit(model, rnf, "a", ModelCheckpoint(folder, save_last=True), enable_checkpointing=True)
    return recalled(rnf, model)


def gone_on(path):
    """A fit that goes on from a checkpoint that another number of processes has written."""
    model, rnf = ConvClassifier(), RelevanceFreezing(criterion=0.1)
    model.heads.activate("b")
    strategy = {"strategy": "ddp", "devices": WORLD} if WORLD > 1 else {}
    trainer(rnf, max_epochs=3, **strategy).fit(model, datamodule=task_data("b"), ckpt_path=path)
    return list(rnf.state.tasks), recalled(rnf, model)


def by_hand():
    """What is said to who ends a task by hand."""
    rnf = RelevanceFreezing(criterion=0.1)
    by_hand = ByHand(rnf)
    fit(trained(Classifier), rnf, "a", by_hand)
    return by_hand.sentence


def shares():
    """A stream that deals its samples out to the processes itself; in the end one of them has nothing."""
    rnf = RelevanceFreezing(DataLoader(Stream(96, RANK, WORLD) if RANK + 1 < WORLD else Stream(0), 8), criterion=0.1)
    fit(trained(), rnf)
    return rnf.state.tasks["a"].samples


def unvalidated():
    """Loaders that fit is given, and no validation: how many targets the task's end has seen."""
    model, rnf = trained(Classifier), RelevanceFreezing(criterion=0.1, task="a")
    strategy = {"strategy": "ddp", "devices": WORLD} if WORLD > 1 else {}
    trainer(rnf, max_epochs=1, limit_val_batches=0, **strategy).fit(model, loader("a"), small(77))
    return rnf.state.tasks["a"].samples


class OneBad(TensorDataset):
    """A label outside the head, in a batch that is not rank 0's; not seen before the task's end."""

    def __init__(self):
        x, y = clusters("a", 80).tensors
        drawn = torch.randperm(80, generator=torch.Generator().manual_seed(0))
        super().__init__(x, y.index_fill(0, drawn[8:9], 5))


def failure():
    """What a bad label in one process's share raises in each."""
    rnf = RelevanceFreezing(DataLoader(OneBad(), 8), criterion=0.1)
    try:
        fit(trained(Classifier), rnf)
    except Exception as error:
        return type(error).__name__, str(error), list(rnf.state.tasks)
    return None


def unreadable():
    """Data that one process can't read, before the training."""

    def source(trainer, module):
        if RANK == WORLD - 1:
            raise FileNotFoundError("no such folder: data")
        return loader("a")

    try:
        fit(trained(Classifier), RelevanceFreezing(source))
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def dealt():
    """A data set of which each process holds a part."""
    try:
        fit(trained(Classifier), RelevanceFreezing(small(80 + RANK)))
    except ValueError as error:
        return str(error)
    return None


def synchronised():
    """Statistics over unequal numbers of batches, by a norm that would wait for the other processes."""
    torch.manual_seed(0)
    batches = torch.randn(2 * WORLD - 1, 8, 3, 4)
    ranks = Ranks(RANK, WORLD)
    norm = nn.SyncBatchNorm(3).eval()
    with recalibrated([norm], lambda: [norm(batch) for batch in ranks.share(batches)], ranks):
        mean, var = norm.running_mean.clone(), norm.running_var.clone()
    assert "forward" not in vars(norm)
    by_channel = batches.transpose(1, 2).flatten(2)
    return torch.allclose(mean, by_channel.mean(2).mean(0)) and torch.allclose(var, by_channel.var(2).mean(0))


if __name__ == "__main__":
    started = time.monotonic()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = {
        "records": records(IN_TWO if WORLD == 2 else IN_THREE),
        "recovered": recovered(),
        "sequence": sequence("connections"),
        "rows": sequence("units"),
        "kinds": sequence("connections", Kinds),
        "saved": saved(Path(sys.argv[1]) / "many"),
        "gone_on": gone_on(Path(sys.argv[1]) / "alone" / "a-ended.ckpt"),
        "by_hand": by_hand(),
        "pictured": pictured(),
        "shares": shares(),
        "unvalidated": unvalidated(),
        "failure": failure(),
        "unreadable": unreadable(),
        "synchronised": synchronised(),
        "dealt": dealt(),
        "protected": protected(),
        "seconds": time.monotonic() - started,
    }
    torch.save(found, Path(sys.argv[1]) / f"{RANK}.pt")
    fit(trained(Classifier), RelevanceFreezing(DataLoader(OneBad(), 8), criterion=0.1))  # nobody catches this
