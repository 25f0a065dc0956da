"""What test_communication runs in two processes: ``communicating.py folder``, started by ``launched``."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

import lightning.pytorch as pl
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.overrides.distributed import _register_ddp_comm_hook
from lightning.pytorch.strategies import DDPStrategy
from processes import RANK, WORLD
from records import bare_record
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook, fp16_compress_wrapper
from training import Classifier, allocated, clusters, task_data, trainer

from lightning_rnf import RelevanceFreezing, UnitMap
from lightning_rnf.freezing.communication import reduce_free_rows

FROZEN = 0.75


class OnAnyDevice(DDPStrategy):
    """Lightning registers hooks on GPUs only."""

    def _register_ddp_hooks(self):
        _register_ddp_comm_hook(self.model, self._ddp_comm_state, self._ddp_comm_hook, self._ddp_comm_wrapper)


class Upsampled(Classifier):
    """Convolutions whose weights lie in memory with channels last, one of them transposed and in two groups."""

    def __init__(self, **options):
        super().__init__(**options)
        self.body = nn.Sequential(
            nn.Unflatten(1, (1, 1, 6)),
            nn.Conv2d(1, 16, (1, 3)),
            nn.ReLU(),
            nn.ConvTranspose2d(16, 16, (1, 3), groups=2),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, (1, 2), bias=False),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(80, 40),
            nn.ReLU(),
        )
        self.to(memory_format=torch.channels_last)


class Traffic(pl.Callback):
    """Bytes that travel in each step, and those of the rows that masks leave free."""

    def __init__(self, rnf):
        self.rnf, self.found, self.expected = rnf, [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.sent = 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.found.append(self.sent)
        self.expected.append(free_bytes(self.rnf.state, pl_module))

    @contextmanager
    def counted(self) -> Iterator[None]:
        def add(size: int) -> None:
            self.sent += size

        with counted(add):
            yield


@contextmanager
def counted(add) -> Iterator[None]:
    """Tell ``add`` of the bytes of every asynchronous sum: those of communication hooks."""
    original = torch.distributed.all_reduce

    def all_reduce(tensor, *args, **options):
        if options.get("async_op"):
            add(tensor.numel() * tensor.element_size())
        return original(tensor, *args, **options)

    with mock.patch.object(torch.distributed, "all_reduce", all_reduce):
        yield


def free_bytes(state, model) -> int:
    """Of the gradients that somebody needs, from the masks."""
    frozen, recovering = state.frozen(), state.recovering
    size = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    for layer in state.layers:
        fixed = frozen[layer.name] if recovering is None else frozen[layer.name] | ~recovering.relevant[layer.name]
        for name in layer.parameters:
            if model.get_parameter(name).requires_grad:
                size -= model.get_parameter(name).numel() * int(fixed.sum()) // layer.units
    return 4 * size


def fit(model, rnf, task, hook, *callbacks, wrapper=None, view=False, cap=25, **options):
    strategy = OnAnyDevice(
        ddp_comm_state=rnf if hook is reduce_free_rows else None,
        ddp_comm_hook=hook,
        ddp_comm_wrapper=wrapper,
        gradient_as_bucket_view=view,
        bucket_cap_mb=cap,
    )
    model.heads.activate(task)
    traffic = Traffic(rnf)
    seed_everything(1, verbose=False)
    with traffic.counted():
        trainer(*callbacks, traffic, rnf, max_epochs=2, strategy=strategy, devices=WORLD, **options).fit(
            model, datamodule=task_data(task)
        )
    return traffic


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def sequence(hook, freeze="units", **options):
    """Two tasks, each with a recovery in its last epoch."""
    seed_everything(1, verbose=False)
    model, rnf = (
        Upsampled(weight_decay=0.1),
        RelevanceFreezing(
            criterion=0.1, recovery_epochs=1, ration=0.5, reset_free=False, freeze=freeze, fit_head=False
        ),
    )
    traffic = [fit(model, rnf, task, hook, **options) for task in ("a", "b")]
    return {
        "weights": weights(model),
        "sent": [one.found for one in traffic],
        "expected": [one.expected for one in traffic],
        "relevant": {task: record.relevant for task, record in rnf.state.tasks.items()},
    }


class Spoiled(pl.Callback):
    """Gradients of frozen rows that are NaN on their arrival, in both processes."""

    def __init__(self, rnf):
        self.rnf = rnf

    def on_train_start(self, trainer, pl_module):
        for layer in self.rnf.state.layers:
            frozen = self.rnf.state.frozen()[layer.name]
            for name in layer.parameters:
                rows = layer.spread(name, frozen)
                pl_module.get_parameter(name).register_hook(
                    lambda gradient, rows=rows: torch.where(
                        rows.view(*rows.shape, *[1] * (gradient.ndim - rows.ndim)), torch.nan, gradient
                    )
                )


class Endless(RelevanceFreezing):
    """Its masks do not change."""

    def on_train_end(self, *args):
        pass


def second_task(hook, wrapper=None, *, spoiled=False):
    """With three quarters of each layer frozen."""
    seed_everything(1, verbose=False)
    model, rnf = (
        Upsampled(optimizer=torch.optim.SGD, lr=0.05),
        Endless(recovery_epochs=0, reset_free=False, freeze="units"),
    )
    model.heads.activate("a")
    units = UnitMap.of(model.eval(), clusters("a", 8).tensors)
    relevant = {layer.name: torch.randperm(layer.units) < FROZEN * layer.units for layer in units.layers}
    rnf.state.add(bare_record(units, relevant, dict(model.named_buffers())), units)
    before = weights(model.train())
    traffic = fit(model, rnf, "b", hook, *([Spoiled(rnf)] if spoiled else []), wrapper=wrapper)
    held = all(
        torch.equal(
            layer.by_unit(name, model.get_parameter(name))[relevant[layer.name]],
            layer.by_unit(name, before[name])[relevant[layer.name]],
        )
        for layer in units.layers
        for name in layer.parameters
    )
    body = sum(parameter.numel() for parameter in model.body.parameters())
    head = sum(parameter.numel() for parameter in model.heads.tasks["b"].parameters())
    return {"weights": weights(model), "sent": traffic.found, "held": held, "body": 4 * body, "head": 4 * head}


class Layouts(nn.Module):
    """Weights of every order in memory, one of them no dense part of it, and a scalar."""

    def __init__(self):
        super().__init__()
        self.plain = nn.Parameter(torch.randn(6, 4))
        self.turned = nn.Parameter(torch.randn(4, 6).t())
        self.last = nn.Parameter(torch.randn(5, 3, 2, 2).to(memory_format=torch.channels_last))
        self.columns = nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last))
        self.part = nn.Parameter(torch.randn(6, 8)[:, :3])
        self.one = nn.Parameter(torch.randn(()))
        self.row = nn.Parameter(torch.randn(1, 7))

    def forward(self, x):
        return sum(((parameter * x).sin() * (1 + x)).sum() for parameter in self.parameters())


class Chosen:
    """Rows as they are written down."""

    def __init__(self, model, rows):
        self.rows = {getattr(model, name): index for name, index in rows.items()}
        for parameter, index in self.rows.items():
            parameter.register_post_accumulate_grad_hook(partial(mask, index))

    def free_rows(self, parameter):
        return self.rows.get(parameter)


def mask(index, parameter):
    kept = torch.zeros_like(parameter.grad)
    for place in index.tolist():
        kept[tuple(place)] = parameter.grad[tuple(place)]
    parameter.grad.copy_(kept)


SOME = {
    "plain": [[1], [4], [5]],
    "turned": [[0], [3]],
    "last": [[2], [3]],
    "columns": [[0, 1], [0, 2], [3, 0]],
    "part": [[5]],
}


def layouts(hook, rows, wrapper=None, *, view=False, cap=25):
    torch.manual_seed(0)
    model = Layouts()
    state = Chosen(
        model,
        {
            name: torch.tensor(index, dtype=torch.long).view(len(index), -1 if index else 0)
            for name, index in rows.items()
        },
    )
    wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=view, bucket_cap_mb=cap)
    wrapped.register_comm_hook(state if hook is reduce_free_rows else None, wrapper(hook) if wrapper else hook)
    sent = []
    with counted(sent.append):
        for step in range(3):  # the buckets are rebuilt after the first
            wrapped.zero_grad()
            wrapped(torch.tensor(0.3 + RANK + step)).backward()
    return {"gradients": {name: one.grad.clone() for name, one in model.named_parameters()}, "sent": sent}


def wrong_state():
    model = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
    model.register_comm_hook(None, reduce_free_rows)
    try:
        model(torch.ones(1, 2)).sum().backward()
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def memory(**ddp):
    found, learning, _ = allocated(lambda: {"strategy": OnAnyDevice(**ddp), "devices": WORLD})
    return {"gradients": found.gradients, "states": found.states, "learning": learning}


OPTIONS = {
    "one bucket": {},
    "views": {"view": True},
    "many buckets": {"cap": 0.001},
    "accumulated": {"accumulate_grad_batches": 3},
}
CONNECTIONS = {"connections": {"freeze": "connections"}}
"""Rows of which something is free travel whole."""

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = {"sequences": {}, "layouts": {}}
    for name, options in {**OPTIONS, **CONNECTIONS}.items():
        found["sequences"][name] = [sequence(hook, **options) for hook in (None, reduce_free_rows)]
    found["second"] = {
        "plain": second_task(None),
        "free rows": second_task(reduce_free_rows),
        "spoiled": second_task(reduce_free_rows, spoiled=True),
        "half": second_task(reduce_free_rows, fp16_compress_wrapper),
        "all in half": second_task(allreduce_hook, fp16_compress_wrapper),
    }
    for name, options in {
        "one bucket": {},
        "views": {"view": True},
        "many buckets": {"cap": 1e-5},
        "half": {"wrapper": fp16_compress_wrapper},
    }.items():
        found["layouts"][name] = [layouts(hook, SOME, **options) for hook in (allreduce_hook, reduce_free_rows)]
    found["nothing"] = layouts(reduce_free_rows, {name: [] for name, _ in Layouts().named_parameters()})
    found["memory"] = [memory(), memory(gradient_as_bucket_view=True)]
    found["wrong"] = wrong_state()
    torch.save(found, Path(sys.argv[1]) / f"{RANK}.pt")
