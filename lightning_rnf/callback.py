"""`RelevanceFreezing`: the Trainer's events turned into Algorithm 1 of the paper."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from zennit.core import Composite

from lightning_rnf import arguments, subnetwork
from lightning_rnf.attribution import Attribution, attribute
from lightning_rnf.conservation import Conservation
from lightning_rnf.criteria import AccuracyDrop, Criterion, as_criterion
from lightning_rnf.evaluation import Predict, supervised
from lightning_rnf.freezing import ElasticityOption, Freezer, check_elasticity, check_globs, elasticities
from lightning_rnf.guard import borrowed, evaluating
from lightning_rnf.importance import IMPORTANCES, Importance, ImportanceName, check_scores
from lightning_rnf.reference import Reference, ReferenceData, ReferenceSource
from lightning_rnf.runs import TaskOption, given_name, refuse_strategies, task_of_evaluation
from lightning_rnf.search import Candidates, Method, Normalize, Ranking, SearchResult, rank, search_cutoff
from lightning_rnf.state import FreezeState, TaskRecord
from lightning_rnf.units import UnitMap

log = logging.getLogger(__name__)

Retention = Literal["exact", "paper"]


class RelevanceFreezing(Callback):
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
        The record of a task is made in ``on_train_end``, after ``ModelCheckpoint`` has saved: call
        ``trainer.save_checkpoint(path)`` after ``fit`` to keep it. A task ends only with a fit that trained to its end:
        a skipped or interrupted one, a sanity check, ``fast_dev_run`` and the learning rate finder end none.

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
        importance: ``"lrp"``; to compare it with: ``"gradient_x_activation"``, ``"taylor"``, ``"activation"``,
            ``"magnitude"``, ``"random"``, or an `Importance` of your own.
        composite: Zennit's rules for relevance; None: ``EpsilonPlus``, with batch norms merged into their layers.
        normalize: ``"layer"``: each layer's absolute relevance sums to 1 before units of all layers are ranked, and
            units without any go first. ``"none"``: raw, the paper; not followed, with a warning, where something has no
            rule (a layer norm, attention): raw relevance doesn't compare across layers then.
        search: ``"bisect"``, or the paper's ``"linear"``.
        resolution: units per step of the search (the paper's pruning ratio r).
        reference_samples: how many samples to draw; accuracy is measured on all of them. None: all there are.
        attribution_samples: relevance is measured on so many of them. None: on all.
        units: globs of the names of layers to make units of; None: all linear layers and convolutions outside the head.
            What is left out is frozen whole after the first task.
        heads: globs of the names of heads; None: they are found by tracing which module makes the logits.
        predict: ``(module, batch) -> (logits, target)``; None: for batches ``(x, y)``.
        task: the task's name, or ``(trainer, module) -> name``; None: ``datamodule.task``, else ``"task-<n>"``.
        seed: of the drawing of reference data.

    Raises:
        TypeError, ValueError: if an argument is out of its range.
    """

    def __init__(
        self,
        reference: ReferenceSource = None,
        *,
        criterion: float | Criterion = 0.02,
        elasticity: ElasticityOption = 0.0,
        irrelevant_elasticity: ElasticityOption = 1.0,
        retention: Retention = "exact",
        candidates: Candidates = "free",
        importance: ImportanceName | Importance = "lrp",
        composite: Composite | None = None,
        normalize: Normalize = "layer",
        search: Method = "bisect",
        resolution: int = 1,
        reference_samples: int | None = 5000,
        attribution_samples: int | None = 1000,
        units: str | Sequence[str] | None = None,
        heads: str | Sequence[str] | None = None,
        predict: Predict | None = None,
        task: TaskOption = None,
        seed: int = 0,
    ) -> None:
        self.reference = reference
        self.criterion = as_criterion(criterion)
        self.elasticity = check_elasticity("elasticity", elasticity)
        self.irrelevant_elasticity = check_elasticity("irrelevant_elasticity", irrelevant_elasticity)
        self.retention = arguments.one_of("retention", retention, Retention)
        self.candidates = arguments.one_of("candidates", candidates, Candidates)
        self.importance = (
            importance if callable(importance) else arguments.one_of("importance", importance, ImportanceName)
        )
        if composite is not None and importance != "lrp":
            raise ValueError(f"composite holds rules for importance='lrp', which is {importance!r} here: leave one out")
        self.composite = arguments.of_type("composite", composite, Composite, "a composite of Zennit")
        self.normalize = arguments.one_of("normalize", normalize, Normalize)
        self.search = arguments.one_of("search", search, Method)
        self.resolution = arguments.at_least_one("resolution", resolution)
        self.reference_samples = (
            None if reference_samples is None else arguments.at_least_one("reference_samples", reference_samples)
        )
        self.attribution_samples = (
            None if attribution_samples is None else arguments.at_least_one("attribution_samples", attribution_samples)
        )
        self.units = arguments.globs("units", units)
        self.heads = arguments.globs("heads", heads)
        self.predict = arguments.of_type("predict", predict, Callable, "a function (module, batch)") or supervised
        self.task = arguments.of_type("task", task, (str, Callable), "a name or a function (trainer, module)")
        self.seed = arguments.of_type("seed", seed, int, "a whole number")
        self.state = FreezeState()
        self._model: Callable[[], pl.LightningModule | None] = lambda: None
        self._freezer: Freezer | None = None
        self._recalled = ExitStack()
        if self.retention == "exact" and any(elasticity.values() if isinstance(elasticity, dict) else [elasticity]):
            rank_zero_warn(f"elasticity={elasticity}: relevant units go on learning, so recall will not be exact")

    @classmethod
    def paper(cls, **changes: Any) -> RelevanceFreezing:
        """The paper's own configuration: Algorithm 1, with a tolerance of 2 %."""
        return cls(**{"retention": "paper", "candidates": "all", "normalize": "none", "elasticity": 0.0, **changes})

    # -- what a user asks ---------------------------------------------------------------------------------------------

    @contextmanager
    def recall(self, task: str, model: torch.nn.Module | None = None) -> Iterator[None]:
        """Run the model as the sub-network of a finished task: only the units relevant to it speak.

        Inside the context the model is in eval mode, has the norm statistics of that task's end, and runs that task's
        head if the heads are a `MultiHead` (activate heads of your own yourself). Its logits are bit-identical at any
        later time, on the same device with the same dtype, batch and kernels.

        Args:
            task: name of the task.
            model: None: the model of the last fit.

        Raises:
            KeyError: if there is no such finished task.
            ValueError: if there is no model, or it lacks something that the task uses.
        """
        record = self.state.task(task)
        module = self._model() if model is None else getattr(model, "_orig_mod", model)  # torch.compile wraps it
        if module is None:
            raise ValueError(f"no model to recall {task!r} in: name it, recall({task!r}, model)")
        self.state.check_module(module)
        with subnetwork.recall(module, self.state.layers, record, masked=self.retention == "exact"):
            yield

    @property
    def free_capacity(self) -> float:
        """Share of the units that are relevant to no finished task, in [0, 1]."""
        frozen = self.state.frozen()
        total = sum(len(units) for units in frozen.values())
        return 1.0 - sum(int(units.sum()) for units in frozen.values()) / total if total else 1.0

    def capacity(self) -> dict[str, float]:
        """Free capacity of each unit layer, in execution order."""
        return {name: 1.0 - int(units.sum()) / len(units) for name, units in self.state.frozen().items()}

    # -- a fit --------------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Freeze whole parameters before the strategy wraps the model."""
        if stage != "fit":
            return
        if sum(isinstance(callback, RelevanceFreezing) for callback in trainer.callbacks) > 1:  # type: ignore[attr-defined]
            raise ValueError("the Trainer has more than one RelevanceFreezing: one keeps all tasks, remove the others")
        refuse_strategies(trainer)
        self._task_name(trainer, pl_module)
        self._begin(pl_module)
        self._model = weakref.ref(pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check what the task's end will need while nothing is lost, and hold frozen rows from here on."""
        self._task_name(trainer, pl_module)
        reference = self._reference()
        with isolate_rng():
            example = reference.example(trainer)
            units = self._trace(pl_module, example)
            self._check_size(reference.size(trainer))
            self._attribute("a first batch", pl_module, units, [example])
        check_globs("elasticity", self.elasticity, units)
        check_globs("irrelevant_elasticity", self.irrelevant_elasticity, units)
        assert self._freezer is not None
        self._freezer.attach(trainer.optimizers)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Follow optimizers that were put in place of others."""
        assert self._freezer is not None
        self._freezer.follow(trainer.optimizers)

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
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        assert self._freezer is not None
        self._freezer.follow(trainer.optimizers)
        self._freezer.pin()
        name = self._task_name(trainer, pl_module)
        with isolate_rng():
            reference = self._reference().draw(trainer)
            self._check_size(reference.samples)
            units = self._trace(pl_module, reference.example)
            started = time.perf_counter()
            attribution = self._attribute(name, pl_module, units, reference.for_attribution)
            attributed = time.perf_counter()
            relevance, conservation = attribution.relevance, attribution.conservation
            normalize, notes = self._heed(name, conservation)
            ranking = rank(relevance, self.state.frozen(), normalize=normalize, candidates=self.candidates)
            found = self._search(name, pl_module, units, ranking, reference)
            searched = time.perf_counter()
        record = TaskRecord(
            name=name,
            head=units.head,
            head_parameters=units.head_parameters,
            relevant=ranking.relevant(found.accepted.cutoff),
            relevance={layer: values.float() for layer, values in relevance.items()},
            norm_statistics=subnetwork.statistics(pl_module, units),
            cutoff=found.accepted.cutoff,
            accuracy=found.accepted.baseline,
            subnetwork_accuracy=found.accepted.accuracy,
            samples=reference.samples,
            evaluations=found.evaluations,
            seconds={"attribution": attributed - started, "search": searched - attributed},
            conservation=conservation.ratios,
            cuts=conservation.cuts,
            notes=notes,
        )
        full_before = self._full_layers()
        self.state.add(record, units)
        self._report(record, full_before)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give everything back at the end of any run."""
        self._give_back()

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
            return
        if module is not None:
            state.check_module(module)
        self.state = state
        if module is not None and self._freezer is not None:
            was_attached = self._freezer.attached
            self._begin(module)
            if was_attached:  # the learning rate finder restores a checkpoint in the middle of a fit
                self._freezer.attach(module.trainer.optimizers)

    # -- validate, test, predict --------------------------------------------------------------------------------------

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Recall the task if it is a finished one, until the run ends."""
        self._recall_finished(trainer, pl_module)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End the recall."""
        self._recalled.close()

    on_predict_start = on_test_start
    on_validation_end = on_predict_end = on_test_end

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """In a fit: hold frozen rows before they are looked at. Else recall, as in a test."""
        if self._freezer is not None:
            self._freezer.pin()
        self._recall_finished(trainer, pl_module)

    # -- verbs --------------------------------------------------------------------------------------------------------

    def _begin(self, module: pl.LightningModule) -> None:
        if self._freezer is not None:
            self._freezer.detach()
        self.state.check_module(module)
        self._freezer = Freezer(module, elasticities(self.state, self.elasticity, self.irrelevant_elasticity))
        self._freezer.stop_gradients()

    def _give_back(self) -> None:
        self._recalled.close()
        if self._freezer is not None:
            self._freezer.detach()
            self._freezer = None

    def _reference(self) -> Reference:
        return Reference(self.reference, self.reference_samples, self.attribution_samples, self.predict, self.seed)

    def _trace(self, module: pl.LightningModule, batch: Any) -> UnitMap:
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
        if samples is not None and isinstance(self.criterion, AccuracyDrop):
            self.criterion.check_samples(samples)

    def _attribute(self, name: str, module: pl.LightningModule, units: UnitMap, batches: list[Any]) -> Attribution:
        def progress(samples: int) -> None:
            log.debug("%s: relevance, %d samples", name, samples)

        if self.importance == "lrp":
            return attribute(module, units.layers, batches, self.predict, self.composite, progress)
        importance = self.importance if callable(self.importance) else IMPORTANCES[self.importance]
        return Attribution(check_scores(importance(module, units.layers, batches, self.predict), units.layers))

    def _heed(self, name: str, conservation: Conservation) -> tuple[Normalize, tuple[str, ...]]:
        """How to rank units by a relevance that was conserved so well, and what the record has to say about it."""
        notes = conservation.notes
        if lost := conservation.loss():
            rank_zero_warn(f"{name}: {lost}" + ("; composite= may have rules for it" if conservation.unruled else ""))
            notes = (*notes, lost)
        if conservation.unruled and self.normalize == "none":
            note = "ranked per layer: without those rules raw relevance doesn't compare across layers"
            rank_zero_warn(f"{name}: {'; '.join(conservation.notes)}; {note}, so normalize='none' is not followed")
            return "layer", (*notes, note)
        return self.normalize, notes

    def _search(
        self, name: str, module: pl.LightningModule, units: UnitMap, ranking: Ranking, reference: ReferenceData
    ) -> SearchResult:
        def measure(cutoff: int) -> float:
            with subnetwork.silence(module, units.layers, ranking.relevant(cutoff)):
                accuracy = reference.accuracy(module)
            log.debug("%s: search, %d of %d units silenced, accuracy %.3f", name, cutoff, ranking.candidates, accuracy)
            return accuracy

        with borrowed(module), evaluating(module):
            return search_cutoff(ranking, measure, self.criterion, method=self.search, resolution=self.resolution)

    def _full_layers(self) -> set[str]:
        return {layer for layer, share in self.capacity().items() if share == 0}

    def _report(self, record: TaskRecord, full_before: set[str]) -> None:
        units = sum(layer.units for layer in self.state.layers)
        rank_zero_info(
            f"{record.name}: {sum(int(mask.sum()) for mask in record.relevant.values())} of {units} units are relevant "
            f"(accuracy {record.accuracy:.4f}, of the sub-network {record.subnetwork_accuracy:.4f}, "
            f"{len(record.evaluations)} evaluations on {record.samples} samples); {self.free_capacity:.1%} free"
        )
        full = self._full_layers() - full_before
        if full:
            rank_zero_warn(f"no free units are left in {', '.join(sorted(full))}: later tasks can only reuse them")

    def _task_name(self, trainer: pl.Trainer, module: pl.LightningModule) -> str:
        name = given_name(self.task, trainer, module)
        if name is None:
            name = f"task-{len(self.state.tasks)}"
        if name in self.state.tasks:
            raise ValueError(
                f"task {name!r} has ended already; name the new one: datamodule.task, or "
                f"RelevanceFreezing(task=...). Finished tasks: {list(self.state.tasks)}"
            )
        return name

    def _recall_finished(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING or not self.state.tasks:
            return
        name, is_known = task_of_evaluation(self.task, self.state, trainer, module)
        if name in self.state.tasks:
            self._recalled.enter_context(self.recall(name, module))
        elif not is_known:
            rank_zero_warn(
                "which task this is can't be told, so nothing is recalled: use a data module with a task attribute, "
                "or wrap the call in rnf.recall(task)"
            )

    def __getstate__(self) -> dict[str, Any]:
        # A copy is a callback that has no fit under way.
        return {**vars(self), "_model": None, "_freezer": None, "_recalled": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _model=lambda: None, _recalled=ExitStack())
