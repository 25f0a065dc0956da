"""What only some batches run: experts, optional branches, early exits. A trace is of one batch, a task of them all."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

from lightning_rnf.anatomy.layers import UnitLayer, inside
from lightning_rnf.anatomy.units import UnitMap

_REASON = "runs on some batches only"


class Routes:
    """Watches what runs, or is read, that a trace has not seen. Where it has seen everything, nothing is watched.

    Attributes:
        missed: by walk, names of modules that ran and of parameters that a function was given, in order.
        batches: of the first walk, one for each time that there were new ones.
    """

    def __init__(self, module: nn.Module, units: UnitMap) -> None:
        self._watched = {
            name: part
            for name, part in module.named_modules()
            if name and name not in units.ran and not inside(name, units.head) and _has_own(part)
        }
        idle = {name for name in units.idle if not _is_beside(name, units.head)}
        own = module.named_parameters(remove_duplicate=False)
        self._idle = {id(parameter): name for name, parameter in own if name in idle}
        self._seen: set[str] = set()
        self.missed: dict[int, list[str]] = {}
        self.batches: list[Any] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside the context it is noticed."""

        def ran(name: str, *call: object) -> None:
            self._seen.add(name)

        handles = [part.register_forward_pre_hook(partial(ran, name)) for name, part in self._watched.items()]
        try:
            with _Reads(self._idle, self._seen) if self._idle else nullcontext():
                yield
        finally:
            for handle in handles:
                handle.remove()

    def each(self, batches: Iterable[Any], walk: int) -> Iterator[Any]:
        """Hand batches on, and note after each what had not been seen in this walk before."""
        missed = self.missed.setdefault(walk, [])
        for batch in batches:
            self._seen.clear()
            yield batch
            new = [name for name in (*self._watched, *self._idle.values()) if name in self._seen]
            new = [name for name in new if name not in missed]
            if new:
                missed += new
                if len(self.missed) == 1:
                    self.batches.append(batch)


class _Reads(TorchFunctionMode):
    """Notes which of these parameters functions are given."""

    def __init__(self, names: Mapping[int, str], seen: set[str]) -> None:
        super().__init__()
        self.names = names
        self.seen = seen

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        for argument in (*args, *(kwargs or {}).values()):
            several = argument if isinstance(argument, (list, tuple)) else (argument,)
            self.seen.update(self.names[id(one)] for one in several if id(one) in self.names)
        return function(*args, **(kwargs or {}))


def joined(
    units: UnitMap, module: nn.Module, others: Sequence[UnitMap], missed: Iterable[str], known: Collection[str] | None
) -> tuple[UnitMap, tuple[str, ...]]:
    """A map of all that any batch runs. Which layers are units does not depend on the order of the batches.

    Args:
        units: of one batch.
        module: the model.
        others: maps of batches that run more.
        missed: modules that run in some batch, and parameters that are read.
        known: layers that units may be made of, if other tasks have ended; None: any.

    Returns:
        The map, and the modules of those that can't be made of units: their parameters are shared.
    """
    first = units
    for other in sorted(others, key=lambda one: one.ran):
        if _fit(units, other, known):
            units = _union(units, other)
    missed = set(missed)
    own = {name: part for name, part in module.named_modules() if name in missed - set(units.ran)}
    parameters = [f"{name}.{key}" for name, part in own.items() for key, _ in part.named_parameters(recurse=False)]
    buffers = [f"{name}.{key}" for name, part in own.items() for key, _ in part.named_buffers(recurse=False)]
    left = [name for name in units.idle if name in missed or name in parameters]
    whole = replace(
        units,
        shared=(*units.shared, *left),
        idle=tuple(name for name in units.idle if name not in left),
        buffers=(*units.buffers, *(name for name in buffers if name not in units.buffers)),
        reasons={**units.reasons, **dict.fromkeys(left, _REASON)},
        ran=(*units.ran, *own),
    )
    of_others = (name for name in units.whole if name not in first.whole)
    return whole, tuple(dict.fromkeys((*of_others, *(name.rpartition(".")[0] for name in left))))


def _fit(units: UnitMap, other: UnitMap, known: Collection[str] | None) -> bool:
    """Whether two maps say the same of what both are about."""
    if units.head != other.head:
        return False
    own, new = _by_name(units), _by_name(other)
    if known is not None and not set(new) <= set(known):
        return False
    if any(own[name] != new[name] for name in own.keys() & new.keys()):
        return False
    return _of_units(units).isdisjoint(other.shared) and _of_units(other).isdisjoint(units.shared)


def _union(units: UnitMap, other: UnitMap) -> UnitMap:
    layers = {**_by_name(other), **_by_name(units)}
    # Neither batch has run all of them, so there is no order of execution: that of the model's modules.
    place = {name: index for index, name in enumerate(units.kinds)}
    idle = set(units.idle) & set(other.idle)
    shared = tuple(dict.fromkeys((*units.shared, *other.shared)))
    return replace(
        units,
        layers=tuple(sorted(layers.values(), key=lambda layer: place[layer.name])),
        shared=shared,
        idle=tuple(name for name in units.idle if name in idle),
        buffers=tuple(dict.fromkeys((*units.buffers, *other.buffers))),
        own=tuple(dict.fromkeys((*units.own, *other.own))),
        reasons={**other.reasons, **units.reasons},
        whole={**other.whole, **units.whole},
        ran=tuple(dict.fromkeys((*units.ran, *other.ran))),
        attention={**other.attention, **units.attention},
        kept=tuple(dict.fromkeys((*units.kept, *other.kept))),
        embeddings=tuple(name for name in dict.fromkeys((*units.embeddings, *other.embeddings)) if name not in shared),
    )


def _by_name(units: UnitMap) -> Mapping[str, UnitLayer]:
    return {layer.name: layer for layer in units.layers}


def _of_units(units: UnitMap) -> set[str]:
    return {name for layer in units.layers for name in layer.parameters}


def _is_beside(parameter: str, head: str) -> bool:
    """Whether it stands in the container of the head: with the heads of other tasks."""
    container = head.rpartition(".")[0]
    return bool(container) and parameter.startswith(f"{container}.")


def _has_own(module: nn.Module) -> bool:
    parameters = module.named_parameters(recurse=False)
    return any(True for _ in parameters) or any(True for _ in module.named_buffers(recurse=False))
