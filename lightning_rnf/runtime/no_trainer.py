"""What a Trainer would do for reference data, where none runs: set up a data module, bring batches to the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lightning_rnf.packages import LightningDataModule, LightningModule, either, is_overridden, move_data_to_device

_TRANSFER = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


class NoTrainer:
    """Stands in a Trainer's place for hooks that ask it what is being done: validation, in one process.

    It is false, as None is: properties of Lightning's own then say what they say without a Trainer.
    """

    training = testing = predicting = sanity_checking = False
    validating = evaluating = is_global_zero = True
    world_size = num_nodes = num_devices = 1
    global_rank = local_rank = node_rank = 0

    def __bool__(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"the Trainer was asked for {name!r}, but none is running: use a model and batches that need no Trainer, "
            "or end the task in a fit"
        )


@contextmanager
def alone(module: nn.Module, source: object) -> Iterator[None]:
    """Inside the context no Trainer is attached to a LightningModule, and a data module is ready to validate."""
    parts = [part for part in module.modules() if isinstance(part, either(LightningModule))]
    attached = [(part, part._trainer) for part in parts]
    stand_in: Any = NoTrainer()
    try:
        for part, _ in attached:
            part._trainer = stand_in
        if isinstance(source, either(LightningDataModule)):
            with _set_up(source, stand_in):
                yield
        else:
            yield
    finally:
        for part, trainer in attached:
            part._trainer = trainer


def transferred(batch: Any, module: nn.Module, source: object) -> Any:
    """The batch on the module's device, through the same hooks as in a fit: a data module's own come first."""
    device = next(module.parameters()).device
    for name in _TRANSFER:
        owner = next((one for one in (source, module) if _has_own(name, one)), None)
        arguments = (device, 0) if name == "transfer_batch_to_device" else (0,)
        if owner is not None:
            batch = getattr(owner, name)(batch, *arguments)
        elif name == "transfer_batch_to_device":
            batch = move_data_to_device(batch, device)
    return batch


@contextmanager
def _set_up(data: LightningDataModule, stand_in: Any) -> Iterator[None]:
    before, data.trainer = data.trainer, stand_in
    try:
        data.prepare_data()
        data.setup("validate")
        try:
            yield
        finally:
            data.teardown("validate")
    finally:
        data.trainer = before


def _has_own(name: str, owner: object) -> bool:
    return isinstance(owner, either(LightningDataModule, LightningModule)) and is_overridden(name, owner)
