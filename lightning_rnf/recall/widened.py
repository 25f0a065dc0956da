"""A model as it was before it was made wider: a task that ended then is recalled in the shape that it ended in.

Zeros that are added would not change a sum, but for another shape another kernel may be taken, which rounds otherwise.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rnf.anatomy import Wider
from lightning_rnf.memory import index_before, sliced
from lightning_rnf.runtime import sharding

_WHOLE = "_rnf_whole"  # of what stands in a tensor's place: that tensor


@contextmanager
def as_it_was(module: nn.Module, widenings: Sequence[Wider], since: int) -> Iterator[None]:
    """Inside the context a model has the shape that it had after some of its widenings; what differs are copies.

    Afterwards every parameter and buffer is the very same object as before. What is written to the copies is lost.

    Args:
        module: the model; it may be inside of such a context already.
        widenings: all that it has come through, in their order.
        since: so many of them had been.

    Raises:
        ValueError: if it is sharded.
    """
    later = widenings[since:]
    if later and sharding.is_sharded(module):
        raise ValueError(
            "a task that ended before the model was widened can't be recalled while the model is sharded: load the "
            "checkpoint into a model that is not (rnf.restore) and recall it there"
        )
    modules = dict(module.named_modules(remove_duplicate=False)) if widenings else {}
    with ExitStack() as undo:
        for name in dict.fromkeys(name for wider in widenings for name in wider.tensors):
            owner, _, key = name.rpartition(".")
            for tensors in (modules[owner]._parameters, modules[owner]._buffers) if owner in modules else ():
                now: Any = tensors.get(key)
                if now is not None:
                    tensors[key] = _sliced(getattr(now, _WHOLE, now), index_before(later, name))
                    undo.callback(tensors.__setitem__, key, now)
        for name, sizes in _sizes(widenings, since).items():
            for attribute, size in sizes.items() if name in modules else ():
                undo.callback(setattr, modules[name], attribute, getattr(modules[name], attribute))
                setattr(modules[name], attribute, size)
        yield


def _sizes(widenings: Sequence[Wider], since: int) -> dict[str, dict[str, int]]:
    """What attributes of modules were."""
    found: dict[str, dict[str, int]] = defaultdict(dict)
    for place, wider in enumerate(widenings):
        for name, sizes in wider.sizes.items():
            for attribute, (before, after) in sizes.items():
                if place < since:
                    found[name][attribute] = after
                else:
                    found[name].setdefault(attribute, before)
    return found


@torch.no_grad()
def _sliced(whole: Tensor, index: Mapping[int, Tensor]) -> Tensor:
    value = sliced(whole.detach(), index)
    if not index:
        return whole
    if isinstance(whole, nn.Parameter):
        value = nn.Parameter(value, whole.requires_grad)
    setattr(value, _WHOLE, whole)
    return value
