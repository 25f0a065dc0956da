"""Which units a task needs: attribution, ranking and search of Algorithm 1, on one model and its reference data."""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial, reduce
from operator import and_
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from zennit.core import Composite

from lightning_rnf.anatomy import UnitMap
from lightning_rnf.memory import FreezeState, TaskRecord
from lightning_rnf.recall import NormStatistics, Prefix, SubnetworkFlops, norms, subnetwork
from lightning_rnf.relevance import (
    IMPORTANCES,
    Attribution,
    Conservation,
    Importance,
    ImportanceName,
    Summed,
    attribute,
    check_scores,
    random,
)
from lightning_rnf.runtime import Show, arguments, borrowed, evaluating, silent
from lightning_rnf.search import (
    Candidates,
    Criterion,
    Evaluation,
    Measured,
    Method,
    Normalize,
    Ranking,
    SubnetworkScore,
    about,
    rank,
    search_cutoff,
)
from lightning_rnf.tasks.reference import ReferenceData, gathered
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
    rations: float | Sequence[float] | None = None
    search: Method = "bisect"
    resolution: int = 1
    norm_statistics: NormStatistics = "per_task"
    recalibrate_norm: bool = True

    def __post_init__(self) -> None:
        if not callable(self.importance):
            arguments.one_of("importance", self.importance, ImportanceName)
        arguments.of_type("composite", self.composite, Composite, "a composite of Zennit")
        arguments.one_of("normalize", self.normalize, Normalize)
        arguments.one_of("candidates", self.candidates, Candidates)
        object.__setattr__(self, "rations", arguments.shares("ration", self.rations))  # a tuple from here on
        arguments.one_of("search", self.search, Method)
        arguments.at_least("resolution", self.resolution, 1)
        arguments.one_of("norm_statistics", self.norm_statistics, NormStatistics)
        arguments.of_type("recalibrate_norm", self.recalibrate_norm, bool, "True or False")
        if self.composite is not None and self.importance != "lrp":
            found = repr(self.importance)
            raise ValueError(f"composite holds rules for importance='lrp', which is {found} here: leave one out")

    def ration(self, task: int) -> float | None:
        """What a task may claim of each layer's free units; ``task`` counts the finished ones. None: all."""
        rations: Any = self.rations
        return rations[min(task, len(rations) - 1)] if rations else None

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
            found = attribute(module, units.layers, batches, predict, self.composite, progress, ranks)
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
            with self._candidates(module, units, example, ranking, *criteria) as candidates:
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
    ) -> TaskRecord:
        """Score and rank the units, search the cutoff: the record of a task that ends with the module as it is.

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

        Raises:
            MissedError: if batches run modules that are not in ``units``.
        """
        started = time.perf_counter()
        attribution = self.attribute(module, units, reference, len(state.tasks), show)
        attributed = time.perf_counter()
        relevance, conservation = attribution.relevance, attribution.conservation
        notes = self._heed(name, conservation)
        ranking = reference.ranks.decided(lambda: self._rank(relevance, state, notes))

        def verdict(score: SubnetworkScore) -> bool:
            # A criterion may be any function of the user's: all ranks go by what it says on rank 0.
            return reference.ranks.decided(lambda: criterion(score))

        expected = about(ranking, self.search, self.resolution)
        with self._candidates(
            module, units, reference, ranking, criterion, *later, show=show, expected=expected, survey=survey
        ) as candidates:

            def measure(cutoff: int) -> Measured:
                measured = candidates.measure(cutoff)
                if survey is not None and cutoff == 0 and any(reference.ranks.gather(bool(survey.routes.missed[0]))):
                    raise MissedError
                return measured

            found = search_cutoff(ranking, measure, verdict, method=self.search, resolution=self.resolution)
            statistics = candidates.statistics(found.taken.score.cutoff)
        relevant = ranking.relevant(found.taken.score.cutoff)
        record = TaskRecord(
            name=name,
            head=units.head,
            head_parameters=units.head_parameters,
            relevant=relevant,
            relevance=relevance,
            norm_statistics=statistics,
            cutoff=found.taken.score.cutoff,
            accuracy=found.taken.score.baseline,
            subnetwork_accuracy=found.taken.score.accuracy,
            accepted=found.taken.accepted or criterion.met(found.taken.score),
            samples=found.evaluations[0].score.samples,
            evaluations=found.evaluations,
            capacity=state.capacity_after(relevant),
            seconds={"attribution": attributed - started, "search": time.perf_counter() - attributed},
            conservation=conservation.ratios,
            cuts=conservation.cuts,
            notes=notes,
        )
        return reference.ranks.decided(lambda: record)

    def check_goes_on(self, record: TaskRecord, state: FreezeState) -> None:
        """Check that a recovery that was begun, maybe by another program, is of the sub-network that would be settled.

        Raises:
            ValueError: if not.
        """
        ranking = self._rank(record.relevance, state, record.notes)
        found = ranking.relevant(record.cutoff) if record.cutoff <= ranking.candidates else {}
        if not all(name in found and torch.equal(found[name], mask) for name, mask in record.relevant.items()):
            raise ValueError(
                f"{record.name}: its recovery was begun inside another sub-network than normalize={self.normalize!r}, "
                f"candidates={self.candidates!r} and a ration of {self.ration(len(state.tasks))} give: go on with the "
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
    ) -> TaskRecord:
        """Measure a sub-network after its recovery: the record of a task that ends with the module as it is.

        Args:
            record: as the search before the recovery left it.
            module: trained inside that sub-network.
            units: of the module.
            reference: the same data as then.
            state: the finished tasks.
            criterion: what the sub-network is held to now.
            milder: if the criterion does not accept it, try the smaller cutoffs that the search has measured, the
                largest first; if it accepts none of them, the recovered one stays.
            show: how far it has come.
            survey: of the first walk; None: nothing is asked.
        """
        started = time.perf_counter()
        ranks = reference.ranks
        ranking = ranks.decided(lambda: self._rank(record.relevance, state, record.notes))
        smaller = {evaluation.score.cutoff for evaluation in record.evaluations} & set(
            range(ranking.beyond_ration, record.cutoff)
        )
        whole = record.evaluations[0].score
        baseline = Measured(whole.accuracy, whole.values, whole.samples)
        made: list[Evaluation] = []
        expected = 1 + len(smaller) * milder
        with self._candidates(
            module, units, reference, ranking, criterion, show=show, expected=expected, survey=survey
        ) as candidates:
            candidates.limit = criterion.accuracy_limit(baseline.accuracy)
            for cutoff in (record.cutoff, *(sorted(smaller, reverse=True) if milder else ())):
                score = ranking.score(cutoff, candidates.measure(cutoff), baseline, self.resolution)
                made.append(Evaluation(score, ranks.decided(partial(criterion.met, score))))
                if made[-1].accepted:
                    break
            taken = made[-1] if made[-1].accepted else made[0]
            statistics = candidates.statistics(taken.score.cutoff)
        relevant = ranking.relevant(taken.score.cutoff)
        settled = replace(
            record,
            relevant=relevant,
            norm_statistics=statistics,
            cutoff=taken.score.cutoff,
            subnetwork_accuracy=taken.score.accuracy,
            accepted=taken.accepted,
            capacity=state.capacity_after(relevant),
            recovery=tuple(made),
            seconds={**record.seconds, "settling": time.perf_counter() - started},
        )
        return ranks.decided(lambda: settled)

    @contextmanager
    def _candidates(
        self,
        module: nn.Module,
        units: UnitMap,
        reference: ReferenceData,
        ranking: Ranking,
        *criteria: Criterion,
        show: Show = silent,
        expected: int = 1,
        survey: Survey | None = None,
    ) -> Iterator[_Candidates]:
        # Norms that the user keeps in eval mode have their statistics on purpose.
        own = norms.with_statistics(module, units.buffers)
        moving = [norm for norm in own.values() if isinstance(norm, _BatchNorm) and norm.training]
        with borrowed(module), evaluating(module):
            yield _Candidates(self, module, units, reference, ranking, criteria, own, moving, show, expected, survey)

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

    def _rank(self, relevance: dict[str, Tensor], state: FreezeState, notes: tuple[str, ...]) -> Ranking:
        normalize = "layer" if _PER_LAYER in notes else self.normalize
        ration = self.ration(len(state.tasks))
        return rank(relevance, state.frozen(), normalize=normalize, candidates=self.candidates, ration=ration)


class _Candidates:
    """The sub-networks of a ranking, measured one by one in a borrowed module."""

    def __init__(
        self,
        selection: Selection,
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
    ) -> None:
        self.module = module
        self.units = units
        self.reference = reference
        self.ranking = ranking
        self.criterion = criteria[0]
        self.metrics = reduce(and_, criteria).metrics
        self.show = show
        self.expected = expected
        self.survey = Survey(module, units) if survey is None else survey
        self.made = 0
        self.prefix = Prefix(module, ranking.untouched() if ranking.candidates and expected > 1 else ())
        self.limit: float | None = None  # before cutoff 0 is measured nobody knows it
        self.targets: int | None = None  # how many there are, the first to be measured shows: it is measured on all
        # What the ration takes away is taken whatever the verdict.
        self.measured_whole = {0, ranking.beyond_ration}
        self.resolution = selection.resolution
        self.ranks = reference.ranks
        self.is_shared = selection.norm_statistics == "shared"
        self.norms = own_norms
        # Shared statistics are not brought back by recall: the sub-network has to do with the model's own.
        self.recalibrated = moving_norms if selection.recalibrate_norm and not self.is_shared else ()
        self.counts_flops = any(criterion.counts_flops for criterion in criteria)
        counts_here = self.counts_flops and self.ranks.rank == 0
        self.flops = self.ranks.agreed(lambda: _flops_counter(module, units, reference) if counts_here else None)

    def measure(self, cutoff: int) -> Measured:
        """Accuracy, and what else the criterion asks for, with so many candidates silenced."""
        with self._speaking(cutoff):
            # With half of its units silent a network may overflow: that is no divergence, only a bad sub-network.
            lowest = None if cutoff in self.measured_whole else self.limit
            with self.prefix.spared("accuracy"), self.survey.of(self.reference, cutoff) as reference:
                measured = reference.measure(
                    self.module, self.metrics, finite=cutoff == 0, lowest=lowest, expected=self.targets
                )
        if self.targets is None:
            self.targets = measured.samples
        if cutoff == 0 and any(math.isnan(value) for value in measured.values.values()):
            raise ValueError(f"a metric of the whole network is not a number: {dict(measured.values)}")
        if self.counts_flops:
            flops = self.ranks.decided(lambda: self._count(cutoff))
            measured = replace(measured, values={**measured.values, **flops})
        log.debug("search: %d of %d units silenced, accuracy %.3f", cutoff, self.ranking.candidates, measured.accuracy)
        self.made += 1
        if cutoff == 0:
            self.limit = self.criterion.accuracy_limit(measured.accuracy)
        limit = "" if self.limit is None else f" (limit {self.limit:.3f})"
        self.show("search", self.made, self.expected, f"cutoff {cutoff}, accuracy {measured.accuracy:.3f}{limit}")
        return measured

    def statistics(self, cutoff: int) -> dict[str, Tensor]:
        """What recall brings back: the buffers with which that sub-network was measured."""
        with self._speaking(cutoff):
            buffers = subnetwork.statistics(self.module, self.units)
        if self.is_shared:
            return {name: value for name, value in buffers.items() if name.rpartition(".")[0] not in self.norms}
        return buffers

    def _count(self, cutoff: int) -> dict[str, float]:
        assert self.flops is not None
        before = self.ranking.before(cutoff, self.resolution)
        return {
            "flops": float(self.flops(self.ranking.relevant(cutoff)) if cutoff else self.flops.total),
            "flops_before": float(self.flops(self.ranking.relevant(before)) if before else self.flops.total),
        }

    @contextmanager
    def _speaking(self, cutoff: int) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(subnetwork.silence(self.module, self.units.layers, self.ranking.relevant(cutoff)))
            if self.recalibrated and cutoff > 0:
                stack.enter_context(norms.recalibrated(self.recalibrated, self._run, self.ranks))
            yield

    def _run(self) -> None:
        with self.prefix.spared("statistics"):
            self.reference.run(self.module)


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
