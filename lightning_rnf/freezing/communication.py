"""What processes tell each other in a step of DDP: gradients of frozen rows are zero in all, they need not travel.

For use as Lightning's own arguments, here with a callback ``rnf``::

    DDPStrategy(ddp_comm_state=rnf, ddp_comm_hook=reduce_free_rows)
"""

# No `from __future__ import annotations`: DDP compares a hook's annotations, and with it they would be strings.

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import GradBucket  # type: ignore[attr-defined]


@runtime_checkable
class FreeRows(Protocol):
    """Knows which rows of a parameter learn."""

    def free_rows(self, parameter: Tensor) -> Tensor | None:
        """Indices ``(rows, leading dimensions)`` of the rows that aren't frozen, in general ``(rows, 1)``; None: all.

        The gradient of all others has to be zero in every process, and the answer the same.
        """


def reduce_free_rows(state: FreeRows, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """Average the gradients of free rows over all processes: a communication hook for ``DistributedDataParallel``.

    The averages are those of torch's ``allreduce_hook``. If all of a bucket is free, the bucket itself travels, as
    there; if nothing is, nothing does. ``fp16_compress_wrapper`` may be put around it.

    Args:
        state: a `RelevanceFreezing` of the fit, or whatever else knows the free rows.
        bucket: gradients, flat.

    Returns:
        The bucket's buffer, once averages are in it. Rows that did not travel are as they were.

    Raises:
        TypeError: if the state knows no free rows.
    """
    if not isinstance(state, FreeRows):
        raise TypeError(
            f"reduce_free_rows was given a {type(state).__name__} that knows no free rows: "
            "use DDPStrategy(ddp_comm_state=rnf, ddp_comm_hook=reduce_free_rows), with the RelevanceFreezing of the fit"
        )
    buffer = bucket.buffer()
    parameters = bucket.parameters()
    free = [state.free_rows(parameter) for parameter in parameters]
    if all(rows is None for rows in free):
        return _average(buffer)
    if all(rows is not None and len(rows) == 0 for rows in free):
        return _completed(buffer)
    # Not `bucket.gradients()`: those are row-major, whatever the order in the buffer is.
    flat = buffer.split([parameter.numel() for parameter in parameters])
    parts = [
        _part(gradient, parameter, rows)
        for gradient, parameter, rows in zip(flat, parameters, free, strict=True)
        if rows is None or len(rows) > 0
    ]
    sizes = [part.size for part in parts]
    packed = buffer.new_empty(sum(sizes))
    for part, place in zip(parts, packed.split(sizes), strict=True):
        part.read(place)

    def unpack(averaged: torch.futures.Future[Tensor]) -> Tensor:
        for part, place in zip(parts, averaged.value().split(sizes), strict=True):
            part.write(place)
        return buffer

    unpacked: torch.futures.Future[Tensor] = _average(packed).then(unpack)
    return unpacked


@dataclass(frozen=True, eq=False)
class _Part:
    """What travels of one gradient: a view of it, and an index for each of the view's leading dimensions; none: all."""

    view: Tensor
    index: Sequence[Tensor]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.index[0]), *self.view.shape[len(self.index) :]) if self.index else self.view.shape

    @property
    def size(self) -> int:
        return torch.Size(self.shape).numel()

    def read(self, place: Tensor) -> None:
        place = place.view(self.shape)
        if len(self.index) == 1:
            torch.index_select(self.view, 0, self.index[0], out=place)
        else:
            place.copy_(self.view[tuple(self.index)] if self.index else self.view)

    def write(self, place: Tensor) -> None:
        place = place.view(self.shape)
        if len(self.index) == 1:
            self.view.index_copy_(0, self.index[0], place)
        elif self.index:
            self.view.index_put_(tuple(self.index), place)
        else:
            self.view.copy_(place)


def _part(flat: Tensor, parameter: Tensor, free: Tensor | None) -> _Part:
    if free is None:
        return _Part(flat, ())
    gradient = flat.view(parameter.shape)
    if _is_dense(parameter):  # DDP lays its gradient out as the parameter then
        gradient = flat.as_strided(parameter.shape, parameter.stride())
    row = gradient[0].numel()
    if free.shape[1] == 1 and gradient.stride(0) == row:
        # Rows that lie one behind the other are copied as such, whatever the order inside of them (channels last).
        gradient = flat.view(len(gradient), row)
    return _Part(gradient, free.unbind(1))


def _is_dense(parameter: Tensor) -> bool:
    """Whether its elements lie in memory one behind the other, in any order of the dimensions."""
    expected = 1
    for stride, size in sorted(zip(parameter.stride(), parameter.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _average(tensor: Tensor) -> torch.futures.Future[Tensor]:
    """Over all processes, in place."""
    tensor.div_(dist.get_world_size())  # before the sum, as torch does it: half precision could overflow
    averaged: torch.futures.Future[Tensor] = (
        dist.all_reduce(tensor, async_op=True).get_future().then(lambda done: done.value()[0])
    )
    return averaged


def _completed(tensor: Tensor) -> torch.futures.Future[Tensor]:
    devices: list[int | str | torch.device] | None = [tensor.device] if tensor.is_cuda else None
    future: torch.futures.Future[Tensor] = torch.futures.Future(devices=devices)
    future.set_result(tensor)
    return future
