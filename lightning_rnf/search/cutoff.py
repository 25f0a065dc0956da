"""Search how many of the least relevant units can be silenced: Algorithm 1 of the paper, "while t not reached"."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from lightning_rnf.search.criteria import Measured, SubnetworkScore
from lightning_rnf.search.ranking import Ranking

Method = Literal["bisect", "linear"]


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
