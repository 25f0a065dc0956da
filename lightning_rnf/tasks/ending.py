"""How a task ends: its reference data are drawn, its units traced and selected, and what it leaves is witnessed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_rnf.anatomy import UnitMap
from lightning_rnf.memory import FreezeState, TaskRecord, fingerprints
from lightning_rnf.recall import subnetwork
from lightning_rnf.relevance import heatmaps as heatmaps_of
from lightning_rnf.report import tracking
from lightning_rnf.runtime import alone, arguments, borrowed, sharding, shown
from lightning_rnf.search import Criterion, SubnetworkScore, as_criterion
from lightning_rnf.tasks import checkpoints
from lightning_rnf.tasks.probes import SAMPLES
from lightning_rnf.tasks.reference import Reference, ReferenceData, ReferenceSource
from lightning_rnf.tasks.runs import check_new_name, ranks_of
from lightning_rnf.tasks.selection import Selection
from lightning_rnf.tasks.witnesses import Witnesses

CriterionOption = float | Criterion | Callable[[SubnetworkScore], bool]
"""A number is the absolute drop of accuracy to tolerate."""

Globs = Any
"""A glob of module names, or several; None: what is found."""


@dataclass(frozen=True)
class Recovery:
    """How a task's last epochs train inside its sub-network.

    Attributes:
        epochs: so many; 0: there is no recovery.
        criterion: what the search before them may take; None: a drop of 0.1.
        search: if the recovery falls short of the task's criterion, try milder cutoffs.

    Raises:
        TypeError, ValueError: if an option is out of its range, or of no use.
    """

    epochs: int = 0
    criterion: CriterionOption | None = None
    search: bool = False

    def __post_init__(self) -> None:
        arguments.at_least("recovery_epochs", self.epochs, 0)
        arguments.of_type("recovery_search", self.search, bool, "True or False")
        before = self.before  # raises if it is none
        if not self.epochs and (self.criterion is not None or self.search):
            raise ValueError("recovery_criterion and recovery_search are of use with recovery_epochs only: it is 0")
        object.__setattr__(self, "criterion", before)

    @property
    def before(self) -> Criterion:
        """What the search before the recovery may take."""
        return as_criterion(0.1 if self.criterion is None else self.criterion)


@dataclass
class Ending:
    """The options of `RelevanceFreezing` that a task's end goes by. What was finished before is given to each verb.

    Attributes:
        selection: how units are selected.
        reference: where reference data come from.
        criterion: what the sub-network is held to.
        recovery: how it is trained before.
        units: which layers are made of units.
        heads: which modules are heads.
        masked: whether only relevant units speak in recall.
        heatmaps: of so many samples of each task.

    Raises:
        TypeError, ValueError: if an option is out of its range.
    """

    selection: Selection
    reference: Reference
    criterion: Criterion
    recovery: Recovery
    units: Globs = None
    heads: Globs = None
    masked: bool = True
    heatmaps: int = 0

    def __post_init__(self) -> None:
        if self.recovery.epochs:
            _ = (self.criterion & self.recovery.before).metrics  # raises where one name means two metrics
            if not self.masked:
                raise ValueError(
                    "recovery_epochs train a sub-network, which retention='paper' never runs: leave one out"
                )
        self.units = arguments.globs("units", self.units)
        self.heads = arguments.globs("heads", self.heads)
        if arguments.at_least("heatmaps", self.heatmaps, 0) > SAMPLES:
            raise ValueError(
                f"heatmaps is {self.heatmaps}, expected at most {SAMPLES}: so many samples of a task are kept"
            )

    def rehearse(self, trainer: Trainer, module: LightningModule, state: FreezeState) -> UnitMap:
        """Try on one batch what the end will need, before the training: the units that it will be about.

        Raises:
            TypeError, ValueError: what the task's end would raise after it.
        """
        with isolate_rng():
            example, samples = self.reference.example(trainer), self.reference.size(trainer)
            how = trainer.precision_plugin.forward_context
            batch = ReferenceData([example], 1, 1, self.reference.predict, how)
            return ranks_of(trainer).decided(lambda: self._rehearse(module, state, batch, samples))

    def recover(self, trainer: Trainer, module: LightningModule, state: FreezeState, name: str) -> TaskRecord:
        """Select the sub-network that the task's last epochs are to train; the state knows that it recovers."""
        with self._observing(trainer, module, state) as (units, reference), shown(trainer) as show:
            criteria = (self.recovery.before, self.criterion)
            record = self.selection.select(name, module, units, reference, state, *criteria, show=show)
        state.recover(record, units)
        return record

    def end(
        self, trainer: Trainer, module: LightningModule, state: FreezeState, witnesses: Witnesses, name: str
    ) -> TaskRecord:
        """Finish a task that a fit has trained: selected now, or settled if its sub-network was trained.

        Its record is in the state and in a checkpoint before anything that a logger or a warning could break off.
        """
        recovered = state.recovering
        if recovered is None and self.recovery.epochs:
            rank_zero_warn(f"{name}: the fit ended before its last {self.recovery.epochs} epochs: no recovery")
        with self._observing(trainer, module, state) as (units, reference), shown(trainer) as show:
            given = (module, units, reference, state, self.criterion)
            if recovered is None:
                record = self.selection.select(name, *given, show=show)
            else:
                record = self.selection.settle(recovered, *given, milder=self.recovery.search, show=show)
            record = self._witnessed(record, module, units, reference, state, witnesses)
        state.add(record, units)
        path = checkpoints.keep(trainer, name)
        self._announce(record, state)
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
            held_to.check_samples(drawn.samples)
            units = self._trace(module, state, drawn.example)
            record = self.selection.select(name, module, units, drawn, state, held_to)
            record = self._witnessed(record, module, units, drawn, state, witnesses)
        state.add(record, units)
        self._announce(record, state, trained=False)
        return record

    def _announce(self, record: TaskRecord, state: FreezeState, *, trained: bool = True) -> None:
        tracking.announce(state, record, self.selection.ration(len(state.tasks) - 1), trained=trained)

    def _rehearse(
        self, module: LightningModule, state: FreezeState, batch: ReferenceData, samples: int | None
    ) -> UnitMap:
        units = self._trace(module, state, batch.example)
        self._check_size(samples)
        self.selection.check(module, units, batch, *self._criteria())
        if self.heatmaps:
            heatmaps_of(module, units.layers, batch.example, self.reference.predict, self.selection.composite)
        return units

    @contextmanager
    def _observing(
        self, trainer: Trainer, module: LightningModule, state: FreezeState
    ) -> Iterator[tuple[UnitMap, ReferenceData]]:
        with isolate_rng():
            reference = self.reference.draw(trainer)
            self._check_size(reference.samples)
            with sharding.whole(module), subnetwork.with_leading_buffers(module, reference.ranks):
                yield reference.ranks.decided(lambda: self._trace(module, state, reference.example)), reference

    def _trace(self, module: torch.nn.Module, state: FreezeState, batch: Any) -> UnitMap:
        units = UnitMap.of(module, batch, self.reference.predict, self.units, self.heads)
        state.check_units(units)
        for record in state.tasks.values():
            if record.head == units.head:
                raise ValueError(
                    f"head {units.head!r} belongs to the finished task {record.name!r} and is frozen: give each task "
                    "a head of its own (lightning_rnf.MultiHead does) and activate it before fit"
                )
        return units

    def _check_size(self, samples: int | None) -> None:
        if samples is not None:
            for criterion in self._criteria():
                criterion.check_samples(samples)

    def _criteria(self) -> tuple[Criterion, ...]:
        return (self.criterion, self.recovery.before) if self.recovery.epochs else (self.criterion,)

    def _witnessed(
        self,
        record: TaskRecord,
        module: torch.nn.Module,
        units: UnitMap,
        reference: ReferenceData,
        state: FreezeState,
        witnesses: Witnesses,
    ) -> TaskRecord:
        """The record with what a later audit needs: fingerprints of what is frozen, the drift of earlier logits."""
        rows = fingerprints(module, units, record, state)
        # Rank 0 has a batch for sure, and it alone keeps some of it; all get the record.
        drift = reference.ranks.decided(
            lambda: witnesses.look(
                record,
                module,
                units,
                reference,
                state,
                masked=self.masked,
                images=self.heatmaps,
                composite=self.selection.composite,
            )
        )
        return replace(record, rows=rows, drift=drift)
