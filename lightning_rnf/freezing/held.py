"""One parameter's rows in a fit: what of it is frozen, what is elastic, and where they were."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rnf.freezing.rows import LearnRows
from lightning_rnf.freezing.slices import LARGEST_BLOCK, AllBut, Block, Entries, Slice
from lightning_rnf.freezing.stillness import Stillness, writes_of_step
from lightning_rnf.runtime import sharding


class HeldRows:
    """One parameter's frozen rows and its elastic ones, of those that this process has.

    Args:
        parameter: whose rows they are.
        factor: on the learning rate, as from `elasticities`.
        is_transposed: whether the dimensions that tell units apart don't begin with rows.

    Attributes:
        still: follows what steps leave alone; None: nobody knows, so what is frozen is put back after each.
        learn: the hook that makes the weight's gradient by free rows alone; None: there is none.
    """

    def __init__(self, parameter: nn.Parameter, factor: Tensor, *, is_transposed: bool = False) -> None:
        self.parameter = parameter
        self.factor = factor
        self.is_transposed = is_transposed
        self.is_whole = not bool(factor.any())
        self.frozen: Slice | None = None
        self.free: Tensor | None = None
        self.elastic: Slice | None = None
        self.pinned: Tensor
        self.pinned_writes = -1
        self.before: Tensor
        self.weight: Tensor
        self.learn: LearnRows | None = None
        self.still: Stillness | None = None

    def hold(self) -> None:
        """Start to hold what is frozen where it is now."""
        factor = sharding.local_rows(self.parameter, self.factor)
        elastic = (factor != 0) & (factor != 1)
        self.frozen = self.held(factor == 0)
        self.elastic = self.where(elastic)
        self.free = None if self.frozen is None else self.travelling(factor)
        if self.frozen is not None:
            self.pinned = self.frozen.read(self.parameter)
            self.pinned_writes = sharding.writes(self.parameter)
        self.still = None
        if self.elastic is not None:
            factors = factor if self.elastic.index is None else factor[elastic]
            inner = [1] * (self.parameter.ndim - factor.ndim)
            self.weight = factors.view((*factors.shape, *inner)).to(sharding.local(self.parameter))

    def where(self, chosen: Tensor) -> Slice | None:
        """Those entries along the leading dimensions; None: there are none."""
        if not chosen.any():
            return None
        return Slice(None if chosen.all() else chosen.nonzero().to(self.parameter.device).unbind(1))

    def held(self, chosen: Tensor) -> Slice | None:
        """As `where`, by blocks and masks where entries are told apart."""
        if chosen.ndim < 2 or not chosen.any() or chosen.all():
            return self.where(chosen)
        rows, columns = chosen.any(dim=1), chosen.any(dim=0)
        count, device = int(rows.sum()) * int(columns.sum()), self.parameter.device
        if count == int(chosen.sum()) and count <= LARGEST_BLOCK * chosen.numel():
            return Block(*(one.nonzero().view(-1).to(device) for one in (rows, columns)))
        if count == int(chosen.sum()):
            return AllBut(*((~one).nonzero().view(-1).to(device) for one in (rows, columns)))
        return Entries(chosen.to(device))

    def travelling(self, factor: Tensor) -> Tensor | None:
        """Of what a gradient that other processes have is of use: whole rows of a weight, if anything of them is."""
        if factor.ndim == 2 and not self.is_transposed:
            factor = factor.any(dim=1)
        return None if factor.ndim and bool(factor.all()) else factor.nonzero().to(self.parameter.device)

    def mask_gradients(self) -> Any:
        """Fill the gradient of what is frozen with zero whenever it arrives: the hook's handle."""
        # What the user keeps from training may be let go later (BackboneFinetuning), but takes no hook until then.
        flag = self.parameter.requires_grad
        handle = self.parameter.requires_grad_(True).register_post_accumulate_grad_hook(self._mask_gradient)
        self.parameter.requires_grad_(flag)
        return handle

    @torch.no_grad()
    def _mask_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        assert self.frozen is not None
        if self.learn is None or not self.learn.has_made(parameter.grad):
            self.frozen.zero(parameter.grad)
        if self.still is not None:
            self.still.note_masked(parameter.grad)

    def remember(self) -> None:
        """Before a step: where elastic rows are."""
        if self.elastic is not None:
            self.before = self.elastic.read(self.parameter)

    def pin(self) -> None:
        """Put what is frozen back."""
        if self.frozen is not None:
            self.frozen.write(self.parameter, self.pinned)
            self.pinned_writes = sharding.writes(self.parameter)

    def was_left_alone(self, optimizer: torch.optim.Optimizer, group: Mapping[str, Any] | None) -> bool:
        """Whether a step has left what is frozen where it was, and nobody else has written either.

        Args:
            optimizer: that has made the step.
            group: of its parameter groups the one of this parameter; None: there is none.
        """
        if self.still is None:
            return False
        if not self.still.holds(optimizer, group):
            if group is not None:
                self.still = None
            return False
        writes = sharding.writes(self.parameter)
        if writes != self.pinned_writes + writes_of_step(optimizer, group, self.parameter):
            return False
        self.pinned_writes = writes
        return True

    def slow_down(self) -> None:
        """After a step: leave elastic rows that share of the way from where they were."""
        if self.elastic is not None:
            self.elastic.write(self.parameter, torch.lerp(self.before, self.elastic.read(self.parameter), self.weight))
