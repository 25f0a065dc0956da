"""Whether recall is still exact: a few samples of each task, kept with their logits to be run again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_rnf.anatomy import UnitLayer
from lightning_rnf.memory import FreezeState, TaskRecord
from lightning_rnf.recall import subnetwork
from lightning_rnf.runtime import borrowed
from lightning_rnf.tasks.reference import ReferenceData

SAMPLES = 8
"""How many samples a `Probe` keeps, where the batch can be cut."""


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


def _leading(batch: Any) -> Any:
    """The first samples, if all tensors in the batch have as many rows; else the whole batch."""
    tensors: list[Tensor] = []
    apply_to_collection(batch, Tensor, tensors.append, allow_frozen=True)
    if all(tensor.ndim > 0 for tensor in tensors) and len({len(tensor) for tensor in tensors}) == 1:
        return apply_to_collection(batch, Tensor, lambda tensor: tensor[:SAMPLES].clone(), allow_frozen=True)
    return batch


def _to(batch: Any, device: torch.device) -> Any:
    return apply_to_collection(batch, Tensor, lambda tensor: tensor.to(device), allow_frozen=True)
