"""Whether what the graph of a model says of its silent channels is true of what ``predict`` runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack

import torch
from torch import Tensor

from lightning_rnf.anatomy import UnitLayer, Wiring
from lightning_rnf.freezing import Listening
from lightning_rnf.memory import TaskRecord
from lightning_rnf.recall import subnetwork
from lightning_rnf.runtime import borrowed, evaluating
from lightning_rnf.tasks.reference import ReferenceData


def trusted(module: torch.nn.Module, wiring: Wiring, record: TaskRecord, reference: ReferenceData) -> dict[str, Tensor]:
    """Which channels layers read in a task's recall, `Wiring.heard`, where it was seen that the others are zero.

    Args:
        module: the model.
        wiring: of it.
        record: of the task.
        reference: of which rank 0 runs its first batch; it decides for all.
    """
    heard = wiring.heard(record.relevant)

    def confirmed() -> set[str]:
        ears = listened(module, wiring.layers, record.relevant, heard, reference)
        return ears.seen - ears.wrong

    names = reference.ranks.decided(confirmed) if heard else set()
    return {name: channels for name, channels in heard.items() if name in names}


def listened(
    module: torch.nn.Module,
    layers: Iterable[UnitLayer],
    relevant: Mapping[str, Tensor],
    heard: Mapping[str, Tensor],
    reference: ReferenceData,
) -> Listening:
    """Run the first batch as a task's sub-network, through ``predict``, and see whether silent channels are zero.

    Args:
        module: the model.
        layers: its unit layers.
        relevant: bool ``(units,)`` by layer: those that speak.
        heard: bool ``(channels,)`` by layer, as from `Wiring.heard`.
        reference: of which the first batch is run.
    """
    ears = Listening()
    with ExitStack() as stack:
        for context in (borrowed(module), evaluating(module), torch.no_grad(), reference.forward_context()):
            stack.enter_context(context)
        with subnetwork.silence(module, layers, relevant), ears.to(module, layers, heard):
            reference.predict(module, reference.example)
    return ears
