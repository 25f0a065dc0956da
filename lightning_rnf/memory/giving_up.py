"""The finished tasks without one of them: what no other task uses is free again."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace

from torch import Tensor

from lightning_rnf.memory.embeddings import joined
from lightning_rnf.memory.record import TaskRecord
from lightning_rnf.memory.state import FreezeState
from lightning_rnf.memory.widening import layers_before

NOT_YET = -1
"""As `FreezeState.resets`: free units were not reset since a task was given up."""


def without(state: FreezeState, task: str) -> FreezeState:
    """The state as if a task had never ended; the given one stays as it is.

    Units that are relevant to other tasks stay frozen, and so do shared parameters that one of them may use: which of
    these a task's forward has read is known only of those that were shared for the first time at its end. They stay if
    a task has ended after it, and are from then on that one's to be compared with their fingerprints.

    Args:
        state: the finished tasks; what a fit has left that was given up is not in the result.
        task: name of a finished one.

    Raises:
        KeyError: if there is no such finished task.
    """
    given_up = state.task(task)
    names = list(state.tasks)
    later = names[names.index(task) + 1 :]
    own = {name: row for name, row in given_up.rows.items() if name in state.shared}
    heir = later[0] if later else None
    left = {name: record for name, record in state.tasks.items() if name != task}
    if heir is not None:
        if given_up.widenings != left[heir].widenings:  # they were taken in another shape than the heir's
            own = {name: row if "@" in row else f"{row}@{given_up.widenings}" for name, row in own.items()}
        left[heir] = replace(left[heir], rows={**left[heir].rows, **own})
    before = names[: names.index(task)]
    if before:  # what it heard of rows that were changed after it, those from before hear, too
        last = left[before[-1]]
        left[last.name] = replace(last, old_rows=joined(last.old_rows, given_up.old_rows))
    for name in later:
        if (portrait := left[name].portrait) is not None:
            left[name] = replace(left[name], portrait=portrait.without(task))
    tasks = {record.name: record for record in _as_alone(left, task, later, state)}
    known_units = bool(tasks or state.initial)  # free units are to be reset though no task is left
    shared = tuple(name for name in state.shared if tasks and (heir is not None or name not in own))
    return FreezeState(
        layers=state.layers if known_units else (),
        shared=shared,
        kept=tuple(name for name in state.kept if name in shared),
        tasks=tasks,
        initial=state.initial,
        resets=NOT_YET if state.initial else min(state.resets, len(tasks)),
        forms=state.forms if known_units else {},
        widenings=state.widenings,
        embeddings=state.embeddings if tasks else (),
        own_rows=state.own_rows if tasks else (),
    )


def _as_alone(
    records: Mapping[str, TaskRecord], task: str, later: Collection[str], state: FreezeState
) -> Iterator[TaskRecord]:
    """What is said of a task in the records of others goes, and what was free after them is counted anew."""
    frozen: dict[str, Tensor] = {}
    for record in records.values():
        frozen = {layer: mask | frozen.get(layer, mask) for layer, mask in record.relevant.items()}
        yield replace(
            record,
            drift={name: value for name, value in record.drift.items() if name != task},
            tests={name: logged for name, logged in record.tests.items() if name != task},
            free_weights={} if record.name in later else record.free_weights,  # takes the model to tell
            capacity={
                layer.name: 1.0 - int(frozen[layer.name].sum()) / layer.units
                for layer in layers_before(state.layers, state.later(record))
            },
        )
