"""Whether a model's modules are such as a unit layer was made of when a task ended."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from lightning_rnf.anatomy.kinds import kind_of
from lightning_rnf.anatomy.layers import UnitLayer, is_norm_of_channels, is_prelu
from lightning_rnf.anatomy.recurrent import cells_of


def check_kinds(layer: UnitLayer, modules: Mapping[str, nn.Module]) -> None:
    """Check that a model's modules, by name, are of the kinds that a layer, its norm and its slopes have to be.

    Raises:
        ValueError: naming the one that is not.
    """
    module = modules.get(layer.name)
    kind = None if module is None else kind_of(module)
    made = None if module is None or kind is None or not kind.recurrent else cells_of(module)
    if (
        kind is None
        or kind.axis != layer.axis
        or kind.transposed != (layer.transposed is not None)
        or made != layer.cells
        or kind.packed != layer.packed
    ):
        was = "layer with a transposed weight" if layer.transposed else "layer"
        was = f"recurrent layer of {layer.cells.gates} gates" if layer.cells else was
        was = "layer of attention" if layer.packed else was
        advice = "" if module is None or kind else "; if its class was registered then, call register_layer here, too"
        raise ValueError(
            f"layer {layer.name!r} was a {was} with its units along dimension {layer.axis} when a task ended, in this "
            f"model it is {_described(module)}{advice}"
        )
    for role, name, is_kind in (("norm", layer.norm, is_norm_of_channels), ("slopes", layer.slopes, is_prelu)):
        if name is not None and (name not in modules or not is_kind(modules[name])):
            raise ValueError(
                f"layer {layer.name!r} had {name!r} for its {role} when a task ended, in this model that is "
                f"{_described(modules.get(name))}"
            )
    _check_tied(layer, modules)


def _check_tied(layer: UnitLayer, modules: Mapping[str, nn.Module]) -> None:
    """Check that modules that had one weight have one, and nothing that is not the units'."""
    own = {
        id(value)
        for name in layer.modules
        for key, value in (modules[name].named_parameters(recurse=False) if name in modules else ())
        if f"{name}.{key}" in layer.parameters
    }
    for name in layer.tied:
        module = modules.get(name)
        if module is None or type(module) is not type(modules[layer.name]):
            found = _described(module)
        else:
            strange = [key for key, value in module.named_parameters(recurse=False) if id(value) not in own]
            found = f"one with a {strange[0]} of its own" if strange else ""
        if found:
            raise ValueError(
                f"{name!r} had one weight with layer {layer.name!r} when a task ended, in this model it is {found}: "
                "tie them as they were then"
            )


def _described(module: nn.Module | None) -> str:
    return "missing" if module is None else f"of type {type(module).__name__}"
