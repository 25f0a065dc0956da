"""Rows of embeddings as a finished task heard them, where a later fit has changed them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rnf.memory import OldRows


@contextmanager
def heard(module: nn.Module, old: Mapping[str, OldRows]) -> Iterator[None]:
    """Inside the context what embeddings say of these rows is what they were; the embeddings stay as they are.

    Args:
        module: the model.
        old: by the weight's name.
    """
    with ExitStack() as hooks:
        for name, rows in old.items():
            if not len(rows.rows):
                continue
            part = module.get_submodule(name.rpartition(".")[0])
            # Before all other hooks: those of the user's are to see it.
            hook = part.register_forward_hook(_Heard(part, rows), prepend=True, with_kwargs=True)
            hooks.callback(hook.remove)
        yield


@contextmanager
def written(module: nn.Module, old: Mapping[str, OldRows]) -> Iterator[None]:
    """Inside the context embeddings have copies of their weights, with these rows in them.

    Args:
        module: the model.
        old: by the weight's name.
    """
    with ExitStack() as undo:
        for name, rows in old.items():
            parameters = module.get_submodule(name.rpartition(".")[0])._parameters
            weight = parameters["weight"]
            assert weight is not None
            undo.callback(parameters.__setitem__, "weight", weight)
            parameters["weight"] = nn.Parameter(rows.written(weight), weight.requires_grad)
        yield


class _Heard:
    def __init__(self, part: nn.Module, old: OldRows) -> None:
        weight = part.get_parameter("weight")
        self.values = old.values.to(weight.device, weight.dtype)  # of a sharded one, too
        self.place = torch.full((len(weight),), -1).index_copy_(0, old.rows, torch.arange(len(old.rows)))
        self.place = self.place.to(weight.device)

    def __call__(self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        place = self.place[args[0] if args else kwargs["input"]]
        values = self.values[place.clamp(min=0)].to(output.dtype)
        return torch.where((place >= 0).unsqueeze(-1), values, output)
