"""What is remembered of the model in which tasks have ended: its layers, and the form of each parameter that it had."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from torch import Tensor, nn

from lightning_rnf.anatomy import OUTPUT_AXIS, RECURRENT, UnitLayer, form, is_layer
from lightning_rnf.memory.plain import COUNTS, get, get_name, get_names, get_texts

_FORM = re.compile(r"\w+ \((\d{1,16},( \d{1,16})?(, \d{1,16})*)?\)")


def shape_of(form: str) -> str:
    """The part of a `form` that a conversion leaves as it is."""
    return form.partition(" ")[2]


def sizes_of(form: str) -> list[int]:
    """The shape in a `form`, as numbers."""
    return [int(size) for size in re.findall(r"\d+", shape_of(form))]


def check_shape(name: str, parameter: Tensor, forms: Mapping[str, str], whose: str, *, is_head: bool = False) -> None:
    """Check that a parameter has the shape that it had when a task ended, as far as that is known.

    Raises:
        ValueError: naming both shapes.
    """
    if name in forms and shape_of(forms[name]) != shape_of(form(parameter)):
        advice = (
            "; a head that grows with the tasks can't be kept, its logits would change: leave it as it is and give the "
            "new task one of its own (lightning_rnf.MultiHead does), or name the modules that are heads with heads="
        )
        raise ValueError(
            f"{name!r} of {whose} had shape {shape_of(forms[name])} when a task ended, in this model it has "
            f"{shape_of(form(parameter))}{advice * is_head}"
        )


def unknown_modules(module: nn.Module, forms: Mapping[str, str]) -> list[str]:
    """Names of the modules with parameters of their own that the model did not have when the last task ended.

    Without any forms nothing is known, and nothing unknown.
    """
    names = (name for name, _ in module.named_parameters(remove_duplicate=False) if forms and name not in forms)
    return list(dict.fromkeys(name.rpartition(".")[0] for name in names))


def unheld_modules(module: nn.Module, held: AbstractSet[str], heads: Iterable[str]) -> list[str]:
    """Names of the modules without parts of which no parameter is held, but for those that stand beside a head.

    A module with parts may have a parameter of its own that is of no use, and runs all the same.
    """
    containers = [f"{one}." for one in (head.rpartition(".")[0] for head in heads) if one]
    found = []
    # By identity: a module may stand in two places, and a parameter belong to two modules.
    ids = {id(parameter) for name, parameter in module.named_parameters(remove_duplicate=False) if name in held}
    for name, part in module.named_modules(remove_duplicate=False):
        own = [id(parameter) for parameter in part.parameters(recurse=False)]
        is_leaf = bool(name and own) and not any(True for _ in part.children())
        if is_leaf and ids.isdisjoint(own) and not any(name.startswith(one) for one in containers):
            found.append(name)
    return found


def unknown_layer(module: nn.Module, forms: Mapping[str, str], heads: Iterable[str]) -> str | None:
    """A linear layer or convolution that the model has come to have, outside of heads of tasks to come; None: no such.

    What is new as a whole and stands beside a finished task's head, in the same container, may be such a head. Whether
    it is can be told when it runs.
    """
    modules = dict(module.named_modules(remove_duplicate=False))
    beside = {head.rpartition(".")[0] for head in heads}
    for name in unknown_modules(module, forms):
        if is_layer(modules[name]):
            outer = (one for one in _from_outside(name) if not any(_inside(known, one) for known in forms))
            new = next(outer, None)
            if new is None or new.rpartition(".")[0] not in beside:
                return name
    return None


def forms_from_plain(plain: Mapping[str, Any], layers: Sequence[UnitLayer], others: Iterable[str]) -> dict[str, str]:
    """Dtype and shape by parameter; none in files from before there were any.

    Args:
        plain: the state.
        layers: those that it lists.
        others: parameters that it has besides those of the layers.

    Raises:
        ValueError: if they are no forms, or lack a parameter, or one of them has another number of units.
    """
    if "forms" not in plain:
        return {}
    forms = get_texts(plain, "forms")
    wrong = next((text for text in forms.values() if not _FORM.fullmatch(text)), None)
    if wrong is not None:
        raise ValueError(f"not a state of lightning_rnf: 'forms' should be dtypes and shapes, one is {wrong!r:.80}")
    for layer in layers:
        for name in layer.parameters:
            leading = layer.leading_shape(name)
            sizes = tuple(sizes_of(forms.get(name, "")))
            if sizes[: len(leading)] != leading:
                raise ValueError(f"not a state of lightning_rnf: 'forms' has no {name!r:.80} of {layer.units} units")
    missing = [name for name in others if name not in forms]
    if missing:
        raise ValueError(f"not a state of lightning_rnf: 'forms' lacks {missing[0]!r:.80}")
    return forms


def layer_from_plain(plain: Mapping[str, Any]) -> UnitLayer:
    """A unit layer.

    Raises:
        ValueError: if it is none, naming what is wrong.
    """
    units = get(plain, "units", int)
    transposed: Any = get(plain, "transposed", (list, tuple, type(None)))
    if transposed is not None and not (
        len(transposed) == 2
        and all(type(size) is int and size > 0 and size in COUNTS for size in transposed)
        and units % transposed[0] == 0
    ):
        raise ValueError(
            f"not a state of lightning_rnf: 'transposed' should be a number of groups that divides {units} units, and "
            f"of inputs per group, it is {transposed!r:.80}"
        )
    recurrent: Any = get(plain, "recurrent", (list, tuple, type(None))) if "recurrent" in plain else None
    if recurrent is not None and not (
        len(recurrent) == 3
        and all(type(size) is int and size > 0 and size in COUNTS for size in recurrent)
        and recurrent[0] in RECURRENT.values()
        and recurrent[2] <= 2
        and units % (recurrent[1] * recurrent[2]) == 0
        and transposed is None
    ):
        raise ValueError(
            "not a state of lightning_rnf: 'recurrent' should be gates, layers and directions, cells of equal size of "
            f"{units} units, it is {recurrent!r:.80}"
        )
    packed: bool = get(plain, "packed", bool) if "packed" in plain else False
    if packed and (units % 3 or recurrent is not None or transposed is not None):
        raise ValueError(f"not a state of lightning_rnf: 'packed' are queries, keys and values, and no {units} units")
    layer = UnitLayer(
        name=get_name(plain, "name"),
        units=units,
        axis=get(plain, "axis", int),
        parameters=get_names(plain, "parameters"),
        norm=get(plain, "norm", (str, type(None))),
        slopes=get(plain, "slopes", (str, type(None))),
        transposed=None if transposed is None else (transposed[0], transposed[1]),
        recurrent=None if recurrent is None else (recurrent[0], recurrent[1], recurrent[2]),
        packed=packed,
        tied=get_names(plain, "tied") if "tied" in plain else (),
    )
    if layer.axis not in OUTPUT_AXIS.values():
        raise ValueError(f"not a state of lightning_rnf: 'axis' of {layer.name!r} is {layer.axis!s:.80}")
    followed = layer.norm is not None or layer.slopes is not None
    doubled = any(f"{name}.weight" in layer.parameters for name in layer.tied)
    if layer.tied and (followed or doubled or not layer.is_open or len({*layer.modules}) <= len(layer.tied)):
        raise ValueError(
            f"not a state of lightning_rnf: {layer.name!r:.80} can't have one weight with {layer.tied!r:.80}"
        )
    owners = {_owner(parameter, layer.name) for parameter in layer.parameters}
    if layer.weight not in layer.parameters or not owners <= {*layer.modules, layer.norm, layer.slopes}:
        raise ValueError(
            f"not a state of lightning_rnf: 'parameters' of {layer.name!r} should be those of the layer, its norm and "
            f"its slopes, they are {layer.parameters!r:.80}"
        )
    for name in layer.parameters if not layer.is_open else ():
        layer.leading_shape(name)  # it has one of the names that torch gives
    return layer


def _owner(parameter: str, layer: str) -> str:
    """The module that a parameter is of; what a layer's own are computed from counts as its own."""
    return layer if parameter.startswith(f"{layer}.parametrizations.") else parameter.rpartition(".")[0]


def _from_outside(name: str) -> Iterator[str]:
    """The modules that one is in, the outermost first, and it."""
    parts = name.split(".")
    yield from (".".join(parts[:depth]) for depth in range(1, len(parts) + 1))


def _inside(parameter: str, module: str) -> bool:
    return parameter.startswith(f"{module}.")
