"""Finished tasks as a user meets them: recalled in evaluation runs, reported, given up."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from lightning_rnf.freezing import free_weights, frozen_connections, heard
from lightning_rnf.memory import (
    Audit,
    FreezeState,
    TaskRecord,
    changed,
    masks,
    without,
)
from lightning_rnf.packages import TrainerFn, pl, rank_zero_warn
from lightning_rnf.report import RetentionReport
from lightning_rnf.runtime import Ranks, sharding
from lightning_rnf.tasks.checkpoints import widen_for
from lightning_rnf.tasks.probes import drifts
from lightning_rnf.tasks.recalling import Recalling, Retention
from lightning_rnf.tasks.runs import TaskOption, batches_left_out, task_of_evaluation, tasks_of_loaders
from lightning_rnf.tasks.witnesses import Witnesses

_OF_LIGHTNING = ("log", "log_dict")  # methods of the module that the Trainer leaves in each callback


class FinishedTasks(Recalling):
    """What finished tasks can do without a fit; `RelevanceFreezing` adds the fits that finish them.

    Args:
        retention: whether only the task's relevant units speak in recall (``"exact"``), or all (``"paper"``).
        task: the task's name, or ``(trainer, module) -> name``; None: ``datamodule.task``.
    """

    def __init__(self, retention: Retention = "exact", task: TaskOption = None) -> None:
        super().__init__(retention)
        self.task = task
        self._recalled = ExitStack()
        self._watched = ExitStack()  # a model that may have to grow for the weights of a run
        self._tested: list[str | None] = []
        self._has_older_weights = False

    # -- what a user asks ----------------------------------------------------------------------------------------------

    def forget(self, task: str) -> dict[str, int]:
        """Give a finished task up: what no other task uses is free again, and its head may train again or be removed.

        Nothing is done to the model. Other tasks are recalled to the bit as before, now and later. With ``reset_free``
        the units that are free again get their initial values back before the next task. Checkpoints and files of masks
        from before hold the task still.

        A unit that is relevant to another task stays frozen. With ``candidates="free"`` that is every unit of tasks
        that had ended before that other one: only the last task gives something back, then the one before it.

        Args:
            task: name of the task; in several processes, in all of them.

        Returns:
            How many units are free again, by layer; with a warning, if it is none.

        Raises:
            KeyError: if there is no such finished task.
            RuntimeError: if a fit is under way.
        """
        self._check_between_fits(f"forget {task!r}")
        given_up, state = self.state.task(task), without(self.state, task)
        frozen = state.frozen()
        freed = {
            layer: int((mask & ~frozen.get(layer, torch.zeros_like(mask))).sum())
            for layer, mask in given_up.relevant.items()
        }
        self.state = state
        self._witnesses = self._witnesses.of(state.tasks)
        for maps in self._witnesses.gallery.maps.values():
            maps.pop(task, None)
        if not any(freed.values()):
            users = [name for name, record in state.tasks.items() if _uses(record, given_up)]
            rank_zero_warn(
                f"{task!r} is forgotten, but no unit is free again: all of its units are relevant to other tasks, too "
                f"({', '.join(map(repr, users)) or 'it had none'}); with candidates='free', forget the last task first"
            )
        return freed

    @property
    def free_capacity(self) -> float:
        """Share of the units that are relevant to no finished task, in [0, 1]."""
        frozen = self.state.frozen()
        total = sum(len(units) for units in frozen.values())
        return 1.0 - sum(int(units.sum()) for units in frozen.values()) / total if total else 1.0

    def capacity(self) -> dict[str, float]:
        """Free capacity of each unit layer, in execution order."""
        return {name: 1.0 - int(units.sum()) / len(units) for name, units in self.state.frozen().items()}

    @property
    def free_weights(self) -> float:
        """Share of the weights of unit layers and embeddings that may still move, in [0, 1].

        It is what no finished task needs; of an embedding the rows that none has read.
        """
        return masks.free_weights(self.state, self._free_weights())

    def weights_left(self) -> dict[str, float]:
        """`free_weights` of each unit layer, in execution order, then of each embedding."""
        return {**self._free_weights(), **masks.free_rows(self.state)}

    def report(
        self,
        model: torch.nn.Module | None = None,
        *,
        matrix: Tensor | None = None,
        metric: str | None = None,
        baseline: Tensor | None = None,
    ) -> RetentionReport:
        """What was kept, what it cost, and what is left; and an audit of what was promised.

        Example::

            report = rnf.report()
            print(report)
            report.plot("retention.png")

        Args:
            model: that is audited: its frozen rows, and the logits of a few samples of each task that has ended since
                the program was started; None: the same as for `recall`, if it is still there.
            matrix: accuracy ``(tasks, tasks)`` as `metrics` says; None: what ``trainer.test`` has logged.
            metric: which of the logged metrics the matrix is of; None: the first that has "acc" in its name.
            baseline: accuracy of each task before any training, ``(tasks,)``: for the forward transfer.

        Raises:
            ValueError: if the model is another one, the matrix has another shape, or the metric was never logged.
        """
        module = self._model() if model is None else getattr(model, "_orig_mod", model)
        looked_at = None
        self._note_rows()
        if module is not None and not sharding.is_sharded(module):
            self.state.check_module(module)
            drift = drifts(module, self.state, self._witnesses.probes, masked=self.retention == "exact")
            parameters = dict(module.named_parameters(remove_duplicate=False))
            looked_at = Audit.of(parameters, self.state, drift, heard(module, self.state))
        return RetentionReport.of(self.state, matrix=matrix, metric=metric, baseline=baseline, audit=looked_at)

    # -- test, validate, predict ---------------------------------------------------------------------------------------

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Recall the task if it is a finished one, until the run ends."""
        self._recall_finished(trainer, pl_module)

    def on_test_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Recall another task if this loader has one of its own."""
        if batch_idx == 0:
            self._recall_finished(trainer, pl_module, dataloader_idx)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End the recall, and note what was logged: it is a row of the report's accuracy matrix.

        Not of ``fast_dev_run``; nor, with a warning, of a part of the data or of another model than the last task's.
        """
        self._recalled.close()
        self._note_test(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End the recall."""
        self._recalled.close()

    on_predict_end = on_validation_end
    on_validation_start = on_predict_start = on_test_start
    on_validation_batch_start = on_predict_batch_start = on_test_batch_start

    def _free_weights(self) -> dict[str, float]:
        module = self._model()
        if module is None or sharding.is_sharded(module):
            return masks.free_weights_of_layers(self.state)
        return free_weights(self.state, frozen_connections(module, self.state, heard(module, self.state)))

    def _recall_finished(self, trainer: pl.Trainer, module: pl.LightningModule, loader: int | None = None) -> None:
        if trainer.state.fn == TrainerFn.FITTING or not self.state.tasks:
            return
        of_loaders = tasks_of_loaders(trainer)
        if loader is None:
            self._tested = of_loaders
        if not any(of_loaders):
            if loader is None:
                name, is_known = task_of_evaluation(self.task, self.state, trainer, module)
                self._tested = [name]
                self._recall(name, is_known, module)
        elif loader is not None:
            self._recall(of_loaders[loader], of_loaders[loader] is not None, module)

    def _recall(self, name: str | None, is_known: bool, module: pl.LightningModule) -> None:
        self._recalled.close()
        if name in self.state.tasks:
            self._recalled.enter_context(self.recall(name, module))
        elif not is_known:
            rank_zero_warn(
                "which task this is can't be told, so nothing is recalled: use a data module with a task attribute, "
                "or wrap the call in rnf.recall(task)"
            )

    def state_dict(self) -> dict[str, Any]:
        """The finished tasks, as plain data for a checkpoint."""
        self._note_rows()
        return self.state.to_plain()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the finished tasks of a checkpoint.

        A checkpoint from before some of the finished tasks had ended does not make them forgotten: ``ModelCheckpoint``
        saves its best before the task's end, and Lightning restores it in ``test(ckpt_path="best")``.

        Raises:
            ValueError: if it is no such state, or of a newer version.
        """
        state = FreezeState.from_plain(state_dict)
        lost = self._lacks(state)
        if lost and set(state.tasks) <= set(self.state.tasks):
            rank_zero_warn(
                f"{lost}: these tasks are kept, but their units belong to later weights than the loaded ones"
            )
            self._has_older_weights = True  # until the next run
            return
        self._take(state)

    def _lacks(self, state: FreezeState) -> str:
        """What is to be said of a checkpoint that lacks finished tasks; nothing if it has them all."""
        lost = sorted(set(self.state.tasks) - set(state.tasks))
        return f"the checkpoint was saved before {', '.join(map(repr, lost))} ended" if lost else ""

    def _agree(self, ranks: Ranks) -> None:
        """Go on with the finished tasks of the first rank in all of them."""
        of_first = ranks.decided(lambda: self.state)
        if ranks.rank > 0:
            self._take(of_first)

    def _watch_sizes(self, module: pl.LightningModule) -> None:
        self._watched.callback(widen_for(module))

    def _end_run(self) -> None:
        self._recalled.close()
        self._watched.close()
        self._has_older_weights = False
        for name in _OF_LIGHTNING:  # they would keep the model alive
            vars(self).pop(name, None)

    def _note_test(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        tested, self._tested = self._tested, []
        if not self.state.tasks or self._has_older_weights or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        last = next(reversed(self.state.tasks.values()))
        if other := self._other_than_at(last, module):
            rank_zero_warn(
                f"the model that was tested is not the one in which {last.name!r} has ended ({', '.join(other)} "
                "differ), so the test is left out of the report"
            )
            return
        left_out = batches_left_out(trainer)
        for index, task in enumerate(tested):
            if task is None or tested.count(task) > 1:
                continue
            if left_out[index]:
                rank_zero_warn(f"{task!r} was tested on {left_out[index]}, so the test is left out of the report")
                continue
            suffix = f"/dataloader_idx_{index}"
            logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
            if len(tested) > 1:
                logged = {name[: -len(suffix)]: value for name, value in logged.items() if name.endswith(suffix)}
            if logged:
                last.tests[task] = logged

    def _other_than_at(self, record: TaskRecord, module: pl.LightningModule) -> tuple[str, ...]:
        """What of a task's own a model doesn't have as it was at the task's end; of a sharded one that isn't known."""
        if sharding.is_sharded(module):
            return ()
        parameters = dict(module.named_parameters(remove_duplicate=False))
        return changed(parameters, self.state, record.name, heard(module, self.state))

    def __getstate__(self) -> dict[str, Any]:
        # A copy is a callback that has no run under way.
        kept = {name: value for name, value in vars(self).items() if name not in _OF_LIGHTNING}
        return {
            **kept,
            "_model": None,
            "_recalled": None,
            "_watched": None,
            "_holding": None,
            "_witnesses": Witnesses(),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _model=lambda: None, _recalled=ExitStack(), _watched=ExitStack())


def _uses(record: TaskRecord, other: TaskRecord) -> bool:
    """Whether a unit is relevant to both tasks."""
    return any(bool((mask & other.relevant[layer]).any()) for layer, mask in record.relevant.items())
