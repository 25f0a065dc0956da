"""Finished tasks in files: masks to hand on, and checkpoints from which a new process goes on with new tasks."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from lightning_rnf.memory import FreezeState, hub, maskfiles
from lightning_rnf.packages import Callback
from lightning_rnf.runtime import sharding
from lightning_rnf.tasks import checkpoints
from lightning_rnf.tasks.holding import Holding
from lightning_rnf.tasks.witnesses import Witnesses

T = TypeVar("T", bound="KeptInFiles")


class KeptInFiles(Callback):
    """Finished tasks that can be saved and loaded; `FinishedTasks` adds what they can do."""

    def __init__(self) -> None:
        self.state = FreezeState()
        self._model: Callable[[], Any] = lambda: None  # of the last fit, or of what was protected or restored since
        self._holding: Holding | None = None  # of a fit that is under way
        self._witnesses = Witnesses()

    def _note_rows(self) -> None:
        """In a fit: let the state know what it has changed so far that finished tasks hear as it was."""
        if self._holding is not None:
            self._holding.note_rows()

    def save(self, path: str | os.PathLike[str], *, relevance: bool = False) -> None:
        """Write the finished tasks into a small file to hand on: a bit for each unit and task, no weights.

        Example::

            rnf.save("masks.safetensors")
            RelevanceFreezing().load("masks.safetensors", model)  # of the same architecture, with the same weights

        Args:
            path: of the file (safetensors).
            relevance: of every unit, too: four bytes for each unit and task.

        Raises:
            ValueError: if no task has ended.
        """
        self._note_rows()
        maskfiles.save(self.state, path, relevance=relevance)

    def load(self, path: str | os.PathLike[str], model: torch.nn.Module | None = None) -> None:
        """Take over the finished tasks of a file of `save`: nothing in it can run, a refused one changes nothing.

        Args:
            path: of the file.
            model: to be checked against the file; None: it is checked when it is first used.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it can't be read, is of another model, or lacks a task that has ended here.
            RuntimeError: if a fit is under way.
        """
        self._check_between_fits("load masks")
        state = maskfiles.load(path)
        if model is not None:
            state.check_whole(getattr(model, "_orig_mod", model))
        self._check_complete(path, state)
        self._take(state)

    def restore(self, path: str | os.PathLike[str], model: torch.nn.Module) -> None:
        """Go on with new tasks in a new process: the finished tasks of a checkpoint, and its weights for the model.

        The model may have heads of tasks to come, which the checkpoint lacks. The next fit begins anew, without
        ``ckpt_path``: that would go on with the old fit, its epochs and optimizers.

        Example::

            model.heads.add("digits-45", 2)
            rnf.restore("digits-23-ended.ckpt", model)
            model.heads.activate("digits-45")
            Trainer(callbacks=[rnf]).fit(model, datamodule=digits_45)

        Args:
            path: of ``<task>-ended.ckpt``, or another checkpoint in one file.
            model: gets the weights.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it can't be read, is of another model, or lacks a task that has ended here. Nothing is
                changed then.
            RuntimeError: if a fit is under way.
        """
        self._check_between_fits("restore")
        checkpoint = checkpoints.read(path)
        self._check_complete(path, checkpoints.finished_tasks(checkpoint))
        module = getattr(model, "_orig_mod", model)
        if sharding.is_sharded(module):
            raise ValueError("the model is sharded already: restore it before its first fit")
        self._take(checkpoints.restore(checkpoint, module))
        self._model = weakref.ref(module)

    @classmethod
    def from_pretrained(
        cls: type[T],
        repository: str,
        *,
        revision: str | None = None,
        model: torch.nn.Module | None = None,
        **options: Any,
    ) -> T:
        """A callback with the finished tasks that somebody has pushed to the Hugging Face hub.

        Args:
            repository: ``"owner/name"``.
            revision: branch, tag or commit.
            model: to be checked against the file.
            options: of the callback.

        Raises:
            ImportError: if huggingface-hub is not installed (extra ``hub``).
            ValueError: as `load`.
        """
        path = hub.download(repository, revision)
        callback = cls(**options)
        callback.load(path, model)
        return callback

    def push_to_hub(self, repository: str, *, relevance: bool = False, private: bool | None = None) -> str:
        """Put the file of `save` into a repository of the Hugging Face hub, which is made if there is none.

        Args:
            repository: ``"owner/name"``.
            relevance: as for `save`.
            private: whether a new repository is; None: as the owner's settings say.

        Returns:
            The address of the commit.

        Raises:
            ImportError: if huggingface-hub is not installed (extra ``hub``).
            ValueError: if no task has ended.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, hub.FILE)
            self.save(path, relevance=relevance)
            return hub.upload(path, repository, private)

    def _check_between_fits(self, act: str) -> None:
        if self._holding is not None:
            raise RuntimeError(f"a fit is under way: {act} before it, or after its end")

    def _check_complete(self, path: str | os.PathLike[str], state: FreezeState) -> None:
        if lost := [name for name in self.state.tasks if name not in state.tasks]:
            raise ValueError(
                f"{os.fspath(path)!r} lacks {', '.join(map(repr, lost))}, finished here: load it into a new callback"
            )

    def _take(self, state: FreezeState) -> None:
        """Go on with other finished tasks; what was kept beside the old ones goes, but for those that are the same."""
        rows = {name: record.rows for name, record in self.state.tasks.items()}
        same = [name for name, record in state.tasks.items() if record.rows and record.rows == rows.get(name)]
        self._witnesses = self._witnesses.of(same)
        self.state = state
