"""Which units a task needs: attribution, ranking and search of Algorithm 1, on one model and its reference data."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from zennit.core import Composite

from lightning_rnf.anatomy import UnitMap
from lightning_rnf.memory import FreezeState, TaskRecord
from lightning_rnf.recall import NormStatistics
from lightning_rnf.relevance import (
    IMPORTANCES,
    Attribution,
    Conservation,
    Importance,
    ImportanceName,
    OverSamples,
    Summed,
    attribute,
    check_scores,
    random,
)
from lightning_rnf.runtime import Show, arguments, silent
from lightning_rnf.search import (
    Candidates,
    Criterion,
    Evaluation,
    Measured,
    Method,
    Normalize,
    Ranking,
    SearchResult,
    SubnetworkScore,
    about,
    rank,
    search_cutoff,
)
from lightning_rnf.tasks import auto
from lightning_rnf.tasks.auto import Enough
from lightning_rnf.tasks.candidates import Known, Subnetworks, Taken, subnetworks
from lightning_rnf.tasks.fitting import Fitting
from lightning_rnf.tasks.reference import ReferenceData, gathered
from lightning_rnf.tasks.refitting import Refitting
from lightning_rnf.tasks.survey import Survey

log = logging.getLogger(__name__)

_PER_LAYER = "ranked per layer: without those rules raw relevance doesn't compare across layers"


class MissedError(Exception):
    """Some batches of the reference data run modules that the trace of one batch has not seen."""


@dataclass(frozen=True)
class Selection:
    """How units are selected: the options of `RelevanceFreezing` that Algorithm 1 reads."""

    importance: ImportanceName | Importance = "lrp"
    composite: Composite | None = None
    normalize: Normalize = "layer"
    candidates: Candidates = "free"
    rations: float | Sequence[float] | Literal["auto"] | None = None
    search: Method = "fewest"
    resolution: int = 1
    norm_statistics: NormStatistics = "per_task"
    recalibrate_norm: bool = True
    tasks: int | None = None
    over_samples: OverSamples = "absolute"

    def __post_init__(self) -> None:
        if not callable(self.importance):
            arguments.one_of("importance", self.importance, ImportanceName)
        arguments.of_type("composite", self.composite, Composite, "a composite of Zennit")
        arguments.one_of("over_samples", self.over_samples, OverSamples)
        arguments.one_of("normalize", self.normalize, Normalize)
        arguments.one_of("candidates", self.candidates, Candidates)
        if self.rations != "auto":
            object.__setattr__(self, "rations", arguments.shares("ration", self.rations))  # a tuple from here on
        arguments.at_least("tasks", self.tasks, 1, or_none=True)
        arguments.one_of("search", self.search, Method)
        arguments.at_least("resolution", self.resolution, 1)
        arguments.one_of("norm_statistics", self.norm_statistics, NormStatistics)
        arguments.of_type("recalibrate_norm", self.recalibrate_norm, bool, "True or False")
        if self.composite is not None and self.importance != "lrp":
            found = repr(self.importance)
            raise ValueError(f"composite holds rules for importance='lrp', which is {found} here: leave one out")

    def ration(self, task: int) -> float | None:
        """What a task may claim of each layer's free units; ``task`` counts the finished ones. None: all, or open."""
        if self.rations == "auto":
            return None
        rations: Any = self.rations
        return rations[min(task, len(rations) - 1)] if rations else None

    def _shares(self, task: int, criterion: Criterion, *, recovers: bool) -> tuple[float | None, ...]:
        """What the task may claim of each layer's free units, in the order in which it is tried."""
        if self.rations == "auto" and auto.takes(criterion):
            return auto.shares_of(task, self.tasks, recovers=recovers)
        return (self.ration(task),)

    def _precision(self, criterion: Criterion) -> float:
        """A criterion that is not about accuracy, or a ration of the user's, is followed to the unit."""
        return auto.PRECISION if self.rations == "auto" and auto.takes(criterion) else 0.0

    def attribute(
        self, module: nn.Module, units: UnitMap, reference: ReferenceData, task: int = 0, show: Show = silent
    ) -> Attribution:
        """Score every unit: float32 ``(units,)`` by layer; ``task`` counts the finished ones."""
        batches, predict, ranks = reference.for_attribution, reference.predict, reference.ranks
        counted = itertools.count(1)

        def progress(samples: int) -> None:
            log.debug("relevance: %d samples", samples)
            show("relevance", next(counted), len(batches), f"{samples} samples")

        if self.importance == "lrp":
            how: dict[str, Any] = {"over_samples": self.over_samples}
            found = attribute(module, units.layers, batches, predict, self.composite, progress, ranks, **how)
        else:
            found = Attribution(self._scores(module, units, reference, task))
        # As the record keeps them: a ranking made from the record is then the same. A user's function may have given
        # what is on the model's device, hangs in a graph or goes on changing.
        kept = {name: values.detach().to("cpu", torch.float32, copy=True) for name, values in found.relevance.items()}
        return replace(found, relevance=kept)

    def _scores(self, module: nn.Module, units: UnitMap, reference: ReferenceData, task: int) -> dict[str, Tensor]:
        """Of another importance than relevance."""
        batches, predict, ranks = reference.for_attribution, reference.predict, reference.ranks
        importance = self.importance if callable(self.importance) else IMPORTANCES[self.importance]
        if isinstance(importance, Summed):
            return importance(module, units.layers, batches, predict, ranks=ranks)
        if importance is random:  # the same units in every task would be another method
            importance = partial(random, seed=task)
        # Whether a user's function can be told from shares of the data is not known, so it is shown all of them.
        batches = gathered(batches, ranks) if callable(self.importance) else batches
        scores = ranks.decided(lambda: importance(module, units.layers, batches, predict))
        return check_scores(scores, units.layers)

    def check(self, module: nn.Module, units: UnitMap, example: ReferenceData, *criteria: Criterion) -> None:
        """Try everything on one batch, before a training whose end would need it."""
        self.attribute(module, units, example)
        if any(criterion.counts_flops or criterion.metrics for criterion in criteria):
            ranking = rank({layer.name: torch.ones(layer.units) for layer in units.layers}, {})
            with self._subnetworks(module, units, example, ranking, *criteria) as candidates:
                candidates.measure(0)

    def select(
        self,
        name: str,
        module: nn.Module,
        units: UnitMap,
        reference: ReferenceData,
        state: FreezeState,
        criterion: Criterion,
        *later: Criterion,
        show: Show = silent,
        survey: Survey | None = None,
        fitting: Fitting | None = None,
    ) -> tuple[TaskRecord, Taken]:
        """Score and rank the units, search the cutoff: the record of a task that ends with the module as it is.

        A task that recovers has its rows fitted to its sub-network, too.

        Args:
            name: of the task.
            module: the model.
            units: its units.
            reference: the task's data.
            state: the finished tasks.
            criterion: what the search may take.
            later: criteria that the record will be held to after a recovery: what they ask for is measured, too.
            show: how far it has come.
            survey: of the walk that measures the whole network; None: nothing is asked.
            fitting: of the task's head to each candidate; None: as it was trained.

        Returns:
            The record, and what it was measured with and that has to be written.

        Raises:
            MissedError: if batches run modules that are not in ``units``.
        """
        started = time.perf_counter()
        attribution = self.attribute(module, units, reference, len(state.tasks), show)
        attributed = time.perf_counter()
        relevance, conservation = attribution.relevance, attribution.conservation
        notes = self._heed(name, conservation)
        shares, known = self._shares(len(state.tasks), criterion, recovers=bool(later)), Known()
        refitting: Refitting | None = None
        if later and fitting is not None:
            refitting = Refitting(module, units.layers, state.frozen(), fitting.data)
        for number, share in enumerate(shares, start=1):
            is_last = number == len(shares)
            known.turn_to(share)
            ranking = reference.ranks.decided(partial(self._rank, relevance, units, state, notes, share))
            expected = about(ranking, self.search, self.resolution, self._precision(criterion))
            options: dict[str, Any] = {"expected": expected, "show": show, "survey": survey, "fitting": fitting}
            with self._subnetworks(
                module, units, reference, ranking, criterion, *later, known=known, refitting=refitting, **options
            ) as candidates:
                if not is_last and not self._is_enough(candidates, criterion, share, asks=survey is not None):
                    continue
                found, taken = self._searched(candidates, criterion, asks=survey is not None, recovers=bool(later))
            break
        score, whole = found.taken.score, found.evaluations[0].score
        accepted = found.taken.accepted or reference.ranks.decided(partial(criterion.met, score))
        relevant = ranking.relevant(score.cutoff)
        record = TaskRecord(
            name=name,
            head=units.head,
            head_parameters=units.head_parameters,
            relevant=relevant,
            relevance=relevance,
            norm_statistics=taken.statistics,
            cutoff=score.cutoff,
            accuracy=whole.accuracy,
            whole=known.whole,
            ration=share,
            subnetwork_accuracy=score.accuracy,
            scored=known.measured[0].scored,
            accepted=accepted,
            samples=whole.samples,
            evaluations=found.evaluations,
            capacity=state.capacity_after(relevant),
            seconds={"attribution": attributed - started, "search": time.perf_counter() - attributed},
            conservation=conservation.ratios,
            cuts=conservation.cuts,
            notes=notes,
        )
        return reference.ranks.decided(lambda: record), taken

    def _searched(
        self, candidates: Subnetworks, criterion: Criterion, *, asks: bool, recovers: bool
    ) -> tuple[SearchResult, Taken]:
        """What the search has found, with the head that it keeps; what is taken says whether the criterion accepts it.

        Args:
            candidates: to be measured.
            criterion: what the search may take.
            asks: whether the walk through the whole network has to have seen all modules that run.
            recovers: whether the task trains on inside of what is taken.
        """
        ranks, ranking = candidates.ranks, candidates.ranking
        enough: Enough | None = None
        if self.rations == "auto" and auto.takes(criterion):
            enough = Enough(criterion, ranking.beyond_ration, ranking.candidates if recovers else None)

        def verdict(score: SubnetworkScore) -> bool:
            # A criterion may be any function of the user's: all ranks go by what it says on rank 0.
            if enough is None:
                return ranks.decided(lambda: criterion(score))
            accepted = enough(score)  # of numbers that all ranks have
            candidates.limit = enough.floor
            return accepted

        measure = partial(self._measure, candidates, asks=asks)
        how: dict[str, Any] = {"method": self.search, "resolution": self.resolution}
        found = search_cutoff(ranking, measure, verdict, precision=self._precision(candidates.criterion), **how)
        if enough is not None and enough.is_flat:
            all_of_it = next(one for one in found.evaluations if one.score.cutoff == enough.budget)
            found = replace(found, taken=all_of_it)
        whole, cutoff = found.evaluations[0].score, found.taken.score.cutoff
        baseline = Measured(whole.accuracy, whole.values, whole.samples)

        def scored(measured: Measured) -> SubnetworkScore:
            return ranking.score(cutoff, measured, baseline, self.resolution)

        def is_met(measured: Measured) -> bool:
            return ranks.decided(lambda: criterion.met(scored(measured)))

        taken = candidates.take(cutoff, is_met, refits=candidates.refitting is not None and cutoff > 0)
        if taken.measured is None and enough is None:
            return found, taken
        if taken.measured is None:  # what is enough may be less than what the criterion asks for
            score = found.taken.score
            return replace(found, taken=Evaluation(score, ranks.decided(lambda: criterion.met(score)))), taken
        # The whole network needs no verdict.
        last = Evaluation(scored(taken.measured), cutoff == 0 or is_met(taken.measured))
        return SearchResult(last, (*found.evaluations, last)), taken

    def _is_enough(self, candidates: Subnetworks, criterion: Criterion, share: float | None, *, asks: bool) -> bool:
        ranking = candidates.ranking
        whole, budget = (self._measure(candidates, cutoff, asks=asks) for cutoff in (0, ranking.beyond_ration))
        score = ranking.score(ranking.beyond_ration, budget, whole, self.resolution)
        return share is not None and auto.takes(criterion) and auto.is_enough(criterion, score, share)

    def _measure(self, candidates: Subnetworks, cutoff: int, *, asks: bool) -> Measured:
        measured = candidates.measure(cutoff)
        missed = candidates.survey.routes.missed.get(0, [])
        if asks and cutoff == 0 and any(candidates.ranks.gather(bool(missed))):
            raise MissedError
        return measured

    def check_goes_on(self, record: TaskRecord, units: UnitMap, state: FreezeState) -> None:
        """Check that a recovery that was begun, maybe by another program, is of the sub-network that would be settled.

        Raises:
            ValueError: if not.
        """
        ranking = self._rank(record.relevance, units, state, record.notes, self._ration_of(record, state))
        found = ranking.relevant(record.cutoff) if record.cutoff <= ranking.candidates else {}
        if not all(name in found and torch.equal(found[name], mask) for name, mask in record.relevant.items()):
            raise ValueError(
                f"{record.name}: its recovery was begun inside another sub-network than normalize={self.normalize!r}, "
                f"candidates={self.candidates!r} and a ration of {self._ration_of(record, state)} give: go on with the "
                "options that it was begun with, or train the task from its start"
            )

    def settle(
        self,
        record: TaskRecord,
        module: nn.Module,
        units: UnitMap,
        reference: ReferenceData,
        state: FreezeState,
        criterion: Criterion,
        *,
        milder: bool,
        show: Show = silent,
        survey: Survey | None = None,
        fitting: Fitting | None = None,
    ) -> tuple[TaskRecord, Taken]:
        """Measure a sub-network after its recovery: the record of a task that ends with the module as it is.

        Args:
            record: as the search before the recovery left it.
            module: trained inside that sub-network.
            units: of the module.
            reference: the same data as then.
            state: the finished tasks.
            criterion: what the sub-network is held to now.
            milder: if the criterion does not accept it, try smaller cutoffs (`Ranking.milder`); if it accepts none
                of them, the recovered one stays.
            show: how far it has come.
            survey: of the first walk; None: nothing is asked.
            fitting: of the task's head, as in `select`.
        """
        started = time.perf_counter()
        ranks = reference.ranks
        ranking = ranks.decided(
            lambda: self._rank(record.relevance, units, state, record.notes, self._ration_of(record, state))
        )
        smaller = ranking.milder(record.cutoff, self.resolution) if milder else []
        whole = record.evaluations[0].score
        baseline = Measured(whole.accuracy, whole.values, whole.samples)
        made: list[tuple[Evaluation, Taken]] = []
        expected = 1 + len(smaller)
        options: dict[str, Any] = {"show": show, "expected": expected, "survey": survey, "fitting": fitting}
        with self._subnetworks(module, units, reference, ranking, criterion, **options) as candidates:
            candidates.limit = criterion.accuracy_limit(baseline.accuracy)
            for cutoff in (record.cutoff, *smaller):

                def met(measured: Measured, cutoff: int = cutoff) -> bool:
                    score = ranking.score(cutoff, measured, baseline, self.resolution)
                    return ranks.decided(partial(criterion.met, score))

                one = candidates.take(cutoff, met)
                measured = candidates.measure(cutoff) if one.measured is None else one.measured
                score = ranking.score(cutoff, measured, baseline, self.resolution)
                made.append((Evaluation(score, met(measured)), one))
                if made[-1][0].accepted:
                    break
            taken, kept = made[-1] if made[-1][0].accepted else made[0]
        relevant = ranking.relevant(taken.score.cutoff)
        settled = replace(
            record,
            relevant=relevant,
            norm_statistics=kept.statistics,
            cutoff=taken.score.cutoff,
            subnetwork_accuracy=taken.score.accuracy,
            accepted=taken.accepted,
            capacity=state.capacity_after(relevant),
            recovery=tuple(evaluation for evaluation, _ in made),
            seconds={**record.seconds, "settling": time.perf_counter() - started},
        )
        return ranks.decided(lambda: settled), kept

    def _subnetworks(
        self,
        module: nn.Module,
        units: UnitMap,
        reference: ReferenceData,
        ranking: Ranking,
        *criteria: Criterion,
        **options: Any,
    ) -> AbstractContextManager[Subnetworks]:
        return subnetworks(
            module,
            units,
            reference,
            ranking,
            *criteria,
            norm_statistics=self.norm_statistics,
            recalibrate_norm=self.recalibrate_norm,
            resolution=self.resolution,
            **options,
        )

    def _heed(self, name: str, conservation: Conservation) -> tuple[str, ...]:
        """What the record has to say about a relevance that was conserved so well; warns where it matters."""
        notes = conservation.notes
        if lost := conservation.loss():
            notes = (*notes, lost.sentence)
            if not lost.only_biases:
                rank_zero_warn(f"{name}: {lost.sentence}")
        if conservation.unruled and self.normalize == "none":
            rank_zero_warn(
                f"{name}: {'; '.join(conservation.notes)}; {_PER_LAYER}, so normalize='none' is not followed"
            )
            notes = (*notes, _PER_LAYER)
        return notes

    def _ration_of(self, record: TaskRecord, state: FreezeState) -> float | None:
        """What a task that recovers could claim."""
        return record.ration if self.rations == "auto" else self.ration(len(state.tasks))

    def _rank(
        self,
        relevance: dict[str, Tensor],
        units: UnitMap,
        state: FreezeState,
        notes: tuple[str, ...],
        ration: float | None,
    ) -> Ranking:
        how: dict[str, Any] = {"candidates": self.candidates, "ration": ration, "parts": units.parts()}
        normalize = "layer" if _PER_LAYER in notes else self.normalize
        return rank(relevance, state.frozen(), normalize=normalize, **how)
