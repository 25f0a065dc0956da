"""Parts of a parameter that are read, put back and zeroed: rows, blocks of entries, and entries anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lightning_rnf.runtime import sharding


class Slice:
    """Some rows of a parameter: an index for each of its leading dimensions; None: all of it.

    Two leading dimensions are rare, one has its own faster functions.
    """

    def __init__(self, index: tuple[Tensor, ...] | None) -> None:
        self.index = index

    def read(self, parameter: Tensor) -> Tensor:
        """What a parameter has there now: a copy."""
        rows = sharding.local(parameter)
        if self.index is None:
            return rows.clone()
        return rows.index_select(0, *self.index) if len(self.index) == 1 else rows[self.index]

    def write(self, parameter: Tensor, value: Tensor) -> None:
        """Put back what was read, into the parameter or a copy of it."""
        rows = sharding.local(parameter)
        if self.index is None:
            rows.copy_(value)
            return
        value = value.to(rows)  # after the fit the parameter may be on another device
        index = tuple(one.to(rows.device) for one in self.index)
        if len(index) == 1:
            rows.index_copy_(0, *index, value)
        else:
            rows.index_put_(index, value)

    def zero(self, tensor: Tensor) -> None:
        """Fill the same part of a gradient with zero."""
        tensor = sharding.local(tensor)
        # Filled, not multiplied: zero times NaN is NaN.
        if self.index is None:
            tensor.zero_()
        elif len(self.index) == 1:
            tensor.index_fill_(0, *self.index, 0.0)
        else:
            tensor[self.index] = 0.0

    def chosen(self, parameter: Tensor) -> Tensor:
        """Which entries of the parameter these are: bool of its shape."""
        others = torch.ones_like(sharding.local(parameter), dtype=torch.bool)
        self.zero(others)
        return others.logical_not_()

    def is_at(self, parameter: Tensor, value: Tensor) -> bool:
        """Whether the parameter has there what was read, to the bit: NaN is itself, and 0 is not -0."""
        own = sharding.local(parameter)
        held = own.clone()
        self.write(held, value)
        bits = _BITS[own.element_size()]
        return torch.equal(own.view(bits), held.view(bits))


class Block(Slice):
    """Some rows of a parameter, and of them some columns; where that is most of it, `AllBut` is faster."""

    def __init__(self, rows: Tensor, columns: Tensor) -> None:
        super().__init__(None)
        self.rows, self.columns = rows, columns

    def read(self, parameter: Tensor) -> Tensor:
        """What a parameter has there now: a copy."""
        return sharding.local(parameter).index_select(0, self.rows).index_select(1, self.columns)

    def write(self, parameter: Tensor, value: Tensor) -> None:
        """Put back what was read, into the parameter or a copy of it."""
        own = sharding.local(parameter)
        value, rows, columns = value.to(own), self.rows.to(own.device), self.columns.to(own.device)
        own.index_copy_(0, rows, own.index_select(0, rows).index_copy_(1, columns, value))

    def zero(self, tensor: Tensor) -> None:
        """Fill the same part of a gradient with zero."""
        own = sharding.local(tensor)
        own.index_copy_(0, self.rows, own.index_select(0, self.rows).index_fill_(1, self.columns, 0.0))


class AllBut(Slice):
    """All of a parameter but some rows and, of the others, some columns. What is read is all."""

    def __init__(self, rows: Tensor, columns: Tensor) -> None:
        super().__init__(None)
        self.rows, self.columns = rows, columns

    def write(self, parameter: Tensor, value: Tensor) -> None:
        """Put back what was read, into the parameter or a copy of it."""
        own = sharding.local(parameter)
        with self._kept(own):
            own.copy_(value)

    def zero(self, tensor: Tensor) -> None:
        """Fill the same part of a gradient with zero."""
        own = sharding.local(tensor)
        with self._kept(own):
            own.zero_()

    @contextmanager
    def _kept(self, own: Tensor) -> Iterator[None]:
        rows, columns = self.rows.to(own.device), self.columns.to(own.device)
        of_rows, of_columns = own.index_select(0, rows), own.index_select(1, columns)
        yield
        own.index_copy_(1, columns, of_columns)
        own.index_copy_(0, rows, of_rows)


class Entries(Slice):
    """Entries anywhere in the first two dimensions of a parameter: ``mask`` is bool of those. What is read is all."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__(None)
        self.mask = mask

    def write(self, parameter: Tensor, value: Tensor) -> None:
        """Put back what was read, into the parameter or a copy of it."""
        own = sharding.local(parameter)
        torch.where(self._mask(own), value.to(own), own, out=own)

    def zero(self, tensor: Tensor) -> None:
        """Fill the same part of a gradient with zero."""
        own = sharding.local(tensor)
        own.masked_fill_(self._mask(own), 0.0)

    def _mask(self, tensor: Tensor) -> Tensor:
        return self.mask.to(tensor.device).view(*self.mask.shape, *[1] * (tensor.ndim - self.mask.ndim))


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

LARGEST_BLOCK = 0.6
"""Of a parameter's entries: with more frozen, copying all of it is faster than copying a block (measured on a CPU)."""
