"""Embeddings whose rows can be told apart: each belongs to a token, and nobody but its lookup reads it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rnf.anatomy.layers import SilentHook, has_foreign_hooks
from lightning_rnf.anatomy.trace import Trace


def looks_up(module: nn.Module | None) -> bool:
    """Whether it is an embedding of torch's that gives the rows of its weight as they are."""
    if not isinstance(module, nn.Embedding) or "forward" in vars(module):
        return False
    return type(module).forward is nn.Embedding.forward and "weight" in module._parameters


def why_whole_embedding(trace: Trace, parameter: str) -> str | None:
    """How an embedding is used so that its rows can't be told apart, in few words; None: they can.

    Args:
        trace: of the model.
        parameter: full name of a parameter of an embedding.
    """
    name, _, key = parameter.rpartition(".")
    module, weight = trace.modules[name], trace.names[parameter]
    if not looks_up(module) or key != "weight":
        return "has a forward of its own"
    assert isinstance(module, nn.Embedding)
    if module.max_norm is not None:
        return "writes into its rows (max_norm)"
    if module.sparse:
        return "has sparse gradients"
    hooks = module._forward_pre_hooks.values()
    if has_foreign_hooks(module) or any(not isinstance(hook, SilentHook) for hook in hooks):
        return "has hooks of others"
    if others := trace.sharers(parameter, weight):
        return f"shares {key!r} with {others}"
    lookups = sum(call.name == name and trace.reached(call) for call in trace.calls)
    if id(weight) in trace.outside or weight not in trace.leaves or trace.edges[trace.leaves[weight]] != lookups:
        return "has its weight used by more than its lookups"
    return None


@contextmanager
def rows_read(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Inside the context it is noted which rows of embeddings are read, by name of the parameter: bool ``(rows,)``.

    They are on the embedding's device, and nothing waits for it.
    """
    found: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for name, part in module.named_modules(remove_duplicate=False):
            if looks_up(part):
                weight = part.get_parameter("weight")
                read = torch.zeros(len(weight), dtype=torch.bool, device=weight.device)
                found[f"{name}.weight" if name else "weight"] = read
                hooks.callback(part.register_forward_hook(_Noted(read), with_kwargs=True).remove)
        yield found


class _Noted(SilentHook):
    def __init__(self, read: Tensor) -> None:
        self.read = read

    def __call__(self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        ids = args[0] if args else kwargs["input"]
        if type(ids) is Tensor and not torch.compiler.is_compiling():  # none that a tracer has made up
            self.read.index_fill_(0, ids.detach().reshape(-1).long(), True)
