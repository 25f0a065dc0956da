"""How a task ends: its reference data are drawn, its units traced and selected, and what it leaves is witnessed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial, reduce
from operator import and_
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_rnf.anatomy import UnitMap, Wiring, rows_read
from lightning_rnf.freezing import free_weights, frozen_connections, heard
from lightning_rnf.memory import FreezeState, Heard, TaskRecord, changed, fingerprints, moved
from lightning_rnf.packages import LightningModule, Trainer, isolate_rng, rank_zero_info, rank_zero_warn
from lightning_rnf.recall import subnetwork
from lightning_rnf.relevance import heatmaps as heatmaps_of
from lightning_rnf.report import tracking
from lightning_rnf.runtime import Show, alone, arguments, borrowed, sharding, silent, steps
from lightning_rnf.search import Criterion, as_criterion
from lightning_rnf.tasks import checkpoints, foresight
from lightning_rnf.tasks.connections import listened, trusted
from lightning_rnf.tasks.fitting import Fitting, HeadFit, UnfitError
from lightning_rnf.tasks.portraying import portrayed
from lightning_rnf.tasks.probes import SAMPLES, taken
from lightning_rnf.tasks.recovery import CriterionOption, Recovery
from lightning_rnf.tasks.reference import Reference, ReferenceData, ReferenceSource
from lightning_rnf.tasks.runs import check_new_name, ranks_of
from lightning_rnf.tasks.selection import MissedError, Selection
from lightning_rnf.tasks.survey import Survey
from lightning_rnf.tasks.tokens import tokens
from lightning_rnf.tasks.tracing import Tracing
from lightning_rnf.tasks.witnesses import Witnesses

Freeze = Literal["connections", "units"]
"""What of weights is frozen: see `RelevanceFreezing`."""


@dataclass
class Ending:
    """The options of `RelevanceFreezing` that a task's end goes by. What was finished before is given to each verb.

    Attributes:
        selection: how units are selected.
        reference: where reference data come from.
        criterion: what the sub-network is held to.
        recovery: how it is trained before.
        tracing: which units and heads the model has.
        head_fit: whether the task's head is fitted to its sub-network, and on what.
        masked: whether only relevant units speak in recall.
        heatmaps: of so many samples of each task.
        connections: whether a task needs only connections between its units, where the graph of the model can be
            followed; if not, whole rows.
        portraits: whether it is remembered what each task's data look like to sub-networks, see `Portrait`.
        is_exact: whether recall is promised to be bit-identical for ever: then any drift is a warning.

    Raises:
        TypeError, ValueError: if an option is out of its range.
    """

    OPTIONS: ClassVar = frozenset(
        {
            *("selection", "criterion", "recovery_epochs", "recovery_criterion", "recovery_search", "units", "heads"),
            *("reference_samples", "attribution_samples", "predict", "seed", "heatmaps"),
            *("fit_head", "fit_data", "fit_samples", "freeze", "portraits"),
        }
    )
    """Names of those that a callback is given once, when it is made."""

    selection: Selection
    reference: Reference
    criterion: Criterion
    recovery: Recovery
    tracing: Tracing
    head_fit: HeadFit
    masked: bool = True
    heatmaps: int = 0
    is_exact: bool = True
    connections: bool = True
    portraits: bool = False

    def __post_init__(self) -> None:
        self.tracing.by_tokens = self.masked
        if self.recovery.epochs:
            _ = reduce(and_, self._criteria()).metrics  # raises where one name means two metrics
            if not self.masked and self.recovery.epochs != "auto":
                raise ValueError(
                    "recovery_epochs train a sub-network, which retention='paper' never runs: leave one out"
                )
        if self.portraits and not self.masked:
            raise ValueError(
                "portraits are of sub-networks, which retention='paper' never runs: what was remembered would age with "
                "the whole network; leave one out"
            )
        if arguments.at_least("heatmaps", self.heatmaps, 0) > SAMPLES:
            raise ValueError(
                f"heatmaps is {self.heatmaps}, expected at most {SAMPLES}: so many samples of a task are kept"
            )

    def rehearse(
        self, trainer: Trainer, module: LightningModule, state: FreezeState, heard: Heard
    ) -> tuple[UnitMap, frozenset[str]]:
        """Try on one batch what the end will need, before the training: the units that it will be about.

        Args:
            trainer: of the fit.
            module: whole.
            state: the finished tasks.
            heard: by task, which channels layers read in its recall: the others have to be zero on the batch, too.

        Returns:
            The units, and the names of layers in which they are not.

        Raises:
            TypeError, ValueError: what the task's end would raise after it.
        """
        self.tracing.rehearsed = None  # of a fit that was given up: others may be trained now
        with isolate_rng():
            example, size = self.reference.example(trainer), self.reference.size(trainer)
            how = trainer.precision_plugin.forward_context
            batch = ReferenceData([example], 1, self.reference.predict, how)
            units, targets, doubted = ranks_of(trainer).decided(lambda: self._rehearse(module, state, batch, heard))
            self.tracing.rehearsed = units
            if size is not None and self._too_few(targets * size[0] // size[1]):
                # Other batches may have more: only what is counted is certain, and where it is little it is soon done.
                self._check_size(self.reference.draw(trainer).targets(module))
            return units, doubted

    def recover(self, trainer: Trainer, module: LightningModule, state: FreezeState, name: str) -> TaskRecord:
        """Select the sub-network that the task's last epochs are to train; the state knows that it recovers."""
        with isolate_rng(), steps(trainer) as show, sharding.whole(module):
            reference = self.reference.draw(trainer)
            with self._measuring(module, reference):
                criteria = (self.recovery.before or self.criterion, self.criterion)
                found = self._select(name, module, reference, state, *criteria, trainer=trainer, show=show)
                found.write(trains_on=True)
        state.recover(found.record, found.units)
        return found.record

    def end(
        self, trainer: Trainer, module: LightningModule, state: FreezeState, witnesses: Witnesses, name: str
    ) -> TaskRecord:
        """Finish a task that a fit has trained: selected now, or settled if its sub-network was trained.

        Its record is in the state and in a checkpoint before anything is probed, logged or drawn. What fails from there
        on is a warning.
        """
        if state.recovering is None and self.recovery.epochs and self.recovery.epochs != "auto":
            rank_zero_warn(f"{name}: the fit ended before its last {self.recovery.epochs} epochs: no recovery")
        with isolate_rng():
            with steps(trainer) as show, sharding.whole(module):  # whole: drawing may run it
                reference = self.reference.draw(trainer)
                with self._measuring(module, reference), rows_read(module) as read:
                    if state.recovering is None:
                        found = self._select(name, module, reference, state, self.criterion, trainer=trainer, show=show)
                    else:
                        found = self._settle(state.recovering, module, reference, state, trainer=trainer, show=show)
                    record = self._add(found, module, reference, state, read)
            self.tracing.rehearsed = None
            path = checkpoints.keep(trainer, name)
            with self._measuring(module, reference):
                self._audit(record, module, reference, state, witnesses)
        self._announce(found, state, self.criterion)
        if too_few := self._too_few(record.samples):
            rank_zero_warn(f"{name}: {too_few}")
        if path:
            rank_zero_info(f"{name}: kept in {path}")
        tracking.log(trainer, state, record)
        if witnesses.gallery.maps:
            witnesses.gallery.log(trainer, len(state.tasks))
        return record

    def protect(
        self,
        module: torch.nn.Module,
        state: FreezeState,
        witnesses: Witnesses,
        name: str,
        source: ReferenceSource,
        criterion: CriterionOption | None = None,
    ) -> TaskRecord:
        """Finish a task that was never trained here, without a Trainer; the model comes back as it was.

        Args:
            module: with the task's head active.
            state: to which the task is added.
            witnesses: to which its samples are added.
            name: of the task.
            source: of its reference data.
            criterion: what its sub-network is held to; None: the same as others.

        Raises:
            TypeError: if the name is no text, the model no module, or the source of another kind.
            ValueError: if the task has ended already, the model is sharded, or as the end of a fit.
        """
        if not isinstance(name, str) or not name:
            raise TypeError(f"name is {name!r}, expected the task's name")
        if not isinstance(module, torch.nn.Module):
            raise TypeError(f"model is of type {type(module).__name__}, expected the module that later fits train")
        if source is None:
            raise TypeError(
                "reference is None, expected labelled data of the task: a data module, a loader or a list of batches"
            )
        check_new_name(name, state)
        if sharding.is_sharded(module):
            raise ValueError(
                "a sharded model can't be measured without its Trainer: protect the task before the first fit"
            )
        state.check_module(module)
        state.forget_unfinished()
        held_to = self.criterion if criterion is None else as_criterion(criterion)
        # Forwards may ask their Trainer, too, not only hooks that bring data.
        with isolate_rng(), torch.inference_mode(False), torch.enable_grad(), borrowed(module), alone(module, None):
            if not module.training:
                module.train()  # as a fit leaves it: norms that are in eval mode with all the rest are no exceptions
            drawn = self.reference.of(source).draw_alone(module)
            with rows_read(module) as read:
                found = self._select(name, module, drawn, state, held_to)
            held_to.check_samples(found.record.samples)
            if not state.tasks:
                foresight.of_units(found.units, module)
            record = self._add(found, module, drawn, state, read)
            self._audit(record, module, drawn, state, witnesses)
        self._announce(found, state, held_to, trained=False)
        return record

    def look_again(self, module: torch.nn.Module, state: FreezeState) -> None:
        """Warn if what the last task has frozen was written after its record was made: by the module's hooks, say."""
        name = next(reversed(state.tasks), None)
        if name is not None and not sharding.is_sharded(module):
            parameters = dict(module.named_parameters(remove_duplicate=False))
            foresight.of_writes(name, changed(parameters, state, name, heard(module, state)))

    # -- parts --------------------------------------------------------------------------------------------------------

    def _rehearse(
        self, module: LightningModule, state: FreezeState, batch: ReferenceData, heard: Heard
    ) -> tuple[UnitMap, int, frozenset[str]]:
        """The units, how many targets the batch has, and layers in which silent channels are not zero on it."""
        units = self.tracing.of_batch(module, state, batch.example)
        batch = batch.laid_out(units.layout)
        targets = batch.targets(module)
        foresight.tried(lambda: taken(module, batch, nullcontext))
        if targets:  # predict may drop all of a batch and none of the next
            self.selection.check(module, units, batch, *self._criteria())
            if self.heatmaps:
                heatmaps_of(module, units.layers, batch.example, self.reference.predict, self.selection.composite)
        if not state.tasks:
            foresight.of_units(units, module)
        doubted: set[str] = set()
        for name, of_task in heard.items():
            doubted |= listened(module, state.layers, state.tasks[name].relevant, of_task, batch).wrong
        return units, targets, frozenset(doubted)

    @contextmanager
    def _measuring(self, module: torch.nn.Module, reference: ReferenceData) -> Iterator[None]:
        """Inside the context the model is whole, and the same on all ranks."""
        with sharding.whole(module), subnetwork.with_leading_buffers(module, reference.ranks):
            yield

    def _select(
        self,
        name: str,
        module: torch.nn.Module,
        reference: ReferenceData,
        state: FreezeState,
        *criteria: Criterion,
        trainer: Trainer | None = None,
        show: Show = silent,
    ) -> _Found:
        """By units of all that the reference data run: those of the first batch, unless others run more."""
        ranks = reference.ranks
        units = ranks.decided(lambda: self.tracing.of_data(module, state, reference))
        whole: tuple[str, ...] = ()
        for fitting, measured in self._fittings(module, units, reference, state, trainer):
            while True:
                survey = Survey(module, units)
                try:
                    given: tuple[Any, ...] = (name, module, units, measured, state, *criteria)
                    record, kept = self.selection.select(*given, show=show, survey=survey, fitting=fitting)
                except MissedError:
                    units, more = self.tracing.joined(units, module, state, measured, survey, 0)
                    whole = (*whole, *more)
                except UnfitError:
                    break
                else:
                    # Silence may send samples another way than the whole network did.
                    units, more = self.tracing.joined(units, module, state, measured, survey, record.cutoff)
                    constant = survey.constant_accuracy(ranks)
                    write = partial(kept.write, fitting)
                    data = measured if fitting is None else fitting.data
                    return _Found(record, units, (*whole, *more), constant, state.frozen(), write, data)
        raise AssertionError("the last offer fits no head")

    def _settle(
        self,
        recovered: TaskRecord,
        module: torch.nn.Module,
        reference: ReferenceData,
        state: FreezeState,
        *,
        trainer: Trainer,
        show: Show,
    ) -> _Found:
        ranks = reference.ranks
        units = ranks.decided(lambda: self.tracing.of_data(module, state, reference))
        for fitting, measured in self._fittings(module, units, reference, state, trainer):
            survey = Survey(module, units)
            given = (recovered, module, units, measured, state, self.criterion)
            milder = self.recovery.search or self.recovery.epochs == "auto"
            how: dict[str, Any] = {"milder": milder, "show": show, "survey": survey, "fitting": fitting}
            with suppress(UnfitError):
                record, kept = self.selection.settle(*given, **how)
                units, whole = self.tracing.joined(units, module, state, measured, survey, record.cutoff)
                write = partial(kept.write, fitting)
                data = measured if fitting is None else fitting.data
                return _Found(record, units, whole, survey.constant_accuracy(ranks), state.frozen(), write, data)
        raise AssertionError("the last offer fits no head")

    def _fittings(
        self,
        module: torch.nn.Module,
        units: UnitMap,
        reference: ReferenceData,
        state: FreezeState,
        trainer: Trainer | None,
    ) -> Iterator[tuple[Fitting | None, ReferenceData]]:
        """How the head can be fitted, and on what sub-networks are then measured, the best first; in the end not.

        A layer that a finished task has, too, is never fitted.
        """
        named = dict(module.named_parameters(remove_duplicate=False))
        of_tasks = [name for record in state.tasks.values() for name in record.head_parameters]
        if state.tasks:
            of_tasks += [*state.shared, *state.embeddings]
        kept = [named[name] for name in of_tasks if name in named]
        for offer in self.head_fit.offers(trainer, self.reference, reference):
            measured = offer.reference.laid_out(units.layout)
            if offer.fitted_on is None:
                yield None, measured
                continue
            fitted_on = offer.fitted_on.laid_out(units.layout)
            how = {"balanced": self.criterion.by_metrics, "scaled": bool(self.criterion.metrics)}
            fitting = Fitting.of(module, units.head, fitted_on, **how)
            if fitting and not any(parameter is one for parameter in fitting.layer.parameters() for one in kept):
                yield fitting, measured

    def _add(
        self,
        found: _Found,
        module: torch.nn.Module,
        reference: ReferenceData,
        state: FreezeState,
        read: Mapping[str, Tensor],
    ) -> TaskRecord:
        """Put the record into the state, with the head that was fitted and fingerprints of what is frozen."""
        found.write()
        wiring = Wiring.of(module, found.units.layers) if self.masked and self.connections else None
        of_task = {} if wiring is None else trusted(module, wiring, found.record, reference)
        record = replace(found.record, connections=tuple(of_task), read_whole=found.units.read_whole)
        record.tokens.update(tokens(module, found.units, state, read, reference.ranks))
        record.rows.update(fingerprints(module, found.units, record, state, of_task))
        if self.portraits:
            began = time.perf_counter()
            given = (module, found.units.layers, state.widenings, replace(record, widenings=len(state.widenings)))
            portrait = portrayed(*given, state.tasks.values(), found.data, reference, masked=self.masked)
            record = replace(record, portrait=portrait)
            record.seconds["portrait"] = time.perf_counter() - began
        state.add(record, found.units)
        frozen = {} if wiring is None else frozen_connections(module, state, heard(module, state, wiring))
        record.free_weights.update(free_weights(state, frozen))
        return state.tasks[record.name]

    def _audit(
        self,
        record: TaskRecord,
        module: torch.nn.Module,
        reference: ReferenceData,
        state: FreezeState,
        witnesses: Witnesses,
    ) -> None:
        """See again what earlier tasks left, and keep samples of this one. No task is lost for it."""
        seen = witnesses.look(
            record,
            module,
            state.layers,
            reference,
            state,
            masked=self.masked,
            images=self.heatmaps,
            composite=self.selection.composite,
        )
        record.drift.update(seen.drift)
        if self.is_exact:
            parameters = dict(module.named_parameters(remove_duplicate=False))
            foresight.of_drift(record.name, seen, moved(parameters, state, (), heard(module, state)))

    def _announce(self, found: _Found, state: FreezeState, criterion: Criterion, *, trained: bool = True) -> None:
        is_rationed = self.selection.rations not in (None, "auto")
        has_chosen = bool(found.record.recovery) and self.recovery.epochs != "auto"
        chosen = "recovery" if has_chosen else "ration" * is_rationed
        tracking.announce(state, state.tasks[found.record.name], trained=trained, chosen=chosen)
        foresight.of_runs(found.record.name, found.whole)
        rationed = found.record.ration not in (None, 1.0)
        foresight.of_record(found.record, criterion, found.constant, found.frozen_before, rationed=rationed)

    def _check_size(self, targets: int) -> None:
        if not targets:
            raise ValueError("predict returns no target for any of the reference data: nothing can be measured on them")
        for criterion in self._criteria():
            criterion.check_samples(targets)

    def _too_few(self, targets: int) -> str:
        """What a criterion has to say against so many targets; empty: nothing."""
        try:
            self._check_size(targets)
        except ValueError as error:
            return str(error)
        return ""

    def _criteria(self) -> tuple[Criterion, ...]:
        before = self.recovery.before if self.recovery.epochs else None
        return (self.criterion,) if before is None else (self.criterion, before)


@dataclass(frozen=True)
class _Found:
    """A record that is to be added, and what came up on the way to it.

    Attributes:
        record: of the task.
        units: of all that its reference data run.
        whole: names of modules that only some batches run, and that are frozen whole.
        constant: accuracy of the best answer that is always the same.
        frozen_before: bool ``(units,)`` by layer: what earlier tasks need.
        write: gives the model the head, and the rows, that were fitted; ``trains_on``: a recovery follows.
        data: what the head was fitted on, or else the reference data.
    """

    record: TaskRecord
    units: UnitMap
    whole: tuple[str, ...]
    constant: float
    frozen_before: dict[str, Tensor]
    write: Callable[..., None]
    data: ReferenceData
