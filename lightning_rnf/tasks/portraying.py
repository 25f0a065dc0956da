"""What a task's data look like to its sub-network and to those of earlier tasks: measured at its end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial, reduce
from operator import add
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rnf.anatomy import Inputs, UnitLayer, Wider
from lightning_rnf.inference import Judge, Sums, quantiles, readable_layers, reading, space_of
from lightning_rnf.memory import Gaussians, Portrait, Space, TaskRecord, record_before
from lightning_rnf.packages import rank_zero_warn
from lightning_rnf.recall import subnetwork
from lightning_rnf.runtime import Ranks, borrowed
from lightning_rnf.tasks.loaders import rows_of
from lightning_rnf.tasks.reference import ReferenceData

SAMPLES = 2000
"""Of a task's data, at most so many are looked at."""

BATCHES = 16
"""They come of so many batches at least, if there are as many: of sorted data one batch would show one class."""

FOLDS = 5
"""Of a task's data, where no others are held out."""

NO_CLASS = -1
"""Of samples of a batch in which some have no label: they are left out. If there are no others, all are one class."""


def portrayed(
    module: nn.Module,
    layers: Sequence[UnitLayer],
    widenings: Sequence[Wider],
    record: TaskRecord,
    earlier: Iterable[TaskRecord],
    data: ReferenceData,
    reference: ReferenceData,
    *,
    masked: bool,
) -> Portrait | None:
    """A task's portrait; None, with a warning, where its sub-network can't be read.

    Args:
        module: the model at the task's end, the task's head active.
        layers: its unit layers.
        widenings: of the model.
        record: of the task.
        earlier: finished tasks; those without a portrait are left out.
        data: of the task, what its head was fitted on: its classes are described by them.
        reference: data of the task: how usual a sample is goes by those of its batches that are not in ``data``, or,
            where there are none, by each part of ``data`` beside the others.
        masked: as for `subnetwork.recall`.
    """
    work = _Portraying(module, layers, widenings, masked=masked)
    try:
        with borrowed(module), torch.no_grad():
            return work.of(record, list(earlier), data, reference)
    except Exception as error:  # no task is lost for it
        said = " ".join(str(error).split())
        rank_zero_warn(
            f"{record.name}: its data can't be told from those of other tasks later ({type(error).__name__}: "
            f"{said:.200}); the task is kept all the same, without a portrait"
        )
        return None


class _Portraying:
    def __init__(
        self, module: nn.Module, layers: Sequence[UnitLayer], widenings: Sequence[Wider], *, masked: bool
    ) -> None:
        self.module, self.layers, self.widenings, self.masked = module, layers, widenings, masked

    def of(
        self, record: TaskRecord, earlier: Sequence[TaskRecord], data: ReferenceData, reference: ReferenceData
    ) -> Portrait:
        ranks, by_name = data.ranks, {layer.name: layer for layer in self.layers}
        read = readable_layers(self.layers, record.relevant)
        if not read:
            raise ValueError("no layer of plain units has any that is relevant")
        sizes = [int(record.relevant[layer.name].sum()) for layer in read]
        places = {id(batch): index for index, batch in enumerate(reference.batches)}  # the data may be every other one
        drawn = self._drawn(record, read, data, places)
        described = {id(batch) for batch in data.batches}
        others = replace(reference, batches=[batch for batch in reference.batches if id(batch) not in described])
        held_out = self._drawn(record, read, others, places)
        features = [one.features for one in drawn]
        every = torch.cat(features).double() if features else torch.zeros(0, sum(sizes)).double()
        shares = ranks.gather((len(every), every.sum(0).cpu(), every.square().sum(0).cpu()))
        count, sums, squares = (reduce(add, one) for one in zip(*shares, strict=True))
        if not bool(squares.isfinite().all()):
            raise ValueError("its units' outputs are no finite numbers for some of its data")
        space = space_of(read, sizes, int(count), sums, squares)
        labels, classes = _numbered([one.labels for one in drawn], ranks)
        in_spaces: dict[str, Gaussians] = {}
        for other in earlier:
            if other.portrait is not None:
                known = other.portrait.space
                there = [by_name[name] for name in known.layers]
                seen = ranks.agreed(lambda: [self._read(other, there, one, data) for one in drawn])  # noqa: B023 - now
                in_spaces[other.name] = _gaussians(known, seen, labels, classes, ranks)
        in_spaces[record.name] = _gaussians(space, features, labels, classes, ranks)
        if any(ranks.gather(len(held_out))):
            own = ranks.agreed(lambda: _largest(in_spaces[record.name], space, [one.features for one in held_out]))
        else:
            folds = [one.order % FOLDS for one in drawn]
            own = _largest_by_folds(space, features, labels, classes, folds, ranks)
        usual = [one for share in ranks.gather(own) for one in share]
        return Portrait(space, in_spaces, quantiles(torch.cat(usual)))

    def _drawn(
        self, record: TaskRecord, read: Sequence[UnitLayer], data: ReferenceData, places: Mapping[int, int]
    ) -> list[_Batch]:
        """Samples from all over the data; ``places`` among this rank's reference batches, by identity, are kept."""
        ranks = data.ranks
        batches = {data.place(places.get(id(batch), index)): batch for index, batch in enumerate(data.batches)}
        wanted = _some(batches, ranks)
        return _spread(ranks.agreed(lambda: self._own_pass(record, read, data, wanted)), ranks)

    def _own_pass(
        self, record: TaskRecord, read: Sequence[UnitLayer], data: ReferenceData, batches: Mapping[int, Any]
    ) -> list[_Batch]:
        """All samples of some batches, by place."""
        found: list[_Batch] = []

        def note(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append(Inputs(args, kwargs))

        for place, given in batches.items():
            batch, calls = data.convert(given), list[Inputs]()
            with self._recalled(record) as relevant, reading(self.module, read, relevant, record.head) as seen:
                # Before the user's own, which change it when the model is called with it once more.
                handle = self.module.register_forward_pre_hook(note, prepend=True, with_kwargs=True)
                with handle, data.forward_context():
                    target = data.predict(self.module, batch)[1]
            if len(calls) != 1:
                raise ValueError(f"predict calls the model's forward {len(calls)} times for a batch, expected once")
            samples = calls[0].samples
            every = torch.arange(samples)
            found.append(_Batch(place, calls[0], every, every, _labels(target, samples), seen.features(samples)))
        return found

    def _read(self, record: TaskRecord, layers: Sequence[UnitLayer], batch: _Batch, data: ReferenceData) -> Tensor:
        inputs, read = batch.inputs, partial(reading, self.module, layers, head=record.head)
        with self._recalled(record) as relevant, read(relevant=relevant) as seen, data.forward_context():
            self.module(*inputs.args, **inputs.kwargs)
        features = seen.features(inputs.samples)
        return features[batch.rows.to(features.device)]

    @contextmanager
    def _recalled(self, record: TaskRecord) -> Iterator[Mapping[str, Tensor]]:
        """The recall of a task; its relevant units, in the shape that the model has in it."""
        with subnetwork.recall(self.module, self.layers, record, self.widenings, masked=self.masked):
            yield record_before(record, self.widenings[record.widenings :]).relevant


@dataclass(frozen=True, eq=False)
class _Batch:
    """Some samples of one batch.

    Attributes:
        place: of the batch, in the order of one process.
        inputs: what the model is called with: of the whole batch, since not all that can be run can be cut (graphs).
        rows: int64 ``(N,)``: which samples.
        order: int64 ``(N,)``: their places among those of all batches of all ranks.
        labels: int64 ``(N,)``.
        features: ``(N, features)``.
    """

    place: int
    inputs: Inputs
    rows: Tensor
    order: Tensor
    labels: Tensor
    features: Tensor


def _some(batches: Mapping[int, Any], ranks: Ranks) -> dict[int, Any]:
    """As many batches of those of all ranks as `SAMPLES` need, from all over them: the same for any number of ranks.

    Args:
        batches: of this rank, by place in one process.
        ranks: all.
    """
    sizes = {place: rows_of(batch) or 1 for place, batch in batches.items()}
    every = sorted(one for share in ranks.gather(sizes) for one in share.items())
    total = sum(size for _, size in every)
    parts = max(-(-SAMPLES * len(every) // max(total, 1)), BATCHES)
    wanted = {every[index][0] for index in _one_of_each(len(every), min(parts, len(every))).tolist()}
    return {place: batch for place, batch in batches.items() if place in wanted}


def _one_of_each(total: int, parts: int) -> Tensor:
    """Of each of so many equal parts of 0 … total - 1 a number at random: int64 ``(parts,)``, ascending.

    Every n-th would see one of two classes that take turns.
    """
    borders = torch.arange(parts + 1) * total // max(parts, 1)
    shares = torch.rand(parts, generator=torch.Generator().manual_seed(total), dtype=torch.float64)
    return borders[:-1] + (shares * borders.diff()).long()


def _spread(batches: Sequence[_Batch], ranks: Ranks) -> list[_Batch]:
    """`SAMPLES` of those of all ranks, however many ranks there are: data may be sorted, by class or anything else."""
    sizes = dict(one for share in ranks.gather([(one.place, len(one.rows)) for one in batches]) for one in share)
    begins, total = dict[int, int](), 0
    for place in sorted(sizes):
        begins[place], total = total, total + sizes[place]
    picks = _one_of_each(total, min(SAMPLES, total))
    found: list[_Batch] = []
    for one in batches:
        begin = begins[one.place]
        first, end = torch.searchsorted(picks, torch.tensor([begin, begin + len(one.rows)])).tolist()
        if first < end:
            rows = picks[first:end] - begin
            features = one.features[rows.to(one.features.device)]
            order = torch.arange(first, end)
            found.append(replace(one, rows=one.rows[rows], order=order, labels=one.labels[rows], features=features))
    return found


def _labels(target: Any, samples: int) -> Tensor:
    """The class of each sample, int64 ``(N,)``; `NO_CLASS` where targets are no classes of samples."""
    if isinstance(target, Tensor) and target.shape == (samples,) and not target.is_floating_point():
        return target.cpu().long()
    return torch.full((samples,), NO_CLASS)


def _numbered(labels: Sequence[Tensor], ranks: Ranks) -> tuple[list[Tensor], int]:
    """Labels by their places among those that the samples of all ranks have, and how many these are.

    A task may have two of 22,000 classes, and each takes as much memory as all its samples.
    """
    own = {label for one in labels for label in one.unique().tolist() if label >= 0}
    known = torch.tensor(sorted(set[int]().union(*ranks.gather(own))))
    if not len(known):
        return [torch.zeros_like(one) for one in labels], 1
    return [torch.where(one < 0, NO_CLASS, torch.searchsorted(known, one)) for one in labels], len(known)


def _gaussians(
    space: Space, features: Sequence[Tensor], labels: Sequence[Tensor], classes: int, ranks: Ranks
) -> Gaussians:
    """Of the classes of all ranks' samples in a space."""
    sums = Sums.none(classes, space.dimensions)
    if features:  # at once: what is summed may be larger than all samples
        sums = sums.with_samples(torch.cat([space(some) for some in features]), torch.cat(list(labels)))
    return reduce(add, ranks.gather(sums)).gaussians()


def _largest(gaussians: Gaussians, space: Space, features: Sequence[Tensor]) -> list[Tensor]:
    """For each sample the largest log density of a class, in a task's own space: ``(N,)`` of each batch."""
    judge = Judge({"": gaussians})
    return [judge.of_classes(space(one)).amax(1).cpu() for one in features]


def _largest_by_folds(
    space: Space,
    features: Sequence[Tensor],
    labels: Sequence[Tensor],
    classes: int,
    folds: Sequence[Tensor],
    ranks: Ranks,
) -> list[Tensor]:
    """The same, where there are no other samples than those that the classes are described by.

    These are more usual than others of the task: so each is compared with what is left without its fold.
    """
    found: list[Tensor] = []
    for fold in range(FOLDS):
        chosen = [one == fold for one in folds]
        of_others = [one[~some] for one, some in zip(labels, chosen, strict=True)]
        others, inside = (
            [one[(some == is_in).to(one.device)] for one, some in zip(features, chosen, strict=True)]
            for is_in in (False, True)
        )
        gaussians = _gaussians(space, others, of_others, classes, ranks)
        found += ranks.agreed(lambda: _largest(gaussians, space, inside))  # noqa: B023 - called now
    return found
