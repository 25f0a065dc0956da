"""What test_sharding runs in several processes: ``sharded.py folder``, started by ``launched``."""

from __future__ import annotations

import copy
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.strategies import ModelParallelStrategy
from processes import RANK, SAME, WORLD, Apart, OneBad, trained
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.utils.data import DataLoader
from training import Classifier, ConvClassifier, clusters, frozen_entries, inputs, task_data, trainer

from lightning_rnf import RelevanceFreezing
from lightning_rnf.freezing.freezer import Freezer
from lightning_rnf.runtime import sharding

NAMES = {
    2: ("many", "metric", "budget", "taylor", "random"),
    3: ("odd", "seven", "one batch", "own", "ration"),
}
"""What is tried, by the number of processes."""


class Spread:
    """As in the README: each part of the body by itself, and the rest, the heads, as one."""

    def configure_model(self):
        if not isinstance(self, FSDPModule):  # the next fit calls it again
            for part in self.body:
                fully_shard(part, mesh=self.device_mesh["data_parallel"])
            fully_shard(self, mesh=self.device_mesh["data_parallel"])


class Conv(Spread, ConvClassifier): ...


class Linear(Spread, Classifier): ...


class NoNorms(Linear):
    """Nor dropout: a fit that is resumed draws anew, and a checkpoint in parts has statistics of any process."""

    def __init__(self):
        super().__init__()
        self.body[2].p = 0.0


class Unspread(Classifier):
    def configure_model(self): ...


class HalfSpread(Classifier):
    def configure_model(self):
        fully_shard(self.body, mesh=self.device_mesh["data_parallel"])


class Listed(Classifier):
    def configure_model(self):
        fully_shard([self.body[0], self.body[3]], mesh=self.device_mesh["data_parallel"])
        fully_shard(self, mesh=self.device_mesh["data_parallel"])


class ByColumns(Classifier):
    def configure_model(self):
        mesh = self.device_mesh["data_parallel"]
        fully_shard(self, mesh=mesh, shard_placement_fn=lambda one: Shard(1) if one.shape == (40, 6) else None)


class InHalf(Classifier):
    def configure_model(self):
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        fully_shard(self, mesh=self.device_mesh["data_parallel"], mp_policy=policy)


def fit(model, rnf, task="a", *callbacks, whole_file=False, tensor_parallel=1, ckpt_path=None, **options):
    model.heads.activate(task)
    strategy = ModelParallelStrategy(
        data_parallel_size=WORLD // tensor_parallel,
        tensor_parallel_size=tensor_parallel,
        save_distributed_checkpoint=not whole_file,
    )
    one = trainer(*callbacks, rnf, **{"max_epochs": 1, "strategy": strategy, "devices": WORLD, **options})
    one.fit(model, datamodule=task_data(task), ckpt_path=ckpt_path)
    return one


def full(model):
    """The whole of every parameter and buffer, by name."""
    sharding.reshard(model)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: getattr(one, "full_tensor", one.clone)().detach() for name, one in tensors.items()}


def parameters(model):
    now = full(model)
    return {name: now[name] for name, _ in model.named_parameters()}


def records():
    found = {}
    for name in NAMES[WORLD]:
        model, rnf = trained(Conv), RelevanceFreezing(**SAME[name])
        before = {key: value.clone() for key, value in model.state_dict().items() if "num_batches" not in key}
        seed_everything(3, verbose=False)
        fit(model, rnf, "a", Apart())
        after = full(model)
        record = found[name] = rnf.state_dict()["tasks"][0]
        for key in before.keys() - set(record["head_parameters"]):
            expected = before[key] + RANK if "running" in key else before[key]
            assert torch.equal(after[key], expected), (name, key)
        record["fitted"] = {key: after[key] for key in record["head_parameters"]}
    return found


def frozen_in(model, rnf):
    """Where, by parameter."""
    with sharding.whole(model):
        return frozen_entries(rnf, model)


def held_by(model, rnf, task, frozen):
    """What may never change again, by parameter."""
    now, record = full(model), rnf.state.tasks[task]
    entries = {name: now[name][mask] for name, mask in frozen.items()}
    return entries | {name: now[name] for name in (*record.head_parameters, *rnf.state.shared)}


def equal(some, others):
    return some.keys() == others.keys() and all(torch.equal(value, others[name]) for name, value in some.items())


def logits(model, rnf, task):
    with rnf.recall(task, model), torch.no_grad():
        return model(inputs())


def sequence(freeze):
    """Two tasks in earnest, with norms, recovery, clipping, pinned statistics, and units that start anew."""
    seed_everything(1, verbose=False)
    model = Conv(weight_decay=0.1)
    rnf = RelevanceFreezing(
        criterion=0.1, recovery_epochs=1, ration=0.5, norm_statistics="pinned", reset_free=True, freeze=freeze
    )
    options = {"max_epochs": 3, "gradient_clip_val": 1.0, "accumulate_grad_batches": 2}
    fit(model, rnf, "a", **options)
    frozen, recalled, before = frozen_in(model, rnf), logits(model, rnf, "a"), full(model)
    held = held_by(model, rnf, "a", frozen)
    one = fit(model, rnf, "b", **options)  # after a forward that has left the heads whole
    after = full(model)
    tested = one.test(model, datamodule=task_data("a"), verbose=False)[0]["test_accuracy"]
    test = DataLoader(clusters("a", 320, 2), 32, sampler=torch.utils.data.DistributedSampler(range(320), shuffle=False))
    with rnf.recall("a", model), torch.no_grad():
        hits = torch.cat([model(x).argmax(1) == y for x, y in test]).float()
    return {
        "held": equal(held, held_by(model, rnf, "a", frozen)),
        "by entries": sorted(name for name, mask in frozen.items() if mask.ndim > 1),
        "exact": torch.equal(recalled, logits(model, rnf, "a")),
        "moved": sorted(name for name in before if not torch.equal(before[name], after[name])),
        "tested": (tested, float(hits.mean())),
        "flags": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "state": rnf.state_dict(),
        "weights": parameters(model),
    }


def reset():
    """Whether units that a task leaves free start the next one from where they started the first."""
    seed_everything(1, verbose=False)
    model, rnf = Conv(), RelevanceFreezing(criterion=0.1, ration=0.5, reset_free=True, freeze="units")
    start = full(model)
    fit(model, rnf, "a", max_epochs=2)
    trained = full(model)
    model.options["lr"] = 0.0
    fit(model, rnf, "b")
    now, frozen = full(model), rnf.state.tasks["a"].relevant
    return all(
        torch.equal(now[name][~rows], start[name][~rows]) and torch.equal(now[name][rows], trained[name][rows])
        for layer, rows in ((layer, frozen[layer.name]) for layer in rnf.state.layers)
        for name in layer.parameters
    ) and not equal(start, trained)


class SaveAfterOneEpoch(pl.Callback):
    def __init__(self, path):
        self.path = path

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


def resumed(folder):
    """A second task that goes on in a new process's model, from either kind of checkpoint, against one that went on."""
    found = {}
    for whole_file, model_type in ((False, NoNorms), (True, Conv)):
        seed_everything(1, verbose=False)
        model, rnf = model_type(), RelevanceFreezing(criterion=0.1)
        fit(model, rnf, "a", max_epochs=2)
        frozen = frozen_in(model, rnf)
        held, recalled = held_by(model, rnf, "a", frozen), logits(model, rnf, "a")
        path = str(folder / f"{whole_file}.ckpt")
        options = {"max_epochs": 3, "whole_file": whole_file}
        one = fit(model, rnf, "b", SaveAfterOneEpoch(path), **options)
        torch.manual_seed(9)  # other weights; the sampler keeps its seed
        other, again = model_type(), RelevanceFreezing(criterion=0.1)
        fit(other, again, "b", ckpt_path=path, **options)
        found[str(whole_file)] = {
            "held": equal(held, held_by(other, again, "a", frozen)),
            "exact": torch.equal(recalled, logits(other, again, "a")),
            "weights": equal(parameters(model), parameters(other)),
            "masks": equal(rnf.state.frozen(), again.state.frozen()),
            "logits": recalled,
        }
        if whole_file:
            one.save_checkpoint(str(folder / "finished.ckpt"))
    return found


def failure():
    """What a bad label in one process's share raises in each, and whether the model is spread again after it."""
    model = trained(Linear)
    try:
        fit(model, RelevanceFreezing(DataLoader(OneBad(), 8), criterion=0.1))
    except ValueError as error:
        return str(error), all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return None


def refused():
    """What layouts that can't be worked with are told."""
    found = {}
    for model_type in (Unspread, HalfSpread, Listed, ByColumns, InHalf, "tensor parallel"):
        options = {"tensor_parallel": WORLD} if model_type == "tensor parallel" else {}
        model = Linear() if options else model_type()
        try:
            fit(model, RelevanceFreezing(criterion=0.1), **options)
        except ValueError as error:
            found[str(getattr(model_type, "__name__", model_type))] = str(error)
    return found


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, weight_decay=0.1, foreach=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, foreach=False),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.01, weight_decay=0.1),
}


def held(name, whole_first):
    """Rows of elasticity 0, 0.1 and 1 of a network of which some processes have nothing, against one that is whole."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(2, 7, 2), nn.ReLU(), nn.Flatten(), nn.Linear(28, 2), nn.ReLU(), nn.Linear(2, 1))
    factors = {
        key: torch.tensor([0.0, 0.1, 1.0])[torch.randint(3, value.shape[:1])] for key, value in plain.named_parameters()
    }
    factors["3.weight"] = torch.tensor([[0.0, 1.0] * 14, [0.1, 0.0] * 14])  # units along two dimensions
    factors["5.bias"] = torch.tensor(0.0)  # whole
    spread, start = copy.deepcopy(plain), {key: value.detach().clone() for key, value in plain.named_parameters()}
    nets = {"plain": plain, "spread": spread}
    freezers = {}
    for kind, net in nets.items():
        if kind == "spread" and whole_first:
            freezers[kind] = Freezer(net, factors)  # as in a setup: what it is about will be replaced
            freezers[kind].stop_gradients()
        if kind == "spread":
            for part in (net[0], net[3], net):
                fully_shard(part, mesh=MESH)
        if kind not in freezers:
            freezers[kind] = Freezer(net, factors)
            freezers[kind].stop_gradients()
        optimizer = OPTIMIZERS[name](net.parameters())
        freezers[kind].attach([optimizer])
        generator = torch.Generator().manual_seed(1)
        for _ in range(5):
            optimizer.zero_grad()
            net(torch.randn(6, 2, 3, 3, generator=generator)).square().sum().backward()
            optimizer.step()
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter.mul_(0.999)  # a callback that writes weights
            freezers[kind].pin(written_only=True)
        freezers[kind].detach()
    now, expected = full(spread), full(plain)
    shape = {key: (*factor.shape, *[1] * (start[key].ndim - factor.ndim)) for key, factor in factors.items()}
    factor = {key: factors[key].view(shape[key]).expand_as(value) for key, value in start.items()}
    return {
        "bit-equal": all(torch.equal(now[key][own == 0], start[key][own == 0]) for key, own in factor.items()),
        "moved": all(bool((now[key] != start[key])[own > 0].all()) for key, own in factor.items()),
        "as whole": all(torch.allclose(now[key], value, rtol=1e-4, atol=1e-6) for key, value in expected.items()),
        "flags": all(parameter.requires_grad for parameter in spread.parameters()),
        "smallest share": min(parameter.to_local().numel() for parameter in spread.parameters()),
    }


def borrowed():
    """A model that is put together, run in one process only and written to; and what is left of that."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2), nn.Linear(2, 3))
    plain[3].weight.requires_grad_(False)
    spread, x = copy.deepcopy(plain), torch.randn(3, 4)
    seen = []
    spread[0].register_forward_hook(lambda *args: seen.append("users"))
    for part in (spread[0], spread[2], spread):
        fully_shard(part, mesh=MESH)
    spread[0].register_forward_pre_hook(lambda *args: seen.append("users"))
    spread(x).sum().backward()
    with torch.no_grad():
        spread(x)  # leaves the root's own whole
        spread[3].requires_grad_(True)
    sharding.reshard(spread)

    def everything():
        return {
            "classes": [type(part) for part in spread.modules()],
            "hooks": [list(getattr(part, kind).items()) for part in spread.modules() for kind in sharding._HOOKS],
            "ids": [(id(one), id(one.grad), id(one.to_local().untyped_storage())) for one in spread.parameters()],
            "values": [one.to_local().tolist() for one in spread.parameters()],
            "gradients": [None if one.grad is None else one.grad.to_local().tolist() for one in spread.parameters()],
            "flags": [one.requires_grad for one in spread.parameters()],
        }

    before = everything()
    seen.clear()
    with sharding.whole(spread):
        inside = {
            "classes": [type(part) for part in spread.modules()] == [type(part) for part in plain.modules()],
            "values": equal(full(spread), full(plain)),
            "gradients": all(one.grad is None for one in spread.parameters()),
            "logits": RANK > 0 or torch.equal(spread(x), plain(x)),  # rank 0 alone
            "hooks": seen == ["users"] * 2 * (RANK == 0),
        }
    unchanged = everything() == before
    try:
        with sharding.whole(spread), torch.no_grad():
            spread[0].weight[3] = 7.0
            raise KeyError
    except KeyError:
        written = full(spread)["0.weight"]
    plain.state_dict()["0.weight"][3] = 7.0
    return {**inside, "unchanged": unchanged, "written": torch.equal(written, plain[0].weight), "flag": before["flags"]}


def export_refused():
    rnf, model = RelevanceFreezing(criterion=0.1), Linear()
    fit(model, rnf)
    try:
        rnf.export(model, "a")
    except ValueError as error:
        return str(error)
    return None


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    found = {
        "records": records(),
        "sequence": sequence("connections"),
        "rows": sequence("units"),
        "resumed": resumed(folder),
        "failure": failure(),
        "reset": reset(),
    }
    MESH = init_device_mesh("cpu", (WORLD,))
    found["held"] = {name: [held(name, whole_first) for whole_first in (False, True)] for name in OPTIMIZERS}
    found["borrowed"] = borrowed()
    found["export"] = export_refused()
    found["refused"] = refused()
    torch.save(found, folder / f"{RANK}.pt")
