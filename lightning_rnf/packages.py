"""Lightning under its two names, `lightning.pytorch` and `pytorch_lightning`: one code, but classes of their own."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, TypeVar

from lightning_utilities.core import overrides

# Our own classes are made of those of `lightning`; of `pytorch_lightning` where that is the only one. Functions do the
# same in both. A folder of the user's that is called lightning has no origin.
if TYPE_CHECKING or getattr(find_spec("lightning"), "origin", None) is not None:
    import lightning.pytorch as pl
    from lightning.fabric.utilities.data import sized_len
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch import LightningDataModule, LightningModule, Trainer, callbacks, seed_everything, strategies
    from lightning.pytorch.callbacks import Callback
    from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
    from lightning.pytorch.loggers import Logger
    from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher as MultiProcessingLauncher
    from lightning.pytorch.trainer.states import TrainerFn
    from lightning.pytorch.utilities import CombinedLoader, move_data_to_device, rank_zero_info, rank_zero_warn
    from lightning.pytorch.utilities.data import extract_batch_size
    from lightning.pytorch.utilities.exceptions import SIGTERMException
    from lightning.pytorch.utilities.seed import isolate_rng
else:
    import pytorch_lightning as pl
    from lightning_fabric.utilities.data import sized_len
    from lightning_fabric.utilities.exceptions import MisconfigurationException
    from pytorch_lightning import LightningDataModule, LightningModule, Trainer, callbacks, seed_everything, strategies
    from pytorch_lightning.callbacks import Callback
    from pytorch_lightning.callbacks.progress.tqdm_progress import Tqdm
    from pytorch_lightning.loggers import Logger
    from pytorch_lightning.strategies.launchers import _MultiProcessingLauncher as MultiProcessingLauncher
    from pytorch_lightning.trainer.states import TrainerFn
    from pytorch_lightning.utilities import CombinedLoader, move_data_to_device, rank_zero_info, rank_zero_warn
    from pytorch_lightning.utilities.data import extract_batch_size
    from pytorch_lightning.utilities.exceptions import SIGTERMException
    from pytorch_lightning.utilities.seed import isolate_rng

__all__ = [
    "Callback",
    "CombinedLoader",
    "LightningDataModule",
    "LightningModule",
    "Logger",
    "MisconfigurationException",
    "MultiProcessingLauncher",
    "SIGTERMException",
    "Tqdm",
    "Trainer",
    "TrainerFn",
    "callbacks",
    "either",
    "extract_batch_size",
    "is_overridden",
    "isolate_rng",
    "like",
    "move_data_to_device",
    "pl",
    "rank_zero_info",
    "rank_zero_warn",
    "seed_everything",
    "sized_len",
    "strategies",
]

_OTHER = {"lightning.pytorch": "pytorch_lightning", "pytorch_lightning": "lightning.pytorch"}

T = TypeVar("T")


def either(*kinds: type[T]) -> tuple[type[T], ...]:
    """Classes of Lightning and their twins of the other package, for `isinstance`: what a user brings may be of either.

    Nothing is imported for it: a package that nobody has imported has made no instances.

    >>> either(Trainer)[0] is Trainer
    True
    """
    found = list(kinds)
    for kind in kinds:
        place = kind.__module__.removeprefix(pl.__name__)
        twin = getattr(sys.modules.get(_OTHER[pl.__name__] + place), kind.__qualname__, None)
        found += [] if twin is None else [twin]
    return tuple(found)


def like(kind: type[T], module: object) -> type[T]:
    """A class of Lightning, or its twin: the one that stands in the package of a module's own base class."""
    twins = dict(zip(either(LightningModule), either(kind), strict=False))
    return next((twin for base, twin in twins.items() if isinstance(module, base)), kind)


def is_overridden(method: str, thing: LightningModule | LightningDataModule) -> bool:
    """Whether a module or data module, of either package, has a method of its own in the place of Lightning's."""
    base = next(kind for kind in either(LightningModule, LightningDataModule) if isinstance(thing, kind))
    return overrides.is_overridden(method, thing, base)
