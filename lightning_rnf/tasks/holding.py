"""What is held still for the finished tasks while a fit is under way, and what of the network speaks in it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from lightning_rnf.anatomy import UnitMap, form
from lightning_rnf.freezing import (
    ElasticityOption,
    EmbeddingRows,
    Freezer,
    Unread,
    elasticities,
    factor_of,
    frozen_connections,
    has_own_rows,
    heard,
    hold_in_copy,
    initial,
)
from lightning_rnf.memory import FreezeState, TaskRecord, moved
from lightning_rnf.packages import LightningModule, is_overridden, rank_zero_warn
from lightning_rnf.recall import norms, subnetwork
from lightning_rnf.runtime import Ranks, recompiled, sharding
from lightning_rnf.tasks import foresight
from lightning_rnf.tasks.checkpoints import file_name, refuse_more_parameters, widen_for


def give_rows(
    module: torch.nn.Module,
    state: FreezeState,
    names: Iterable[str],
    asked: EmbeddingRows | None,
    elasticity: ElasticityOption,
) -> None:
    """Let a state know of which embeddings each task has its own rows: of none that a finished task needs whole.

    Args:
        module: the model.
        state: the finished tasks.
        names: of the embeddings' weights.
        asked: as for `freezing.has_own_rows`.
        elasticity: of relevant units.
    """
    needed = {name for record in state.tasks.values() for name in record.read_whole}
    state.own_rows = tuple(
        name
        for name in dict.fromkeys(() if sharding.is_sharded(module) else names)
        if name not in needed
        and has_own_rows(module.get_parameter(name), asked, factor_of(elasticity, name.rpartition(".")[0], 0.0))
    )


class Holding:
    """The rows of frozen units, pinned norms, and in a recovery the silence around the sub-network: one fit's.

    Once the model is built, parameters that are frozen whole are out of training; rows are held once it is attached.

    Args:
        module: the bare model, before the strategy wraps it and before its own ``setup`` and ``configure_model``.
        state: the finished tasks.
        elasticity: of relevant units.
        irrelevant_elasticity: of the others.
        embeddings: whether each task has rows of its own; None: as `freezing.has_own_rows` says.
        pins_norms: whether frozen channels normalise with their stored statistics.
        by_rows: whether whole rows of relevant units are frozen, whatever their tasks read.

    Attributes:
        heard: channels that layers read in recall, by task, as they were `followed`; see `freezing.heard`.
    """

    def __init__(
        self,
        module: LightningModule,
        state: FreezeState,
        elasticity: ElasticityOption,
        irrelevant_elasticity: ElasticityOption,
        embeddings: EmbeddingRows | None = None,
        *,
        pins_norms: bool,
        by_rows: bool = False,
    ) -> None:
        self.module = module
        self.state = state
        self.elasticities = (elasticity, irrelevant_elasticity)
        self.pins_norms = pins_norms
        self.by_rows = by_rows
        self.embedding_rows = embeddings
        self._connections: dict[str, Tensor] = {}
        self._followed: list[str] | None = None
        self._doubted: set[str] = set()
        self.heard: dict[str, dict[str, Tensor]] = {}
        self._embeddings: tuple[str, ...] = ()  # of the task that is being trained
        self._whole: set[str] = set()  # of the embeddings of finished tasks, those that it can't use by rows
        self._tasks: list[str] = []  # that had ended when rows of embeddings were held
        self._silenced = ExitStack()
        self._pinned = ExitStack()
        self._waiting = ExitStack()
        self.freezer = Freezer(module, {})

    def wait(self, built: Callable[[], Any]) -> None:
        """Begin when the model is built, and call ``built`` then. What it lacks is refused then.

        Raises:
            ValueError: then, if the model is not the one of the finished tasks.
        """
        # Between these two and the strategy, which wraps the model, Lightning calls no callback; so the last that
        # builds says when it has. Where a class has neither, the model is there already.
        last = next((name for name in ("configure_model", "setup") if is_overridden(name, self.module)), None)
        if last is None:
            self._begin_built(built)
            return
        build, own = getattr(self.module, last), vars(self.module).get(last)

        def build_and_begin(*args: Any, **options: Any) -> None:
            self._waiting.close()
            build(*args, **options)
            self._begin_built(built)

        setattr(self.module, last, build_and_begin)
        if own is None:
            self._waiting.callback(delattr, self.module, last)
        else:
            self._waiting.callback(setattr, self.module, last, own)

    def check_weights(self, ranks: Ranks) -> None:
        """Check that the model has the weights in which the finished tasks ended, before the fit keeps others for them.

        Every rank has to call it, with the whole model. Rows that go on learning are not looked at, nor what had moved
        when the last task ended; a model in another precision is warned of.

        Raises:
            ValueError: naming the tasks, their layers and the ways out.
        """
        parameters = dict(self.module.named_parameters(remove_duplicate=False))
        found = ranks.decided(lambda: moved(parameters, self.state, self._learning(), self.heard))
        if not found:
            return
        frozen = [name for name in elasticities(self.state) if name in parameters]
        dtypes = [{text.partition(" ")[0] for text in (form(parameters[name]), self._form(name))} for name in frozen]
        if several := next((sorted(pair) for pair in dtypes if len(pair) > 1), None):
            rank_zero_warn(
                f"the model is in another precision than the finished tasks {list(found)} ended in "
                f"({' and '.join(several)}): rounded rows are not bit-equal, and recall gives other logits than then"
            )
            return
        said = "; ".join(f"of {task!r} {', '.join(names)} differ" for task, names in found.items())
        task = next(iter(found))
        raise ValueError(
            f"the model's weights are not those in which the finished tasks ended ({said:.500}), so this fit would "
            f"keep what no task needs: load those of the last task's end, rnf.restore('{file_name(task)}', model), or "
            f"give tasks up with rnf.forget({task!r}) or a new RelevanceFreezing"
        )

    def attach(self, optimizers: Iterable[torch.optim.Optimizer], units: UnitMap) -> None:
        """Hold rows from here on, at the values that they have now; in a recovery that is resumed, inside of it.

        Args:
            optimizers: of the fit.
            units: of the task that it trains.
        """
        self._waiting.close()
        self._embeddings = units.embeddings
        self._whole = set(units.read_whole)
        if self._give_rows() or self._whole:
            self.freezer.change(self.factors())
        self._hold_unread()
        self.freezer.attach(optimizers)
        self._pin_norms()
        if self.state.recovering is not None:
            self.stay_inside(self.state.recovering)

    def restart(self, state: FreezeState, optimizers: Iterable[torch.optim.Optimizer] | None) -> None:
        """Hold what other finished tasks need, at once if there are optimizers: a checkpoint was restored."""
        self.freezer.detach()
        state.check_module(self.module)
        self.state = state
        self._begin()
        if optimizers is not None:
            self._hold_unread()
            self.freezer.attach(optimizers)

    def pin(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        """Put rows back, whoever wrote to them, and hold them against new optimizers, too; note what has changed."""
        self.freezer.follow(optimizers)
        self.freezer.pin()
        self.note_rows()

    def stay_inside(self, record: TaskRecord) -> None:
        """Until `speak` nothing but a task's sub-network speaks, and no unit outside of it learns."""
        self.freezer.change(self.factors(record.relevant))
        self._silenced.enter_context(recompiled())
        self._silenced.enter_context(subnetwork.silence(self.module, self.state.layers, record.relevant))
        self._silenced.enter_context(norms.held(self.module))

    def speak(self) -> None:
        """Let the whole network speak."""
        self._silenced.close()

    def go_on(self, *, reset: bool) -> None:
        """Hold what a task that has ended inside the fit needs, too; what is free is reset before, or not."""
        self._pinned.close()
        if reset:
            with sharding.whole(self.module):
                initial.reset_free(self.state, self.module, self.followed())
        self._give_rows()
        self._hold_unread()
        self.freezer.change(self.factors())
        self._pin_norms()

    def note_rows(self) -> None:
        """Let the state know which rows of embeddings this fit has changed, and how finished tasks heard them."""
        if self._tasks == list(self.state.tasks) and self.freezer.unread:  # if one has ended, they are its own
            unread = self.freezer.unread.items()
            self.state.keep_rows(
                {name: one.learned() for name, one in unread}, {name: one.before() for name, one in unread}
            )

    def distrust(self, layers: Collection[str]) -> None:
        """Freeze whole rows of layers in this fit: they read something else than the graph says."""
        doubted = [name for name in self.followed() if name in layers]
        if doubted:
            rank_zero_warn(
                f"{', '.join(doubted)}: silent channels are not zero there in this task's forward, as they are in the "
                "graph of the model's: whole rows are frozen"
            )
            self._doubted.update(doubted)
            self.freezer.change(self.factors())

    def followed(self) -> dict[str, Tensor]:
        """Entries of weights that are frozen, where those are not whole rows; see `frozen_connections`."""
        if self._followed != list(self.state.tasks):
            self.heard, self._followed = heard(self.module, self.state), list(self.state.tasks)
            self._connections = {} if self.by_rows else frozen_connections(self.module, self.state, self.heard)
        return {name: needed for name, needed in self._connections.items() if name not in self._doubted}

    def factors(self, inside: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The factor on the learning rate of each parameter; ``inside`` a sub-network, if there is one."""
        found = elasticities(self.state, *self.elasticities, inside, self.followed())
        is_sharded = sharding.is_sharded(self.module)  # then no process sees all rows
        whole = [name for name in self.state.embeddings if is_sharded or name in self._whole]
        return {**found, **{name: torch.zeros_like(found[name]) for name in whole}}

    def hold_in_copy(self, tensors: Mapping[str, Tensor]) -> None:
        """Put rows back, whoever wrote to them, and give them to a copy of the parameters, too; see `hold_in_copy`."""
        self.freezer.pin()
        hold_in_copy(tensors, self.module, self.still())

    def still(self) -> dict[str, Tensor]:
        """As `factors`, for what is not to move now: 0, too, for rows of embeddings that have not learned anything."""
        found = self.factors()
        unread = self.freezer.unread
        for name in {*self.state.embeddings, *unread}:
            before = found.get(name)
            if name in unread:
                learned = unread[name].learned()
                found[name] = learned.float() if before is None else before.masked_fill(~learned, 0.0)
            elif before is not None:
                found[name] = torch.zeros_like(before)
        return found

    def end(self) -> None:
        """Give the model back. Safe to call twice."""
        self._waiting.close()
        self._silenced.close()
        self._pinned.close()
        self.freezer.detach()
        self.note_rows()  # also of a fit that was given up: finished tasks go on hearing what was there before it
        self.freezer.unread.clear()

    def _begin_built(self, built: Callable[[], Any]) -> None:
        self.state.check_module(self.module)
        self._begin()
        built()
        self._waiting.callback(refuse_more_parameters(self.module))
        self._waiting.callback(widen_for(self.module))

    def _learning(self) -> set[str]:
        """Layers and shared parameters whose relevant rows are elastic."""
        factors = elasticities(self.state, *self.elasticities)  # by rows, all of a row has the same
        frozen = self.state.frozen()
        of_layers = {
            layer.name
            for layer in self.state.layers
            if (factors[layer.weight][layer.spread(layer.weight, frozen[layer.name])] != 0).any()
        }
        frozen_rows = {name: self.state.frozen_rows(name) for name in self.state.embeddings}
        of_embeddings = {name for name, rows in frozen_rows.items() if factors[name][rows].any()}
        return of_layers | of_embeddings | {name for name in self.state.shared if factors[name] != 0}

    def _form(self, parameter: str) -> str:
        return self.state.forms.get(parameter, "float32 ")  # most are, and files of before don't say

    def _begin(self) -> None:
        self._followed = None
        self._give_rows()  # first: what is frozen whole is out of training from here on
        self.freezer = Freezer(self.module, self.factors())
        foresight.of_let_go(self.module, self.state)
        self.freezer.stop_gradients()

    def _give_rows(self) -> bool:
        """Let the state know of which embeddings each task has its own rows; whether that is otherwise than before."""
        before = self.state.own_rows
        names = [name for name in (*self.state.embeddings, *self._embeddings) if name not in self._whole]
        give_rows(self.module, self.state, names, self.embedding_rows, self.elasticities[0])
        return before != self.state.own_rows

    def _hold_unread(self) -> None:
        """Hold rows of embeddings until they are read, from what they are now."""
        self._tasks, self.freezer.unread = list(self.state.tasks), {}
        if sharding.is_sharded(self.module):
            return
        for name in dict.fromkeys((*self.state.embeddings, *self._embeddings)):
            if name not in self._whole and name not in self.state.shared:
                frozen, learned = self.state.frozen_rows(name), self.state.learned.get(name)
                frozen = None if frozen is None or not frozen.any() else frozen
                self.freezer.unread[name] = Unread(self.module.get_parameter(name), frozen, learned)

    def _pin_norms(self) -> None:
        self._pinned.close()
        if self.pins_norms:
            self._pinned.enter_context(recompiled())
            self._pinned.enter_context(norms.pinned(self.module, norms.stored(self.state, self.module)))
