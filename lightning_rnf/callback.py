"""`RelevanceFreezing`: the Trainer's events turned into Algorithm 1 of the paper."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from zennit.core import Composite

from lightning_rnf import arguments, audit, checkpoints, initial, norms, sharding, subnetwork, tracking
from lightning_rnf.criteria import Criterion, SubnetworkScore, as_criterion
from lightning_rnf.evaluation import Predict, supervised
from lightning_rnf.finished import FinishedTasks, Retention
from lightning_rnf.freezing import ElasticityOption, Freezer, check_elasticity, check_globs, elasticities, hold_in_copy
from lightning_rnf.guard import borrowed, recompiled
from lightning_rnf.heatmaps import heatmaps as heatmaps_of
from lightning_rnf.importance import Importance, ImportanceName
from lightning_rnf.no_trainer import alone
from lightning_rnf.norms import NormStatistics
from lightning_rnf.progress import shown
from lightning_rnf.reference import Reference, ReferenceData, ReferenceSource
from lightning_rnf.runs import (
    TaskOption,
    check_epochs,
    check_new_name,
    check_sharding,
    epochs_left,
    given_name,
    ranks_of,
    refuse_strategies,
    warn_of_averages,
)
from lightning_rnf.search import Candidates, Method, Normalize
from lightning_rnf.selection import Selection
from lightning_rnf.state import FreezeState, TaskRecord
from lightning_rnf.units import UnitMap

CriterionOption = float | Criterion | Callable[[SubnetworkScore], bool]

_CONTEXTS = ("_silenced", "_pinned")  # of a fit


class RelevanceFreezing(FinishedTasks):
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
        end: a skipped or interrupted one, a sanity check, ``fast_dev_run`` and the learning rate finder end none. A fit
        that is resumed from a checkpoint of after the last epoch ends its task, too.

    Args:
        reference: a data module or loader to draw reference data from, the same for every task; a function
            ``(trainer, module)`` that returns one, for a source per task; None: the fit's own validation data.
        criterion: when pruning stops. A number is the absolute drop of accuracy to tolerate (`AccuracyDrop`); or any
            callable that is shown a `SubnetworkScore`.
        elasticity: factor on the learning rate of relevant units (the paper's lr_frozen): 0 freezes them. A number, or
            numbers by glob of module names. Above 0, recall is not exact.
        irrelevant_elasticity: the same for the other units (the paper's lr_irrelevant).
        retention: ``"exact"``: in recall only the task's relevant units speak, so its logits never change.
            ``"paper"``: Algorithm 1 to the letter: nothing is silenced after the search, and frozen units go on reading
            free ones.
        candidates: ``"free"``: only free units may be pruned. ``"all"``: the paper, every unit is ranked anew.
        recovery_epochs: the task's last epochs, so many, train inside the sub-network: the search comes before them,
            against ``recovery_criterion``; then only the head, the free units that are relevant, and in the first task
            shared parameters learn, and the network, pruned harder, gets its accuracy back. The tolerance is checked
            at the end.
        recovery_criterion: what the search before the recovery may take; a number is the absolute drop of accuracy.
            None: 0.1.
        recovery_search: if the recovery falls short of ``criterion``, take a milder cutoff of those that were measured.
        ration: the largest share of a layer's free units that one task may claim, in (0, 1]: the least relevant claims
            beyond it are pruned too. Several: one for each task in the order of their ends, protected and loaded ones
            counted, the last for all after it. None: no limit.
        reset_free: give free units their initial values back before each new task.
        importance: ``"lrp"``; to compare it with: ``"gradient_x_activation"``, ``"taylor"``, ``"activation"``,
            ``"magnitude"``, ``"random"``, or an `Importance` of your own.
        composite: Zennit's rules for relevance; None: ``EpsilonPlus``, with batch norms merged into their layers.
        normalize: ``"layer"``: each layer's absolute relevance sums to 1 before units of all layers are ranked, and
            units without any go first. ``"none"``: raw, the paper; not followed, with a warning, where something has no
            rule (a layer norm, attention): raw relevance doesn't compare across layers then.
        search: ``"bisect"``, or the paper's ``"linear"``.
        resolution: units per step of the search (the paper's pruning ratio r).
        norm_statistics: ``"per_task"``: recall brings back the running statistics of the task's end. ``"pinned"``:
            besides, frozen channels normalise with their stored statistics in training. ``"shared"``: later tasks move
            them, and recall is not exact.
        recalibrate_norm: estimate the running statistics of each candidate sub-network anew, from the inputs that
            relevance is measured on, before it is scored; recall brings those back.
        reference_samples: how many samples to draw; accuracy is measured on all of them. None: all there are.
        attribution_samples: relevance is measured on so many of them. None: on all.
        units: globs of the names of layers to make units of; None: all linear layers and convolutions outside the head.
            What is left out is frozen whole after the first task.
        heads: globs of the names of heads; None: they are found by tracing which module makes the logits.
        predict: ``(module, batch) -> (logits, target)``, the target class indices ``(N,)``, or 0 and 1 of
            ``(N, classes)``; None: for batches ``(x, y)``.
        task: the task's name, or ``(trainer, module) -> name``; None: ``datamodule.task``, else ``"task-<n>"``.
        seed: of the drawing of reference data.
        heatmaps: of so many samples of each task, up to 8, log what in the image is relevant to the true class, after
            the task's end and after every later one (figures and their drift, to loggers). 0: none. The samples are not
            in checkpoints: tasks that ended before the program was started have none, and a warning says so.

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
        candidates: Candidates = "free",
        recovery_epochs: int = 0,
        recovery_criterion: CriterionOption | None = None,
        recovery_search: bool = False,
        ration: float | Sequence[float] | None = None,
        reset_free: bool = False,
        importance: ImportanceName | Importance = "lrp",
        composite: Composite | None = None,
        normalize: Normalize = "layer",
        search: Method = "bisect",
        resolution: int = 1,
        norm_statistics: NormStatistics = "per_task",
        recalibrate_norm: bool = True,
        reference_samples: int | None = 5000,
        attribution_samples: int | None = 1000,
        units: str | Sequence[str] | None = None,
        heads: str | Sequence[str] | None = None,
        predict: Predict | None = None,
        task: TaskOption = None,
        seed: int = 0,
        heatmaps: int = 0,
    ) -> None:
        super().__init__(
            arguments.one_of("retention", retention, Retention),
            arguments.of_type("task", task, (str, Callable), "a name or a function (trainer, module)"),
        )
        self.reference = reference
        self.criterion = as_criterion(criterion)
        self.elasticity = check_elasticity("elasticity", elasticity)
        self.irrelevant_elasticity = check_elasticity("irrelevant_elasticity", irrelevant_elasticity)
        self.recovery_epochs = arguments.at_least("recovery_epochs", recovery_epochs, 0)
        self.recovery_criterion = as_criterion(0.1 if recovery_criterion is None else recovery_criterion)
        self.recovery_search = arguments.of_type("recovery_search", recovery_search, bool, "True or False")
        self.reset_free = arguments.of_type("reset_free", reset_free, bool, "True or False")
        if self.recovery_epochs:
            _ = (self.criterion & self.recovery_criterion).metrics  # raises where one name means two metrics
        elif recovery_criterion is not None or recovery_search:
            raise ValueError("recovery_criterion and recovery_search are of use with recovery_epochs only: it is 0")
        self.selection = Selection(
            importance if callable(importance) else arguments.one_of("importance", importance, ImportanceName),
            arguments.of_type("composite", composite, Composite, "a composite of Zennit"),
            arguments.one_of("normalize", normalize, Normalize),
            arguments.one_of("candidates", candidates, Candidates),
            arguments.shares("ration", ration),
            arguments.one_of("search", search, Method),
            arguments.at_least("resolution", resolution, 1),
            arguments.one_of("norm_statistics", norm_statistics, NormStatistics),
            arguments.of_type("recalibrate_norm", recalibrate_norm, bool, "True or False"),
        )
        if recovery_epochs and retention == "paper":
            raise ValueError("recovery_epochs train a sub-network, which retention='paper' never runs: leave one out")
        if composite is not None and importance != "lrp":
            raise ValueError(f"composite holds rules for importance='lrp', which is {importance!r} here: leave one out")
        self.reference_samples = (
            None if reference_samples is None else arguments.at_least("reference_samples", reference_samples, 1)
        )
        self.attribution_samples = (
            None if attribution_samples is None else arguments.at_least("attribution_samples", attribution_samples, 1)
        )
        self.units = arguments.globs("units", units)
        self.heads = arguments.globs("heads", heads)
        self.predict = arguments.of_type("predict", predict, Callable, "a function (module, batch)") or supervised
        self.seed = arguments.of_type("seed", seed, int, "a whole number")
        self.heatmaps = arguments.at_least("heatmaps", heatmaps, 0)
        if self.heatmaps > audit.SAMPLES:
            raise ValueError(
                f"heatmaps is {heatmaps}, expected at most {audit.SAMPLES}: so many samples of a task are kept"
            )
        self._is_resumed = self._has_trained = False
        self._steps_at_end = -1
        self._freezer: Freezer | None = None
        self._silenced = ExitStack()
        self._pinned = ExitStack()
        if self.retention == "exact" and norm_statistics == "shared":
            rank_zero_warn("norm_statistics='shared': later tasks move the running statistics, so recall is not exact")
        if self.retention == "exact" and any(elasticity.values() if isinstance(elasticity, dict) else [elasticity]):
            rank_zero_warn(f"elasticity={elasticity}: relevant units go on learning, so recall will not be exact")

    @classmethod
    def paper(cls, **changes: Any) -> RelevanceFreezing:
        """The paper's own configuration: Algorithm 1, with a tolerance of 2 %."""
        paper = {
            "retention": "paper",
            "candidates": "all",
            "normalize": "none",
            "recovery_epochs": 0,
            "recalibrate_norm": False,
            "elasticity": 0.0,
        }
        return cls(**{**paper, **changes})

    def load(self, path: str | os.PathLike[str], model: torch.nn.Module | None = None) -> None:
        """As `FinishedTasks.load`, between fits.

        Raises:
            RuntimeError: if a fit is under way.
        """
        if self._freezer is not None:
            raise RuntimeError("a fit is under way: load masks before it, or after its end")
        super().load(path, model)

    def end_task(self, name: str | None = None) -> TaskRecord:
        """End the task that is being trained, inside a fit that goes on with the next one.

        For several tasks in one long fit. Call it between two steps, from a hook such as ``on_train_epoch_end``, before
        the next task's head is activated: its reference data is drawn and its head traced now, and its units are frozen
        from the next step on. The fit's end then ends the last task, unless no step was made since.

        Args:
            name: of the task; None: as ``task`` says.

        Raises:
            RuntimeError: if no fit is under way.
            ValueError: if the fit has several processes, the task has ended already, or as the end of a fit.
        """
        module = self._model()
        if module is None or self._freezer is None or not self._freezer.attached:
            raise RuntimeError("no fit is under way whose task could end: call end_task from a hook between two steps")
        trainer = module.trainer
        if trainer.world_size > 1:
            raise ValueError(
                f"end_task can't work in {trainer.world_size} processes: DDP has wrapped the model with the heads that "
                "learned at its start, and would leave the next one's gradients apart; use one fit per task"
            )
        self._freezer.follow(trainer.optimizers)
        self._freezer.pin()
        record = self._end_task(trainer, module, self._task_name(trainer, module, name))
        if self.reset_free:
            with sharding.whole(module):
                initial.reset_free(self.state, module)
        self._freezer.change(self._elasticities())
        self._pin_norms(module)
        return record

    def protect(
        self,
        model: torch.nn.Module,
        reference: pl.LightningDataModule | Iterable[Any],
        *,
        name: str,
        criterion: CriterionOption | None = None,
    ) -> TaskRecord:
        """Keep what a model can do already, as a finished task that was never trained here: its pretraining, say.

        Its units are attributed and searched as at a fit's end, and the next fit freezes them. No Trainer runs: the
        model stays on its device, in its precision, and comes back as it was. ``recovery_epochs`` count for fits only;
        no checkpoint is written and nothing is logged. The record is in the next fit's checkpoints.

        Example::

            net.fc = MultiHead(net.fc.in_features, {"imagenet": net.fc, "ages": 8})
            rnf.protect(model, imagenet, name="imagenet", criterion=0.05)
            net.fc.activate("ages")
            Trainer(callbacks=[rnf]).fit(model, datamodule=ages)

        Args:
            model: the very module that later fits train, not a part of it, with the head of this task active.
            reference: labelled data of the task: a data module (its validation data), a loader or a list of batches.
            name: of the task.
            criterion: when pruning stops; None: the callback's.

        Returns:
            The record, which is in ``state.tasks``, too.

        Raises:
            RuntimeError: if a fit is under way.
            TypeError: if the name is no text, the model no module, or the reference of another kind.
            ValueError: if the task has ended already, the model is sharded, or as the end of a fit.
        """
        if self._freezer is not None:
            raise RuntimeError("a fit is under way: protect a task before it, or after its end")
        if not isinstance(name, str) or not name:
            raise TypeError(f"name is {name!r}, expected the task's name")
        if not isinstance(model, torch.nn.Module):
            raise TypeError(f"model is of type {type(model).__name__}, expected the module that later fits train")
        if reference is None:
            raise TypeError(
                "reference is None, expected labelled data of the task: a data module, a loader or a list of batches"
            )
        check_new_name(name, self.state)
        module = getattr(model, "_orig_mod", model)  # torch.compile wraps it
        if sharding.is_sharded(module):
            raise ValueError(
                "a sharded model can't be measured without its Trainer: protect the task before the first fit"
            )
        self.state.check_module(module)
        self.state.forget_unfinished()
        asked = self.criterion if criterion is None else as_criterion(criterion)
        # Forwards may ask their Trainer, too, not only hooks that bring data.
        with isolate_rng(), torch.inference_mode(False), torch.enable_grad(), borrowed(module), alone(module, None):
            if not module.training:
                module.train()  # as a fit leaves it: norms that are in eval mode with all the rest are no exceptions
            drawn = self._reference(reference).draw_alone(module)
            asked.check_samples(drawn.samples)
            units = self._trace(module, drawn.example)
            record = self.selection.select(name, module, units, drawn, self.state, asked)
            record = self._witnessed(record, module, units, drawn)
        if self.reset_free and not self.state.tasks:
            initial.remember(self.state, module, units)
        self.state.add(record, units)
        self._model = weakref.ref(module)
        tracking.announce(self.state, record, self.selection.ration(len(self.state.tasks) - 1), trained=False)
        return record

    def free_rows(self, parameter: torch.Tensor) -> torch.Tensor | None:
        """Which rows of a parameter the fit that is under way lets learn: see `communication.reduce_free_rows`.

        Returns:
            Indices ``(rows, leading dimensions)`` of those that aren't frozen, in general ``(rows, 1)``; None: all.
        """
        return None if self._freezer is None else self._freezer.free_rows(parameter)

    # -- a fit --------------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Freeze whole parameters before the strategy wraps the model."""
        if stage != "fit":
            return
        if sum(isinstance(callback, RelevanceFreezing) for callback in trainer.callbacks) > 1:  # type: ignore[attr-defined]
            raise ValueError("the Trainer has more than one RelevanceFreezing: one keeps all tasks, remove the others")
        refuse_strategies(trainer)
        warn_of_averages(trainer, self)
        # What was protected or loaded before the processes knew of each other: they go on with the same.
        ranks = ranks_of(trainer)
        of_first = ranks.decided(lambda: self.state)
        if ranks.rank > 0:
            self._take(of_first)
        self._task_name(trainer, pl_module)
        self._is_resumed = self._has_trained = False
        self.state.forget_unfinished()  # a checkpoint brings back what belongs to a fit that is resumed
        self._begin(pl_module)
        self._model = weakref.ref(pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check what the task's end will need while nothing is lost, and hold frozen rows from here on."""
        name = self._task_name(trainer, pl_module)
        if self.state.recovering is not None and self.state.recovering.name != name:
            self.state.forget_unfinished()
        if self.state.recovering is None:
            check_epochs(trainer, self.recovery_epochs, resumed=self._is_resumed)
        check_sharding(trainer, pl_module)
        reference = self._reference(self.reference)
        with sharding.whole(pl_module):
            if self.reset_free:
                initial.reset_free(self.state, pl_module)
            with isolate_rng():
                example, samples = reference.example(trainer), reference.size(trainer)
                batch = ReferenceData([example], 1, 1, self.predict, trainer.precision_plugin.forward_context)
                units = ranks_of(trainer).decided(lambda: self._rehearse(pl_module, batch, samples))
            check_globs("elasticity", self.elasticity, units)
            check_globs("irrelevant_elasticity", self.irrelevant_elasticity, units)
            if self.reset_free and not self.state.tasks and not self.state.initial:
                initial.remember(self.state, pl_module, units)
        assert self._freezer is not None
        self._has_trained = True
        self._steps_at_end = -1
        self.state.training = name
        self._warn_of_lost_samples()
        self._freezer.attach(trainer.optimizers)
        self._pin_norms(pl_module)
        if self.state.recovering is not None:
            self.selection.check_goes_on(self.state.recovering, self.state)
            self._stay_inside(pl_module, self.state.recovering)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Follow optimizers that were put in place of others; go on inside the sub-network when it is time."""
        assert self._freezer is not None
        self._freezer.follow(trainer.optimizers)
        if self.state.training is None:  # the last one was ended by hand
            name = given_name(self.task, trainer, pl_module)
            self.state.training = None if name in self.state.tasks else name
        if self._is_time_to_recover(trainer):
            name = self._task_name(trainer, pl_module)
            with self._observing(trainer, pl_module) as (units, reference), shown(trainer) as show:
                criteria = (self.recovery_criterion, self.criterion)
                record = self.selection.select(name, pl_module, units, reference, self.state, *criteria, show=show)
            self.state.recover(record, units)
            self._stay_inside(pl_module, record)
        if self.state.recovering is not None:
            epochs = self.state.recovering.recovery_epochs + 1
            self.state.recovering = replace(self.state.recovering, recovery_epochs=epochs)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start counting optimizer steps anew."""
        assert self._freezer is not None
        self._freezer.forget_failed_step()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Hold frozen rows against callbacks that write weights."""
        assert self._freezer is not None
        self._freezer.pin(written_only=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Algorithm 1: score the units, search the cutoff, keep what remains. The next fit freezes it."""
        if trainer.fast_dev_run or trainer.global_step == self._steps_at_end:  # type: ignore[attr-defined]
            return
        assert self._freezer is not None
        self._freezer.follow(trainer.optimizers)
        self._freezer.pin()
        self._end_task(trainer, pl_module, self._task_name(trainer, pl_module))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End the task of a checkpoint from after its last epoch: with nothing left to train, no training ends."""
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
            hold_in_copy(checkpoint["state_dict"], pl_module, self._elasticities())

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """In a fit: hold frozen rows before they are looked at. Else recall, as in a test."""
        if self._freezer is not None:
            self._freezer.pin()
        super().on_validation_start(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give everything back after an exception: Lightning calls no teardown then."""
        self._give_back()

    def state_dict(self) -> dict[str, Any]:
        """The finished tasks, as plain data for a checkpoint."""
        return self.state.to_plain()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the finished tasks of a checkpoint; in a fit that is being set up or resumed they count at once.

        A checkpoint from before some of the finished tasks had ended does not make them forgotten: ``ModelCheckpoint``
        saves its best before the task's end, and Lightning restores it in ``test(ckpt_path="best")``.

        Raises:
            ValueError: if it is no such state, of a newer version, of another model, or a fit would go on without a
                finished task.
        """
        state = FreezeState.from_plain(state_dict)
        module = self._model() if self._freezer is not None else None
        lost = sorted(set(self.state.tasks) - set(state.tasks))
        if lost and (module is not None or set(state.tasks) <= set(self.state.tasks)):
            found = f"the checkpoint was saved before {', '.join(map(repr, lost))} ended"
            if module is not None:
                raise ValueError(
                    f"{found}: this fit would train over what they need; save with trainer.save_checkpoint after fit, "
                    "or use a new RelevanceFreezing to go back"
                )
            rank_zero_warn(
                f"{found}: these tasks are kept, but their units belong to later weights than the loaded ones"
            )
            self._has_older_weights = True  # until the next run
            return
        if module is not None:
            state.check_module(module)
        self._take(state)
        if module is not None and self._freezer is not None:
            was_attached = self._freezer.attached
            self._begin(module)
            self._is_resumed = True
            if was_attached:  # the learning rate finder restores a checkpoint in the middle of a fit
                self._freezer.attach(module.trainer.optimizers)

    # -- verbs --------------------------------------------------------------------------------------------------------

    def _begin(self, module: pl.LightningModule) -> None:
        if self._freezer is not None:
            self._freezer.detach()
        self.state.check_module(module)
        self._freezer = Freezer(module, self._elasticities())
        self._freezer.stop_gradients()

    def _end_task(self, trainer: pl.Trainer, module: pl.LightningModule, name: str) -> TaskRecord:
        self._silenced.close()
        recovered = self.state.recovering
        with self._observing(trainer, module) as (units, reference), shown(trainer) as show:
            if recovered is None:
                if self.recovery_epochs:
                    rank_zero_warn(f"{name}: the fit ended before its last {self.recovery_epochs} epochs: no recovery")
                record = self.selection.select(name, module, units, reference, self.state, self.criterion, show=show)
            else:
                record = self.selection.settle(
                    recovered,
                    module,
                    units,
                    reference,
                    self.state,
                    self.criterion,
                    milder=self.recovery_search,
                    show=show,
                )
            record = self._witnessed(record, module, units, reference)
        self.state.add(record, units)
        self._steps_at_end = trainer.global_step
        path = checkpoints.keep(trainer, name)  # before anything that a logger or a warning could break off
        tracking.announce(self.state, record, self.selection.ration(len(self.state.tasks) - 1))
        if path:
            rank_zero_info(f"{name}: kept in {path}")
        tracking.log(trainer, self.state, record)
        if self._witnesses.gallery.maps:
            self._witnesses.gallery.log(trainer, len(self.state.tasks))
        return record

    def _witnessed(
        self, record: TaskRecord, module: torch.nn.Module, units: UnitMap, reference: ReferenceData
    ) -> TaskRecord:
        """The record with what a later audit needs: fingerprints of what is frozen, the drift of earlier logits."""
        rows = audit.fingerprints(module, units, record, self.state)
        # Rank 0 has a batch for sure, and it alone keeps some of it; all get the record.
        drift = reference.ranks.decided(
            lambda: self._witnesses.look(
                record,
                module,
                units,
                reference,
                self.state,
                masked=self.retention == "exact",
                images=self.heatmaps,
                composite=self.selection.composite,
            )
        )
        return replace(record, rows=rows, drift=drift)

    def _pin_norms(self, module: pl.LightningModule) -> None:
        self._pinned.close()
        if self.selection.norm_statistics == "pinned":
            self._pinned.enter_context(recompiled())
            self._pinned.enter_context(norms.pinned(module, norms.stored(self.state, module)))

    def _give_back(self) -> None:
        for name in _CONTEXTS:
            getattr(self, name).close()
        if self._freezer is not None:
            self._freezer.detach()
            self._freezer = None
        self._end_run()

    def _elasticities(self, inside: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        return elasticities(self.state, self.elasticity, self.irrelevant_elasticity, inside)

    def _stay_inside(self, module: pl.LightningModule, record: TaskRecord) -> None:
        """Until the task's end nothing but its sub-network speaks, and no unit outside of it learns."""
        assert self._freezer is not None
        self._freezer.change(self._elasticities(record.relevant))
        self._silenced.enter_context(recompiled())
        self._silenced.enter_context(subnetwork.silence(module, self.state.layers, record.relevant))
        self._silenced.enter_context(norms.held(module))

    def _rehearse(self, module: pl.LightningModule, batch: ReferenceData, samples: int | None) -> UnitMap:
        units = self._trace(module, batch.example)
        self._check_size(samples)
        self.selection.check(module, units, batch, *self._criteria())
        if self.heatmaps:
            heatmaps_of(module, units.layers, batch.example, self.predict, self.selection.composite)
        return units

    @contextmanager
    def _observing(self, trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[tuple[UnitMap, ReferenceData]]:
        with isolate_rng():
            reference = self._reference(self.reference).draw(trainer)
            self._check_size(reference.samples)
            with sharding.whole(module), subnetwork.with_leading_buffers(module, reference.ranks):
                yield reference.ranks.decided(lambda: self._trace(module, reference.example)), reference

    def _warn_of_lost_samples(self) -> None:
        lost = [name for name in self.state.tasks if name not in self._witnesses.probes]
        if self.heatmaps and lost:
            rank_zero_warn(
                f"no heatmaps of {', '.join(map(repr, lost))}: samples of a task are kept until the program ends, and "
                "are in no checkpoint; make them yourself with lightning_rnf.heatmaps inside rnf.recall(task)"
            )

    def _is_time_to_recover(self, trainer: pl.Trainer) -> bool:
        return (
            self.recovery_epochs > 0
            and self.state.recovering is None
            and not trainer.fast_dev_run  # type: ignore[attr-defined]
            and epochs_left(trainer) == self.recovery_epochs
        )

    def _reference(self, source: ReferenceSource) -> Reference:
        return Reference(source, self.reference_samples, self.attribution_samples, self.predict, self.seed)

    def _trace(self, module: torch.nn.Module, batch: Any) -> UnitMap:
        units = UnitMap.of(module, batch, self.predict, self.units, self.heads)
        self.state.check_units(units)
        for record in self.state.tasks.values():
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
        return (self.criterion, self.recovery_criterion) if self.recovery_epochs else (self.criterion,)

    def _task_name(self, trainer: pl.Trainer, module: pl.LightningModule, given: str | None = None) -> str:
        name = given or ranks_of(trainer).decided(lambda: given_name(self.task, trainer, module))
        if name is None:
            name = f"task-{len(self.state.tasks)}"
        check_new_name(name, self.state)
        return name

    def __getstate__(self) -> dict[str, Any]:
        return {
            **super().__getstate__(),
            "_freezer": None,
            **dict.fromkeys(_CONTEXTS),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, **{name: ExitStack() for name in _CONTEXTS}})
