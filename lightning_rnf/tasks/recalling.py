"""Finished tasks that run: recalled in the model by name or sample by sample, and exported."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch

from lightning_rnf.anatomy import Inputs
from lightning_rnf.inference import By, TaskInference, inferring
from lightning_rnf.memory import TaskRecord, record_before, unheld_modules, unknown_modules
from lightning_rnf.recall import as_it_was, export, mixed, subnetwork, unswitched
from lightning_rnf.runtime import arguments, sharding
from lightning_rnf.tasks.files import KeptInFiles

Retention = Literal["exact", "paper"]


class Recalling(KeptInFiles):
    """Finished tasks that can be run; `FinishedTasks` adds evaluation runs and reports.

    Args:
        retention: whether only the task's relevant units speak in recall (``"exact"``), or all (``"paper"``).
    """

    def __init__(self, retention: Retention = "exact") -> None:
        super().__init__()
        self.retention = retention

    @contextmanager
    def recall(self, task: str | Sequence[str], model: torch.nn.Module | None = None) -> Iterator[Any]:
        """Run the model as the sub-network of a finished task: only the units relevant to it speak.

        Inside the context the model is in eval mode, has the norm statistics of that task's end, and runs that task's
        head if the heads are a `MultiHead` (activate heads of your own yourself). Its logits are bit-identical at any
        later time, on the same device with the same dtype, batch and kernels.

        With the tasks of samples, each sample of a batch runs through its own task's sub-network. What comes of them is
        to the bit what the recall of each task makes of its samples as one batch; logits are as wide as those of the
        task with the most classes, with ``-inf`` for classes that a task doesn't have. A list is read at each forward:
        change it in place for the next batch, and nothing is entered anew.

        Example::

            with rnf.recall("digits-01"):
                logits = model(x)
            with rnf.recall(["digits-01", "digits-23", "digits-01"]):
                logits = model(three_samples)

        With ``"auto"`` each sample runs through the sub-network of the task that `infer_task` finds it to be of; the
        context gives an object whose ``last`` is the `TaskInference` of the last forward. With gradients on, the tasks
        that were found run a second time, and gradients go through each sample's own sub-network as in its recall.

        Args:
            task: name of the task, or ``(N,)`` names: one for each sample of the batches ``(N, ...)`` that the model
                is called with. ``"auto"``, if no task has that name: nobody says.
            model: None: the model of the last fit, or of a `RelevanceFreezing.protect` since.

        Raises:
            KeyError: if there is no such finished task.
            ValueError: if there is no model, or it lacks something that the task uses; in the forward, if it runs a
                module that it did not have when the last task ended, or, with the tasks of samples, if a head runs that
                is not its task's, or outputs can't be put together.
        """
        if isinstance(task, str) and task == "auto" and task not in self.state.tasks:  # an array has no one answer
            with self._inferring(self._found(model, "recall('auto')")) as found:
                yield found
            return
        if isinstance(task, str):
            module = self._found(model, f"recall({task!r})")
            with unswitched(module), self._recalled_task(task, module), _alone(module):
                yield
            return
        for name in task:
            self.state.task(name)
        module = self._found(model, "recall(tasks)")
        _check_not_alone(module)
        if sharding.is_sharded(module):
            raise ValueError("a sharded model can't run several tasks in one batch: recall one after the other")
        heads = {name: record.head for name, record in self.state.tasks.items()}
        with mixed(module, lambda name: self._recalled_task(name, module), task, heads):
            yield

    def infer_task(
        self,
        x: Any,
        model: torch.nn.Module | None = None,
        *,
        by: By = "auto",
        grouped: bool = False,
        unknown: bool = False,
    ) -> TaskInference:
        """Which finished task each sample is of, and its logits in the recall of that task.

        Every task's sub-network runs on all samples. With ``RelevanceFreezing(portraits=True)`` their features are
        compared with those of the tasks' own data; without, the task with the least entropy of its logits is taken,
        which is right less often: ``docs/inference.md`` says how often. The model comes back as it was.

        Example::

            found = rnf.infer_task(x)
            found.names                 # ("digits-01", "digits-45", ...)
            found.logits.argmax(1)      # each sample's class in its task

        Args:
            x: what the model's ``forward`` is called with: a tensor ``(N, ...)``, a tuple of what is given by position,
                or a dict of what is given by name.
            model: None: the model of the last fit, or of a `RelevanceFreezing.protect` since.
            by: what is compared, see `By`.
            grouped: all samples are known to be of one task: they are judged together, and there is one name.
            unknown: a sample may be of none of the tasks: its name is None if it is less usual than 95 % of the
                reference data of the likeliest one.

        Raises:
            ValueError: if there is no model or no finished task, what is to be compared is not remembered of all tasks,
                a head runs that is not its task's, or says one number for a sample where logits are compared, or the
                model can't be called with ``x``.
        """
        arguments.one_of("by", by, By)
        with self._inferring(self._found(model, "infer_task(x)"), by=by, grouped=grouped, unknown=unknown) as found:
            result: TaskInference = found.infer(Inputs.of(x))
            return result

    def _inferring(self, module: torch.nn.Module, **how: Any) -> AbstractContextManager[Any]:
        if not self.state.tasks:
            raise ValueError("no task has ended, so no sample can be of one")
        _check_not_alone(module)
        if sharding.is_sharded(module):
            raise ValueError(
                "a sharded model can't run several tasks in one batch: load its checkpoint into one that is not"
            )
        records = {
            name: record_before(record, self.state.widenings[record.widenings :])
            for name, record in self.state.tasks.items()
        }
        layers = {layer.name: layer for layer in self.state.layers}
        return inferring(module, lambda name: self._recalled_task(name, module), layers, records, **how)

    def _found(self, model: torch.nn.Module | None, call: str) -> torch.nn.Module:
        """The given model, without what torch.compile wraps it in, or that of the last fit; ``call`` lacks one."""
        module: torch.nn.Module | None = self._model() if model is None else getattr(model, "_orig_mod", model)
        if module is None:
            raise ValueError(f"no model for {call}: name it, {call[:-1]}, model)")
        return module

    @contextmanager
    def _recalled_task(self, task: str, module: torch.nn.Module) -> Iterator[None]:
        self._note_rows()
        record = self.state.recalled(task)
        with as_it_was(
            module, self.state.widenings, len(self.state.widenings)
        ):  # inside of another recall it isn't now
            self.state.check_module(module)
        new = unknown_modules(module, self.state.forms)
        of_task = (self.state.layers, record, self.state.widenings)
        recalled = subnetwork.recall(module, *of_task, masked=self.retention == "exact")
        unheld = [name for name in self._unheld(module, record) if name not in new]
        with recalled, subnetwork.refusing(module, new, task), subnetwork.telling(module, unheld, task):
            yield

    def _unheld(self, module: torch.nn.Module, recalled: TaskRecord) -> list[str]:
        """Modules that ran on no task's reference data: recall is exact as long as they don't run in it either."""
        if self.retention != "exact":
            return []
        records = self.state.tasks.values()
        held = {name for layer in self.state.layers for name in layer.parameters}.union(
            *(self.state.shared, self.state.embeddings, recalled.norm_statistics),
            *(record.head_parameters for record in records),
        )
        return unheld_modules(module, held, [record.head for record in records])

    def export(self, model: torch.nn.Module, task: str, example: Any = None) -> torch.nn.Module:
        """Cut the sub-network of a finished task out of a model, as a small, dense, ordinary module in eval mode.

        Its logits are those of recall within 1e-5 of the largest; see `recall.export` for what goes and what stays,
        and to measure both sizes. The model itself stays as it is. A warning says if much is silent and little was
        cut: then ``kept`` of what comes back names the operations that stop the cut.

        Example::

            small = rnf.export(model, "digits-01")
            torch.save(small, "digits-01.pt")                   # loads without this package
            torch.onnx.export(small, (x,), "digits-01.onnx")
            small.kept["reasons"]                               # {"norm (LayerNorm) mixes channels": 8}

        Args:
            model: with the weights of any later time.
            task: name of the task.
            example: inputs of the model's ``forward``, as in Lightning's ``example_input_array``: a tensor, a tuple of
                what is given by position, or a dict of what is given by name. They are needed where ``torch.fx`` can't
                trace the model, and the small one takes the same. None: those of the samples that the program keeps of
                a finished task, or else the model's ``example_input_array``.

        Raises:
            KeyError: if there is no such finished task.
            ValueError: if the model lacks something that the task uses, runs another head, is sharded, or can't be
                traced.
        """
        self._note_rows()
        record = self.state.recalled(task)
        module = getattr(model, "_orig_mod", model)  # torch.compile wraps it
        if sharding.is_sharded(module):
            raise ValueError("a sharded model can't be cut: load its checkpoint into one that is not, and export that")
        self.state.check_module(module)
        of_task = (self.state.layers, record, self.state.widenings)
        masked = self.retention == "exact"
        small = export(module, *of_task, masked=masked, inputs=lambda: self._inputs(module, record, example))
        if strangers := sorted(set(unknown_modules(module, self.state.forms)) & set(dict(small.named_modules()))):
            raise ValueError(f"the model runs {strangers[0]!r}, which it did not have when the last task ended")
        return small

    def _inputs(self, module: torch.nn.Module, record: TaskRecord, example: Any) -> Inputs | None:
        """What the forward is called with: the given, of a task's kept samples, or the module's example."""
        if example is not None:
            return Inputs.of(example)
        probes = self._witnesses.probes
        for name in (record.name, *probes):
            if name in probes and (found := probes[name].inputs(module)) is not None:
                return found
        own = getattr(module, "example_input_array", None)
        return None if own is None else Inputs.of(own)


_ALONE: WeakKeyDictionary[torch.nn.Module, int] = WeakKeyDictionary()
"""Models in the recall of one task, and in how many, one inside another."""


@contextmanager
def _alone(module: torch.nn.Module) -> Iterator[None]:
    """Inside the context a model is in the recall of one task."""
    _ALONE[module] = _ALONE.get(module, 0) + 1
    try:
        yield
    finally:
        _ALONE[module] -= 1


def _check_not_alone(module: torch.nn.Module) -> None:
    """Check that a model can go from task to task: where one is recalled, others would speak through its units only."""
    if _ALONE.get(module):
        raise ValueError(
            "the model is in the recall of one task, where no other one runs as it should: leave rnf.recall(task), or "
            "the test of that task, before samples of several tasks are recalled or told apart"
        )
