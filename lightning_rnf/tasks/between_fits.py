"""What is done to a model between two fits: a task is protected that was never trained here."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_rnf.freezing import initial
from lightning_rnf.memory import TaskRecord
from lightning_rnf.tasks import runs
from lightning_rnf.tasks.ending import CriterionOption, Ending
from lightning_rnf.tasks.finished import FinishedTasks


class BetweenFits(FinishedTasks):
    """What finishes a task, or changes the model, while no fit is under way; `RelevanceFreezing` adds the fits."""

    ending: Ending
    reset_free: Any

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
        runs.refuse_other_package(model, reference)
        module = getattr(model, "_orig_mod", model)  # torch.compile wraps it
        finished = len(self.state.tasks)
        try:
            return self.ending.protect(module, self.state, self._witnesses, name, reference, criterion)
        finally:
            if len(self.state.tasks) > finished:  # also where a warning is an error: the record stands before it
                self._model = weakref.ref(module)
                if self.reset_free and not finished:
                    initial.remember(self.state, module, self.state.layers)
