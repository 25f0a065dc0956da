"""Whether recall is still exact: a few samples of each task, kept with their logits to be run again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_rnf.anatomy import Inputs, UnitLayer, Wider, logits_of
from lightning_rnf.memory import FreezeState, TaskRecord
from lightning_rnf.recall import subnetwork
from lightning_rnf.runtime import borrowed
from lightning_rnf.tasks.foresight import tried
from lightning_rnf.tasks.reference import ReferenceData

SAMPLES = 8
"""How many samples a `Probe` keeps, where the batch can be cut."""

LARGEST = 2**24
"""Bytes of a batch that can't be cut and is kept whole: 16 MiB, about a graph of some thousand nodes."""


def drifts(module: nn.Module, state: FreezeState, probes: Mapping[str, Probe], *, masked: bool) -> dict[str, float]:
    """How far the recalled logits of finished tasks are from those of their ends, by task: see `Probe.drift`.

    Not in it are tasks without a probe, those that ended in another precision, those whose head does not run, and, with
    a warning, those whose samples do not run any more.

    Args:
        module: whole.
        state: the finished tasks.
        probes: by task.
        masked: as for `subnetwork.recall`.
    """
    dtype = next(module.parameters()).dtype
    found: dict[str, float] = {}
    for name, probe in probes.items():
        if name in state.tasks and probe.dtype == dtype:
            of_task = (state.layers, state.recalled(name), state.widenings)
            drift = tried(partial(probe.drift, module, *of_task, masked=masked), name)
            if drift is not None:
                found[name] = drift
    return found


@dataclass(frozen=True, eq=False)
class Probe:
    """A few samples of a task's reference data and their logits at its end. It never leaves the run of the program.

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
    def of(cls, module: nn.Module, batch: Any, logits: Tensor, reference: ReferenceData) -> Probe:
        """Of a batch and its logits, both as `taken` gives them."""
        first = next(module.parameters())
        return cls(batch, logits, _how(reference), first.device, first.dtype)

    def on_device(self, module: nn.Module) -> Any:
        """The batch where the module is, in the fit's precision."""
        return self.reference.convert(_to(self.batch, next(module.parameters()).device))

    def inputs(self, module: nn.Module) -> Inputs | None:
        """What the model's forward gets for the batch, where the model is now; None: it isn't called."""
        seen: list[Inputs] = []

        def note(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(Inputs(args, kwargs))

        with borrowed(module):
            module.register_forward_pre_hook(note, with_kwargs=True)
            with suppress(Exception):  # of another task's batch
                run(module, self.batch, self.reference, nullcontext(), next(module.parameters()).device)
        return seen[0] if seen else None

    def drift(
        self,
        module: nn.Module,
        layers: Iterable[UnitLayer],
        record: TaskRecord,
        widenings: Sequence[Wider] = (),
        *,
        masked: bool,
    ) -> float | None:
        """The largest difference of any logit under recall, now against then; 0 means that the bits are the same.

        It is run where the task has ended, wherever the module is now. None: the task's head is not the one that runs,
        since heads of the user's own are activated by the user.
        """
        heads: list[str] = []
        watched = module.get_submodule(record.head).register_forward_hook(lambda *call: heads.append(record.head))
        with watched:
            recall = subnetwork.recall(module, layers, record, widenings, masked=masked)
            (now,) = run(module, self.batch, self.reference, recall, self.device)
        return difference(now, self.logits) if heads else None


def taken(
    module: nn.Module, reference: ReferenceData, recall: Callable[[], AbstractContextManager[None]]
) -> tuple[Any, Tensor, float] | None:
    """A few of the reference samples, on the CPU, their logits, and how far those of a second run are from them.

    What can't be cut into samples (a graph, a packed sequence, a sparse matrix) is kept whole if it is small. None: it
    is not, so nothing is.

    Args:
        module: the model.
        reference: of several ranks, that of the first.
        recall: makes the context in which samples are run.
    """
    device = next(module.parameters()).device
    batch = _to(reference.batches[0], torch.device("cpu"))
    for kept in (_leading(batch), batch if _size(batch) <= LARGEST else None):
        if kept is None:
            continue
        if kept is not batch and not _runs(module, kept, reference, device):
            continue
        first, second = run(module, kept, _how(reference), recall(), device, times=2)
        noise, seen = difference(first, second), len(first)
        for other in reference.batches[1:SAMPLES]:  # one sample alone may come out the same by chance
            if seen >= SAMPLES:
                break
            one, again = run(module, other, _how(reference), recall(), device, times=2)
            noise, seen = max(noise, difference(one, again)), seen + len(one)
        return kept, first, noise
    return None


def difference(one: Tensor, other: Tensor) -> float:
    """The largest of any logit; 0: the bits are the same; infinite: they can't be compared."""
    if one.shape != other.shape:
        return float("inf")
    if bool(((one == other) | (one.isnan() & other.isnan())).all()):
        return 0.0
    return float((one.double() - other.double()).abs().max())


def _runs(module: nn.Module, batch: Any, reference: ReferenceData, device: torch.device) -> bool:
    """Whether a part of a batch is one, too: of a graph, the first rows of all its tensors are not."""
    try:
        run(module, batch, reference, nullcontext(), device)
    except Exception:  # whatever the user's forward makes of it
        return False
    return True


def run(
    module: nn.Module,
    batch: Any,
    how: ReferenceData,
    recall: AbstractContextManager[None],
    device: torch.device,
    times: int = 1,
) -> list[Tensor]:
    """Logits on the CPU; of several times, with the random states and buffers that each leaves to the next."""
    with borrowed(module):
        module.to(device)  # until the borrowing ends
        with recall, torch.no_grad(), how.forward_context():
            runs = [logits_of(how.predict, module, how.convert(_to(batch, device))) for _ in range(times)]
    return [logits.detach().cpu() for logits in runs]


def _how(reference: ReferenceData) -> ReferenceData:
    return ReferenceData([], 0, reference.predict, reference.forward_context, reference.convert)


def _leading(batch: Any) -> Any:
    """The first samples, if all tensors in the batch have as many rows; None: they have not."""
    tensors = _tensors(batch)
    strided = all(tensor.layout == torch.strided and tensor.ndim > 0 for tensor in tensors)
    if not strided or len({len(tensor) for tensor in tensors}) != 1:
        return None
    if len(tensors[0]) <= SAMPLES:
        return batch
    return apply_to_collection(batch, Tensor, lambda tensor: tensor[:SAMPLES].clone(), allow_frozen=True)


def _size(batch: Any) -> int:
    """Bytes of all tensors in it."""
    return sum(
        tensor.element_size() * (tensor._nnz() if tensor.is_sparse else tensor.numel()) for tensor in _tensors(batch)
    )


def _tensors(batch: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def seen(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor  # a packed sequence is put together again of what comes back

    apply_to_collection(batch, Tensor, seen, allow_frozen=True)
    return found


def _to(batch: Any, device: torch.device) -> Any:
    return apply_to_collection(batch, Tensor, lambda tensor: tensor.to(device), allow_frozen=True)
