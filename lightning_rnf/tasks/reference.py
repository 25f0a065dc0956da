"""Reference data: a random sample of a task's own held-out data, drawn once and kept on the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import Metric

from lightning_rnf.anatomy import Flat, Layout, Predict, measure, predict_checked, supervised
from lightning_rnf.packages import LightningDataModule, LightningModule, Trainer, either, rank_zero_warn
from lightning_rnf.runtime import ALONE, Ranks, alone, arguments, borrowed, evaluating, joined, transferred
from lightning_rnf.search import Measured
from lightning_rnf.tasks import loaders
from lightning_rnf.tasks.runs import data_module, ranks_of

ReferenceSource = LightningDataModule | Iterable[Any] | Callable[[Trainer, LightningModule], Any] | None
"""Where reference data comes from: a data module's validation data; a loader; a function ``(trainer, module)`` that
returns one of them, for a source per task, and is called several times in a fit; or None: the fit's validation data."""


_EMPTY = "reference data is empty: give labelled samples of the task as reference, or a fit some validation data"


@dataclass(frozen=True)
class ReferenceData:
    """Batches on the device; accuracy is measured on all of them, relevance on the first ``attributed``.

    Of several ranks, each holds the share of whole batches that is its own: a batch is the same batch as in one
    process, and with it what batch norms see.

    Attributes:
        batches: in random order where the data could be indexed.
        attributed: number of leading batches for relevance.
        predict: how to get logits and labels of a batch.
        forward_context: entered around each forward of `accuracy`: the fit's precision.
        convert: applied to each batch before that forward, for the same reason.
        ranks: that have a share each.
    """

    batches: list[Any]
    attributed: int
    predict: Predict = supervised
    forward_context: Callable[[], AbstractContextManager[Any]] = nullcontext
    convert: Callable[[Any], Any] = lambda batch: batch
    ranks: Ranks = ALONE

    def laid_out(self, layout: Layout) -> ReferenceData:
        """The same data, whose targets are read as the task's first batch has shown them; see `Layout`."""
        predict = self.predict.predict if isinstance(self.predict, Flat) else self.predict
        return replace(self, predict=Flat(predict, layout))

    def place(self, index: int) -> int:
        """Where a batch of this rank, by its index here, stands among those of all ranks, as one process has them."""
        return index * self.ranks.size + self.ranks.rank

    @property
    def example(self) -> Any:
        """One batch, in the fit's precision. Of several ranks only rank 0 is sure to have one."""
        return self.convert(self.batches[0])

    @property
    def for_attribution(self) -> list[Any]:
        """The batches on which relevance is measured, in the fit's precision."""
        return [self.convert(batch) for batch in self.batches[: self.attributed]]

    def measure(
        self,
        module: nn.Module,
        metrics: Mapping[str, Metric] | None = None,
        *,
        finite: bool = True,
        lowest: float | None = None,
        expected: int | None = None,
    ) -> Measured:
        """Accuracy of ``module`` on all batches of all ranks, in [0, 1], and the metrics; see `measure`."""
        return measure(
            module,
            map(self.convert, self.batches),
            self.predict,
            self.forward_context,
            metrics,
            finite=finite,
            ranks=self.ranks,
            lowest=lowest,
            expected=expected,
        )

    def targets(self, module: nn.Module) -> int:
        """How many targets `predict` returns for all batches of all ranks; the module runs once on each."""

        def of_share() -> int:
            targets = 0
            with borrowed(module), evaluating(module), torch.no_grad():
                for batch in map(self.convert, self.batches):
                    with self.forward_context():
                        targets += len(predict_checked(self.predict, module, batch, finite=False)[1])
            return targets

        return sum(self.ranks.each(of_share))

    def run(self, module: nn.Module) -> None:
        """Run ``module`` on the inputs of the batches for attribution, but for much smaller ones and single samples.

        Each batch weighs the same in statistics that are estimated from them.
        """
        for batch in self.of_like_size.values():
            with torch.no_grad(), self.forward_context():
                self.predict(module, batch)

    def has_even_batches(self, least: int) -> bool:
        """Whether the batches for attribution have so many samples each, and none half as many as another one."""
        sizes = [loaders.rows_of(batch) or 0 for batch in self.batches[: self.attributed]]
        sizes = [size for of_rank in self.ranks.gather(sizes) for size in of_rank]
        return bool(sizes) and min(sizes) >= max(least, max(sizes) / 2)

    @property
    def of_like_size(self) -> dict[int, Any]:
        """The batches for attribution by their place, in the fit's precision, but for much smaller ones and samples."""
        batches = self.for_attribution
        sizes = [loaders.rows_of(batch) for batch in batches]
        largest = max((size for size in sizes if size is not None), default=0)
        enough = [size is None or (size > 1 and size >= largest / 2) for size in sizes]
        return {index: batch for index, batch in enumerate(batches) if enough[index]}


class Reference:
    """Draws reference data, for a fit or without one.

    Args:
        source: see `ReferenceSource`.
        samples: at most so many data are drawn, whatever `predict` makes of each; None: all.
        attribution_samples: at most so many of them are attributed; None: all.
        predict: how to get logits and labels of a batch; None: for batches ``(x, y)``.
        seed: of the drawing.

    Raises:
        TypeError, ValueError: if an option is out of its range.
    """

    def __init__(
        self,
        source: ReferenceSource = None,
        samples: int | None = 5000,
        attribution_samples: int | None = 1000,
        predict: Predict | None = None,
        seed: int = 0,
    ) -> None:
        self.source = source
        self.samples: int | None = arguments.at_least("reference_samples", samples, 1, or_none=True)
        self.attribution_samples = arguments.at_least("attribution_samples", attribution_samples, 1, or_none=True)
        self.predict = arguments.of_type("predict", predict, Callable, "a function (module, batch)") or supervised
        self.seed = arguments.of_type("seed", seed, int, "a whole number")

    def of(self, source: ReferenceSource) -> Reference:
        """The same of another source."""
        return self.to_fit(source, self.samples, self.attribution_samples)

    def to_fit(self, source: ReferenceSource, samples: int | None, leading: int | None) -> Reference:
        """Draws so many of another source, and so many of them first."""
        return Reference(source, samples, leading, self.predict, self.seed)

    def size(self, trainer: Trainer) -> tuple[int, int] | None:
        """How many data would be drawn, and how many of them are in an `example`; None: only drawing can tell.

        Where a loader does not say how many it puts into a batch, batches are what is counted.

        Raises:
            ValueError: if a data set that can be indexed is not the same in all processes.
        """
        ranks = ranks_of(trainer)
        with self._loader(trainer) as loader:
            if loaders.can_be_indexed(loader, ranks):
                length = loaders.length_of(loader.dataset, ranks)
                drawn = length if self.samples is None else min(length, self.samples)
                return drawn, min(length, loader.batch_size)
            return ranks.agreed(lambda: self._size_of_walk(loader))

    def _size_of_walk(self, loader: Any) -> tuple[int, int] | None:
        sampler: object = getattr(loader, "sampler", None)
        batch_size = getattr(loader, "batch_size", None)
        if not batch_size or not isinstance(sampler, Sized):
            try:
                return len(loader), 1
            except (TypeError, NotImplementedError):  # a stream
                return None
        there_are = len(sampler)
        walked = there_are if self.samples is None else math.ceil(self.samples / batch_size) * batch_size
        return min(there_are, walked), min(there_are, batch_size)

    def example(self, trainer: Trainer) -> Any:
        """One batch on the device, in the fit's precision; None in all ranks but the first.

        Raises:
            ValueError: if there is no reference data, or more than one loader.
        """
        ranks = ranks_of(trainer)

        def first(loader: Any) -> Any:
            for batch in loader if ranks.rank == 0 else ():
                return trainer.precision_plugin.convert_input(on_device(batch, trainer))
            if ranks.rank == 0:
                raise ValueError(_EMPTY)
            return None

        with self._loader(trainer) as loader, _validating(trainer):
            return ranks.agreed(lambda: first(loader))

    def draw(self, trainer: Trainer) -> ReferenceData:
        """Draw the task's reference data and put it on the device; of several ranks, this one's share.

        A plain DataLoader's dataset is indexed at random; other loaders are walked from their start, by every rank.

        Raises:
            ValueError: if there is no reference data, or more than one loader.
        """
        precision = trainer.precision_plugin
        with self._loader(trainer) as loader, _validating(trainer):
            return self._drawn(
                loader,
                trainer.lightning_module,
                ranks_of(trainer),
                lambda batch: on_device(batch, trainer),
                precision.forward_context,
                precision.convert_input,
            )

    def draw_alone(self, module: nn.Module) -> ReferenceData:
        """As `draw`, where no Trainer runs: in this process, on the module's device, in its own precision.

        A data module is prepared, set up for validation and torn down. Batches go through the transfer hooks of the
        data module, or of a LightningModule, which find a `NoTrainer` in the Trainer's place.

        Raises:
            TypeError: if the source is a function, which only a fit can call, or can be walked only once.
            ValueError: if there is no reference data, or more than one loader.
        """
        source = self.source
        if callable(source):
            raise TypeError(
                "reference is a function (trainer, module), and no Trainer is running: give what it returns"
            )
        with alone(module, source), evaluating(module):
            data = source.val_dataloader() if isinstance(source, either(LightningDataModule)) else source
            loader = loaders.single(data, "reference" if data is source else "reference.val_dataloader()")
            return self._drawn(loader, module, ALONE, lambda batch: transferred(batch, module, source))

    def _drawn(
        self,
        loader: Any,
        module: nn.Module,
        ranks: Ranks,
        to_device: Callable[[Any], Any],
        forward_context: Callable[[], AbstractContextManager[Any]] = nullcontext,
        convert: Callable[[Any], Any] = lambda batch: batch,
    ) -> ReferenceData:
        def targets(batch: Any) -> int:
            copy = apply_to_collection(batch, Tensor, Tensor.clone, allow_frozen=True)  # hooks may write into it
            return ReferenceData([to_device(copy)], 0, self.predict, forward_context, convert).targets(module)

        if loaders.can_be_indexed(loader, ranks):
            parts = self._random_parts(loader, ranks)
        else:
            parts = self._leading_parts(loader, ranks, loaders.weight_of(loader, targets))
        first, rest = ranks.agreed(lambda: [[to_device(batch) for batch in part] for part in parts])
        if not any(ranks.gather(len(first) + len(rest))):
            raise ValueError(_EMPTY)
        return ReferenceData(first + rest, len(first), self.predict, forward_context, convert, ranks)

    def _random_parts(self, loader: DataLoader[Any], ranks: Ranks) -> tuple[Iterable[Any], Iterable[Any]]:
        dataset: Any = loader.dataset
        length = loaders.length_of(dataset, ranks)
        drawn = torch.randperm(length, generator=torch.Generator().manual_seed(self.seed)).tolist()
        drawn = drawn[: self.samples]
        attributed = len(drawn) if self.attribution_samples is None else self.attribution_samples
        # The border falls between batches.
        first, rest = (loaders.chunks(part, loader.batch_size) for part in (drawn[:attributed], drawn[attributed:]))

        def batches(indices: list[list[int]]) -> Iterable[Any]:
            return DataLoader(
                dataset,
                batch_sampler=indices,
                num_workers=loader.num_workers,
                collate_fn=loader.collate_fn,
                worker_init_fn=loader.worker_init_fn,
            )

        return batches(ranks.share(first)), batches(ranks.share(rest, len(first)))

    def _leading_parts(
        self, loader: Iterable[Any], ranks: Ranks, weight: Callable[[Any], float]
    ) -> tuple[Iterable[Any], Iterable[Any]]:
        def walked(source: Iterable[Any], processes: int = 1) -> tuple[list[Any], int]:
            """The batches, and how many of them are attributed."""
            wanted = (self.samples, self.attribution_samples)
            samples, attributed = (None if one is None else math.ceil(one / processes) for one in wanted)
            batches = list(loaders.leading(source, samples, weight))
            return batches, len(list(loaders.leading(batches, attributed, weight)))

        if ranks.size > 1:  # samplers that draw should draw the same
            torch.set_rng_state(ranks.gather(torch.get_rng_state())[0])
        batches, attributed = ranks.agreed(lambda: walked(loader))
        if ranks.size == 1:
            return batches[:attributed], batches[attributed:]
        seen = ranks.each(lambda: [loaders.fingerprint(batch) for batch in batches])
        if all(other == seen[0] for other in seen):
            rank_zero_warn(
                f"reference data can't be indexed: each of {ranks.size} processes walks through all of it and keeps "
                f"every {ranks.size}-th batch"
            )
            first, rest = batches[:attributed], batches[attributed:]
            return ranks.share(first), ranks.share(rest, attributed)
        rank_zero_warn(
            f"reference data can't be indexed, and the {ranks.size} processes see different batches: each is taken to "
            "see a share of its own, and a sample that several see counts several times; give reference= a data set "
            "that can be indexed, or one that is the same in all processes"
        )
        batches, attributed = ranks.agreed(lambda: walked(batches, ranks.size))
        return batches[:attributed], batches[attributed:]

    @contextmanager
    def _loader(self, trainer: Trainer) -> Iterator[Any]:
        ranks = ranks_of(trainer)
        given = self.source
        source = ranks.agreed(lambda: given(trainer, trainer.lightning_module) if callable(given) else given)
        if source is None or source is data_module(trainer):
            yield ranks.agreed(lambda: loaders.single(loaders.validation_data(trainer), "the fit's validation data"))
        elif isinstance(source, either(LightningDataModule)):
            with set_up(source, trainer, "validate"):
                yield ranks.agreed(lambda: loaders.single(source.val_dataloader(), "reference.val_dataloader()"))
        else:
            yield ranks.agreed(lambda: loaders.single(source, "reference"))


def on_device(batch: Any, trainer: Trainer) -> Any:
    """The batch on the Trainer's device, through the transfer hooks that batches of its own loops go through."""
    return trainer.strategy.batch_to_device(trainer.lightning_module._on_before_batch_transfer(batch))


def gathered(batches: list[Any], ranks: Ranks) -> list[Any]:
    """The batches of all ranks, in the order of one process, on this rank's device."""
    if ranks.size == 1:
        return batches
    devices: list[torch.device] = []

    def to_cpu(tensor: Tensor) -> Tensor:
        devices.append(tensor.device)
        return tensor.cpu()

    shares = ranks.each(lambda: [apply_to_collection(batch, Tensor, to_cpu, allow_frozen=True) for batch in batches])
    device = devices[0] if devices else torch.device("cpu")  # only a rank without any batch knows none
    return [
        apply_to_collection(batch, Tensor, lambda one: one.to(device), allow_frozen=True) for batch in joined(shares)
    ]


@contextmanager
def set_up(data: LightningDataModule, trainer: Trainer, stage: str) -> Iterator[None]:
    """The life cycle that Lightning gives only to the Trainer's own data module."""
    ranks = ranks_of(trainer)
    before, data.trainer = data.trainer, trainer
    try:
        prepares = trainer.is_global_zero or (data.prepare_data_per_node and trainer.local_rank == 0)
        ranks.agreed(lambda: data.prepare_data() if prepares else None)  # nobody goes on before
        ranks.agreed(lambda: data.setup(stage))
        try:
            yield
        finally:
            data.teardown(stage)
    finally:
        data.trainer = before


@contextmanager
def _validating(trainer: Trainer) -> Iterator[None]:
    """Transfer hooks of the user's ask the Trainer, or the module, whether to augment."""
    stage = trainer.state.stage
    trainer.validating = True
    try:
        with evaluating(trainer.lightning_module):
            yield
    finally:
        trainer.state.stage = stage
