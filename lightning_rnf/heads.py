"""One head per task, for models that have none yet."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import cast

from torch import Tensor, nn


class MultiHead(nn.Module):
    """One output layer per task; the active one is run and trained, the others wait.

    Example::

        self.heads = MultiHead(400, {"digits-01": 2, "digits-23": 2})
        ...
        model.heads.activate("digits-01")      # before fit

        net.fc = MultiHead(net.fc.in_features, {"imagenet": net.fc, "ages": 8})  # beside the pretrained head

    Args:
        in_features: size of the features that all heads read.
        classes: by task, the number of classes, or a module that is its head already; the first task is active at the
            start.
        make_head: builds a head from ``(in_features, classes)``.
    """

    def __init__(
        self,
        in_features: int,
        classes: Mapping[str, int | nn.Module] | None = None,
        make_head: Callable[[int, int], nn.Module] = nn.Linear,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.make_head = make_head
        self.tasks = nn.ModuleDict()
        self.active: str | None = None
        for task, of_task in (classes or {}).items():
            self.add(task, of_task)
        if classes:
            self.activate(next(iter(classes)))

    def add(self, task: str, classes: int | nn.Module | None = None, *, continues: str | None = None) -> None:
        """Add a head for ``task``; it waits until it is activated.

        Args:
            task: its name.
            classes: how many outputs a new head has, or the head.
            continues: a task whose head it begins as, copied: the same classes in a new domain. The old task keeps its
                own, and its recall stays as it is.

        Raises:
            KeyError: if there is no head to continue.
            TypeError: unless either ``classes`` or ``continues`` is given.
            ValueError: if the task has a head already, its name is empty or has a dot in it, or the given head is
                another task's.
        """
        if (classes is None) == (continues is None):
            raise TypeError(f"head of task {task!r}: give either classes, or the name of a task that it continues")
        if continues is not None:
            self._require(continues)
            classes = copy.deepcopy(self.tasks[continues])
        if not isinstance(task, str) or not task or "." in task or hasattr(nn.ModuleDict, task):
            raise ValueError(
                f"task name {task!r} can't name a module: expected a string without dots that is no method of a dict"
            )
        if task in self.tasks:
            raise ValueError(f"task {task!r} has a head already; heads: {list(self.tasks)}")
        owners = [other for other, head in self.tasks.items() if head is classes]
        if owners:
            raise ValueError(f"the head that was given for task {task!r} is that of {owners[0]!r}: give a copy of it")
        head = classes if isinstance(classes, nn.Module) else self.make_head(self.in_features, cast(int, classes))
        self.tasks[task] = head.requires_grad_(False)

    def activate(self, task: str) -> None:
        """Run this task's head from now on and let it, and no other, be trained.

        Raises:
            KeyError: if there is no such head.
        """
        self._require(task)
        for name, head in self.tasks.items():
            head.requires_grad_(name == task)
        self.active = task

    @contextmanager
    def running(self, task: str) -> Iterator[None]:
        """Run this task's head inside the context; what is trained stays as it is.

        Raises:
            KeyError: if there is no such head.
        """
        self._require(task)
        before, self.active = self.active, task
        try:
            yield
        finally:
            self.active = before

    def forward(self, features: Tensor) -> Tensor:
        """Features, ``(N, in_features)`` or as the heads take them, to the active task's logits ``(N, classes)``.

        Raises:
            RuntimeError: if no head is active.
        """
        if self.active is None:
            raise RuntimeError(f"no head is active: call activate(task) first; heads: {list(self.tasks)}")
        logits: Tensor = self.tasks[self.active](features)
        return logits

    @staticmethod
    def in_use(module: nn.Module) -> dict[str, MultiHead]:
        """Those of a model that run, by name: not what ``peft`` has put aside for a copy (``modules_to_save``)."""
        found = {name: part for name, part in module.named_modules() if isinstance(part, MultiHead)}
        return {name: heads for name, heads in found.items() if not _is_aside(module, name)}

    def _require(self, task: str) -> None:
        if task not in self.tasks:
            raise KeyError(f"no head for task {task!r}: heads are {list(self.tasks)}; add(task, classes) makes one")


def _is_aside(module: nn.Module, name: str) -> bool:
    above, _, own = name.rpartition(".")
    return own == "original_module" and hasattr(module.get_submodule(above), "modules_to_save")
