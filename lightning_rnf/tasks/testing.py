"""A task's test data go through the model, which is told whose they are, or has to find out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import reduce
from operator import add
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_rnf.anatomy import (
    Explained,
    Flat,
    Layout,
    Predict,
    ignored_by,
    is_numbers,
    largest_logits,
    predict_checked,
    rows_of_samples,
)
from lightning_rnf.metrics import AccuracyMatrix
from lightning_rnf.runtime import evaluating
from lightning_rnf.tasks.recalling import Recalling
from lightning_rnf.tasks.reference import on_device, set_up


def tested(
    model: torch.nn.Module,
    task: Any,
    trainer: Any,
    predict: Predict,
    callback: Recalling | None,
    activate: Callable[[Any, Any], None],
    sofar: list[Any] | None,
) -> dict[str, float]:
    """One task's test data go through the model.

    Args:
        model: on the trainer's device.
        task: the data module, which has a name, ``task``.
        trainer: of the last fit.
        predict: how to get logits and labels of a batch.
        callback: recalls the task if it is finished; None: the model is tested as it is.
        activate: called with model and task before another task's head is to speak.
        sofar: data modules of all tasks that a sample may be of, this one among them; None: the task is told.

    Returns:
        What a report has of it, by name, all in [0, 1]: ``"accuracy"``, or of numbers ``"r_squared"``. If tasks are not
        told, the same with ``"_told"`` behind its name, and ``"tasks_found"``. NaN where there is no sample.

    Raises:
        ValueError: if targets are numbers, the task is not told, and there is no portrait of each task to find it by;
            or as `predict_checked`, and of samples that are found one by one, as `rows_of_samples`.
    """
    precision = trainer.precision_plugin
    kinds = ("",) if sofar is None else ("", "_told")
    right = {kind: AccuracyMatrix(1) for kind in kinds}
    explained: dict[str, list[Explained]] = {kind: [] for kind in kinds}
    found: list[Tensor] = []
    numbers: bool | None = None  # as the first batch shows: one of another may all be 0 or 1
    with set_up(task, trainer, "test"), _asking(model, task, sofar, callback, activate) as ask, torch.no_grad():
        for batch in task.test_dataloader():
            converted = precision.convert_input(on_device(batch, trainer))
            with precision.forward_context():
                said = ask(Flat(predict, Layout(numbers=numbers)), converted)
            numbers = is_numbers(said.target) if numbers is None else numbers
            found += [] if said.found is None else [said.found.cpu()]
            target = said.target.cpu()
            answers = {"": (said.untold, said.named), "_told": (said.told, None)}
            for kind in kinds:
                logits, named = answers[kind]
                if numbers:
                    explained[kind].append(Explained.of(logits, target))
                else:
                    right[kind].update(logits.cpu(), target, trained=0, task=0, named=named)
    if numbers:
        shares = {f"r_squared{kind}": reduce(add, parts).share for kind, parts in explained.items()}
    else:
        shares = {f"accuracy{kind}": float(one.correct.sum() / one.samples.sum()) for kind, one in right.items()}
    if sofar is None:
        return shares
    return {**shares, "tasks_found": float(torch.cat(found).float().mean()) if found else math.nan}


class _Said(NamedTuple):
    """Of a batch, a row for each target that counts.

    Attributes:
        told: logits, or numbers, where the task is told.
        target: as `predict_checked` gives it.
        untold: the same where it is not. A row of logits is right only if it is ``named``, too.
        named: bool ``(rows,)``: whether the row is taken for one of its own task; None: that is told.
        found: bool: the same of samples, or of what the model has answered one by one; None: it is told.
    """

    told: Tensor
    target: Tensor
    untold: Tensor
    named: Tensor | None = None
    found: Tensor | None = None


_Ask = Callable[[Flat, Any], _Said]
"""``(predict, batch)`` to what is said of it."""


@contextmanager
def _asking(
    model: torch.nn.Module,
    task: Any,
    sofar: list[Any] | None,
    callback: Recalling | None,
    activate: Callable[[Any, Any], None],
) -> Iterator[_Ask]:
    """Inside the context a model answers for one task's test data; of which task they are is not told if ``sofar``."""
    finished = callback is not None and task.task in callback.state.tasks

    def ask_told(flat: Flat, batch: Any) -> _Said:
        logits, target = predict_checked(flat, model, batch)
        return _Said(logits, target, logits)

    if sofar is None:
        with callback.recall(task.task, model) if callback is not None and finished else evaluating(model):
            yield ask_told
    elif callback is not None and finished:
        knows = all(record.portrait is not None for record in callback.state.tasks.values())
        with callback.recall("auto", model) as inferred:

            def ask(flat: Flat, batch: Any) -> _Said:
                asked, _ = flat.predict(model, batch)  # not checked: the labels may not be of the head that spoke
                found = torch.tensor([name == task.task for name in inferred.last.names])
                with callback.recall(task.task, model):
                    output, target = flat.predict(model, batch)
                # What was found to be of this task has been answered in this recall, in these bits: the only answers
                # that can be right are here, without the -inf that widens them beside those of larger heads.
                told = ask_told(_again(flat, output, target), batch)
                given = (output, target, flat.layout, ignored_by(model))
                named = rows_of_samples(found.to(told.target.device), *given)
                untold = told.told
                if is_numbers(told.target):
                    _check_numbers(task, knows=knows)
                    if asked.shape == output.shape:
                        untold, _ = _again(flat, asked, target)(model, batch)
                    else:  # another task's answer of another form is none
                        untold = torch.where(named.unsqueeze(1), told.told, torch.nan)
                return told._replace(untold=untold, named=named, found=found)

            yield ask
    else:
        with evaluating(model):

            def ask_all(flat: Flat, batch: Any) -> _Said:
                said = []
                for other in sofar:
                    if other.task != task.task:
                        activate(model, other)
                        said.append(flat.predict(model, batch)[0])
                activate(model, task)
                output, target = flat.predict(model, batch)
                told = ask_told(_again(flat, output, target), batch)
                if is_numbers(told.target):
                    _check_numbers(task, knows=False)
                own, columns = told.told.amax(1), told.told.shape[1]
                given = (target, columns, flat.layout, ignored_by(model))
                others = [largest_logits(one, *given) for one in said]
                named = torch.stack([torch.full_like(own, -torch.inf), *others]).amax(0) < own
                return told._replace(named=named, found=named)

            yield ask_all


def _again(flat: Flat, output: Any, target: Any) -> Flat:
    """What was already said, as rows."""
    return Flat(lambda module, batch: (output, target), flat.layout)


def _check_numbers(task: Any, *, knows: bool) -> None:
    if not knows:
        raise ValueError(
            f"targets of {task.task!r} are numbers, which don't say as logits do which task a sample is of: pass a "
            "callback with portraits=True to fit_stream(scenario='class'), from the first task on, or use "
            "scenario='task'"
        )
