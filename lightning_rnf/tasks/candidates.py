"""The sub-networks that a search asks about, measured one by one."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import and_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_rnf.anatomy import Flat, UnitMap
from lightning_rnf.freezing import harmless
from lightning_rnf.recall import NormStatistics, Prefix, SubnetworkFlops, norms, subnetwork
from lightning_rnf.runtime import Show, borrowed, evaluating, joined, silent
from lightning_rnf.search import Criterion, Measured, Ranking
from lightning_rnf.tasks.fitting import NOTED, Fitting, Head, scale_of, thinned
from lightning_rnf.tasks.reference import ReferenceData
from lightning_rnf.tasks.refitting import Refitting, Rows
from lightning_rnf.tasks.survey import Survey

log = logging.getLogger(__name__)

LEAST = 64
"""Statistics of norms are taken from batches on which a head is fitted if each has so many samples."""


@dataclass
class Known:
    """What was measured of a network's sub-networks already.

    Attributes:
        measured: by cutoff.
        whole: accuracy of the whole network by its head, ``"trained"`` or ``"fitted"``; empty if heads are not fitted.
        is_better_trained: whether by a metric the whole network is worth more with its trained head: least squares are
            not what perplexity wants, say. Then its sub-networks are measured with both.
        of_shares: what was measured by the share that the task may claim: each has a ranking of its own.
    """

    measured: dict[int, Measured] = field(default_factory=dict)
    whole: dict[str, float] = field(default_factory=dict)
    is_better_trained: bool = False
    of_shares: dict[float | None, dict[int, Measured]] = field(default_factory=dict)

    def turn_to(self, share: float | None) -> None:
        """From here on cutoffs are of this share's ranking; the whole network is in all of them."""
        whole = {cutoff: one for cutoff, one in self.measured.items() if cutoff == 0}
        self.measured = self.of_shares.setdefault(share, {})
        self.measured.update(whole)


@dataclass(frozen=True)
class Taken:
    """The sub-network that a search ends with.

    Attributes:
        measured: with the head that it keeps; None: heads are not fitted, it is what the search has measured.
        statistics: what recall brings back: the buffers with which it was measured.
        head: to be written; None: the one that was trained.
        rows: to be written: those that were fitted to it.
    """

    measured: Measured | None
    statistics: dict[str, Tensor]
    head: Head | None
    rows: Sequence[Rows] = ()

    def write(self, fitting: Fitting | None, *, trains_on: bool = False) -> None:
        """Give the module the rows and the head with which it was measured; one that trains on a head that can."""
        for one in self.rows:
            one.write()
        if fitting is not None and self.head is not None:
            fitting.write(self.head.as_flat_as(fitting.trained) if trains_on else self.head)


class Subnetworks:
    """The sub-networks of a ranking, measured one by one in a borrowed module; see `subnetworks`.

    Attributes:
        limit: the accuracy below which no candidate has to be measured to the end; None: nobody knows it yet.
        known: what was measured; that is not measured again.
    """

    def __init__(
        self,
        module: nn.Module,
        units: UnitMap,
        reference: ReferenceData,
        ranking: Ranking,
        criteria: Sequence[Criterion],
        own_norms: Mapping[str, nn.Module],
        moving_norms: Sequence[nn.Module],
        show: Show,
        expected: int,
        survey: Survey | None,
        fitting: Fitting | None,
        resolution: int,
        counts_flops: bool,
        is_shared: bool,
        known: Known,
        refitting: Refitting | None,
    ) -> None:
        self.module = module
        self.units = units
        self.reference = reference
        self.ranking = ranking
        self.criterion = criteria[0]
        every = reduce(and_, criteria)
        self.metrics, self.worth = every.metrics, every.worth
        self.show = show
        self.expected = expected
        self.survey = Survey(module, units) if survey is None else survey
        self.made = 0
        self.prefix = Prefix(module, ranking.untouched() if ranking.candidates and expected > 1 else ())
        self.limit: float | None = None  # before cutoff 0 is measured nobody knows it
        self.targets: int | None = None  # how many there are, the first to be measured shows: it is measured on all
        # What the ration takes away is taken whatever the verdict.
        self.measured_whole = {0, ranking.beyond_ration}
        self.resolution = resolution
        self.fitting = fitting
        self.known = known
        # What the search has measured is measured once more where heads are fitted: until then rounding may differ.
        self.is_quick = fitting is not None
        # Where batches tell as much as the data, a candidate's norms and its head are found in one pass.
        self.fits_at_once = fitting is not None and fitting.data.has_even_batches(LEAST)
        self.refitting = refitting
        if refitting is not None:
            refitting.look()
        self.ranks = reference.ranks
        self.is_shared = is_shared
        self.norms = own_norms
        self.recalibrated = moving_norms
        self.counts_flops = counts_flops
        counts_here = self.counts_flops and self.ranks.rank == 0
        self.flops = self.ranks.agreed(lambda: _flops_counter(module, units, reference) if counts_here else None)

    def measure(self, cutoff: int) -> Measured:
        """Accuracy, and what else the criterion asks for, with so many candidates silenced, and a head fitted to them.

        The whole network is measured with its trained head, too, and the better one counts; and so is each of its
        sub-networks if a metric asks for it.
        """
        if cutoff not in self.known.measured:
            self.known.measured[cutoff] = self._measured(cutoff)
            self.made += 1
        measured = self.known.measured[cutoff]
        log.debug("search: %d of %d units silenced, accuracy %.3f", cutoff, self.ranking.candidates, measured.accuracy)
        if cutoff == 0:
            self.targets, self.limit = measured.samples, self.criterion.accuracy_limit(measured.accuracy)
        limit = "" if self.limit is None else f" (limit {self.limit:.3f})"
        scored = f"{measured.scored or 'accuracy'} {measured.accuracy:.3f}{limit}"
        self.show("search", self.made, self.expected, f"cutoff {cutoff}, {scored}")
        return measured

    def _measured(self, cutoff: int) -> Measured:
        heads: list[Head] = []

        def fit() -> None:
            heads.append(self._fitted(all_data=False))

        with self._speaking(cutoff, run=fit if self.fits_at_once else None):
            by_both = cutoff == 0 or self.known.is_better_trained
            if by_both or self.fitting is None:
                measured = self._measure(cutoff)
            if self.fitting is not None:
                if not heads:
                    fit()
                with self.fitting.wearing(heads[0]):
                    fitted = self._measure(cutoff, surveyed=cutoff > 0 and not by_both)
                if cutoff == 0:
                    self.known.whole = {"trained": measured.accuracy, "fitted": fitted.accuracy}
                    self.known.is_better_trained = bool(self.metrics) and self.worth(measured) > self.worth(fitted)
                measured = max(measured, fitted, key=self.worth) if by_both else fitted
        return replace(measured, values={**measured.values, **self._count(cutoff)})

    def take(self, cutoff: int, verdict: Callable[[Measured], bool], *, refits: bool = False) -> Taken:
        """End with a sub-network: its head is fitted to all there is to fit it on, unless the task trains on with it.

        Of that one, the one of the search and the trained one it keeps what the verdict accepts, of those what is
        worth most to the criterion, and in doubt the first.

        Args:
            cutoff: how many candidates are silenced.
            verdict: whether a criterion accepts what was measured.
            refits: fit its rows to it, too, unless by heads as in the search it has been worth more without.
        """
        flops = self._count(cutoff)  # of the network as it is, with nothing silenced in it
        for refitted in (True, False) if refits else (False,):
            with self._speaking(cutoff, refits=refitted) as rows:
                if refitted and not self._gains(cutoff, verdict, flops):
                    continue
                buffers = subnetwork.statistics(self.module, self.units)
                measured = head = None
                if self.fitting is not None:
                    measured, head = self._best(cutoff, self.fitting, verdict, flops)
            break
        if self.is_shared:
            moved = {name for name in self.units.buffers if name.rpartition(".")[0] in self.norms}
            buffers = {name: value for name, value in buffers.items() if name not in moved}
        return Taken(measured, buffers, head, tuple(rows))

    def _gains(self, cutoff: int, verdict: Callable[[Measured], bool], flops: Mapping[str, float]) -> bool:
        """Whether a sub-network that the search has measured is worth as much as then, as it speaks now."""
        assert self.fitting is not None, "rows are fitted where heads are"
        with self.fitting.wearing(self._fitted(all_data=False)):
            now = self._measure(cutoff, surveyed=False, to_the_end=True)
        if self.known.is_better_trained:  # the search has measured with both heads, too
            now = max(self._measure(cutoff, surveyed=False, to_the_end=True), now, key=self.worth)
        now, then = replace(now, values={**now.values, **flops}), self.known.measured[cutoff]
        return (verdict(now), self.worth(now)) >= (verdict(then), self.worth(then))

    def _best(
        self, cutoff: int, fitting: Fitting, verdict: Callable[[Measured], bool], flops: Mapping[str, float]
    ) -> tuple[Measured, Head | None]:
        known, found = self.known.measured.get(cutoff), list[tuple[Measured, Head | None]]()
        # A task that trains on inside of it trains its head, too.
        for fitted_on in ("all", "few", "trained") if self.refitting is None else ("few", "trained"):
            head = None if fitted_on == "trained" else self._fitted(all_data=fitted_on == "all")
            seen: list[tuple[Tensor, Tensor]] = []
            with nullcontext() if head is None else fitting.wearing(head), self._as_recall():
                first = cutoff > 0 and not found
                measured = self._measure(cutoff, surveyed=first, to_the_end=True, seen=seen)
            measured = replace(measured, values={**measured.values, **flops})
            if head is not None and not fitting.scaled:
                every = joined(self.ranks.gather(seen))
                logits, target = (torch.cat(parts) for parts in zip(*every, strict=True))
                head = head.scaled(scale_of(logits, target))
            found.append((measured, head))
            # A head of the search was accepted with that sub-network: no worse will do. After a recovery nobody knows.
            if known is not None and self.worth(measured) >= self.worth(known) and verdict(measured):
                break
        return max(found, key=lambda one: (verdict(one[0]), self.worth(one[0])))

    def _fitted(self, *, all_data: bool) -> Head:
        assert self.fitting is not None
        with self.prefix.spared("fitting"):
            return self.fitting.fit(all_data=all_data)

    def _measure(
        self,
        cutoff: int,
        *,
        surveyed: bool = True,
        to_the_end: bool = False,
        seen: list[tuple[Tensor, Tensor]] | None = None,
    ) -> Measured:
        # With half of its units silent a network may overflow: that is no divergence, only a bad sub-network.
        lowest = None if cutoff in self.measured_whole or to_the_end else self.limit
        watched = self.survey.of(self.reference, cutoff) if surveyed else nullcontext(self.reference)
        with self.prefix.spared("accuracy"), watched as reference:
            if seen is not None:
                reference = _noting(reference, seen, sum(self.ranks.gather(len(self.reference.batches))))
            measured = reference.measure(
                self.module, self.metrics, finite=cutoff == 0, lowest=lowest, expected=self.targets
            )
        if self.targets is None:
            self.targets = measured.samples
        if cutoff == 0 and any(math.isnan(value) for value in measured.values.values()):
            raise ValueError(f"a metric of the whole network is not a number: {dict(measured.values)}")
        return measured

    def _count(self, cutoff: int) -> dict[str, float]:
        """Operations of a sub-network, if a criterion asks for them."""
        return self.ranks.decided(lambda: self._counted(cutoff)) if self.counts_flops else {}

    def _counted(self, cutoff: int) -> dict[str, float]:
        assert self.flops is not None
        before = self.ranking.before(cutoff, self.resolution)
        return {
            "flops": float(self.flops(self.ranking.relevant(cutoff)) if cutoff else self.flops.total),
            "flops_before": float(self.flops(self.ranking.relevant(before)) if before else self.flops.total),
        }

    @contextmanager
    def _speaking(
        self, cutoff: int, *, refits: bool = False, run: Callable[[], None] | None = None
    ) -> Iterator[Sequence[Rows]]:
        """Inside the context it speaks, with rows that are fitted to it if asked.

        Statistics of norms are estimated anew from what ``run`` sends through, if that is not the reference data.
        """
        with ExitStack() as stack:
            speaking = self.ranking.relevant(cutoff)
            stack.enter_context(harmless(self.module, self.units.layers, speaking))
            layers = self.units.layers
            stack.enter_context(subnetwork.silence(self.module, layers, speaking, by_columns=lambda: self.is_quick))
            rows: Sequence[Rows] = ()
            if refits and self.refitting is not None:
                rows = stack.enter_context(self.refitting.wearing(speaking, self.recalibrated))
            if self.recalibrated and cutoff > 0:
                stack.enter_context(norms.recalibrated(self.recalibrated, run or self._run, self.ranks))
            yield rows

    @contextmanager
    def _as_recall(self) -> Iterator[None]:
        """Inside the context candidates say, bit for bit, what recall will say."""
        before, self.is_quick = self.is_quick, False
        try:
            yield
        finally:
            self.is_quick = before

    def _run(self) -> None:
        with self.prefix.spared("statistics"):
            self.ranks.agreed(lambda: self.reference.run(self.module))


@contextmanager
def subnetworks(
    module: nn.Module,
    units: UnitMap,
    reference: ReferenceData,
    ranking: Ranking,
    *criteria: Criterion,
    norm_statistics: NormStatistics,
    recalibrate_norm: bool,
    resolution: int = 1,
    show: Show = silent,
    expected: int = 1,
    survey: Survey | None = None,
    fitting: Fitting | None = None,
    known: Known | None = None,
    refitting: Refitting | None = None,
) -> Iterator[Subnetworks]:
    """Inside the context the module is borrowed, in eval mode, and its sub-networks can be measured.

    Args:
        module: the model.
        units: of it.
        reference: what accuracy is measured on.
        ranking: the units in the order in which they go.
        criteria: the first is the search's; what any of them asks for is measured.
        norm_statistics: whether recall brings running statistics back.
        recalibrate_norm: whether they are estimated anew for each candidate.
        resolution: units per step of the search.
        show: how far it has come.
        expected: how many evaluations there will be.
        survey: of the first walk; None: nothing is asked.
        fitting: of the task's head to each candidate; None: as it was trained.
        known: what was measured before, and gets what is measured now.
        refitting: of rows to sub-networks; None: they stay as they were trained.
    """
    # Norms that the user keeps in eval mode have their statistics on purpose.
    own = norms.with_statistics(module, units.buffers)
    is_shared = norm_statistics == "shared"
    # Shared statistics are not brought back by recall: the sub-network has to do with the model's own.
    recalibrates = recalibrate_norm and not is_shared
    moving = [norm for norm in own.values() if isinstance(norm, _BatchNorm) and norm.training] if recalibrates else []
    counts_flops = any(criterion.counts_flops for criterion in criteria)
    with borrowed(module), evaluating(module):
        module.requires_grad_(False)  # recall asks for no gradients either: torch's products would add up otherwise
        yield Subnetworks(
            *(module, units, reference, ranking, criteria, own, moving, show, expected, survey, fitting),
            *(resolution, counts_flops, is_shared, Known() if known is None else known, refitting),
        )


def _noting(reference: ReferenceData, seen: list[tuple[Tensor, Tensor]], batches: int) -> ReferenceData:
    """The same data; logits and targets are kept on the CPU, of positions some; ``batches``: of all ranks."""

    def predict(module: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        logits, target = Flat.like(reference.predict, reference.predict)(module, batch)
        kept = thinned(logits.detach(), target.detach(), batch, NOTED // max(batches * logits.shape[1], 1))
        seen.append((kept[0].float().cpu(), kept[1].cpu()))
        return logits, target

    return replace(reference, predict=Flat.like(reference.predict, predict))


def _flops_counter(module: nn.Module, units: UnitMap, reference: ReferenceData) -> SubnetworkFlops:
    """Counts what ``module`` needs for one sample of the reference data."""
    inputs: list[Any] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.append(args if args else kwargs)

    hook = module.register_forward_pre_hook(note, with_kwargs=True)
    with hook, torch.no_grad(), reference.forward_context():
        reference.predict(module, reference.example)
    if not inputs:
        raise ValueError(
            "operations can't be counted: predict does not call the module itself; do without ComputeBudget"
        )
    return SubnetworkFlops(module, units.layers, inputs[0])
