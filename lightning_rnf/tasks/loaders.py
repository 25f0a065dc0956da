"""Loaders of the user's: where a fit has its own, whether their data can be indexed, and how far they are walked."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, RandomSampler, SequentialSampler

from lightning_rnf.packages import (
    CombinedLoader,
    MisconfigurationException,
    Trainer,
    either,
    extract_batch_size,
    is_overridden,
)
from lightning_rnf.runtime import Ranks


def length_of(dataset: Any, ranks: Ranks) -> int:
    """How many data there are.

    Raises:
        ValueError: if processes have unequal numbers of them.
    """
    lengths = ranks.each(lambda: len(dataset))
    if len(set(lengths)) > 1:
        raise ValueError(
            f"the data set of the reference data has {', '.join(map(str, lengths))} samples, by process: give all of "
            "them the whole of it, each then draws a share of its own"
        )
    return lengths[0]


def chunks(indices: list[int], batch_size: int | None) -> list[list[int]]:
    """The indices by batch."""
    assert batch_size is not None
    return [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]


def leading(batches: Iterable[Any], samples: int | None, weight: Callable[[Any], float]) -> Iterator[Any]:
    """Whole batches until there are so many data; None: all."""
    seen = 0.0
    for batch in batches:
        if samples is not None and seen >= samples:
            break
        yield batch
        seen += 0 if samples is None else weight(batch)


def weight_of(loader: object, targets: Callable[[Any], int]) -> Callable[[Any], float]:
    """As how many data a batch counts where a walk has to end; verdicts and records count what `predict` returns.

    The first dimension of its first tensor says it for samples, but not for a batch of graphs, which has as many rows
    as nodes: where `predict` has fewer targets, these count. Where it has more (pixels, tokens), rows do. The first
    batch shows how many targets go on a row: to run the model on each would take as long as to measure a candidate.
    What the loader says that it puts into a batch is the least, also where hardly any of it has a target; it is not the
    most, for each of them may be a batch itself. So a walk ends with as many targets as were asked for, or as many
    data, or at the end of the loader.
    """
    stated = stated_batch_size(loader) or 0
    share = 0.0  # of a row; not known yet

    def weight(batch: Any) -> float:
        nonlocal share
        rows = rows_of(batch)
        if rows is None:
            return stated or targets(batch)
        if rows > stated and not share:
            share = min(1.0, targets(batch) / rows) or 1.0
        return max(stated, rows * share)

    return weight


def stated_batch_size(loader: object) -> int | None:
    """How many data a loader says that it puts into a batch; None: it does not say."""
    for one in (loader, getattr(loader, "batch_sampler", None)):
        size = getattr(one, "batch_size", None)
        if isinstance(size, int) and size > 0:
            return size
    return None


def rows_of(batch: Any) -> int | None:
    """The first dimension of a batch's first tensor; None: no tensor is seen in it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that other tensors have other ones
            return extract_batch_size(batch)
    except MisconfigurationException:
        return None


def fingerprint(batch: Any) -> list[str]:
    """Sums of a batch's tensors: enough to see whether several processes walk through the same data."""
    sums: list[str] = []

    def seen(one: Tensor) -> Tensor:
        sums.append(f"{tuple(one.shape)} {one.double().sum().item()}")
        return one  # a packed sequence is put together again of what comes back

    apply_to_collection(batch, Tensor, seen)
    return sums


def is_stream(loader: object) -> bool:
    """Whether what is taken out of it may be missed by whoever reads it next."""
    return isinstance(loader, Iterator) or isinstance(getattr(loader, "dataset", None), IterableDataset)


def can_be_indexed(loader: object, ranks: Ranks) -> bool:
    """Whether all of a loader's data set belong to the task, each of them by its index."""
    # A sampler of the user's own says which samples belong to the task; a subclass may do anything. In several
    # processes torch's distributed one only says which of them each is to see.
    samplers = (SequentialSampler, RandomSampler, *((DistributedSampler,) if ranks.size > 1 else ()))
    return (
        type(loader) is DataLoader
        and loader.batch_size is not None
        and not isinstance(loader.dataset, IterableDataset)
        and type(loader.sampler) in samplers
    )


def single(loaders: Any, where: str) -> Any:
    """The only loader of what was given; ``where`` it was found.

    Raises:
        TypeError: if it is none, or can be walked only once.
        ValueError: if there is none, or there are several.
    """
    if loaders is None:
        raise ValueError(f"no reference data: {where} is missing; give the task validation data, or set reference=")
    if not isinstance(loaders, Iterable) or iter(loaders) is loaders:
        raise TypeError(
            f"{where} is of type {type(loaders).__name__}, expected a data module or a loader that can be walked twice"
        )
    if isinstance(loaders, DataLoader):
        return loaders
    several = list(loaders.values()) if isinstance(loaders, dict) else loaders
    if not isinstance(several, (list, tuple)):
        return loaders
    if len(several) == 1 and isinstance(several[0], DataLoader):
        return several[0]
    if all(isinstance(one, DataLoader) for one in several) and several:
        raise ValueError(
            f"{where} has {len(several)} loaders, and which of them belongs to the task can't be told: "
            "set the task's own as reference= (a function of trainer and module, or rnf.reference before each fit)"
        )
    return loaders  # batches in a list


def validation_data(trainer: Trainer) -> Any:
    """What the fit validates on, or would; None: nothing was given."""
    loop, module = trainer.fit_loop.epoch_loop.val_loop, trainer.lightning_module
    if trainer.enable_validation and trainer.world_size == 1:
        # Lightning does this at the first validation; here it may be asked for earlier.
        loop.setup_data()
        return trainer.val_dataloaders
    # Without a validation Lightning keeps what it was given and sets nothing up. Of several processes: as the user gave
    # them, for Lightning deals its own out, and repeats samples until that comes out.
    if loop._data_source.is_defined():
        loaders = loop._data_source.dataloader()
        return loaders.iterables if isinstance(loaders, either(CombinedLoader)) else loaders
    return module.val_dataloader() if is_overridden("val_dataloader", module) else None
