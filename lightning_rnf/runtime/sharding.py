"""Models whose parameters are spread over processes by rows (FSDP2): each process's own rows, and all for a while."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")

_TOGETHER: set[int] = set()
"""Identities of modules that are put together for a while."""


def is_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was called on the module or a part of it."""
    return any(True for _ in _wrapped(module))


def is_spread(module: nn.Module) -> bool:
    """Whether the same holds once `whole` is left: what is whole inside of it is sharded for training."""
    return is_sharded(module) or id(module) in _TOGETHER


def check(module: nn.Module, processes: int) -> None:
    """Check that the model is spread in the one way that is understood here: by rows, over all processes.

    Raises:
        ValueError: if not, naming what is spread otherwise, and a way out.
    """
    reshard(module)
    for part in _wrapped(module):
        if any(len(_hooks_of_fsdp(part, kind)) != 1 for kind in _HOOKS):
            raise ValueError(
                f"fully_shard was called on a list of modules, and the {_plain_class(part).__name__} in it can't run "
                "without the others: call it on one module at a time, or use Trainer(strategy='ddp')"
            )
        policy = part._get_fsdp_state()._mp_policy
        if policy.param_dtype is not None or policy.output_dtype is not None:
            raise ValueError(
                f"fully_shard was given {policy} for a {_plain_class(part).__name__}, in which relevance and accuracy "
                "would not be measured: use Trainer(precision='bf16-mixed' or 'bf16-true'), or "
                "Trainer(strategy='ddp')"
            )
    parameter: Any  # a DTensor has attributes of its own
    for name, parameter in module.named_parameters():
        if not _is_dtensor(parameter):
            if parameter.requires_grad and processes > 1:
                raise ValueError(
                    f"parameter {name!r} is not sharded, so every process trains one of its own: call fully_shard on "
                    "the module itself in configure_model, after its parts, or use Trainer(strategy='ddp')"
                )
            continue
        mesh, placements = parameter.device_mesh, parameter.placements
        if mesh.size() != processes or len(placements) != 1 or not placements[0].is_shard(0):
            raise ValueError(
                f"parameter {name!r} is spread as {placements} over {mesh.size()} of {processes} processes, and units "
                "are rows: use fully_shard as it is over all of them (ModelParallelStrategy(data_parallel_size="
                f"{processes}, tensor_parallel_size=1)), or Trainer(strategy='ddp')"
            )
        if parameter.device.type != mesh.device_type:
            raise ValueError(
                f"parameter {name!r} waits on device {parameter.device.type!r} (an offload policy), so it can't be put "
                "together for relevance: leave the policy out, or use Trainer(strategy='ddp')"
            )


def local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor, in the same memory and without a graph."""
    found: Any = tensor
    if _is_dtensor(tensor):
        with torch.no_grad():  # the tensor inside and no view of it
            found = found.to_local()
    own: Tensor = found.detach()
    return own


def writes(parameter: Tensor) -> int:
    """How many writes to a parameter torch has counted; writes to ``.data`` it doesn't count."""
    # Those to a sharded one count there and not in the tensor inside, which may be written to by itself.
    return parameter._version + (local(parameter)._version if _is_dtensor(parameter) else 0)


def local_rows(parameter: Tensor, rows: Tensor) -> Tensor:
    """Of something that has an entry for each row of a parameter, the entries of this process's rows."""
    if not _is_dtensor(parameter) or rows.ndim == 0:
        return rows
    mesh: Any = parameter.device_mesh  # type: ignore[attr-defined]
    # Rows are dealt out as torch.chunk does it: where they are few, the last processes get less or nothing.
    chunks, rank = rows.chunk(mesh.size()), mesh.get_local_rank()
    return chunks[rank] if rank < len(chunks) else rows[:0]


def reshard(module: nn.Module) -> None:
    """Let each process have its own rows only; a forward without a backward leaves some modules whole.

    A ``requires_grad`` that somebody has set on whole parameters holds for the rows too: FSDP would lose it, and the
    next task's head would not learn.
    """
    wrapped = list(_wrapped(module))
    parts = list(module.modules()) if wrapped else []
    flags = [{name: own is not None and own.requires_grad for name, own in part._parameters.items()} for part in parts]
    for part in wrapped:
        part.reshard()
    for part, seen in zip(parts, flags, strict=True):
        for name, own in part._parameters.items():
            if own is not None and own.requires_grad != seen[name]:
                own.requires_grad_(seen[name])


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """Inside the context every process has the whole model, as an ordinary module: it may run in one of them alone.

    Modules are of their own classes again, their parameters are plain ones without gradients, and nothing of FSDP
    happens around a forward. What is written to parameters is kept (each process keeps its rows of what it has
    written). All processes have to enter it, between training steps. A module that is not sharded stays as it is.
    """
    wrapped = list(_wrapped(module))
    if not wrapped:
        yield
        return
    reshard(module)
    with ExitStack() as undo:
        _TOGETHER.add(id(module))
        undo.callback(_TOGETHER.discard, id(module))
        copies: dict[Tensor, nn.Parameter] = {}  # of a shared parameter there is one, too
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is None or not _is_dtensor(parameter):
                    continue
                if parameter not in copies:
                    together: Any = parameter.detach()
                    copies[parameter] = nn.Parameter(together.full_tensor(), parameter.requires_grad)
                    undo.callback(_write_back, parameter, copies[parameter])
                part._parameters[name] = copies[parameter]
                undo.callback(part._parameters.__setitem__, name, parameter)
        for part in wrapped:
            for kind in _HOOKS:
                undo.callback(_without(getattr(part, kind), _hooks_of_fsdp(part, kind)))
            undo.callback(partial(setattr, part, "__class__", type(part)))
            part.__class__ = _plain_class(part)
        yield


@torch.no_grad()
def _write_back(parameter: Tensor, copy: Tensor) -> None:
    local(parameter).copy_(local_rows(parameter, copy.detach()))


def _without(hooks: dict[int, Any], taken: Mapping[int, Any]) -> Callable[[], None]:
    """Take hooks away; what is returned puts them back where they were among those that are still there."""
    order = list(hooks)
    for number in taken:
        del hooks[number]

    def put_back() -> None:
        now = {**taken, **hooks}
        sorted_hooks = {number: now.pop(number) for number in order if number in now}
        hooks.clear()
        hooks.update(sorted_hooks)
        hooks.update(now)

    return put_back


def _hooks_of_fsdp(module: Any, kind: str) -> dict[int, Any]:
    state = module._get_fsdp_state()
    return {number: hook for number, hook in getattr(module, kind).items() if getattr(hook, "__self__", None) is state}


def _wrapped(module: nn.Module) -> Iterator[Any]:
    fsdp = sys.modules.get("torch.distributed.fsdp")  # nobody has sharded anything before it is imported
    if fsdp is not None and hasattr(fsdp, "FSDPModule"):
        yield from (part for part in module.modules() if isinstance(part, fsdp.FSDPModule))


def _plain_class(part: nn.Module) -> type[nn.Module]:
    """The class that ``fully_shard`` has put one of its own in front of."""
    own: type[nn.Module] = type(part).__bases__[1]
    return own


def _is_dtensor(tensor: Tensor) -> bool:
    distributed = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and isinstance(tensor, distributed.DTensor)
