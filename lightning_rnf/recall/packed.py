"""Attention of torch's own module of which only some queries, keys and values speak.

Its kernels take packed weights, and no hook reaches what they make of them. So it runs by its parts, whatever is
silent: what a search has measured is then what recall repeats, bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rnf.anatomy import OUTPUT, Packed, UnitLayer, by_parts, is_attention


@contextmanager
def spoken_by_parts(module: nn.Module, layers: Iterable[UnitLayer], relevant: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the context attention with unit layers runs by its parts, and what of it is not relevant is zero.

    Silent queries, keys and values are filled with zero: a later task may have made NaN of their rows. Then its
    ``out_proj`` runs, whose silent units are for others to fill. A recall inside another silences what both do.

    Args:
        module: the model.
        layers: its unit layers.
        relevant: bool ``(units,)`` by layer name.
    """
    with ExitStack() as undo:
        for name, layer in _attention(module, layers).items():
            part = module.get_submodule(name)
            before = vars(part).get("forward")
            fill = (lambda role, made: made) if layer is None else _filler(layer, relevant[name])
            vars(part)["forward"] = by_parts(part, fill)
            undo.callback(_put_back, part, before)
        yield


def _attention(module: nn.Module, layers: Iterable[UnitLayer]) -> dict[str, UnitLayer | None]:
    """Torch's attention of which something is units, by name, and the layer of its queries, keys and values."""
    found: dict[str, UnitLayer | None] = {}
    for layer in layers:
        outer, _, key = layer.name.rpartition(".")
        if layer.packed:
            found[layer.name] = layer
        elif key == OUTPUT and is_attention(module.get_submodule(outer)):
            found.setdefault(outer, None)
    return found


def _put_back(part: nn.Module, before: Any) -> None:
    del part.forward
    if before is not None:  # of a recall around this one
        vars(part)["forward"] = before


def _filler(layer: UnitLayer, relevant: Tensor) -> Callable[[str, Tensor], Tensor]:
    silent = ~relevant
    packed = Packed(layer.units // 3)

    def fill(role: str, made: Tensor) -> Tensor:
        nonlocal silent
        silent = silent.to(made.device)
        mute = packed.of(role, silent)
        return torch.where(mute, 0.0, made)

    return fill


@torch.no_grad()
def zeroed_rows(parameter: Callable[[str], Tensor | None], layer: UnitLayer, silent: Tensor) -> bool:
    """Zero the rows of silent units in copies of parameters that torch's attention reads.

    Args:
        parameter: a copy by its full name; None: there is none.
        layer: of units: of attention, or of its ``out_proj``.
        silent: bool ``(units,)``.

    Returns:
        False if there are no such copies, and nothing was changed.
    """
    copies = {name: parameter(name) for name in layer.parameters}
    if any(value is None for value in copies.values()):
        return False
    for name, value in copies.items():
        assert value is not None
        value[layer.spread(name, silent).to(value.device)] = 0
    return True
