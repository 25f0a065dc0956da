"""Where a model was made wider between two fits, as plain data, and what was remembered before it as it was then.

A task that ended before a widening is recalled in the shape that the model had at its end: the same kernels on the same
shapes give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_rnf.anatomy import Places, UnitLayer, Wider
from lightning_rnf.memory.model import sizes_of
from lightning_rnf.memory.plain import COUNTS, get, get_name
from lightning_rnf.memory.record import TaskRecord

_MOST_DIMENSIONS = 8
_SIZES = frozenset(
    (
        *("in_features", "out_features", "in_channels", "out_channels", "groups", "num_features", "num_parameters"),
        "num_channels",
    )
)
"""Attributes that a widening may set: those of torch's modules, and of a `MultiHead`."""


def index_before(later: Sequence[Wider], tensor: str) -> dict[int, Tensor]:
    """Where entries of a parameter or buffer stand that it had before some widenings, by dimension that has grown."""
    found: dict[int, Tensor] = {}
    for wider in later:
        for dimension, places in wider.tensors.get(tensor, {}).items():
            found[dimension] = _after(found.get(dimension), places)
    return found


def sliced(value: Tensor, index: Mapping[int, Tensor]) -> Tensor:
    """The entries that were there before: a copy in the memory format of the whole; the whole itself if none came."""
    found = value
    for dimension, chosen in index.items():
        found = found.index_select(dimension, chosen.to(value.device))
    return found if found is value else like_in_memory(found, value)


def like_in_memory(tensor: Tensor, other: Tensor) -> Tensor:
    """A copy of a tensor with its dimensions in memory in the order of another's: kernels are chosen by that, too."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(other.ndim)
    order = list(range(other.ndim))
    if other.stride() != torch.empty(other.shape, device="meta").stride():
        if last is not None and other.is_contiguous(memory_format=last):
            order = [0, *order[2:], 1]
        else:
            strides = other.stride()
            order.sort(key=lambda dimension: -strides[dimension])
    empty: Tensor = torch.empty_permuted(tensor.shape, order, dtype=tensor.dtype, device=tensor.device)
    return empty.copy_(tensor)


def tensors_before(tensors: Mapping[str, Tensor], later: Sequence[Wider]) -> dict[str, Tensor]:
    """Parameters or buffers by name, without what some widenings have added."""
    grown = {name for wider in later for name in wider.tensors}
    return {
        name: sliced(value.detach(), index_before(later, name)) if name in grown else value
        for name, value in tensors.items()
    }


def layers_before(layers: Iterable[UnitLayer], later: Sequence[Wider]) -> tuple[UnitLayer, ...]:
    """Unit layers as they were before some widenings."""
    return tuple(_resized(layer, reversed(later), 0) for layer in layers)


def layers_after(layers: Iterable[UnitLayer], wider: Wider) -> tuple[UnitLayer, ...]:
    """Unit layers as they are after a widening."""
    return tuple(_resized(layer, [wider], 1) for layer in layers)


def record_before(record: TaskRecord, later: Sequence[Wider]) -> TaskRecord:
    """A task's record with the masks and statistics of the shape that its model had before some widenings."""
    if not later:
        return record
    chosen: dict[str, Tensor] = {}
    for wider in later:
        for layer, places in wider.units.items():
            chosen[layer] = _after(chosen.get(layer), places)

    def by_unit(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: value[chosen[name]] if name in chosen else value for name, value in values.items()}

    return replace(
        record,
        relevant=by_unit(record.relevant),
        relevance=by_unit(record.relevance),
        norm_statistics={
            name: sliced(value, index_before(later, name)) for name, value in record.norm_statistics.items()
        },
    )


def record_after(record: TaskRecord, wider: Wider) -> TaskRecord:
    """A task's record with room for units that came after it: none of them is relevant to it."""

    def by_unit(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: wider.units[name].spread(value, 0) if name in wider.units else value for name, value in values.items()
        }

    statistics = {
        name: grown(value, wider.tensors.get(name, {}), 1.0 if name.endswith("running_var") else 0.0)
        for name, value in record.norm_statistics.items()
    }
    return replace(
        record, relevant=by_unit(record.relevant), relevance=by_unit(record.relevance), norm_statistics=statistics
    )


def grown(value: Tensor, places: Mapping[int, Places], fill: float | Tensor) -> Tensor:
    """A tensor with its entries where they stand after a widening, and others, ``()`` or of the new shape, beside."""
    if not places:
        return value
    before = value
    for dimension, of_dimension in places.items():
        value = of_dimension.spread(value, 0, dimension)
    is_old = torch.ones((), dtype=torch.bool, device=value.device)
    for dimension, of_dimension in places.items():
        here = torch.zeros(of_dimension.size, dtype=torch.bool, device=value.device)
        here[of_dimension.index().to(value.device)] = True
        is_old = is_old & here.view(-1, *[1] * (value.ndim - dimension - 1))
    return like_in_memory(torch.where(is_old, value, torch.as_tensor(fill).to(value)), before)


def to_plain(wider: Wider) -> dict[str, Any]:
    """Dicts, lists and numbers: JSON takes it, too."""
    return {
        "units": {name: _places_to_plain(places) for name, places in wider.units.items()},
        "tensors": {
            name: {str(dimension): _places_to_plain(places) for dimension, places in by_dimension.items()}
            for name, by_dimension in wider.tensors.items()
        },
        "sizes": {
            name: {attribute: list(sizes) for attribute, sizes in by_attribute.items()}
            for name, by_attribute in wider.sizes.items()
        },
    }


def _from_plain(plain: Any) -> Wider:
    """The opposite of `to_plain`.

    Raises:
        ValueError: if it is no widening, naming what is wrong.
    """
    units = {_key(name): _places_from_plain(places) for name, places in get(plain, "units", dict).items()}
    tensors: dict[str, dict[int, Places]] = {}
    for name, by_dimension in get(plain, "tensors", dict).items():
        dimensions = {str(dimension) for dimension in range(_MOST_DIMENSIONS)}
        if not isinstance(by_dimension, dict) or not by_dimension or not dimensions.issuperset(by_dimension):
            raise ValueError(f"not a state of lightning_rnf: {_key(name)!r:.80} has grown along no dimension")
        tensors[name] = {int(key): _places_from_plain(places) for key, places in by_dimension.items()}
    sizes: dict[str, dict[str, tuple[int, int]]] = {}
    for name, by_attribute in get(plain, "sizes", dict).items():
        if not isinstance(name, str) or not isinstance(by_attribute, dict) or not _SIZES.issuperset(by_attribute):
            raise ValueError(f"not a state of lightning_rnf: {name!r:.80} has sizes that no widening changes")
        for pair in by_attribute.values():
            if not (
                isinstance(pair, (list, tuple))
                and len(pair) == 2
                and all(type(size) is int and size in COUNTS for size in pair)
                and 0 < pair[0] <= pair[1]
            ):
                raise ValueError(f"not a state of lightning_rnf: {name!r:.80} has grown from and to {pair!r:.80}")
        sizes[name] = {attribute: (pair[0], pair[1]) for attribute, pair in by_attribute.items()}
    return Wider(units, tensors, sizes)


def all_from_plain(
    plain: Mapping[str, Any], layers: Sequence[UnitLayer], forms: Mapping[str, str], known: Mapping[str, Tensor]
) -> tuple[Wider, ...]:
    """The widenings of a state; none in files from before there were any.

    Raises:
        ValueError: if they are none, or don't lead to the sizes of these layers, parameters and other tensors.
    """
    widenings = tuple(_from_plain(one) for one in get(plain, "widenings", list)) if "widenings" in plain else ()
    _check(widenings, layers, forms, known)
    return widenings


def _key(name: object) -> str:
    """A name that is one of a dict's keys."""
    return get_name({"name": name}, "name")


def _after(index: Tensor | None, places: Places) -> Tensor:
    return places.index() if index is None else places.index()[index]


def _resized(layer: UnitLayer, widenings: Iterable[Wider], side: int) -> UnitLayer:
    for wider in widenings:
        places, sizes = wider.units.get(layer.name), wider.sizes.get(layer.name, {})
        transposed = layer.transposed
        if transposed is not None:
            groups = sizes.get("groups", (transposed[0],) * 2)[side]
            features = sizes.get("in_channels", (transposed[0] * transposed[1],) * 2)[side]
            transposed = (groups, features // groups)
        units = layer.units if places is None else (places.before, places.size)[side]
        layer = replace(layer, units=units, transposed=transposed)
    return layer


def _places_to_plain(places: Places) -> dict[str, Any]:
    return {"size": places.size, "runs": [list(run) for run in places.runs]}


def _places_from_plain(plain: Any) -> Places:
    size = get(plain, "size", int)
    runs: list[Any] = get(plain, "runs", (list, tuple))
    end = 0
    for run in runs:
        if (
            not isinstance(run, (list, tuple))
            or len(run) != 2
            or not all(type(number) is int and number in COUNTS for number in run)
            or run[0] < end
            or run[1] < 1
        ):
            raise ValueError(f"not a state of lightning_rnf: no places in {size} that old entries have: {run!r:.80}")
        end = run[0] + run[1]
    if not runs or not end <= size or size not in COUNTS:
        raise ValueError(f"not a state of lightning_rnf: {size!s:.80} can't be the size of what has grown from {end}")
    return Places(size, tuple((first, count) for first, count in runs))


def _check(
    widenings: Sequence[Wider], layers: Sequence[UnitLayer], forms: Mapping[str, str], known: Mapping[str, Tensor]
) -> None:
    """Check that widenings lead to the sizes of these layers, parameters and other tensors.

    Raises:
        ValueError: naming what they do not lead to.
    """
    units = {layer.name: layer.units for layer in layers}
    shapes = {name: sizes_of(form) for name, form in forms.items()}
    shapes |= {name: list(value.shape) for name, value in known.items()}
    for wider in reversed(widenings):
        for name, places in wider.units.items():
            if units.get(name, places.size) != places.size:  # without tasks no layer is known
                raise ValueError(f"not a state of lightning_rnf: {name!r:.80} never had {places.size} units")
            units[name] = places.before
        for name, by_dimension in wider.tensors.items():
            shape = shapes.get(name, [])
            for dimension, places in by_dimension.items() if name in shapes else ():
                if dimension >= len(shape) or shape[dimension] != places.size:
                    raise ValueError(f"not a state of lightning_rnf: {name!r:.80} never had the size {places.size}")
                shape[dimension] = places.before
    for layer in layers_before(layers, widenings):
        if layer.units < 1 or (layer.transposed is not None and layer.units % layer.transposed[0]):
            raise ValueError(f"not a state of lightning_rnf: {layer.name!r:.80} can't have been so wide before")
