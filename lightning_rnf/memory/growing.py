"""The finished tasks after their model was made wider: as they were, with room for units that none of them knows."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lightning_rnf.anatomy import Wider
from lightning_rnf.memory.model import sizes_of
from lightning_rnf.memory.state import FreezeState
from lightning_rnf.memory.widening import grown, layers_after, record_after


def wider(state: FreezeState, found: Wider, drawn: Mapping[str, Tensor]) -> FreezeState:
    """The state after a widening; the given one stays as it is. What a fit has left that was given up is not in it.

    Args:
        state: the finished tasks.
        found: the widening.
        drawn: what new entries of parameters and buffers start from, by name, of the new shape.
    """
    return FreezeState(
        layers=layers_after(state.layers, found),
        shared=state.shared,
        kept=state.kept,
        tasks={name: record_after(record, found) for name, record in state.tasks.items()},
        initial={
            name: grown(value, found.tensors[name], drawn[name]) if name in found.tensors else value
            for name, value in state.initial.items()
        },
        resets=state.resets,
        forms={name: _form(form, found, name) for name, form in state.forms.items()},
        widenings=(*state.widenings, found),
        embeddings=state.embeddings,
        own_rows=state.own_rows,
    )


def _form(form: str, found: Wider, name: str) -> str:
    sizes = sizes_of(form)
    for dimension, places in found.tensors.get(name, {}).items():
        sizes[dimension] = places.size
    return f"{form.partition(' ')[0]} {tuple(sizes)}"
