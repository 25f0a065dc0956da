"""Everything reachable from a module, to compare before and after."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Snapshot:
    """What was found, by where it was found. It keeps the objects alive, so that no other can take their identity.

    Attributes:
        identities: objects that have to be the same ones.
        values: what has to be equal; tensors bit by bit.
    """

    identities: dict[str, Any]
    values: dict[str, Any]


def snapshot(module: nn.Module) -> Snapshot:
    """Everything reachable: attributes, containers and hooks of every submodule, tensors, gradients, random states."""
    identities: dict[str, Any] = {}
    values: dict[str, Any] = {}
    for name, submodule in module.named_modules(remove_duplicate=False):
        values[f"{name} training"] = submodule.training
        values[f"{name} attributes"] = list(vars(submodule))
        for key, value in vars(submodule).items():
            where = f"{name}.{key}"
            identities[where] = value
            if isinstance(value, Mapping):
                values[f"{where} keys"] = list(value)
                identities.update({f"{where}[{entry!r}]": held for entry, held in value.items()})
            elif isinstance(value, (list, set)):
                values[f"{where} entries"] = [id(held) for held in value]
    tensors = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
    for name, tensor in tensors.items():
        identities[name] = tensor
        identities[f"{name} hooks"] = tensor._backward_hooks
        identities[f"{name} grad"] = tensor.grad
        values[f"{name} requires_grad"] = tensor.requires_grad
        values[f"{name} hook ids"] = list(tensor._backward_hooks or ())
        values[f"{name} form"] = (tensor.dtype, tensor.device, tensor.shape, tensor.stride(), tensor.data_ptr())
        values[f"{name} value"] = bits(tensor)
        values[f"{name} grad value"] = None if tensor.grad is None else bits(tensor.grad)
    values["grad mode"] = torch.is_grad_enabled()
    values["autocast"] = torch.is_autocast_enabled("cpu")
    values["torch random state"] = bits(torch.get_rng_state())
    values["numpy random state"] = repr(np.random.get_state())
    values["python random state"] = random.getstate()
    return Snapshot(identities, values)


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes() if tensor.ndim else repr(tensor).encode()


def changes(before: Snapshot, after: Snapshot) -> list[str]:
    """Where two snapshots differ."""
    missing = object()
    found = [
        where
        for where in {**before.identities, **after.identities}
        if before.identities.get(where, missing) is not after.identities.get(where, missing)
    ]
    found += [
        where
        for where in {**before.values, **after.values}
        if before.values.get(where, missing) != after.values.get(where, missing)
    ]
    return found
