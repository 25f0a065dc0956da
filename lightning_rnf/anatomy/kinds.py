"""Kinds of layers whose outputs may be units: torch's own, two of other packages by their names, and the user's."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_rnf.anatomy.packed import is_attention
from lightning_rnf.anatomy.recurrent import RECURRENT, is_recurrent

OUTPUT_AXIS: dict[type[nn.Module], int] = {
    nn.Linear: -1,
    nn.Conv1d: -2,
    nn.Conv2d: -3,
    nn.Conv3d: -4,
    nn.ConvTranspose1d: -2,
    nn.ConvTranspose2d: -3,
    nn.ConvTranspose3d: -4,
}
"""Unit layers of torch and the axis of their output that counts units, from the end."""

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class LayerKind:
    """What is known of a kind of layer.

    Attributes:
        axis: of its output that counts units, negative.
        transposed: whether its weight has units along its second dimension, behind what it reads.
        recurrent: whether it is a recurrent layer of torch's, whose units are those of its cells; see `recurrent`.
        packed: whether it is torch's attention, whose units are queries, keys and values; see `packed`.
    """

    axis: int
    transposed: bool = False
    recurrent: bool = False
    packed: bool = False


_BY_NAME = {
    ("torch_geometric.nn.dense.linear", "Linear"): LayerKind(-1),
    ("transformers.pytorch_utils", "Conv1D"): LayerKind(-1, transposed=True),
    ("transformers.modeling_utils", "Conv1D"): LayerKind(-1, transposed=True),  # where it stood before
}
"""Kinds of other packages, which are not imported to know them."""

_REGISTERED: dict[type[nn.Module], LayerKind] = {}


def register_layer(kind: type[nn.Module], axis: int, *, transposed: bool = False) -> None:
    """Let layers of a class of yours be made of units, as torch's linear layers and convolutions are.

    Such a layer has a ``weight``, and what else it has of its own (a ``bias``) has units along its first dimension.
    Whether each output depends on its own row alone is found out by trying on each layer: one where it does not is
    frozen whole, and ``print(UnitMap.of(model, batch))`` says why. Call it before the first fit, in every process that
    fits or loads such a model. Calling it again is no error.

    Example::

        lightning_rnf.register_layer(Maxout, axis=-1)

    Args:
        kind: the class; its subclasses are such layers, too.
        axis: of a layer's output that counts units, from the end: -1 for features, -3 for channels of images.
        transposed: the weight is ``(inputs, units)``, not ``(units, …)``.

    Raises:
        TypeError: if ``kind`` is no class of modules.
        ValueError: if it is one of torch's layers, or ``axis`` is not -1, -2, -3 or -4.
    """
    if not isinstance(kind, type) or not issubclass(kind, nn.Module):
        raise TypeError(f"kind is {kind!r}, expected a class of modules")
    if issubclass(kind, (*OUTPUT_AXIS, *RECURRENT, nn.MultiheadAttention)):
        raise ValueError(f"{kind.__name__} is a layer of torch's, or inherits from one: it is known already")
    if isinstance(axis, bool) or axis not in OUTPUT_AXIS.values():
        raise ValueError(f"axis is {axis!r}, expected that of a layer's output, from the end: -1, -2, -3 or -4")
    _REGISTERED[kind] = LayerKind(axis, bool(transposed))


def kind_of(module: nn.Module) -> LayerKind | None:
    """What is known of a layer; None: it is none that units may be made of."""
    for torchs, axis in OUTPUT_AXIS.items():
        if isinstance(module, torchs):
            return LayerKind(axis, isinstance(module, TRANSPOSED))
    if is_recurrent(module):
        return LayerKind(-1, recurrent=True)
    if is_attention(module):
        return LayerKind(-1, packed=True)
    for cls in type(module).__mro__:
        found = _REGISTERED.get(cls) or _BY_NAME.get((cls.__module__, cls.__name__))
        if found is not None:
            return found
    return None


def is_layer(module: nn.Module) -> bool:
    """Whether its outputs may be units."""
    return kind_of(module) is not None


def is_transposed(module: nn.Module) -> bool:
    """Whether its weight has units along the second dimension: a transposed convolution's, for example."""
    found = kind_of(module)
    return found is not None and found.transposed


def class_name(module: nn.Module) -> str:
    """Of the module; torch gives a parametrized one a class of its own, which says less."""
    kind = type(module).__mro__[1] if is_parametrized(module) else type(module)
    return kind.__name__
