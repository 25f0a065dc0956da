"""Which of a model's layers are made of units: all that can be, those that the user has named, or all but some."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_rnf.anatomy.layers import coupling, has_rows, inside, layer_calls, matches, not_rows, why_whole
from lightning_rnf.anatomy.trace import Trace
from lightning_rnf.anatomy.tying import tied

EXCLUDES = "!"
"""Before a glob: what it matches is left out."""

MOST_NAMED = 3
"""So many modules are named where there are no unit layers: those with the most parameters."""


@dataclass(frozen=True)
class Chosen:
    """Layers, by name.

    Attributes:
        names: of the unit layers, in execution order.
        whole: layers that nobody left out, but that units can't follow, and why; see `layers.why_whole`.
        left_out: globs of what the user has left out.
    """

    names: tuple[str, ...]
    whole: Mapping[str, str]
    left_out: tuple[str, ...] = ()


def choose(trace: Trace, head: str, globs: Sequence[str] | None, kept: AbstractSet[str] = frozenset()) -> Chosen:
    """Choose the unit layers.

    Args:
        trace: of the model.
        head: name of the module that is none of them.
        globs: of their names, and behind a ``!`` of those that are left out; None: all. Of layers that have one weight
            each name stands for all.
        kept: parameters that the user keeps from training, by name. Layers that have no others are not chosen, unless
            globs ask for them: whatever a task uses of them costs later tasks nothing. Where no other layer can be
            made of units, they are, for a fit that lets them go.

    Raises:
        ValueError: naming a glob that matches none or asks by name for one that can't be, or saying why there are none.
    """
    candidates = [
        name
        for name in dict.fromkeys(call.name for call in layer_calls(trace))
        if not inside(name, head) and has_rows(trace, name)
    ]
    excluding = [glob[len(EXCLUDES) :] for glob in globs or () if glob.startswith(EXCLUDES)]
    wanted = [glob for glob in globs or () if not glob.startswith(EXCLUDES)]

    def matched(name: str, globs: Sequence[str]) -> bool:
        return any(matches(one, globs) for one in tied(trace, name))

    def is_chosen(name: str) -> bool:
        return (not wanted or matched(name, wanted)) and not matched(name, excluding)

    def is_kept(name: str) -> bool:
        return all(trace.own_parameters(one).keys() <= kept for one in tied(trace, name))

    learning = [name for name in candidates if wanted or not is_kept(name)]
    names, whole, coupled = _usable(trace, learning, head)
    if not any(map(is_chosen, names)):
        names, whole, coupled = _usable(trace, candidates, head)

    for glob in wanted:
        if not any(matched(name, [glob]) for name in names):
            for name in whole:
                if matches(name, [glob]):
                    raise ValueError(_cannot(name, whole[name]))
            of_coupled = {name: found for name, found in coupled.items() if matches(name, [glob])}
            raise ValueError(_no_match(trace, glob, head, names, of_coupled))
    embeddings = [name for name, module in trace.modules.items() if isinstance(module, nn.Embedding)]
    for glob in excluding:
        if not any(matches(name, [glob]) for name in (*candidates, *embeddings)):
            raise ValueError(_no_match(trace, glob, head, names, {}, EXCLUDES))
    chosen = tuple(name for name in names if is_chosen(name))
    left = {name: found for name, found in whole.items() if is_chosen(name) and (name in learning or not chosen)}
    if not chosen:
        reasons = [f"layer {name!r} {found}" for name, found in left.items()]
        reasons += [f"{name!r}: {not_rows(trace, name, coupled[name])}" for name in coupled if is_chosen(name)]
        raise ValueError(_nothing(trace, head, reasons, globs if names else None))
    return Chosen(chosen, left, tuple(excluding))


def _usable(trace: Trace, candidates: Sequence[str], head: str) -> tuple[list[str], dict[str, str], dict[str, str]]:
    """Of some layers those that units can follow; and why the others can't be followed, or are not made of rows.

    Of layers that have one weight it is the first in the model's order, whether that has run or not.
    """
    whole = {name: found for name in candidates if (found := why_whole(trace, name, head))}
    coupled = {name: found for name in candidates if name not in whole and (found := coupling(trace, name))}
    usable = (tied(trace, name)[0] for name in candidates if name not in whole and name not in coupled)
    return list(dict.fromkeys(usable)), whole, coupled


def _cannot(name: str, found: str) -> str:
    instead = "give it a weight of its own"
    if found.startswith("is parametrized"):
        instead = "bake it in (torch.nn.utils.parametrize.remove_parametrizations)"
    elif found.startswith("runs"):
        instead = "build a layer for each run"
    return (
        f"layer {name!r} {found}; leave it out of units= (globs of the others, or {EXCLUDES + name!r}) and it is "
        f"frozen whole after the first task, or {instead} before the first fit"
    )


def _no_match(
    trace: Trace, glob: str, head: str, names: Sequence[str], coupled: Mapping[str, str], before: str = ""
) -> str:
    found = "matches no unit layer"
    if glob in trace.modules:
        kind = type(trace.modules[glob]).__name__
        found = f"names a {kind}, whose parameters can't be assigned to units"
    for name in coupled:
        found = f"names {name!r}, and {not_rows(trace, name, coupled[name])}: it is frozen whole"
    if inside(glob, head):
        found = f"names the head {head!r}, which is never made of units"
    return f"units={before + glob!r} {found}; this model's unit layers are {_listed(names)}"


def _nothing(trace: Trace, head: str, reasons: Sequence[str], globs: Sequence[str] | None) -> str:
    """That there is no unit layer, why, where the parameters are, and what to do."""
    found = (
        "; ".join(reasons[:MOST_NAMED])
        or f"no Linear, convolution, recurrent layer or attention ran before the head {head!r}"
    )
    if globs is not None:
        found = f"units={list(globs)} leaves all of them out"
    sizes = Counter(
        {
            name: sum(parameter.numel() for parameter in trace.own_parameters(name).values())
            for name in trace.modules
            if not inside(name, head)
        }
    )
    largest = ", ".join(
        f"{type(trace.modules[name]).__name__} {name or '(the model itself)'!r} ({size:,})"
        for name, size in sizes.most_common(MOST_NAMED)
        if size
    )
    holders = f"the most parameters outside of it are those of {largest}" if largest else "nothing else has parameters"
    baked = ""
    if any(is_parametrized(trace.modules[name]) and not inside(name, head) for name in trace.modules):
        baked = "; torch.nn.utils.parametrize.remove_parametrizations makes plain layers of parametrized ones"
    return (
        f"no unit layers: {found}; {holders}. A network needs a hidden layer each of whose outputs depends on its own "
        "row alone, such as torch's Linear or convolutions, a recurrent layer or attention; if those are such layers, "
        f"lightning_rnf.register_layer(Kind, axis) says so{baked}"
    )


def _listed(names: Sequence[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
