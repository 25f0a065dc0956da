"""Layers inside of torch's own blocks that read units of one other layer there: no graph has to show it.

`nn.MultiheadAttention` and the layers of torch's transformers are single operations to whoever follows a forward. What
they do inside is known: ``out_proj`` reads a weighted sum of values, ``linear2`` an activation of ``linear1``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_rnf.anatomy.graph import torch_class
from lightning_rnf.anatomy.layers import UnitLayer
from lightning_rnf.anatomy.packed import OUTPUT, Packed, is_attention

_TRANSFORMERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)

_KEEP_ZERO = (functional.relu, functional.gelu, functional.silu, torch.relu, torch.tanh)
_KEEPING_ZERO = (nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh)


@dataclass(frozen=True)
class Inside:
    """Whose units a layer reads, and no others.

    Attributes:
        source: that layer.
        part: which of its units: values, of attention; None: all.
    """

    source: UnitLayer
    part: str | None = None

    def channels(self, of_units: Tensor) -> Tensor:
        """What is read of ``(units,)``: ``(channels,)``, in order."""
        return of_units if self.part is None else Packed(self.source.units // 3).of(self.part, of_units)


def insides(module: nn.Module, layers: Iterable[UnitLayer]) -> dict[str, Inside]:
    """The layers of a model of which that is known, by name.

    Args:
        module: the model.
        layers: its unit layers.
    """
    by_name: Mapping[str, UnitLayer] = {layer.name: layer for layer in layers}
    found = {}
    for name, layer in by_name.items():
        outer, _, key = name.rpartition(".")
        if layer.tied:  # each of them reads something else
            continue
        if key == OUTPUT and outer in by_name and is_attention(module.get_submodule(outer)):
            found[name] = Inside(by_name[outer], "value")
        first = by_name.get(f"{outer}.linear1") if key == "linear2" else None
        if first is not None and first.speaker == first.name and _feeds_forward(module.get_submodule(outer)):
            found[name] = Inside(first)
    return found


def _feeds_forward(block: Any) -> bool:
    """Whether it is a transformer's layer as torch has it, with an activation that is zero at zero."""
    kind = torch_class(block)
    return (
        kind in _TRANSFORMERS
        and type(block)._ff_block is getattr(kind, "_ff_block", None)
        and "_ff_block" not in vars(block)
        and (any(block.activation is one for one in _KEEP_ZERO) or type(block.activation) in _KEEPING_ZERO)
    )
