"""Search how many of the least relevant units can be silenced: Algorithm 1 of the paper, "while t not reached"."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

from lightning_rnf.search.criteria import Measured, SubnetworkScore
from lightning_rnf.search.ranking import Ranking

Method = Literal["fewest", "bisect", "linear"]

_GROWTH = 4
"""From one kept count to the next. With 2 the way there and the bisection behind it would cost two, not 1.5."""


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

    @property
    def from_fewest(self) -> tuple[Evaluation, ...]:
        """All evaluations, those that keep the fewest units first.

        The accuracy of a rejected one may have been measured on some of the data only: its ``samples`` say so.
        """
        return tuple(sorted(self.evaluations, key=lambda evaluation: evaluation.score.relevant))


def search_cutoff(
    ranking: Ranking,
    measure: Callable[[int], Measured],
    criterion: Callable[[SubnetworkScore], bool],
    *,
    method: Method = "fewest",
    resolution: int = 1,
    precision: float = 0.0,
) -> SearchResult:
    """Find a large cutoff that the criterion accepts.

    Cutoff 0, the whole network, is measured first and needs no verdict. What the ration takes away is the least that
    is pruned, whatever the verdict. Accuracy is not monotone in the cutoff: ten units may do where eighty don't. So all
    methods end at *a* boundary, and of what they return this holds for any criterion:

    - it has been measured, and accepted, unless it is what the ration takes away;
    - the next larger cutoff that has been measured is rejected, and no larger one is accepted;
    - no cutoff is measured twice.

    If acceptance is monotone, all three return the largest accepted cutoff, to the resolution and, from the fewest, the
    precision.

    Args:
        ranking: the units in the order in which they go.
        measure: what is found with that many candidates silenced.
        criterion: shown each score.
        method: ``"fewest"``: from the fewest units upwards. Of the candidates none is kept first, then steps of 2, 8,
            32, … of them until that is accepted, then it bisects between the last that was rejected and the first that
            was accepted: at most 1.5 times as many evaluations as `about` says of a bisection, most of them of small
            networks. ``"bisect"``: about log2(candidates / resolution) evaluations, halving from both ends; where
            acceptance is not monotone it ends at the upper boundary as likely as not. ``"linear"``: the paper's loop,
            from the least relevant upwards until the first rejection.
        resolution: units per step (the paper's pruning ratio r), at least 1.
        precision: from the fewest, how far the two sides of the boundary may be apart, as a share of what is kept.

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
    walks: dict[Method, Callable[[Callable[[int], bool], int], int]]
    walks = {"fewest": partial(_fewest, precision=precision), "bisect": _bisect, "linear": _linear}
    last = cutoffs[walks[method](lambda step: accepts(cutoffs[step]), len(cutoffs) - 1)]
    found = next(evaluation for evaluation in evaluations if evaluation.score.cutoff == last)
    return SearchResult(found, tuple(evaluations))


def about(ranking: Ranking, method: Method, resolution: int = 1, precision: float = 0.0) -> int:
    """How many evaluations a search makes: at most, and for ``"bisect"`` within one of it."""
    steps = -(-(ranking.candidates - ranking.beyond_ration) // resolution)
    walked = steps
    if method == "bisect":
        walked = (steps + 1).bit_length()  # ⌈log2(steps + 1)⌉, or one more
    elif method == "fewest":
        kept = [*_kept_counts(steps), steps]  # all are rejected up to one, which is accepted; the last is not measured
        walked = max(
            (
                min(number + 1, len(kept) - 1) + _most_between(fewer, more, precision)
                for number, (fewer, more) in enumerate(itertools.pairwise(kept), start=1)
            ),
            default=0,
        )
    return 1 + bool(ranking.beyond_ration) + walked


def _fewest(accepts: Callable[[int], bool], steps: int, precision: float) -> int:
    """The step that keeps the fewest of those that it has seen accepted in 0 … steps; 0 is taken as accepted."""
    rejected, accepted = -1, steps
    for kept in _kept_counts(steps):
        if accepts(steps - kept):
            accepted = kept
            break
        rejected = kept
    return steps - _between(lambda kept: accepts(steps - kept), rejected, accepted, precision)


def _kept_counts(steps: int) -> Iterator[int]:
    """How many steps to keep, from none: 0, 2, 8, 32, … below all of them."""
    kept = 0
    while kept < steps:
        yield kept
        kept = kept * _GROWTH or 2


def _bisect(accepts: Callable[[int], bool], steps: int) -> int:
    """The step below a boundary in 0 … steps; 0 is taken as accepted."""
    return _between(accepts, steps + 1, 0)


def _between(accepts: Callable[[int], bool], rejected: int, accepted: int, precision: float = 0.0) -> int:
    """The accepted side of a boundary between what is rejected and what is accepted, whichever is larger."""
    while not _is_known(rejected, accepted, precision):
        middle = (accepted + rejected) // 2
        if accepts(middle):
            accepted = middle
        else:
            rejected = middle
    return accepted


def _is_known(rejected: int, accepted: int, precision: float) -> bool:
    return abs(rejected - accepted) <= max(1.0, precision * accepted)


def _most_between(rejected: int, accepted: int, precision: float) -> int:
    """How many evaluations a search from the fewest makes at most between these two."""
    if _is_known(rejected, accepted, precision):
        return 0
    middle = (accepted + rejected) // 2
    return 1 + max(_most_between(*sides, precision) for sides in ((rejected, middle), (middle, accepted)))


def _linear(accepts: Callable[[int], bool], steps: int) -> int:
    """The step before the first rejection in 1 … steps."""
    for step in range(1, steps + 1):
        if not accepts(step):
            return step - 1
    return steps
