"""Rank the units by relevance and search how many of the least relevant can be silenced.

Pure functions of tensors and callables: nothing here knows a model. Algorithm 1 of the paper, "sort units" and "while
t not reached".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_rnf.criteria import Criterion, SubnetworkScore

Normalize = Literal["layer", "none"]
Candidates = Literal["free", "all"]
Method = Literal["bisect", "linear"]


@dataclass(frozen=True, eq=False)
class Ranking:
    """All units of a network in layer order, and those that may be pruned, least relevant first.

    Attributes:
        sizes: units of each layer, in layer order.
        order: int64 ``(candidates,)``: positions in the concatenation of all layers.
        frozen: bool ``(units,)``: relevant to an earlier task.
    """

    sizes: dict[str, int]
    order: Tensor
    frozen: Tensor

    @property
    def candidates(self) -> int:
        """How many units may be pruned."""
        return len(self.order)

    def relevant(self, cutoff: int) -> dict[str, Tensor]:
        """Which units remain when the ``cutoff`` least relevant candidates are pruned: bool ``(units,)`` per layer."""
        remaining = torch.ones(len(self.frozen), dtype=torch.bool)
        remaining[self.order[:cutoff]] = False
        return dict(zip(self.sizes, remaining.split(list(self.sizes.values())), strict=True))

    def free(self, cutoff: int) -> int:
        """How many units are relevant to no task when the ``cutoff`` least relevant candidates are pruned."""
        return int((~self.frozen[self.order[:cutoff]]).sum())

    def score(self, cutoff: int, accuracy: float, baseline: float, resolution: int = 1) -> SubnetworkScore:
        """What the criterion is shown."""
        return SubnetworkScore(
            cutoff=cutoff,
            accuracy=accuracy,
            baseline=baseline,
            units=len(self.frozen),
            relevant=len(self.frozen) - cutoff,
            free=self.free(cutoff),
            free_before=self.free(max(cutoff - 1, 0) // resolution * resolution),
        )


@dataclass(frozen=True)
class Evaluation:
    """One measured cutoff and the criterion's verdict."""

    score: SubnetworkScore
    accepted: bool


@dataclass(frozen=True)
class SearchResult:
    """The accepted score and every evaluation, in the order in which they were made."""

    accepted: SubnetworkScore
    evaluations: tuple[Evaluation, ...]


def rank(
    relevance: Mapping[str, Tensor],
    frozen: Mapping[str, Tensor],
    *,
    normalize: Normalize = "layer",
    candidates: Candidates = "free",
) -> Ranking:
    """Order the units by relevance, ascending; ties by layer order, then by index.

    Args:
        relevance: one score per unit, ``(units,)``, by layer, in layer order. Signed: units that speak against the
            true class go before those that speak for it.
        frozen: bool ``(units,)`` by layer, for all layers or for none: relevant to an earlier task.
        normalize: ``"layer"`` divides each layer's relevance by the sum of its absolute values, so that wide and deep
            layers compare, and puts units without any relevance first: they add nothing to the true class.
            ``"none"`` compares raw relevance (the paper).
        candidates: ``"free"``: frozen units are never pruned, they serve every later task at no cost. ``"all"``: every
            unit is ranked anew (the paper).

    Raises:
        ValueError: if there is no unit, or a relevance is not finite.
    """
    if not relevance:
        raise ValueError("no units to rank")
    scores = []
    for name, values in relevance.items():
        if not values.isfinite().all():
            raise ValueError(f"relevance of layer {name!r} is not finite in {int((~values.isfinite()).sum())} units")
        score = values.detach().to("cpu", torch.float64)
        if normalize == "layer":
            # The sum of signed relevance may be near zero or negative and would turn the order round; this sum can't.
            score = score / score.abs().sum().clamp(min=torch.finfo(torch.float64).tiny)
            # Silencing a unit without relevance costs nothing, one that speaks against the true class may cost much.
            score = torch.where(score == 0, -torch.inf, score)
        scores.append(score)
    sizes = {name: len(values) for name, values in relevance.items()}
    is_frozen = torch.cat([frozen.get(name, torch.zeros(size, dtype=torch.bool)) for name, size in sizes.items()])
    order = torch.argsort(torch.cat(scores), stable=True)
    if candidates == "free":
        order = order[~is_frozen[order]]
    return Ranking(sizes, order, is_frozen)


def search_cutoff(
    ranking: Ranking,
    measure: Callable[[int], float],
    criterion: Criterion,
    *,
    method: Method = "bisect",
    resolution: int = 1,
) -> SearchResult:
    """Find a large cutoff that the criterion accepts.

    Cutoff 0, the whole network, is measured first and needs no verdict. The returned cutoff has been measured. Accuracy
    is not monotone in the cutoff: both methods end at *a* boundary, where the next measured cutoff is rejected.

    Args:
        ranking: the units in the order in which they go.
        measure: accuracy in [0, 1] with that many candidates silenced.
        criterion: shown each score.
        method: ``"bisect"``: about log2(candidates / resolution) evaluations. ``"linear"``: the paper's loop, from the
            least relevant upwards until the first rejection.
        resolution: units per step (the paper's pruning ratio r), at least 1.

    Raises:
        ValueError: if the resolution is below 1.
    """
    if resolution < 1:
        raise ValueError(f"resolution is {resolution}, expected at least 1 unit per step")
    evaluations: list[Evaluation] = []

    def accepts(cutoff: int) -> bool:
        accuracy = measure(cutoff)
        baseline = evaluations[0].score.accuracy if evaluations else accuracy
        score = ranking.score(cutoff, accuracy, baseline, resolution)
        evaluations.append(Evaluation(score, accepted=cutoff == 0 or bool(criterion(score))))
        return evaluations[-1].accepted

    cutoffs = [*range(0, ranking.candidates, resolution), ranking.candidates]
    walk = {"bisect": _bisect, "linear": _linear}[method]
    accepts(0)
    last = cutoffs[walk(lambda step: accepts(cutoffs[step]), len(cutoffs) - 1)] if ranking.candidates else 0
    accepted = next(evaluation.score for evaluation in evaluations if evaluation.score.cutoff == last)
    return SearchResult(accepted, tuple(evaluations))


def _bisect(accepts: Callable[[int], bool], steps: int) -> int:
    """The step below a boundary in 0 … steps; 0 is taken as accepted."""
    accepted, rejected = 0, steps + 1
    while rejected - accepted > 1:
        middle = (accepted + rejected) // 2
        if accepts(middle):
            accepted = middle
        else:
            rejected = middle
    return accepted


def _linear(accepts: Callable[[int], bool], steps: int) -> int:
    """The step before the first rejection in 1 … steps."""
    for step in range(1, steps + 1):
        if not accepts(step):
            return step - 1
    return steps
