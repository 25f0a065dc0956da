"""Layers that have one weight: together they are one set of units, silent in each of them or in none."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_rnf.anatomy.kinds import class_name
from lightning_rnf.anatomy.packed import is_attention
from lightning_rnf.anatomy.trace import Trace


def tied(trace: Trace, name: str) -> tuple[str, ...]:
    """The modules whose weight a layer's is, in the model's order, itself among them: whichever of them run."""
    weight = trace.names.get(f"{name}.weight")
    owners = [] if weight is None else trace.owners[weight]
    return tuple(one.removesuffix(".weight") for one in owners if one.endswith(".weight")) or (name,)


def own_of_all(trace: Trace, names: Sequence[str]) -> dict[str, dict[str, str]]:
    """The parameters of tied modules, each once, by its first name: what it is called in each that has it as such."""
    found: dict[str, dict[str, str]] = {}
    first: dict[tuple[nn.Parameter, str], str] = {}
    for name in names:
        for key, parameter in trace.own_parameters(name).items():
            known = first.setdefault((parameter, key.rpartition(".")[2]), key)
            found.setdefault(known, {})[name] = key
    return found


def why_not_tied(trace: Trace, name: str, head: str) -> str | None:
    """Why a layer can't be one of units with all that have its weight, in words; None: they themselves may be.

    Args:
        trace: of the model.
        name: of the layer.
        head: name of the module that is made of no units.
    """
    others = [one for one in tied(trace, name) if one != name]
    found = ((other, _why_apart(trace, name, other, head)) for other in others)
    return next((f"shares {f'{name}.weight'!r} with {[f'{other}.weight']}, {how}" for other, how in found if how), None)


def _why_apart(trace: Trace, name: str, another: str, head: str) -> str | None:
    module, other = trace.modules[name], trace.modules[another]
    if any(_inside(one, head) for one in (name, another)):
        return "and one of them is in the head"
    if any(not trace.runs[one] and _is_beside(trace, one, head) for one in (name, another)):
        return "and one of them may be another task's head"
    if type(module) is not type(other):
        return f"which is of another kind ({class_name(other)})"
    if any(_is_of_attention(trace, one) for one in (name, another)):
        return "and attention reads one of them by itself"
    if is_parametrized(module) or is_parametrized(other):
        return "and one of them is parametrized"
    if _groups(module) != _groups(other):
        return "and their channels are in other groups"
    return None


def _is_of_attention(trace: Trace, name: str) -> bool:
    """Whether it is a part of torch's attention, which runs by its parts and knows its own alone."""
    return is_attention(trace.modules[name.rpartition(".")[0]])


def _groups(module: Any) -> int:
    return int(getattr(module, "groups", 1))


def _inside(name: str, ancestor: str) -> bool:
    return name == ancestor or name.startswith(f"{ancestor}.")


def _is_beside(trace: Trace, name: str, head: str) -> bool:
    """Whether it stands with the heads of other tasks, in a dict or list; modules of other kinds hold anything."""
    container = head.rpartition(".")[0]
    return isinstance(trace.modules.get(container), (nn.ModuleDict, nn.ModuleList)) and _inside(name, container)


def check_memory(parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Check that no two parameters are one in memory: a step that one of them makes is the other's, and nobody sees it.

    Args:
        parameters: of a module, by name.

    Raises:
        ValueError: if two are, naming them.
    """
    known: dict[tuple[int, int], str] = {}
    for name, parameter in parameters:
        if type(parameter) is not nn.Parameter or parameter.is_meta or parameter.data_ptr() == 0:  # a shard, say
            continue
        first = known.setdefault((parameter.data_ptr(), parameter.numel()), name)
        if first != name and parameter.requires_grad:
            raise ValueError(
                f"{first!r} and {name!r} are two parameters in one memory, so what trains one changes the other, which "
                "can't be seen: make them one (let both modules have the same Parameter), or copy it"
            )
