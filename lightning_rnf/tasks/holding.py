"""What is held still for the finished tasks while a fit is under way, and what of the network speaks in it."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack

import torch
from torch import nn

from lightning_rnf.freezing import ElasticityOption, Freezer, elasticities
from lightning_rnf.memory import FreezeState, TaskRecord
from lightning_rnf.recall import norms, subnetwork
from lightning_rnf.runtime import recompiled


class Holding:
    """The rows of frozen units, pinned norms, and in a recovery the silence around the sub-network: one fit's.

    From its construction on, parameters that are frozen whole are out of training; rows are held once it is attached.

    Args:
        module: the bare model, before the strategy wraps it.
        state: the finished tasks.
        elasticity: of relevant units.
        irrelevant_elasticity: of the others.
        pins_norms: whether frozen channels normalise with their stored statistics.

    Raises:
        ValueError: if the model is not the one of the finished tasks.
    """

    def __init__(
        self,
        module: nn.Module,
        state: FreezeState,
        elasticity: ElasticityOption,
        irrelevant_elasticity: ElasticityOption,
        *,
        pins_norms: bool,
    ) -> None:
        state.check_module(module)
        self.module = module
        self.state = state
        self.elasticities = (elasticity, irrelevant_elasticity)
        self.pins_norms = pins_norms
        self._silenced = ExitStack()
        self._pinned = ExitStack()
        self._begin()

    def attach(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        """Hold rows from here on, at the values that they have now; in a recovery that is resumed, inside of it."""
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
            self.freezer.attach(optimizers)

    def pin(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        """Put rows back, whoever wrote to them, and hold them against new optimizers, too."""
        self.freezer.follow(optimizers)
        self.freezer.pin()

    def stay_inside(self, record: TaskRecord) -> None:
        """Until `speak` nothing but a task's sub-network speaks, and no unit outside of it learns."""
        self.freezer.change(elasticities(self.state, *self.elasticities, record.relevant))
        self._silenced.enter_context(recompiled())
        self._silenced.enter_context(subnetwork.silence(self.module, self.state.layers, record.relevant))
        self._silenced.enter_context(norms.held(self.module))

    def speak(self) -> None:
        """Let the whole network speak."""
        self._silenced.close()

    def go_on(self) -> None:
        """Hold what a task that has ended inside the fit needs, too."""
        self.freezer.change(elasticities(self.state, *self.elasticities))
        self._pin_norms()

    def end(self) -> None:
        """Give the model back. Safe to call twice."""
        self._silenced.close()
        self._pinned.close()
        self.freezer.detach()

    def _begin(self) -> None:
        self.freezer = Freezer(self.module, elasticities(self.state, *self.elasticities))
        self.freezer.stop_gradients()

    def _pin_norms(self) -> None:
        self._pinned.close()
        if self.pins_norms:
            self._pinned.enter_context(recompiled())
            self._pinned.enter_context(norms.pinned(self.module, norms.stored(self.state, self.module)))
