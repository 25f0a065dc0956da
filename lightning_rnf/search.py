"""Rank the units by relevance and search how many of the least relevant can be silenced.

Pure functions of tensors and callables: nothing here knows a model. Algorithm 1 of the paper, "sort units" and "while
t not reached".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lightning_rnf.criteria import SubnetworkScore

Normalize = Literal["layer", "none"]
Candidates = Literal["free", "all"]
Method = Literal["bisect", "linear"]


@dataclass(frozen=True)
class Measured:
    """What was found: accuracy in [0, 1], the values that the criterion asked for, and on how many samples."""

    accuracy: float
    values: Mapping[str, float] = field(default_factory=dict)
    samples: int = 0


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


@dataclass(frozen=True)
class Evaluation:
    """One measured cutoff and the criterion's verdict."""

    score: SubnetworkScore
    accepted: bool


@dataclass(frozen=True)
class SearchResult:
    """The evaluation whose cutoff is taken, and all of them, in the order in which they were made.

    The one that is taken is accepted, unless the ration alone takes away more than the criterion accepts.
    """

    taken: Evaluation
    evaluations: tuple[Evaluation, ...]


def rank(
    relevance: Mapping[str, Tensor],
    frozen: Mapping[str, Tensor],
    *,
    normalize: Normalize = "layer",
    candidates: Candidates = "free",
    ration: float | None = None,
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
        ration: the largest share of a layer's free units, in (0, 1], that the task may claim: rounded down, at least
            one unit. The least relevant ones beyond it go first, at any cutoff. None: no limit.

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


def search_cutoff(
    ranking: Ranking,
    measure: Callable[[int], Measured],
    criterion: Callable[[SubnetworkScore], bool],
    *,
    method: Method = "bisect",
    resolution: int = 1,
) -> SearchResult:
    """Find a large cutoff that the criterion accepts.

    Cutoff 0, the whole network, is measured first and needs no verdict. What the ration takes away is the least that
    is pruned, whatever the verdict. The returned cutoff has been measured. Accuracy is not monotone in the cutoff: both
    methods end at *a* boundary, where the next measured cutoff is rejected.

    Args:
        ranking: the units in the order in which they go.
        measure: what is found with that many candidates silenced.
        criterion: shown each score.
        method: ``"bisect"``: about log2(candidates / resolution) evaluations. ``"linear"``: the paper's loop, from the
            least relevant upwards until the first rejection.
        resolution: units per step (the paper's pruning ratio r), at least 1.

    Raises:
        ValueError: if the resolution is below 1.
    """
    if resolution < 1:
        raise ValueError(f"resolution is {resolution}, expected at least 1 unit per step")
    whole = measure(0)
    evaluations = [Evaluation(ranking.score(0, whole, resolution=resolution), accepted=True)]

    def accepts(cutoff: int) -> bool:
        score = ranking.score(cutoff, measure(cutoff), whole, resolution)
        evaluations.append(Evaluation(score, accepted=bool(criterion(score))))
        return evaluations[-1].accepted

    cutoffs = ranking.cutoffs(resolution)
    if ranking.beyond_ration:
        accepts(cutoffs[0])
    walk = {"bisect": _bisect, "linear": _linear}[method]
    last = cutoffs[walk(lambda step: accepts(cutoffs[step]), len(cutoffs) - 1)]
    found = next(evaluation for evaluation in evaluations if evaluation.score.cutoff == last)
    return SearchResult(found, tuple(evaluations))


def about(ranking: Ranking, method: Method, resolution: int = 1) -> int:
    """How many evaluations a search makes: at most, and for ``"bisect"`` within one of it."""
    steps = len(ranking.cutoffs(resolution)) - 1
    walked = (steps + 1).bit_length() if method == "bisect" else steps  # ⌈log2(steps + 1)⌉, or one more
    return 1 + bool(ranking.beyond_ration) + walked


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
