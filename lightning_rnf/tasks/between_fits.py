"""What is done to a model between two fits: a task is protected that was never trained here."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from numbers import Real
from typing import Any

import torch

from lightning_rnf.freezing import ElasticityOption, EmbeddingRows, initial
from lightning_rnf.memory import TaskRecord
from lightning_rnf.packages import pl
from lightning_rnf.runtime import arguments, sharding
from lightning_rnf.tasks import widening
from lightning_rnf.tasks.ending import Ending
from lightning_rnf.tasks.finished import FinishedTasks
from lightning_rnf.tasks.holding import give_rows
from lightning_rnf.tasks.recovery import CriterionOption


class BetweenFits(FinishedTasks):
    """What finishes a task, or changes the model, while no fit is under way; `RelevanceFreezing` adds the fits."""

    ending: Ending
    reset_free: Any
    embeddings: EmbeddingRows | None
    elasticity: ElasticityOption

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
        self._check_between_fits("protect a task")
        module = getattr(model, "_orig_mod", model)  # torch.compile wraps it
        finished = len(self.state.tasks)
        try:
            return self.ending.protect(module, self.state, self._witnesses, name, reference, criterion)
        finally:
            if len(self.state.tasks) > finished:  # also where a warning is an error: the record stands before it
                self._model = weakref.ref(module)
                give_rows(module, self.state, self.state.embeddings, self.embeddings, self.elasticity)
                if self.reset_free and not finished:
                    initial.remember(self.state, module, self.state.layers)

    def widen(
        self, model: torch.nn.Module, share: float = 0.5, *, layers: str | Sequence[str] | None = None
    ) -> dict[str, int]:
        """Give layers that have run out new units, which are free; what finished tasks need stays as it is, bit by bit.

        A finished task goes on being recalled, exported and audited in the shape that the model had at its end, so its
        logits stay bit-identical. New units start from torch's defaults, and so does what free units and heads of tasks
        to come read of them; frozen rows and heads of finished tasks read zero of it. What is tied grows together:
        layers whose outputs meet in a sum or product, convolutions with groups and what they read, norms and slopes.
        Parameters that grow are new objects: the next fit's optimizers see them. Checkpoints and files of masks know
        the sizes, and `restore` widens a model that was built in the original ones.

        Example::

            print(rnf.capacity())                   # {"body.0": 0.0, "body.2": 0.03}
            rnf.widen(model, 0.5)                   # {"body.0": 200, "body.2": 200}
            Trainer(callbacks=[rnf]).fit(model, datamodule=digits_45)

        Args:
            model: the very module that fits train.
            share: of each layer's units, so many come, rounded up: 0.5 makes a layer half as wide again.
            layers: globs of the names of unit layers; None: those of whose units less than 10 % is free.

        Returns:
            How many units each layer has got, in execution order; nothing if none has run out.

        Raises:
            RuntimeError: if a fit is under way.
            TypeError: if ``layers`` are no globs.
            ValueError: if the share is none, no task has ended, the model is sharded, or a layer can't get more units:
                its name and the operation that is why. Nothing is changed then.
        """
        self._check_between_fits("widen the model")
        if isinstance(share, bool) or not isinstance(share, Real) or not 0 < float(share) < float("inf"):
            raise ValueError(
                f"share is {share!r}, expected a share of each layer's units above 0: 0.5 adds half as many"
            )
        module = getattr(model, "_orig_mod", model)  # torch.compile wraps it
        if not self.state.tasks:
            raise ValueError("no task has ended, so which layers are made of units is not known: build the model wider")
        if sharding.is_sharded(module):
            raise ValueError("a sharded model can't be widened: widen it before its fit, or load its checkpoint anew")
        self.state.check_module(module)
        names = [layer.name for layer in self.state.layers]
        globs = arguments.globs("layers", layers)
        globs = (globs,) if isinstance(globs, str) else globs
        for glob in globs or ():
            if not any(fnmatchcase(name, glob) for name in names):
                raise ValueError(f"layers={glob!r} matches no unit layer; they are {', '.join(names)}")
        chosen = (
            widening.short_of_units(self.state)
            if globs is None
            else [name for name in names if any(fnmatchcase(name, glob) for glob in globs)]
        )
        if not chosen:
            return {}
        masked = self.retention == "exact"
        self.state = widening.widen(module, self.state, chosen, float(share), self._witnesses.probes, masked=masked)
        added = self.state.widenings[-1].added()
        return {name: added[name] for name in names if name in added}
