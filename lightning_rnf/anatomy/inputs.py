"""What a forward is called with and returns: tensors, somewhere in lists, dicts and objects with fields."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Inputs:
    """What a forward is called with.

    Attributes:
        args: by position.
        kwargs: by name.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @classmethod
    def of(cls, example: Any) -> Inputs:
        """As Lightning's ``example_input_array``: a tensor, a tuple by position, or a dict by name."""
        if isinstance(example, Inputs):
            return example
        if isinstance(example, Mapping):
            return cls((), dict(example))
        return cls(tuple(example) if isinstance(example, (tuple, list)) else (example,), {})

    def to(self, device: torch.device) -> Inputs:
        """On a device."""
        return self.each(lambda tensor: tensor.detach().to(device))

    def first(self) -> Inputs | None:
        """The first sample alone; None if that is all there is, or tensors are not of as many samples."""
        sizes = {len(tensor) if tensor.ndim else 0 for tensor in self.tensors()}
        return self.each(lambda tensor: tensor[:1]) if len(sizes) == 1 and min(sizes) > 1 else None

    def several(self) -> Inputs:
        """At least two samples: of one alone it can't be seen that the number is free."""
        single = all(tensor.ndim and len(tensor) == 1 for tensor in self.tensors())
        return self.each(lambda tensor: torch.cat([tensor, tensor])) if single else self

    def leaves(self) -> list[tuple[tuple[Any, ...], Any]]:
        """What is in it, by where it is; what else than a list, tuple or dict holds values is one."""
        return leaves_of((self.args, self.kwargs), opened=False)

    def tensors(self) -> list[Tensor]:
        """All of them, in order."""
        return [leaf for _, leaf in self.leaves() if isinstance(leaf, Tensor)]

    @property
    def samples(self) -> int:
        """How many there are, by the first tensor that has dimensions; 0: none."""
        return next((len(tensor) for tensor in self.tensors() if tensor.ndim), 0)

    def run(self, module: nn.Module) -> dict[tuple[Any, ...], Tensor]:
        """What the module returns, each tensor by where it is."""
        output = leaves_of(module(*self.args, **self.kwargs))
        return {path: leaf for path, leaf in output if isinstance(leaf, Tensor)}

    def each(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """Every tensor changed."""
        changed = apply_to_collection((self.args, dict(self.kwargs)), Tensor, change, allow_frozen=True)
        return Inputs(*changed)


def plain(value: Any, change: Callable[[Any], Any], *, opened: bool = True) -> Any:
    """Dicts, lists and tuples for whatever holds values by name or by position, each value changed."""
    if isinstance(value, Mapping):
        return {key: plain(entry, change, opened=opened) for key, entry in value.items()}
    if isinstance(value, list):
        return [plain(entry, change, opened=opened) for entry in value]
    if isinstance(value, tuple):
        return tuple(plain(entry, change, opened=opened) for entry in value)
    if opened and is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name), change) for field in fields(value)}
    return change(value)


def leaves_of(value: Any, *, opened: bool = True) -> list[tuple[tuple[Any, ...], Any]]:
    """What is in lists, dicts and objects, each with the keys that lead to it."""
    found: list[tuple[tuple[Any, ...], Any]] = []

    def collect(entry: Any, path: tuple[Any, ...]) -> None:
        if not isinstance(entry, (dict, list, tuple)):
            found.append((path, entry))
            return
        for key, inner in entry.items() if isinstance(entry, dict) else enumerate(entry):
            collect(inner, (*path, key))

    collect(plain(value, lambda leaf: leaf, opened=opened), ())
    return found
