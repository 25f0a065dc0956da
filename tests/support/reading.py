"""What test_tokens runs in two processes, and in one: ``reading.py folder``, started by ``launched``."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.strategies import ModelParallelStrategy
from processes import RANK, WORLD
from sharded import full
from texts import Reader, anything, text_data, texts
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.data import DataLoader, Subset
from training import trainer

from lightning_rnf import RelevanceFreezing

QUICK = {"recovery_epochs": 0, "ration": None, "fit_head": False}


class Spread(Reader):
    def configure_model(self):
        if not isinstance(self, FSDPModule):
            fully_shard(self, mesh=self.device_mesh["data_parallel"])


def recalled(rnf, model, task="a"):
    with rnf.recall(task, model), torch.no_grad():
        return model(anything())


def stream():
    """Two tasks in double precision: each step sees the same texts, by however many processes."""
    seed_everything(1, verbose=False)
    model = Reader(optimizer=torch.optim.SGD, lr=0.5, momentum=0.9)
    rnf, logits = RelevanceFreezing(criterion=0.05, **QUICK), {}
    for task in "ab":
        model.heads.activate(task)
        data = text_data(task)
        own = Subset(texts(task, 320), range(RANK, 320, WORLD))  # Lightning would shuffle them
        data.train_dataloader = lambda own=own: DataLoader(own, 32 // WORLD)
        strategy = {"strategy": "ddp", "devices": WORLD, "use_distributed_sampler": False} if WORLD > 1 else {}
        trainer(rnf, max_epochs=2, precision="64-true", **strategy).fit(model, datamodule=data)
        logits[task] = recalled(rnf, model, task)
    return {
        "state": rnf.state_dict(),
        "weights": {name: value.detach().clone() for name, value in model.named_parameters()},
        "exact": torch.equal(recalled(rnf, model), logits["a"]),
        "changed": rnf.report(model).changed,
    }


def spread():
    """The first task of a whole model, the next of one that is sharded; and one that was sharded from the start."""
    torch.manual_seed(0)
    model, rnf = Spread(), RelevanceFreezing(**QUICK)
    rnf.protect(model, text_data("a").val_dataloader(), name="a")
    before, logits = model.embedding.weight.detach().clone(), recalled(rnf, model)
    found = {"embeddings": rnf.state.embeddings}
    torch.manual_seed(0)
    other, new = Spread(), RelevanceFreezing(**QUICK)
    for task, one, callback in (("b", model, rnf), ("a", other, new)):
        one.heads.activate(task)
        strategy = ModelParallelStrategy(data_parallel_size=WORLD, tensor_parallel_size=1)
        trainer(callback, max_epochs=1, strategy=strategy, devices=WORLD).fit(one, datamodule=text_data(task))
    held = torch.equal(full(model)["embedding.weight"], before)
    exact = torch.equal(recalled(rnf, model), logits)
    whole = (new.state.embeddings, new.state.shared, torch.equal(full(other)["embedding.weight"], before))
    return {**found, "held": held, "exact": exact, "whole": whole}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.save({"stream": stream(), "spread": spread()}, Path(sys.argv[1]) / f"{RANK}.pt")
