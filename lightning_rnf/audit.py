"""Whether what was promised still holds: fingerprints of frozen rows, and logits that were kept to compare with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_rnf import subnetwork
from lightning_rnf.guard import borrowed
from lightning_rnf.reference import ReferenceData
from lightning_rnf.state import FreezeState, TaskRecord
from lightning_rnf.units import UnitLayer, UnitMap

SAMPLES = 8
"""How many samples a `Probe` keeps, where the batch can be cut."""


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


def drifts(module: nn.Module, state: FreezeState, probes: Mapping[str, Probe], *, masked: bool) -> dict[str, float]:
    """How far the recalled logits of finished tasks are from those of their ends, by task: see `Probe.drift`.

    Tasks without a probe are not in it, nor those that ended in another precision.

    Args:
        module: whole.
        state: the finished tasks.
        probes: by task.
        masked: as for `subnetwork.recall`.
    """
    return {
        name: probe.drift(module, state.layers, state.tasks[name], masked=masked)
        for name, probe in probes.items()
        if name in state.tasks and probe.dtype == next(module.parameters()).dtype
    }


@dataclass(frozen=True, eq=False)
class Probe:
    """A few samples of a task's reference data and their logits at its end. It never leaves the process.

    Attributes:
        batch: on the CPU.
        logits: of the recalled task at its end, ``(N, classes)``, on the CPU.
        reference: how to run the batch, without data of its own.
        device: where the module was; bits are those of its kernels.
        dtype: of the module's parameters.
    """

    batch: Any
    logits: Tensor
    reference: ReferenceData
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(
        cls,
        module: nn.Module,
        layers: Iterable[UnitLayer],
        record: TaskRecord,
        reference: ReferenceData,
        *,
        masked: bool,
    ) -> Probe:
        """Take the first samples of the reference data; ``masked`` as for `subnetwork.recall`."""
        batch = _to(_leading(reference.batches[0]), torch.device("cpu"))
        how = ReferenceData([], 0, 0, reference.predict, reference.forward_context, reference.convert)
        first = next(module.parameters())
        recall = subnetwork.recall(module, layers, record, masked=masked)
        return cls(batch, _recalled(module, batch, how, recall, first.device), how, first.device, first.dtype)

    def on_device(self, module: nn.Module) -> Any:
        """The batch where the module is, in the fit's precision."""
        return self.reference.convert(_to(self.batch, next(module.parameters()).device))

    def drift(self, module: nn.Module, layers: Iterable[UnitLayer], record: TaskRecord, *, masked: bool) -> float:
        """The largest difference of any logit under recall, now against then; 0 means that the bits are the same.

        It is run where the task has ended, wherever the module is now.
        """
        recall = subnetwork.recall(module, layers, record, masked=masked)
        now = _recalled(module, self.batch, self.reference, recall, self.device)
        if torch.equal(now, self.logits):
            return 0.0
        return float((now.double() - self.logits.double()).abs().max())


def _recalled(
    module: nn.Module, batch: Any, how: ReferenceData, recall: AbstractContextManager[None], device: torch.device
) -> Tensor:
    with borrowed(module):
        module.to(device)  # until the borrowing ends
        with recall, torch.no_grad(), how.forward_context():
            logits, _ = how.predict(module, how.convert(_to(batch, device)))
    return logits.detach().cpu()


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


def _leading(batch: Any) -> Any:
    """The first samples, if all tensors in the batch have as many rows; else the whole batch."""
    tensors: list[Tensor] = []
    apply_to_collection(batch, Tensor, tensors.append, allow_frozen=True)
    if all(tensor.ndim > 0 for tensor in tensors) and len({len(tensor) for tensor in tensors}) == 1:
        return apply_to_collection(batch, Tensor, lambda tensor: tensor[:SAMPLES].clone(), allow_frozen=True)
    return batch


def _to(batch: Any, device: torch.device) -> Any:
    return apply_to_collection(batch, Tensor, lambda tensor: tensor.to(device), allow_frozen=True)


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
