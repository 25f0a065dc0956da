"""For projects of the package `pytorch_lightning`: what has to be made of its classes; all else is as for others."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ParamSpec, cast

import pytorch_lightning as pl

from lightning_rnf import callback, streams
from lightning_rnf.tasks import RichUnitSummary as Rich
from lightning_rnf.tasks import UnitSummary as Summary

__all__ = ["RelevanceFreezing", "RichUnitSummary", "TaskDataModule", "UnitSummary", "permute_pixels", "split_by_class"]

# A Trainer calls hooks by their names. But its command line, `callbacks=rnf` without a list, its choice of a summary
# and what it asks of a data module want its own classes. Both packages' are bases; their methods do the same.


class RelevanceFreezing(callback.RelevanceFreezing, pl.Callback):  # type: ignore[misc]
    """`lightning_rnf.RelevanceFreezing` as a callback of `pytorch_lightning`; its checkpoints are the same.

    Example::

        from lightning_rnf.pytorch_lightning import RelevanceFreezing
        from pytorch_lightning import Trainer

        rnf = RelevanceFreezing()
        Trainer(max_epochs=4, callbacks=[rnf]).fit(model, datamodule=datamodule)
    """


class UnitSummary(Summary, pl.callbacks.ModelSummary):  # type: ignore[misc]
    """`lightning_rnf.UnitSummary` in the place of that package's ``ModelSummary``."""


class RichUnitSummary(Rich, pl.callbacks.RichModelSummary):  # type: ignore[misc]
    """`lightning_rnf.RichUnitSummary` in the place of that package's ``RichModelSummary``."""


class TaskDataModule(streams.TaskDataModule, pl.LightningDataModule):  # type: ignore[misc]
    """`lightning_rnf.streams.TaskDataModule` as a data module of `pytorch_lightning`."""


P = ParamSpec("P")


def _of_that_package(split: Callable[P, list[streams.TaskDataModule]]) -> Callable[P, list[TaskDataModule]]:
    return partial(cast(Any, split), kind=TaskDataModule)


split_by_class = _of_that_package(streams.split_by_class)
permute_pixels = _of_that_package(streams.permute_pixels)
