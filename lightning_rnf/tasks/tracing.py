"""Which units a task is about: those that its data run, as far as they agree with the finished tasks."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from lightning_rnf.anatomy import Predict, UnitMap, joined
from lightning_rnf.memory import FreezeState
from lightning_rnf.recall import NormParameters, NormStatistics
from lightning_rnf.runtime import arguments, sharding
from lightning_rnf.tasks.reference import ReferenceData
from lightning_rnf.tasks.survey import Survey

Globs = Any
"""A glob of module names, or several; None: what is found."""


@dataclass
class Tracing:
    """Traces the units of a model for the next task.

    Attributes:
        predict: how to get logits and labels of a batch.
        units: which layers are made of units.
        heads: which modules are heads.
        own_norms: whether each task has scale and shift of norms of its own.
        by_tokens: whether rows of embeddings are told apart; if not, or if the model is sharded, embeddings are
            frozen whole.
        rehearsed: the units that were found before the training.

    Raises:
        TypeError: if an option is no glob.
    """

    predict: Predict
    units: Globs = None
    heads: Globs = None
    own_norms: bool = False
    by_tokens: bool = True
    rehearsed: UnitMap | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.units = arguments.globs("units", self.units)
        self.heads = arguments.globs("heads", self.heads)

    @staticmethod
    def owns(asked: NormParameters | None, retention: str, statistics: NormStatistics) -> bool:
        """Whether each task has scale and shift of norms of its own; None: where recall can bring them back.

        Raises:
            ValueError: if it is asked for and recall can't.
        """
        can = retention == "exact" and statistics == "per_task"
        has = can if asked is None else arguments.one_of("norm_parameters", asked, NormParameters) == "per_task"
        if has and not can:
            raise ValueError(
                "norm_parameters='per_task' is brought back by recall with a task's statistics: it goes with "
                f"retention='exact' and norm_statistics='per_task', not with {retention!r} and {statistics!r}"
            )
        return has

    def of_data(self, module: torch.nn.Module, state: FreezeState, reference: ReferenceData) -> UnitMap:
        """The units of the first batch that has some as they are known: no task is lost for those that disagree.

        What another batch runs besides is frozen whole. If none will do, the units are those that were rehearsed.
        """
        failure: Exception | None = None
        for batch in reference.batches:
            try:
                return self.of_batch(module, state, reference.convert(batch))
            except (TypeError, ValueError) as error:
                failure = failure or error
        assert failure is not None
        if self.rehearsed is None or self.rehearsed.head in {record.head for record in state.tasks.values()}:
            raise failure
        return state.completed(self.rehearsed)

    def of_batch(self, module: torch.nn.Module, state: FreezeState, batch: Any) -> UnitMap:
        """The units of one batch.

        Raises:
            ValueError: if the head belongs to a finished task, or as `UnitMap.of` and `FreezeState.completed`.
        """
        units = state.completed(self._map(module, state, batch))
        for record in state.tasks.values():
            if record.head == units.head:
                raise ValueError(
                    f"head {units.head!r} belongs to the finished task {record.name!r} and is frozen: give each task "
                    "a head of its own (lightning_rnf.MultiHead does) and activate it before fit. One that several "
                    "tasks share, or that grows, can't be kept: it would change the finished task's logits. If "
                    "another module makes this task's logits, name the heads with heads="
                )
        return units

    def joined(
        self,
        units: UnitMap,
        module: torch.nn.Module,
        state: FreezeState,
        reference: ReferenceData,
        survey: Survey,
        walk: int,
    ) -> tuple[UnitMap, tuple[str, ...]]:
        """The units of what other batches run, too, in a walk; and which of their modules can't be made of any."""

        def others() -> list[UnitMap]:
            found = []
            for batch in survey.routes.batches if walk == 0 else ():
                with suppress(TypeError, ValueError):  # what can't be made of units there is frozen whole
                    found.append(self._map(module, state, reference.convert(batch)))
            return found

        ranks = reference.ranks
        maps = [one for of_rank in ranks.each(others) for one in of_rank]
        missed = [name for of_rank in ranks.gather(survey.routes.missed.get(walk, [])) for name in of_rank]
        is_first = not state.tasks and state.recovering is None
        known = None if is_first else [layer.name for layer in state.layers]
        all_units, whole = joined(units, module, maps, missed, known)
        all_units = self._with_own(all_units, module, state)
        said = {name.rpartition(".")[0] for name in (*state.shared, *all_units.own)}
        return state.completed(all_units), tuple(name for name in whole if name not in said)

    def _map(self, module: torch.nn.Module, state: FreezeState, batch: Any) -> UnitMap:
        # Units stay units: those of finished tasks, which may be out of training, and those that this fit has trained.
        layers = (*state.layers, *(self.rehearsed.layers if self.rehearsed is not None else ()))
        learned = {*state.embeddings, *(name for layer in layers for name in layer.parameters)}
        learned.update(self.rehearsed.embeddings if self.rehearsed is not None else ())
        units = UnitMap.of(module, batch, self.predict, self.units, self.heads, learned)
        if not self.by_tokens:
            units = units.with_whole(units.embeddings, "Embedding is frozen whole with retention='paper'")
        elif sharding.is_spread(module):
            units = units.with_whole(units.embeddings, "Embedding is sharded")
        return self._with_own(units, module, state)

    def _with_own(self, units: UnitMap, module: torch.nn.Module, state: FreezeState) -> UnitMap:
        """What finished tasks have frozen stays so, and so does what each has of its own, whatever is asked for now."""
        frozen = {*state.shared, *(name for layer in state.layers for name in layer.parameters)}
        if self.own_norms:
            return units.with_own_norms(module, frozen)
        own = {name for record in state.tasks.values() for name in record.norm_statistics}
        others = {name for name in state.forms if name not in own}
        return units.with_own_norms(module, frozen | others) if own else units
