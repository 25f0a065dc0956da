"""Reference data: a random sample of a task's own held-out data, drawn once and kept on the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler, Subset
from torchmetrics import Metric

from lightning_rnf.evaluation import Predict, measure, supervised
from lightning_rnf.runs import data_module
from lightning_rnf.search import Measured

ReferenceSource = LightningDataModule | Iterable[Any] | Callable[[Trainer, LightningModule], Any] | None
"""Where reference data comes from: a data module's validation data; a loader; a function ``(trainer, module)`` that
returns one of them, for a source per task, and is called several times in a fit; or None: the fit's validation data."""


_EMPTY = "reference data is empty: give the task validation data, or set reference="


@dataclass(frozen=True)
class ReferenceData:
    """Batches on the device; accuracy is measured on all of them, relevance on the first ``attributed``.

    Attributes:
        batches: in random order where the data could be indexed.
        attributed: number of leading batches for relevance.
        samples: number of samples in all batches.
        predict: how to get logits and labels of a batch.
        forward_context: entered around each forward of `accuracy`: the fit's precision.
        convert: applied to each batch before that forward, for the same reason.
    """

    batches: list[Any]
    attributed: int
    samples: int
    predict: Predict = supervised
    forward_context: Callable[[], AbstractContextManager[Any]] = nullcontext
    convert: Callable[[Any], Any] = lambda batch: batch

    @property
    def example(self) -> Any:
        """One batch, in the fit's precision."""
        return self.convert(self.batches[0])

    @property
    def for_attribution(self) -> list[Any]:
        """The batches on which relevance is measured, in the fit's precision."""
        return [self.convert(batch) for batch in self.batches[: self.attributed]]

    def measure(
        self, module: nn.Module, metrics: Mapping[str, Metric] | None = None, *, finite: bool = True
    ) -> Measured:
        """Accuracy of ``module`` on all batches, in [0, 1], and the metrics."""
        batches = map(self.convert, self.batches)
        return measure(module, batches, self.predict, self.forward_context, metrics, finite=finite)

    def run(self, module: nn.Module) -> None:
        """Run ``module`` on the inputs of the batches for attribution, but for much smaller ones and single samples.

        Each batch weighs the same in statistics that are estimated from them.
        """
        batches = self.for_attribution
        sizes = [extract_batch_size(batch) for batch in batches]
        for batch, size in zip(batches, sizes, strict=True):
            if size > 1 and size >= max(sizes) / 2:
                with torch.no_grad(), self.forward_context():
                    self.predict(module, batch)


class Reference:
    """Draws reference data for a fit.

    Args:
        source: see `ReferenceSource`.
        samples: at most so many are drawn; None: all.
        attribution_samples: at most so many of them are attributed; None: all.
        predict: how to get logits and labels of a batch.
        seed: of the drawing.
    """

    def __init__(
        self,
        source: ReferenceSource = None,
        samples: int | None = 5000,
        attribution_samples: int | None = 1000,
        predict: Predict = supervised,
        seed: int = 0,
    ) -> None:
        self.source = source
        self.samples = samples
        self.attribution_samples = attribution_samples
        self.predict = predict
        self.seed = seed

    def size(self, trainer: Trainer) -> int | None:
        """How many samples would be drawn; None: only drawing can tell."""
        with self._loader(trainer) as loader:
            sampler = getattr(loader, "sampler", None)
            batch_size = getattr(loader, "batch_size", None)
            if not isinstance(sampler, Sized) or batch_size is None:
                return None
            if self.samples is None:
                return len(sampler)
            whole_batches = batch_size if not _can_be_indexed(loader) else 1
            return min(len(sampler), math.ceil(self.samples / whole_batches) * whole_batches)

    def example(self, trainer: Trainer) -> Any:
        """One batch on the device, in the fit's precision.

        Raises:
            ValueError: if there is no reference data, or more than one loader.
        """
        with self._loader(trainer) as loader, _validating(trainer):
            for batch in loader:
                return trainer.precision_plugin.convert_input(trainer.strategy.batch_to_device(batch))
        raise ValueError(_EMPTY)

    def draw(self, trainer: Trainer) -> ReferenceData:
        """Draw the task's reference data and put it on the device.

        A plain DataLoader's dataset is indexed at random; other loaders are walked from their start.

        Raises:
            ValueError: if there is no reference data, or more than one loader.
        """
        with self._loader(trainer) as loader, _validating(trainer):
            draw = self._random_parts if _can_be_indexed(loader) else self._leading_parts
            samples, *parts = draw(loader)
            on_device = [[trainer.strategy.batch_to_device(batch) for batch in part] for part in parts]
        if samples == 0:
            raise ValueError(_EMPTY)
        precision = trainer.precision_plugin
        return ReferenceData(
            on_device[0] + on_device[1],
            len(on_device[0]),
            samples,
            self.predict,
            precision.forward_context,
            precision.convert_input,
        )

    def _random_parts(self, loader: DataLoader[Any]) -> tuple[int, Iterable[Any], Iterable[Any]]:
        dataset: Any = loader.dataset
        drawn = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(self.seed)).tolist()
        drawn = drawn[: self.samples]
        attributed = len(drawn) if self.attribution_samples is None else self.attribution_samples

        def batches(indices: list[int]) -> Iterable[Any]:
            return DataLoader(
                Subset(dataset, indices),
                batch_size=loader.batch_size,
                num_workers=loader.num_workers,
                collate_fn=loader.collate_fn,
                worker_init_fn=loader.worker_init_fn,
            )

        # Two loaders, so that the border falls between batches.
        return len(drawn), batches(drawn[:attributed]), batches(drawn[attributed:])

    def _leading_parts(self, loader: Iterable[Any]) -> tuple[int, Iterable[Any], Iterable[Any]]:
        batches: list[Any] = []
        seen = attributed = 0
        for batch in loader:
            if self.samples is not None and seen >= self.samples:
                break
            if self.attribution_samples is None or seen < self.attribution_samples:
                attributed += 1
            batches.append(batch)
            seen += extract_batch_size(batch)
        return seen, batches[:attributed], batches[attributed:]

    @contextmanager
    def _loader(self, trainer: Trainer) -> Iterator[Any]:
        source = self.source(trainer, trainer.lightning_module) if callable(self.source) else self.source
        if source is None or source is data_module(trainer):
            yield _single(_validation_data(trainer), "the fit's validation data")
        elif isinstance(source, LightningDataModule):
            with set_up(source, trainer, "validate"):
                yield _single(source.val_dataloader(), "reference.val_dataloader()")
        else:
            yield _single(source, "reference")


def _can_be_indexed(loader: object) -> bool:
    # A sampler of the user's own says which samples belong to the task; a subclass may do anything.
    return (
        type(loader) is DataLoader
        and loader.batch_size is not None
        and not isinstance(loader.dataset, IterableDataset)
        and type(loader.sampler) in (SequentialSampler, RandomSampler)
    )


def _single(loaders: Any, where: str) -> Any:
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


def _validation_data(trainer: Trainer) -> Any:
    if trainer.enable_validation:
        # Lightning does this at the first validation; here it may be asked for earlier.
        trainer.fit_loop.epoch_loop.val_loop.setup_data()
        return trainer.val_dataloaders
    for source in (data_module(trainer), trainer.lightning_module):
        if source is not None and is_overridden("val_dataloader", source):
            return source.val_dataloader()
    return None


@contextmanager
def set_up(data: LightningDataModule, trainer: Trainer, stage: str) -> Iterator[None]:
    """The life cycle that Lightning gives only to the Trainer's own data module."""
    before, data.trainer = data.trainer, trainer
    try:
        if trainer.is_global_zero or (data.prepare_data_per_node and trainer.local_rank == 0):
            data.prepare_data()
        trainer.strategy.barrier("lightning_rnf_prepare_data")
        data.setup(stage)
        try:
            yield
        finally:
            data.teardown(stage)
    finally:
        data.trainer = before


@contextmanager
def _validating(trainer: Trainer) -> Iterator[None]:
    """Transfer hooks of the user's ask the Trainer whether to augment."""
    stage = trainer.state.stage
    trainer.validating = True
    try:
        yield
    finally:
        trainer.state.stage = stage
