"""`RelevanceFreezing`: the Trainer's events turned into Algorithm 1 of the paper."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from zennit.core import Composite

from lightning_rnf.anatomy import Predict, supervised
from lightning_rnf.freezing import ElasticityOption, EmbeddingRows, check_elasticity, check_globs, check_rows, initial
from lightning_rnf.memory import FreezeState, TaskRecord
from lightning_rnf.packages import pl
from lightning_rnf.recall import NormParameters, NormStatistics
from lightning_rnf.relevance import Importance, ImportanceName, OverSamples
from lightning_rnf.runtime import arguments, sharding
from lightning_rnf.search import Candidates, Method, Normalize, as_criterion
from lightning_rnf.tasks import (
    BetweenFits,
    CriterionOption,
    Ending,
    FitHead,
    Freeze,
    HeadFit,
    Holding,
    Recovery,
    Reference,
    ReferenceSource,
    Retention,
    Selection,
    TaskOption,
    Tracing,
    auto,
    foresight,
    runs,
)


class RelevanceFreezing(BetweenFits):
    """Relevance-based Neural Freezing: what a finished task needs stays bit-equal, the next task learns with the rest.

    When a fit ends, layer-wise relevance propagation scores every unit on reference data; a search finds how many of
    the least relevant can be silenced before accuracy falls by the tolerance; what remains is frozen for every later
    fit with this callback. Use one callback for all tasks, a new Trainer for each, and a head of its own per task.

    Example::

        rnf = RelevanceFreezing()
        for datamodule in tasks:
            model.heads.activate(datamodule.task)
            Trainer(max_epochs=4, callbacks=[rnf]).fit(model, datamodule=datamodule)
        with rnf.recall("digits-01"):
            logits = model(x)

    Note:
        The record of a task is made in ``on_train_end``, of the weights that the model has then, and saved as
        ``<task>-ended.ckpt`` beside the files of ``ModelCheckpoint``. A task ends only with a fit that trained to its
        end, resumed or not: a skipped or interrupted one, a sanity check, ``fast_dev_run`` and the learning rate finder
        end none.

    Args:
        reference: a data module or loader to draw reference data from, the same for every task; a function
            ``(trainer, module)`` that returns one, for a source per task; None: the fit's own validation data.
        criterion: when pruning stops. A number is the absolute drop of accuracy to tolerate (`AccuracyDrop`); or any
            callable that is shown a `SubnetworkScore`.
        elasticity: factor on the learning rate of relevant units (the paper's lr_frozen): 0 freezes them. A number, or
            numbers by glob of module names. Above 0, recall is not exact.
        irrelevant_elasticity: the same for the other units (the paper's lr_irrelevant).
        freeze: ``"connections"``: of a weight only those entries are frozen that a finished task uses both ends of, so
            its units may learn from others; where the graph of the model can't be followed, whole rows. ``"units"``:
            whole rows, as with ``retention="paper"``.
        retention: ``"exact"``: in recall only the task's relevant units speak, so its logits never change.
            ``"paper"``: Algorithm 1 to the letter: nothing is silenced after the search, and frozen units go on reading
            free ones.
        candidates: ``"free"``: only free units may be pruned. ``"all"``: the paper, every unit is ranked anew.
        recovery_epochs: the task's last epochs, so many, train inside the sub-network: the search comes before them,
            against ``recovery_criterion``; then only the head, the free units that are relevant, and in the first task
            shared parameters learn. The tolerance is checked at the end. ``"auto"``: see ``docs/auto.md``.
        recovery_criterion: what the search before it may take; a number is the drop of accuracy, None: 0.1.
        recovery_search: if it falls short of ``criterion`` then, try milder cutoffs, by half more units each.
        ration: the largest share of a layer's free units that one task may claim, in (0, 1]: the least relevant claims
            beyond it are pruned too. Several: one for each task in the order of their ends, protected and loaded ones
            counted, the last for all after it. None: no limit. ``"auto"``: as little as costs it nothing.
        reset_free: give free units their initial values back before each new task. ``"auto"``: see ``docs/auto.md``.
        tasks: how many there will be, for ``"auto"``; None: not known.
        importance: ``"lrp"``; to compare it with: ``"gradient_x_activation"``, ``"taylor"``, ``"activation"``,
            ``"magnitude"``, ``"random"``, or an `Importance` of your own.
        over_samples: how a unit's relevance is summed over samples: ``"absolute"``: that of each sample by its size, so
            that a unit which speaks for some classes and against others is not taken for a silent one. ``"signed"``:
            the paper.
        composite: Zennit's rules for relevance; None: ``EpsilonPlus`` (equations 1 and 2), our own for the rest.
        normalize: ``"layer"``: each layer's absolute relevance sums to 1 before units of all layers are ranked, and
            units without any go first. ``"none"``: raw, the paper; not followed, with a warning, where something has no
            rule (a layer norm, attention): raw relevance doesn't compare across layers then.
        search: ``"fewest"``: from the fewest units upwards; ``"bisect"``, or the paper's ``"linear"``, from the most.
        resolution: units per step of the search (the paper's pruning ratio r).
        norm_statistics: ``"per_task"``: recall brings back the running statistics of the task's end. ``"pinned"``:
            besides, frozen channels normalise with their stored statistics in training. ``"shared"``: later tasks move
            them, and recall is not exact.
        norm_parameters: ``"per_task"``: each task has scale and shift of norms of its own, which recall brings back.
            ``"frozen"``: with their units, or whole. None: per task where recall is exact and its statistics are.
        embeddings: ``"per_task"``: each task has rows of its own, which recall brings back. ``"frozen"``: a row is once
            a task has read it. None: per task up to 2²³ numbers a table. With ``retention="paper"`` they are whole.
        recalibrate_norm: estimate each candidate's running statistics anew.
        reference_samples: how many of the data to draw; accuracy is measured on all their targets. None: all there are.
        attribution_samples: relevance is measured on so many of them. None: on all.
        fit_head: ``"auto"``: with ``retention="exact"``, the last layer of the task's head is fitted to each candidate
            in closed form, and that of the accepted one is written into the model; where it is linear or a 1 × 1
            convolution whose output ``predict`` returns. False: the head stays as it was trained.
        fit_data: what the head is fitted on, as ``reference``; None: the fit's training data in eval mode, or where
            ``predict`` can't do with them, half of the reference data.
        fit_samples: so many of them; None: all there are.
        units: globs of the names of layers to make units of; None: all linear, convolutional, recurrent and attention
            ones outside the head that learn (``requires_grad``). What is left out is frozen whole after the first task.
        heads: globs of the names of heads; None: they are found by tracing which module makes the logits.
        predict: ``(module, batch) -> (logits, target)``: class indices of samples, pixels or tokens, 0 and 1 for each
            label, or numbers (see `Predict`); None: for batches ``(x, y)``.
        task: the task's name, or ``(trainer, module) -> name``; None: ``datamodule.task``, else ``"task-<n>"``.
        seed: of the drawing of reference data.
        heatmaps: of so many samples of each task, up to 8, log what in the image is relevant to the true class, after
            the task's end and after every later one (figures and their drift, to loggers). 0: none. The samples are not
            in checkpoints: tasks that ended before the program was started have none, and a warning says so.
        portraits: remember what each task's data look like to sub-networks, for `infer_task`: ``docs/inference.md``.

    Raises:
        TypeError, ValueError: if an argument is out of its range.
    """

    def __init__(
        self,
        reference: ReferenceSource = None,
        *,
        criterion: CriterionOption = 0.02,
        elasticity: ElasticityOption = 0.0,
        irrelevant_elasticity: ElasticityOption = 1.0,
        retention: Retention = "exact",
        freeze: Freeze = "connections",
        candidates: Candidates = "free",
        recovery_epochs: int | Literal["auto"] = "auto",
        recovery_criterion: CriterionOption | None = None,
        recovery_search: bool = False,
        ration: float | Sequence[float] | Literal["auto"] | None = "auto",
        reset_free: bool | Literal["auto"] = "auto",
        tasks: int | None = None,
        importance: ImportanceName | Importance = "lrp",
        over_samples: OverSamples = "absolute",
        composite: Composite | None = None,
        normalize: Normalize = "layer",
        search: Method = "fewest",
        resolution: int = 1,
        norm_statistics: NormStatistics = "per_task",
        norm_parameters: NormParameters | None = None,
        embeddings: EmbeddingRows | None = None,
        recalibrate_norm: bool = True,
        reference_samples: int | None = 5000,
        attribution_samples: int | None = 1000,
        fit_head: FitHead = "auto",
        fit_data: ReferenceSource = None,
        fit_samples: int | None = 10_000,
        units: str | Sequence[str] | None = None,
        heads: str | Sequence[str] | None = None,
        predict: Predict | None = None,
        task: TaskOption = None,
        seed: int = 0,
        heatmaps: int = 0,
        portraits: bool = False,
    ) -> None:
        super().__init__(
            arguments.one_of("retention", retention, Retention),
            arguments.of_type("task", task, (str, Callable), "a name or a function (trainer, module)"),
        )
        criterion = as_criterion(criterion)
        ration, recovery_epochs, reset_free = auto.settled(ration, recovery_epochs, reset_free, retention, criterion)
        self.ending = Ending(
            Selection(
                *(importance, composite, normalize, candidates, ration, search, resolution),
                *(norm_statistics, recalibrate_norm, tasks, over_samples),
            ),
            Reference(reference, reference_samples, attribution_samples, predict, seed),
            criterion,
            Recovery(recovery_epochs, recovery_criterion, recovery_search),
            Tracing(predict or supervised, units, heads, Tracing.owns(norm_parameters, retention, norm_statistics)),
            HeadFit(fit_head if retention == "exact" else False, fit_data, fit_samples),
            *(retention == "exact", heatmaps),
            connections=retention == "exact" and arguments.one_of("freeze", freeze, Freeze) == "connections",
            portraits=arguments.of_type("portraits", portraits, bool, "True or False"),
        )
        self.elasticity = check_elasticity("elasticity", elasticity)
        self.irrelevant_elasticity = check_elasticity("irrelevant_elasticity", irrelevant_elasticity)
        self.embeddings = check_rows(embeddings, retention)
        if reset_free != "auto":
            arguments.of_type("reset_free", reset_free, bool, "True or False")
        self.reset_free = reset_free
        self._is_resumed = self._has_trained = False
        self._steps_at_end = self._epoch = -1
        self._scores: dict[Any, float] = {}
        is_elastic = any(elasticity.values() if isinstance(elasticity, dict) else [elasticity])
        self.ending.is_exact = retention == "exact" and norm_statistics != "shared" and not is_elastic
        if retention == "exact":
            foresight.of_options(norm_statistics, elasticity, is_elastic=is_elastic)

    @classmethod
    def paper(cls, **changes: Any) -> RelevanceFreezing:
        """The paper's own configuration: Algorithm 1, with a tolerance of 2 %."""
        paper: dict[str, Any] = {"retention": "paper", "candidates": "all", "normalize": "none", "elasticity": 0.0}
        paper |= {"fit_head": False, "search": "bisect", "over_samples": "signed", "recalibrate_norm": False}
        return cls(**paper | {"recovery_epochs": 0} | changes)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in Ending.OPTIONS:  # without this it would be taken, and change nothing
            raise AttributeError(f"{name} is an option of a task's end: set it when you make the callback")
        super().__setattr__(name, value)

    @property
    def reference(self) -> ReferenceSource:
        """Where reference data come from; set it between fits for a source per task."""
        return self.ending.reference.source

    @reference.setter
    def reference(self, source: ReferenceSource) -> None:
        self.ending.reference.source = source

    def end_task(self, name: str | None = None) -> TaskRecord:
        """End the task that is being trained, inside a fit that goes on with the next one.

        For several tasks in one long fit. Call it between two steps, from a hook such as ``on_train_epoch_end``, before
        the next task's head is activated: its reference data is drawn and its head traced now, and its units are frozen
        from the next step on. The fit's end then ends the last task, unless no step was made since; let ``task`` be a
        function that names it, ``lambda trainer, module: module.heads.active``, say.

        Args:
            name: of the task; None: as ``task`` says.

        Raises:
            RuntimeError: if no fit is under way.
            ValueError: if the fit has several processes, the task has ended already, or as the end of a fit.
        """
        module = self._model()
        if module is None or self._holding is None or not self._holding.freezer.attached:
            raise RuntimeError("no fit is under way whose task could end: call end_task from a hook between two steps")
        runs.refuse_processes(module.trainer)
        self._holding.pin(module.trainer.optimizers)
        self.state.several = True  # before: checkpoints of this end belong to a fit that goes on
        record = self._end_task(module.trainer, module, self._task_name(module.trainer, module, name))
        self._holding.go_on(reset=self._resets)
        return record

    def free_rows(self, parameter: torch.Tensor) -> torch.Tensor | None:
        """Which rows of a parameter the fit that is under way lets learn: see `reduce_free_rows`.

        Returns:
            Indices ``(rows, leading dimensions)`` of those that aren't frozen, in general ``(rows, 1)``; None: all.
        """
        return None if self._holding is None else self._holding.freezer.free_rows(parameter)

    # -- a fit --------------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what can't work; freeze whole parameters once the model is built, before the strategy wraps it."""
        if stage != "fit":
            self._watch_sizes(pl_module)
            return
        runs.check_trainer(trainer, self, RelevanceFreezing)
        self._scores = runs.scores_of_before(trainer)
        # What was protected or loaded before the processes knew of each other: they go on with the same.
        self._agree(runs.ranks_of(trainer))
        self._is_resumed = self._has_trained = False
        if self._holding is not None:
            self._holding.end()
        self.state.forget_unfinished()  # a checkpoint brings back what belongs to a fit that is resumed
        self._holding = self._hold(pl_module)

        def built() -> None:
            runs.check_active_head(pl_module, self._task_name(trainer, pl_module))
            self._model = weakref.ref(pl_module)

        self._holding.wait(built)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check what the task's end will need while nothing is lost, and hold frozen rows from here on."""
        name = self._task_name(trainer, pl_module)
        if self.state.recovering is not None and self.state.recovering.name != name:
            self.state.forget_unfinished()
        if self.state.recovering is None and self.ending.recovery.epochs != "auto":
            runs.check_epochs(trainer, self.ending.recovery.epochs, resumed=self._is_resumed)
        runs.check_sharding(trainer, pl_module)
        assert self._holding is not None
        with sharding.whole(pl_module):
            self._holding.check_weights(runs.ranks_of(trainer))
            if self._resets:  # whole rows, which may have diverged; what else is free, when it is known
                initial.reset_free(self.state, pl_module, is_last=False)
            units, doubted = self.ending.rehearse(trainer, pl_module, self.state, self._holding.heard)
            self._holding.distrust(doubted)
            if self._resets:
                initial.reset_free(self.state, pl_module, self._holding.followed())
            check_globs("elasticity", self.elasticity, units)
            check_globs("irrelevant_elasticity", self.irrelevant_elasticity, units)
            if self._resets and not self.state.tasks and not self.state.initial:
                initial.remember(self.state, pl_module, units.layers)
        self._has_trained = True
        self._steps_at_end = -1
        self.state.training = name
        if not self._is_resumed:
            self.state.begun = trainer.current_epoch
        if self.ending.heatmaps:
            self._witnesses.warn_of_lost(self.state.tasks)
        if self.state.recovering is not None:
            self.ending.selection.check_goes_on(self.state.recovering, units, self.state)
        self._holding.attach(trainer.optimizers, units)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Follow optimizers that were put in place of others; go on inside the sub-network when it is time."""
        assert self._holding is not None
        self._holding.freezer.follow(trainer.optimizers)
        if self.state.training is None:  # the last one was ended by hand
            name = runs.given_name(self.task, trainer, pl_module)
            self.state.training = None if name in self.state.tasks else name
        self._epoch = trainer.current_epoch
        epochs = self.ending.recovery.epochs_of(trainer, several=self.state.several, begun=self.state.begun)
        if self.state.recovering is None and runs.is_time_to_recover(trainer, epochs, late=self._is_resumed):
            name = self._task_name(trainer, pl_module)
            self._holding.stay_inside(self.ending.recover(trainer, pl_module, self.state, name))
            self._holding.freezer.forget_curvature()
        if self.state.recovering is not None:
            epochs = self.state.recovering.recovery_epochs + 1
            self.state.recovering = replace(self.state.recovering, recovery_epochs=epochs)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start counting optimizer steps anew."""
        assert self._holding is not None
        self._holding.freezer.forget_failed_step()
        if batch_idx == 0 and self._epoch != trainer.current_epoch:  # Lightning doesn't tell, resumed at an epoch's end
            self.on_train_epoch_start(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Hold frozen rows against callbacks that write weights."""
        assert self._holding is not None
        self._holding.freezer.pin(written_only=True)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at what was frozen and not put back, since no step can have moved it."""
        assert self._holding is not None
        self._holding.freezer.audit()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Algorithm 1: score the units, search the cutoff, keep what remains. The next fit freezes it."""
        if trainer.fast_dev_run or trainer.global_step == self._steps_at_end:  # type: ignore[attr-defined]
            return
        assert self._holding is not None
        self._holding.pin(trainer.optimizers)
        record = self._end_task(trainer, pl_module, self._task_name(trainer, pl_module))
        runs.warn_of_unearned_stop(trainer, record.name, self._scores)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End the task of a checkpoint from after its last epoch: with nothing left to train, no training ends."""
        if self._steps_at_end >= 0:
            self.ending.look_again(pl_module, self.state)
        if not self._has_trained and self.state.training is None:
            runs.warn_of_untrained(trainer, runs.given_name(self.task, trainer, pl_module), self.state)
        if self._has_trained or not self._is_resumed or self.state.training is None or not trainer.fit_loop.done:
            return
        name = self._task_name(trainer, pl_module)
        if name == self.state.training:
            pl_module.to(trainer.strategy.root_device)
            try:
                self._end_task(trainer, pl_module, name)
            finally:
                pl_module.cpu()  # where Lightning has put it

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give everything back at the end of any run."""
        self._give_back()
        sharding.reshard(pl_module)  # flags that the user sets before the next fit are to be seen by it

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep frozen rows exact where another callback saves its averages in the model's place."""
        if not sharding.is_sharded(pl_module):
            (self._holding or self._hold(pl_module)).hold_in_copy(checkpoint["state_dict"])

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """In a fit: hold frozen rows before they are looked at. Else recall, as in a test."""
        if self._holding is not None:
            self._holding.freezer.pin()
        super().on_validation_start(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give everything back after an exception: Lightning calls no teardown then."""
        self._give_back()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `FinishedTasks.load_state_dict`; in a fit that is being set up or resumed the tasks count at once.

        Raises:
            ValueError: besides, if they are of another model, or a fit would go on without a finished task.
        """
        if self._holding is None:
            super().load_state_dict(state_dict)
            return
        state, module = FreezeState.from_plain(state_dict), self._holding.module
        if lost := self._lacks(state):
            raise ValueError(
                f"{lost}: this fit would train over what they need; save with trainer.save_checkpoint after fit, "
                "or use a new RelevanceFreezing to go back"
            )
        state.check_module(module)
        self._take(state)
        # The learning rate finder restores a checkpoint in the middle of a fit.
        trainer: Any = module.trainer if self._holding.freezer.attached else None
        self._holding.restart(state, trainer and trainer.optimizers)
        self._is_resumed = True

    @property
    def _resets(self) -> bool:
        return bool(self.reset_free) and (self.reset_free is True or not self.state.tasks or bool(self.state.initial))

    # -- verbs --------------------------------------------------------------------------------------------------------

    def _end_task(self, trainer: pl.Trainer, module: pl.LightningModule, name: str) -> TaskRecord:
        if self._holding is not None:
            self._holding.speak()
        try:
            return self.ending.end(trainer, module, self.state, self._witnesses, name)
        finally:
            if name in self.state.tasks:
                self._steps_at_end = trainer.global_step

    def _hold(self, module: pl.LightningModule) -> Holding:
        return Holding(
            *(module, self.state, self.elasticity, self.irrelevant_elasticity, self.embeddings),
            pins_norms=self.ending.selection.norm_statistics == "pinned",
            by_rows=not self.ending.connections,
        )

    def _give_back(self) -> None:
        if self._holding is not None:
            self._holding.end()
            self._holding = None
        self._end_run()

    def _task_name(self, trainer: pl.Trainer, module: pl.LightningModule, given: str | None = None) -> str:
        return runs.name_of_new_task(self.task, self.state, trainer, module, given)
