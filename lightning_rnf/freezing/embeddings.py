"""Rows of an embedding that are not frozen: each stays as it is until a gradient of this fit reaches it.

Weight decay would move them all, and earlier tasks hear them. A gradient tells which rows a step has read, in all
processes alike and whatever was compiled: a row that was not read has none, and a row without one has nothing to learn.
What a fit has changed is kept for the tasks before it, so rows may be frozen once a task has read them, or each task
may have its own.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from lightning_rnf.memory import OldRows
from lightning_rnf.runtime import arguments

EmbeddingRows = Literal["per_task", "frozen"]
MOST = 2**23
"""Numbers in a table of which each task has rows of its own unasked: 32 MiB in single precision, a task, at most."""


def check_rows(asked: EmbeddingRows | None, retention: str) -> EmbeddingRows | None:
    """Return what is asked for if there is such a thing, and recall can bring rows back.

    Raises:
        ValueError: otherwise.
    """
    if asked is None or arguments.one_of("embeddings", asked, EmbeddingRows) == "frozen":
        return asked
    if retention == "paper":
        raise ValueError(
            "embeddings='per_task' is brought back by recall: it goes with retention='exact', not with 'paper', where "
            "recall brings nothing back and embeddings are frozen whole after the first task"
        )
    return asked


def has_own_rows(weight: Tensor, asked: EmbeddingRows | None, elasticity: float) -> bool:
    """Whether each task has its own rows of an embedding, or they are frozen once a task has read them.

    Args:
        weight: ``(rows, width)``.
        asked: what the user wants; None: rows of their own for tables that are not large, and that aren't elastic.
        elasticity: factor on the learning rate of what a finished task needs.
    """
    return weight.numel() <= MOST and not elasticity if asked is None else asked == "per_task"


class Unread:
    """One embedding's rows that are not frozen, for the length of a fit.

    Args:
        weight: ``(rows, width)``, as it is now.
        frozen: those that are, bool ``(rows,)``; None: no row.
        learned: of the others, those that have learned something before this fit was stopped and resumed; None: none.

    Raises:
        ValueError: if ``learned`` is of another embedding.
    """

    def __init__(self, weight: nn.Parameter, frozen: Tensor | None = None, learned: Tensor | None = None) -> None:
        device = weight.device
        free = torch.ones(len(weight), dtype=torch.bool, device=device) if frozen is None else ~frozen.to(device)
        if learned is not None and len(learned) != len(weight):
            raise ValueError(
                f"the checkpoint is of another model: an embedding had {len(learned)} rows, here it has {len(weight)}"
            )
        self.weight = weight
        self._free = None if frozen is None else free.nonzero().view(-1)
        chosen = torch.zeros_like(free) if learned is None else learned.to(device) & free
        self._learned = chosen if self._free is None else chosen[self._free]
        self._before = self._of(weight).clone()
        self._writes = -1  # that torch had counted when they were put back

    @torch.no_grad()
    def note(self) -> None:
        """After a step: what has a gradient has been read; of an optimizer that drops gradients, what it has moved."""
        gradient = self.weight.grad
        if gradient is None:
            if self.weight._version != self._writes:
                now = self._of(self.weight)
                self._learned |= (now != self._before.to(now)).any(dim=1).to(self._learned.device)
        else:
            rows = self._of(gradient.to_dense() if gradient.is_sparse else gradient)
            self._learned |= rows.any(dim=1)  # NaN counts, too

    @torch.no_grad()
    def pin(self, *, written_only: bool = False) -> None:
        """Put the others back, whoever moved them; ``written_only`` as in `Freezer.pin`."""
        if written_only and self.weight._version == self._writes:
            return
        weight = self.weight.detach()
        learned, before = self._learned.to(weight.device), self._before.to(weight)
        rows = self._of(weight)
        torch.where(learned[:, None], rows, before, out=rows)
        if self._free is not None:
            weight.index_copy_(0, self._free.to(weight.device), rows)
        self._writes = self.weight._version

    def learned(self) -> Tensor:
        """Those that have learned something in this fit: bool ``(rows,)``, on the CPU."""
        learned = self._learned.cpu()
        if self._free is None:
            return learned.clone()
        return torch.zeros(len(self.weight), dtype=torch.bool).index_copy_(0, self._free.cpu(), learned)

    def before(self) -> OldRows:
        """The same as they were before the fit, or before it was resumed."""
        chosen = self._learned.cpu()
        rows = chosen.nonzero().view(-1) if self._free is None else self._free.cpu()[chosen]
        return OldRows(rows, self._before[self._learned].cpu())

    def _of(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        return tensor if self._free is None else tensor.index_select(0, self._free.to(tensor.device))
