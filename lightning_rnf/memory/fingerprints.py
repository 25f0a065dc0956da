"""Whether what was frozen is still what it was: fingerprints of rows, taken at a task's end and compared ever after."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_rnf.anatomy import UnitLayer, UnitMap, Wider
from lightning_rnf.memory.record import TaskRecord
from lightning_rnf.memory.state import FreezeState
from lightning_rnf.memory.widening import index_before, sliced, tensors_before

Heard = Mapping[str, Mapping[str, Tensor]]
"""Bool ``(channels,)`` by task and layer: those that the layer reads and that may speak in that task's recall."""


def fingerprints(
    module: nn.Module,
    units: UnitMap,
    record: TaskRecord,
    state: FreezeState,
    heard: Mapping[str, Tensor] | None = None,
) -> dict[str, str]:
    """What a task that ends now has frozen: 128 bits of BLAKE2 for the relevant rows of each layer, by its name.

    Besides, by the head's name, for the head; by parameter, for shared ones that no earlier task has frozen, and for
    embeddings, of which the task may hear any row. A bit that changes in any of them changes the fingerprint; to which
    number it has changed can't be told.

    Args:
        module: whole, on any device.
        units: of the module.
        record: of the task.
        state: of the earlier tasks.
        heard: bool ``(channels,)`` by layer, for those of ``record.connections``: only what the task's units have for
            these channels counts of their weights.
    """
    own = dict(module.named_parameters(remove_duplicate=False))
    found = {}
    for layer in units.layers:
        found[layer.name] = _digest_of(own, _chosen(own, layer, record, {record.name: heard or {}}) or {}, ())
    found[record.head] = _of_all(own, record.head_parameters)
    whole = [name for name in units.shared if name not in state.shared]
    whole += dict.fromkeys((*state.embeddings, *units.embeddings))
    return found | {name: _of_all(own, [name]) for name in whole}


@dataclass(frozen=True)
class Audit:
    """What was looked at on a model, and what of it is not as it was when the tasks ended.

    Attributes:
        changed: by task, names of its layers, head and shared parameters that are not bit-equal.
        unknown: by task, those that nothing can be said of: there is no fingerprint of them.
        drift: by task, the largest difference of a logit under recall; only of the tasks that were run, see `drifts`.
    """

    changed: Mapping[str, tuple[str, ...]]
    unknown: Mapping[str, tuple[str, ...]]
    drift: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        parameters: Mapping[str, Tensor],
        state: FreezeState,
        drift: Mapping[str, float] | None = None,
        heard: Heard | None = None,
    ) -> Audit:
        """Compare a model's parameters with the fingerprints of all that the finished tasks have frozen.

        Args:
            parameters: by name; `FreezeState.check_parameters` has let them pass.
            state: the finished tasks.
            drift: as `drifts` gives it.
            heard: by task; without it nothing can be said of layers of which tasks need connections only.
        """
        compared = {name: _compared(parameters, state, record, heard or {}) for name, record in state.tasks.items()}
        return cls(
            {name: differing for name, (differing, _) in compared.items()},
            {name: unknown for name, (_, unknown) in compared.items()},
            drift or {},
        )


def changed(
    parameters: Mapping[str, Tensor], state: FreezeState, task: str, heard: Heard | None = None
) -> tuple[str, ...]:
    """`Audit.changed` of one task."""
    return _compared(parameters, state, state.task(task), heard or {})[0]


def moved(
    parameters: Mapping[str, Tensor], state: FreezeState, learning: Collection[str] = (), heard: Heard | None = None
) -> dict[str, list[str]]:
    """What of the finished tasks' own is not as it was when the last of them ended, by task; only tasks with such.

    What had moved by that end already was told of then (units of some elasticity, another precision) and is left out.
    Rows that a later task has kept, too, are looked at once: it costs a walk over all frozen rows, however many tasks.

    Args:
        parameters: by name; `FreezeState.check_parameters` has let them pass.
        state: the finished tasks.
        learning: names of layers and shared parameters whose relevant rows are not frozen.
        heard: by task; without it layers of which tasks need connections only are not looked at.
    """
    found: dict[str, list[str]] = {}
    seen: dict[str, list[tuple[Tensor, bool]]] = {layer.name: [] for layer in state.layers}
    for record in reversed(state.tasks.values()):
        differing, kept_later = [], []
        for layer in state.layers:
            if layer.name in learning or layer.name not in record.rows:
                continue
            chosen = _chosen(parameters, layer, record, heard or {})
            if chosen is None:
                continue
            kept = _kept(parameters, layer, record, heard or {})
            later = next((same for other, same in seen[layer.name] if not bool((kept & ~other).any())), None)
            if later is None:
                same = _digest_of(parameters, chosen, state.later(record)) == record.rows[layer.name]
                seen[layer.name].append((kept, same))
                differing += [] if same else [layer.name]
            elif later:
                kept_later.append(layer)
        others = {record.head: record.head_parameters, **{name: (name,) for name in state.shared}}
        for name, own in others.items():
            if name in record.rows and name not in learning and not _is_same(parameters, state, record, name, own):
                differing.append(name)
        if record is next(reversed(state.tasks.values())):  # earlier ones hear the same rows, but for those kept
            differing += _embeddings_differ(parameters, state, record, learning)
        if differing and not any(
            _of_layer_then(parameters, state, record, layer, heard or {}) != record.rows[layer.name]
            for layer in kept_later
        ):
            found[record.name] = differing
    return found


def _compared(
    parameters: Mapping[str, Tensor], state: FreezeState, record: TaskRecord, heard: Heard
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What of a task's own is not bit-equal, and what has no fingerprint, or none that can be compared."""
    # A shared parameter is its whose fingerprint says so; without any it might be anybody's, and counts as the first's.
    known = {name for other in state.tasks.values() for name in other.rows}
    is_first = record is next(iter(state.tasks.values()))
    shared = [name for name in state.shared if name in record.rows or (is_first and name not in known)]
    now = {layer.name: _of_layer_then(parameters, state, record, layer, heard) for layer in state.layers}
    then = tensors_before({name: parameters[name] for name in record.head_parameters}, state.later(record))
    now[record.head] = _of_all(then, record.head_parameters)
    differing = [name for name, row in now.items() if row is not None and record.rows.get(name, row) != row]
    differing += _embeddings_differ(parameters, state, record)
    unknown = [name for name in (*now, *shared) if name not in record.rows or now.get(name, "") is None]
    differing += [
        name for name in shared if name in record.rows and not _is_same(parameters, state, record, name, [name])
    ]
    return tuple(differing), tuple(unknown)


def _embeddings_differ(
    parameters: Mapping[str, Tensor], state: FreezeState, record: TaskRecord, learning: Collection[str] = ()
) -> list[str]:
    """Embeddings of which a task hears another row than at its end."""
    old = state.recalled(record.name).old_rows
    heard = {
        name: old[name].written(parameters[name]) if name in old else parameters[name]
        for name in state.embeddings
        if name in record.rows and name not in learning
    }
    return [name for name in heard if _of_all(heard, [name]) != record.rows[name]]


def _is_same(
    parameters: Mapping[str, Tensor], state: FreezeState, record: TaskRecord, name: str, own: Iterable[str]
) -> bool:
    """Whether a head or a shared parameter has its fingerprint, which may have been taken in an earlier shape."""
    row, _, widenings = record.rows[name].partition("@")
    later = state.widenings[int(widenings) if widenings.isdecimal() else record.widenings :]
    return row == _of_all(tensors_before({one: parameters[one] for one in own}, later), own)


def _of_layer_then(
    parameters: Mapping[str, Tensor], state: FreezeState, record: TaskRecord, layer: UnitLayer, heard: Heard
) -> str | None:
    """Of a layer as it was at a task's end, before it was made wider; None: what the task needs of it is not known."""
    chosen = _chosen(parameters, layer, record, heard)
    return None if chosen is None else _digest_of(parameters, chosen, state.later(record))


def _chosen(
    parameters: Mapping[str, Tensor], layer: UnitLayer, record: TaskRecord, heard: Heard
) -> dict[str, Tensor] | None:
    """What a task needs of each of a layer's parameters: bool of its leading dimensions. None: that is not known."""
    mask = record.relevant[layer.name]
    chosen = {name: layer.spread(name, mask) for name in layer.parameters}
    if layer.name in record.connections:
        channels = heard.get(record.name, {}).get(layer.name)
        if channels is None:
            return None
        weight = f"{layer.name}.weight"
        chosen[weight] = layer.connections(mask, channels, parameters[weight].shape)
    return chosen


def _kept(parameters: Mapping[str, Tensor], layer: UnitLayer, record: TaskRecord, heard: Heard) -> Tensor:
    """Which entries of a layer's weight a task needs: bool of its first two dimensions."""
    channels = heard.get(record.name, {}).get(layer.name) if layer.name in record.connections else None
    return layer.connections(record.relevant[layer.name], channels, parameters[layer.weight].shape)


def _digest_of(parameters: Mapping[str, Tensor], chosen: Mapping[str, Tensor], later: Sequence[Wider]) -> str:
    """Of chosen entries, as they were before some widenings."""

    def then(name: str, mask: Tensor) -> Tensor:
        index = index_before(later, name)
        mask = sliced(mask, {dimension: one for dimension, one in index.items() if dimension < mask.ndim})
        value = sliced(parameters[name].detach(), index)
        return value[mask.to(value.device)]

    return _digest(then(name, mask) for name, mask in chosen.items())


def _of_all(own: Mapping[str, Tensor], names: Iterable[str]) -> str:
    return _digest(own[name].detach() for name in names)


def _digest(tensors: Iterable[Tensor]) -> str:
    found = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        found.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
