"""What a Trainer's run is about: whether it can be worked with, whose data it runs on, and which task that is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from lightning_rnf.heads import MultiHead
from lightning_rnf.memory import FreezeState, readable
from lightning_rnf.packages import (
    Callback,
    LightningDataModule,
    LightningModule,
    MultiProcessingLauncher,
    Trainer,
    TrainerFn,
    callbacks,
    either,
    rank_zero_warn,
    sized_len,
    strategies,
)
from lightning_rnf.runtime import Ranks, sharding

# WeightAveraging is there from Lightning 2.6 on.
_AVERAGING = tuple(
    getattr(callbacks, name) for name in ("StochasticWeightAveraging", "WeightAveraging") if hasattr(callbacks, name)
)

# A function first: a command line takes any text for a name.
TaskOption = Callable[[Trainer, LightningModule], str] | str | None
"""A task's name, or ``(trainer, module) -> name``; None: ``datamodule.task``."""


_REFUSED: dict[type[strategies.Strategy], str] = {
    strategies.DeepSpeedStrategy: "DeepSpeed keeps parameters in partitions and updates them in an engine of its own, "
    "past the hooks that hold frozen rows",
    strategies.FSDPStrategy: "FSDP flattens the parameters of several layers into one, whose pieces are no rows of any "
    "layer",
}


def check_trainer(trainer: Trainer, callback: Callback, kind: type[Callback]) -> None:
    """Refuse Trainers that can't be worked with, and warn of callbacks that write behind this one's back.

    Raises:
        ValueError: naming what to use.
    """
    _refuse_others(trainer, kind)
    refuse_strategies(trainer)
    _warn_of_averages(trainer, callback)


def _refuse_others(trainer: Trainer, kind: type[Callback]) -> None:
    every: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if sum(isinstance(callback, kind) for callback in every) > 1:
        name = kind.__name__
        raise ValueError(f"the Trainer has more than one {name}: one keeps all tasks, remove the others")


def refuse_processes(trainer: Trainer) -> None:
    """Check that a task can be ended inside a fit.

    Raises:
        ValueError: if the fit has several processes.
    """
    if trainer.world_size > 1:
        raise ValueError(
            f"end_task can't work in {trainer.world_size} processes: DDP has wrapped the model with the heads that "
            "learned at its start, and would leave the next one's gradients apart; use one fit per task"
        )


def refuse_strategies(trainer: Trainer) -> None:
    """Check that the processes keep what they find, and that each has the whole model or whole rows of it.

    Raises:
        ValueError: if not, naming what to use.
    """
    strategy, name = trainer.strategy, type(trainer.strategy).__name__
    for refused, why in _REFUSED.items():
        if isinstance(strategy, either(refused)):
            raise ValueError(
                f"RelevanceFreezing can't work under {name}: {why}; use Trainer(strategy='ddp'), or "
                "ModelParallelStrategy with fully_shard if the model is too large to be trained whole"
            )
    if isinstance(strategy.launcher, either(MultiProcessingLauncher)):
        raise ValueError(
            f"RelevanceFreezing can't work under {name} as it is set up here: spawned and forked processes take the "
            "finished tasks with them; use Trainer(strategy='ddp')"
        )
    if trainer.world_size > 1 and not isinstance(
        strategy, either(strategies.DDPStrategy, strategies.ModelParallelStrategy)
    ):
        raise ValueError(
            f"RelevanceFreezing does not know how {name} spreads a model over {trainer.world_size} processes: "
            "use Trainer(strategy='ddp')"
        )
    for where, part in trainer.lightning_module.named_modules():
        if isinstance(part, nn.DataParallel):
            raise ValueError(
                f"module {where!r} is a DataParallel, whose replicas lose the hooks that measure and silence units: "
                "take it out and use Trainer(strategy='ddp')"
            )


def check_sharding(trainer: Trainer, module: LightningModule) -> None:
    """Check that a model that is not whole in every process is spread by rows; once it is spread.

    Raises:
        ValueError: if not, naming what to use.
    """
    if isinstance(trainer.strategy, either(strategies.ModelParallelStrategy)):
        tensor_parallel = trainer.strategy.device_mesh["tensor_parallel"].size()
        if tensor_parallel > 1:
            raise ValueError(
                f"ModelParallelStrategy spreads each layer over {tensor_parallel} processes (tensor_parallel_size), "
                "and no process runs a layer whose units could be measured: use ModelParallelStrategy("
                f"data_parallel_size={trainer.world_size}, tensor_parallel_size=1), or Trainer(strategy='ddp')"
            )
        sharding.check(module, trainer.world_size)


def scores_of_before(trainer: Trainer) -> dict[Callback, float]:
    """At a fit's start: the best score of each ``EarlyStopping`` that an earlier fit has used."""
    return {
        callback: float(callback.best_score)
        for callback in trainer.early_stopping_callbacks
        if callback is not None and math.isfinite(callback.best_score)
    }


def warn_of_unearned_stop(trainer: Trainer, task: str, before: Mapping[Callback, float]) -> None:
    """Warn where an ``EarlyStopping`` has ended a task's fit by what it had seen in an earlier one: see `before`."""
    for stopping, best in before.items():
        assert isinstance(stopping, either(callbacks.EarlyStopping))
        has_stopped = stopping.wait_count >= stopping.patience and float(stopping.best_score) == best
        if has_stopped and trainer.max_epochs is not None and trainer.current_epoch < trainer.max_epochs:
            rank_zero_warn(
                f"{task}: EarlyStopping(monitor={stopping.monitor!r}) has ended the fit at epoch "
                f"{trainer.current_epoch} of {trainer.max_epochs} by what it kept from an earlier fit: its best, "
                f"{best:.4g}, and its count of epochs without a better one; give each fit a new EarlyStopping"
            )


def warn_of_untrained(trainer: Trainer, name: str | None, state: FreezeState) -> None:
    """Warn where a fit had no epoch left, and so its task has not ended."""
    is_restored = bool(state.tasks) if name is None else name in state.tasks  # one that ended before: nothing is lost
    if trainer.max_epochs and trainer.fit_loop.done and not is_restored:
        rank_zero_warn(
            f"nothing was trained, so {'the task' if name is None else repr(name)} has not ended: the epochs of the "
            f"Trainer, or of the checkpoint, count on, and {trainer.current_epoch} of max_epochs={trainer.max_epochs} "
            "are over; use a new Trainer for each task, or raise max_epochs"
        )


def check_active_head(module: nn.Module, name: str) -> None:
    """Check that the task of a fit and the `MultiHead` of the model agree, where it has a head of that name.

    Raises:
        ValueError: if another head is active.
    """
    for where, heads in MultiHead.in_use(module).items():
        if name in heads.tasks and heads.active != name:
            raise ValueError(
                f"the fit's task is {name!r}, but the active head of {where!r} is that of {heads.active!r}: call "
                f"{where}.activate({name!r}) before fit, or give the task another name"
            )


def _warn_of_averages(trainer: Trainer, callback: Callback) -> None:
    order: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for later in order[order.index(callback) + 1 :]:
        if isinstance(later, either(*_AVERAGING)):
            name = type(later).__name__
            rank_zero_warn(
                f"{name} writes its averaged weights after RelevanceFreezing has recorded the task: put {name} before "
                "RelevanceFreezing in Trainer(callbacks=[...]), or the record is of weights that no longer exist"
            )


def ranks_of(trainer: Trainer) -> Ranks:
    """The processes of the run."""
    return Ranks(trainer.global_rank, trainer.world_size)


def epochs_left(trainer: Trainer) -> int:
    """How many epochs the fit still has to run."""
    assert trainer.max_epochs is not None
    return trainer.max_epochs - trainer.current_epoch


def is_time_to_recover(trainer: Trainer, recovery_epochs: int, *, late: bool = False) -> bool:
    """Whether the epochs that are left are those of the recovery; ``late``: or fewer of them."""
    if recovery_epochs <= 0 or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return False
    left = epochs_left(trainer)
    return left == recovery_epochs or (late and 0 < left < recovery_epochs)


def check_epochs(trainer: Trainer, recovery_epochs: int, *, resumed: bool) -> None:
    """Check that the fit has a known number of epochs left, and at least one before so many for the recovery.

    A fit that is ``resumed`` may have had that one before.

    Raises:
        ValueError: if not.
    """
    if recovery_epochs == 0 or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    if trainer.max_epochs is None or trainer.max_epochs < 0:
        raise ValueError("recovery_epochs are the last of a known number: give Trainer(max_epochs=...)")
    if epochs_left(trainer) + resumed <= recovery_epochs:
        raise ValueError(
            f"recovery_epochs={recovery_epochs} of the {epochs_left(trainer)} epochs that are left leave none for the "
            "whole network: the sub-network is searched after at least one; give Trainer(max_epochs=...) more"
        )


def data_module(trainer: Trainer) -> LightningDataModule | None:
    """The data module of the run that is under way; None if it was given loaders."""
    # trainer.datamodule is still the last run's if this one was given loaders, but the loops' sources are this one's.
    source = trainer.fit_loop._data_source.instance
    return source if isinstance(source, either(LightningDataModule)) else None


def given_name(task: TaskOption, trainer: Trainer, module: LightningModule) -> str | None:
    """The task's name as the user gives it; None if nothing does.

    Raises:
        TypeError: if the user's function returns no name.
    """
    if callable(task):
        name: Any = task(trainer, module)
        if not isinstance(name, str) or not name:
            raise TypeError(f"task(trainer, module) returned {name!r}, expected the task's name")
        return name
    name = task if task is not None else getattr(data_module(trainer), "task", None)
    return name if isinstance(name, str) and name else None


def name_of_new_task(
    task: TaskOption, state: FreezeState, trainer: Trainer, module: LightningModule, given: str | None = None
) -> str:
    """The name by which the task of a fit ends: ``given``, as the user says in ``task``, or ``"task-<n>"``.

    Raises:
        TypeError: if the user's function returns no name.
        ValueError: as `check_new_name`.
    """
    name = given or ranks_of(trainer).decided(lambda: given_name(task, trainer, module))
    if name is None:
        name = next(
            name for name in map("task-{}".format, itertools.count(len(state.tasks))) if name not in state.tasks
        )
    check_new_name(name, state)
    return name


def check_new_name(name: str, state: FreezeState) -> None:
    """Check that a task may end by this name.

    Raises:
        ValueError: if it can't be shown or written down, or belongs to a finished task.
    """
    if not readable(name):
        raise ValueError(
            f"task name {name!r} has control characters, line ends or halves of characters in it, which files, "
            "tables and terminals don't take: give it another"
        )
    if name in state.tasks:
        raise ValueError(
            f"task {name!r} has ended already; name the new one: datamodule.task, or "
            f"RelevanceFreezing(task=...). Finished tasks: {list(state.tasks)}"
        )


def tasks_of_loaders(trainer: Trainer) -> list[str | None]:
    """The task of each loader that is validated, tested or predicted on; None where the run has one task or none.

    The data module's ``task`` may be a list of names, one for each of its loaders; without a data module, a loader's
    data set may have a ``task``.

    Raises:
        ValueError: if the data module names more or fewer tasks than there are loaders, or one batch holds several.
    """
    each = _loaders(trainer)
    names = getattr(data_module(trainer), "task", None)
    if isinstance(names, str):
        return [None] * len(each)
    if isinstance(names, (list, tuple)) and len(names) != len(each):
        raise ValueError(f"datamodule.task names {len(names)} tasks, {list(names)}, for {len(each)} loaders")
    of_data = [getattr(getattr(loader, "dataset", None), "task", None) for loader in each]
    found = list(names) if isinstance(names, (list, tuple)) else of_data
    if len(set(found)) > 1 and (mode := _evaluation_mode(trainer)) != "sequential":
        raise ValueError(
            f"loaders of the tasks {found} are combined in mode {mode!r}, and a batch can run as one task only: "
            "use mode 'sequential'"
        )
    return found


def batches_left_out(trainer: Trainer) -> list[str | None]:
    """Of each loader that is tested, how many of its batches in words, if not all of them are; else None."""
    found: list[str | None] = []
    for loader, batches in zip(_loaders(trainer), trainer.num_test_batches, strict=True):
        length = sized_len(loader)
        of = "" if length is None else f" of {length}"
        found.append(f"{batches}{of} batches" if batches < (math.inf if length is None else length) else None)
    return found


def _loaders(trainer: Trainer) -> list[Any]:
    loaders: Any = {
        TrainerFn.VALIDATING: trainer.val_dataloaders,
        TrainerFn.TESTING: trainer.test_dataloaders,
        TrainerFn.PREDICTING: trainer.predict_dataloaders,
    }[trainer.state.fn or TrainerFn.TESTING]
    several = list(loaders.values()) if isinstance(loaders, dict) else loaders
    return list(several) if isinstance(several, (list, tuple)) else [several]


def _evaluation_mode(trainer: Trainer) -> str:
    loop: Any = trainer.predict_loop if trainer.state.fn == TrainerFn.PREDICTING else trainer._evaluation_loop
    mode: str = loop._combined_loader._mode
    return mode


def task_of_evaluation(
    task: TaskOption, state: FreezeState, trainer: Trainer, module: LightningModule
) -> tuple[str | None, bool]:
    """The task that is validated, tested or predicted, and whether anything tells which it is."""
    active = [head.tasks[head.active] for head in module.modules() if isinstance(head, MultiHead) and head.active]
    modules = dict(module.named_modules())
    by_head = [name for name, record in state.tasks.items() if modules.get(record.head) in active]
    # What task= says is about the fits: it may name the last one or the next. The data and the head know better.
    of_data = getattr(data_module(trainer), "task", None)
    if isinstance(of_data, str) and (of_data in state.tasks or task is None):
        return of_data, True
    name = by_head[0] if by_head else given_name(task, trainer, module)
    return name, name is not None or bool(active)
