"""Rank the units by relevance: Algorithm 1 of the paper, "sort units"."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_rnf.search.criteria import Measured, SubnetworkScore

Normalize = Literal["layer", "none"]
Candidates = Literal["free", "all"]


@dataclass(frozen=True, eq=False)
class Ranking:
    """All units of a network in layer order, and those that may be pruned, least relevant first.

    Attributes:
        sizes: units of each layer, in layer order.
        order: int64 ``(candidates,)``: positions in the concatenation of all layers.
        frozen: bool ``(units,)``: relevant to an earlier task.
        beyond_ration: so many leading candidates are pruned in any case.
    """

    sizes: dict[str, int]
    order: Tensor
    frozen: Tensor
    beyond_ration: int = 0

    @property
    def candidates(self) -> int:
        """How many units may be pruned."""
        return len(self.order)

    def relevant(self, cutoff: int) -> dict[str, Tensor]:
        """Which units remain when the ``cutoff`` least relevant candidates are pruned: bool ``(units,)`` per layer."""
        remaining = torch.ones(len(self.frozen), dtype=torch.bool)
        remaining[self.order[:cutoff]] = False
        return dict(zip(self.sizes, remaining.split(list(self.sizes.values())), strict=True))

    def untouched(self) -> list[str]:
        """The layers that no cutoff takes a unit from."""
        taken = _layer_of(self.sizes)[self.order].bincount(minlength=len(self.sizes))
        return [name for name, candidates in zip(self.sizes, taken.tolist(), strict=True) if not candidates]

    def free(self, cutoff: int) -> int:
        """How many units are relevant to no task when the ``cutoff`` least relevant candidates are pruned."""
        return int((~self.frozen[self.order[:cutoff]]).sum())

    def cutoffs(self, resolution: int = 1) -> list[int]:
        """The search's steps, from the fewest units that may be pruned to all candidates."""
        return [*range(self.beyond_ration, self.candidates, resolution), self.candidates]

    def before(self, cutoff: int, resolution: int = 1) -> int:
        """The search's step before this cutoff; 0 before its first."""
        beyond = self.beyond_ration
        return beyond + (cutoff - beyond - 1) // resolution * resolution if cutoff > beyond else 0

    def milder(self, cutoff: int, resolution: int = 1) -> list[int]:
        """Smaller cutoffs, the largest first: each keeps half as many candidates more, up to all that may be kept."""
        cutoffs = self.cutoffs(resolution)
        kept, found = len(cutoffs) - 1 - cutoffs.index(cutoff), []
        while kept < len(cutoffs) - 1:
            kept = min(max(kept + 1, kept * 3 // 2), len(cutoffs) - 1)
            found.append(cutoffs[len(cutoffs) - 1 - kept])
        return found

    def score(
        self, cutoff: int, measured: Measured, baseline: Measured | None = None, resolution: int = 1
    ) -> SubnetworkScore:
        """What the criterion is shown; ``baseline`` is what was measured at cutoff 0, None: this."""
        baseline = measured if baseline is None else baseline
        return SubnetworkScore(
            cutoff=cutoff,
            accuracy=measured.accuracy,
            baseline=baseline.accuracy,
            units=len(self.frozen),
            relevant=len(self.frozen) - cutoff,
            free=self.free(cutoff),
            free_before=self.free(self.before(cutoff, resolution)),
            samples=measured.samples,
            values=measured.values,
            baseline_values=baseline.values,
        )


def rank(
    relevance: Mapping[str, Tensor],
    frozen: Mapping[str, Tensor],
    *,
    normalize: Normalize = "layer",
    candidates: Candidates = "free",
    ration: float | None = None,
    parts: Mapping[str, Sequence[tuple[Tensor, float]]] | None = None,
) -> Ranking:
    """Order the units by relevance, ascending; ties by layer order, then by index.

    Args:
        relevance: one score per unit, ``(units,)``, by layer, in layer order. Signed: units that speak against the
            true class go before those that speak for it.
        frozen: bool ``(units,)`` by layer, for all layers or for none: relevant to an earlier task.
        normalize: ``"layer"`` divides each layer's relevance by the sum of its absolute values, so that wide and deep
            layers compare, and puts units without any relevance first: they add nothing to the true class. What a layer
            has in ``parts`` is divided part by part.
            ``"none"`` compares raw relevance (the paper).
        candidates: ``"free"``: frozen units are never pruned, they serve every later task at no cost. ``"all"``: every
            unit is ranked anew (the paper).
        ration: the largest share of a layer's free units, in (0, 1], that the task may claim: rounded down, at least
            one unit. The least relevant ones beyond it go first, at any cutoff. None: no limit.
        parts: by layer, if it is several in one, or one that is not to sum to 1: bool ``(units,)``, and what the
            absolute relevance of these units is divided to sum to. Each unit is in one part. None: all layers sum to 1.

    Raises:
        ValueError: if there is no unit, or a relevance is not finite.
    """
    if not relevance:
        raise ValueError("no units to rank")
    scores = []
    for name, values in relevance.items():
        if not values.isfinite().all():
            raise ValueError(f"relevance of layer {name!r} is not finite in {int((~values.isfinite()).sum())} units")
        score = values.detach().to("cpu", torch.float64, copy=True)
        if normalize == "layer":
            # The sum of signed relevance may be near zero or negative and would turn the order round; this sum can't.
            for of_part, total in (parts or {}).get(name, [(torch.ones(len(score), dtype=torch.bool), 1.0)]):
                size = score[of_part].abs().sum().clamp(min=torch.finfo(torch.float64).tiny)
                score[of_part] = score[of_part] / size * total
            # Silencing a unit without relevance costs nothing, one that speaks against the true class may cost much.
            score = torch.where(score == 0, -torch.inf, score)
        scores.append(score)
    sizes = {name: len(values) for name, values in relevance.items()}
    is_frozen = torch.cat([frozen.get(name, torch.zeros(size, dtype=torch.bool)) for name, size in sizes.items()])
    order = torch.argsort(torch.cat(scores), stable=True)
    if candidates == "free":
        order = order[~is_frozen[order]]
    beyond = _beyond_ration(order, sizes, is_frozen, 1.0 if ration is None else ration)
    return Ranking(sizes, torch.cat([order[beyond], order[~beyond]]), is_frozen, int(beyond.sum()))


def _beyond_ration(order: Tensor, sizes: Mapping[str, int], frozen: Tensor, ration: float) -> Tensor:
    """Which candidates the ration takes away: bool ``(candidates,)``, in the order of the candidates."""
    layer_of = _layer_of(sizes)[order]
    beyond = torch.zeros(len(order), dtype=torch.bool)
    for layer in range(len(sizes)):
        free = ((layer_of == layer) & ~frozen[order]).nonzero().view(-1)
        claims = max(1, math.floor(ration * len(free) + 1e-9))  # 0.07 × 100 is 7.000000000000001
        beyond[free[: max(len(free) - claims, 0)]] = True
    return beyond


def _layer_of(sizes: Mapping[str, int]) -> Tensor:
    """The number of each unit's layer: int64 ``(units,)``."""
    return torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(list(sizes.values())))
