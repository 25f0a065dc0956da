"""What one walk of the whole network through all reference data tells besides its accuracy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rnf.anatomy import Flat, Routes, UnitMap, is_numbers
from lightning_rnf.runtime import Ranks
from lightning_rnf.tasks.reference import ReferenceData


class Survey:
    """Notes which modules run on which batches, and how the answers are spread over the classes.

    Attributes:
        routes: what runs that the trace of one batch has not seen.
    """

    def __init__(self, module: nn.Module, units: UnitMap) -> None:
        self.routes = Routes(module, units)
        self._counts: Tensor | None = None
        self._targets = 0
        self._widths: tuple[int, ...] | None = None

    @contextmanager
    def of(self, reference: ReferenceData, walk: int) -> Iterator[ReferenceData]:
        """The same data, seen on their way through the network; a walk is named by its cutoff."""
        is_first = not self.routes.missed
        layout = reference.predict.layout if isinstance(reference.predict, Flat) else None
        self._widths = tuple(head.classes for head in layout.heads) if layout and layout.heads else None

        def predict(module: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
            logits, target = Flat.like(reference.predict, reference.predict)(module, batch)
            if not is_numbers(target):  # the best that is always the same explains nothing
                self._count(logits.shape[1], target)
            return logits, target

        batches: Any = self.routes.each(reference.batches, walk)
        with self.routes.watching():
            seen = Flat.like(reference.predict, predict)
            yield replace(reference, batches=batches, predict=seen if is_first else reference.predict)

    def constant_accuracy(self, ranks: Ranks) -> float:
        """Accuracy of the best answer that is always the same: of one class, or of one set of labels; in [0, 1].

        Of several heads at once, of one class for each. Of numbers 0: the mean of them explains nothing.
        """
        found = ranks.gather((self._counts, self._targets))
        counts = [one for one, _ in found if one is not None]
        targets = sum(number for _, number in found)
        if not counts or not targets:
            return 0.0
        shares = torch.stack(counts).sum(dim=0) / targets
        if shares.ndim == 2:  # of each label: there or not
            return float(shares.max(dim=1).values.mean())
        heads = shares.split(self._widths) if self._widths else (shares,)
        return float(sum(share.max() for share in heads))

    def _count(self, classes: int, target: Tensor) -> None:
        target = target.detach()
        if target.ndim == 1:
            counts = target.bincount(minlength=classes).cpu().double()
        else:
            there = target.bool().sum(dim=0).cpu().double()
            counts = torch.stack([there, len(target) - there], dim=1)
        self._counts = counts if self._counts is None else self._counts + counts
        self._targets += len(target)
