"""Whether what was frozen is still what it was: fingerprints of rows, taken at a task's end and compared ever after."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_rnf.anatomy import UnitLayer, UnitMap
from lightning_rnf.memory.state import FreezeState, TaskRecord


def fingerprints(module: nn.Module, units: UnitMap, record: TaskRecord, state: FreezeState) -> dict[str, str]:
    """What a task that ends now has frozen: 128 bits of BLAKE2 for the relevant rows of each layer, by its name.

    Besides, by the head's name, for the head; and by parameter, for the shared ones that no earlier task has frozen. A
    bit that changes in any of them changes the fingerprint; to which number it has changed can't be told.

    Args:
        module: whole, on any device.
        units: of the module.
        record: of the task.
        state: of the earlier tasks.
    """
    new = [name for name in units.shared if name not in state.shared]
    return _fingerprints(dict(module.named_parameters(remove_duplicate=False)), units.layers, record, new)


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
        cls, parameters: Mapping[str, Tensor], state: FreezeState, drift: Mapping[str, float] | None = None
    ) -> Audit:
        """Compare a model's parameters with the fingerprints of all that the finished tasks have frozen.

        Args:
            parameters: by name; `FreezeState.check_parameters` has let them pass.
            state: the finished tasks.
            drift: as `drifts` gives it.
        """
        compared = {name: _compared(parameters, state, record) for name, record in state.tasks.items()}
        return cls(
            {name: differing for name, (differing, _) in compared.items()},
            {name: unknown for name, (_, unknown) in compared.items()},
            drift or {},
        )


def changed(parameters: Mapping[str, Tensor], state: FreezeState, task: str) -> tuple[str, ...]:
    """`Audit.changed` of one task."""
    return _compared(parameters, state, state.task(task))[0]


def _compared(
    parameters: Mapping[str, Tensor], state: FreezeState, record: TaskRecord
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What of a task's own is not bit-equal, and what has no fingerprint."""
    # A shared parameter is its whose fingerprint says so; without any it might be anybody's, and counts as the first's.
    known = {name for other in state.tasks.values() for name in other.rows}
    is_first = record is next(iter(state.tasks.values()))
    shared = [name for name in state.shared if name in record.rows or (is_first and name not in known)]
    now = _fingerprints(parameters, state.layers, record, shared)
    differing = tuple(name for name in now if name in record.rows and record.rows[name] != now[name])
    return differing, tuple(name for name in now if name not in record.rows)


def _fingerprints(
    own: Mapping[str, Tensor], layers: Iterable[UnitLayer], record: TaskRecord, shared: Iterable[str]
) -> dict[str, str]:
    found = {}
    for layer in layers:
        mask = record.relevant[layer.name]
        rows = {name: layer.spread(name, mask).to(own[name].device) for name in layer.parameters}
        found[layer.name] = _digest(own[name].detach()[chosen] for name, chosen in rows.items())
    found[record.head] = _digest(own[name].detach() for name in record.head_parameters)
    return found | {name: _digest([own[name].detach()]) for name in shared}


def _digest(tensors: Iterable[Tensor]) -> str:
    found = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        found.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
