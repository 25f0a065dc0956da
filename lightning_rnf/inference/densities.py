"""Gaussians of classes: summed up in one pass, and what they say of a sample. Pure functions of tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor

from lightning_rnf.memory import LEVELS, Gaussians, Portrait

RIDGE = 1e-4
"""Of the mean variance, added to each: no covariance is singular; found on validation data."""

LARGEST_PRECISION = 1e11
"""Norm of what makes a class's points white: `RIDGE` allows 2e9 in 512 dimensions, and float32 has squares of this."""

CHUNK = 2**22
"""Floats that are made at once for a density."""


@dataclass(frozen=True, eq=False)
class Sums:
    """Of samples of each class and of their products, float64: as large for a million samples as for one.

    Attributes:
        counts: ``(classes,)``.
        sums: ``(classes, dimensions)``.
        products: ``(classes, dimensions, dimensions)``.
    """

    counts: Tensor
    sums: Tensor
    products: Tensor

    @classmethod
    def none(cls, classes: int, dimensions: int) -> Sums:
        """Of no sample."""
        shape = (classes, dimensions, dimensions)
        return cls(*(torch.zeros(shape[:ndim], dtype=torch.float64) for ndim in (1, 2, 3)))

    def with_samples(self, points: Tensor, target: Tensor) -> Sums:
        """With more samples: ``(N, dimensions)``, and the class ``(N,)`` of each.

        Those of a class below 0, of none, are left out, and so is a sample that a space has no place for: NaN.
        """
        points, target = points.detach().cpu().double(), target.cpu()
        has_place = ~points.isnan().any(1)
        points, target = points[has_place], target[has_place]
        counts, sums, products = self.counts.clone(), self.sums.clone(), self.products.clone()
        for label in target[target >= 0].unique().tolist():
            some = points[target == label]
            counts[label] += len(some)
            sums[label] += some.sum(0)
            products[label] += some.T @ some
        return Sums(counts, sums, products)

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.counts + other.counts, self.sums + other.sums, self.products + other.products)

    def gaussians(self) -> Gaussians:
        """Of the classes that have samples.

        Raises:
            ValueError: if none has any.
        """
        seen = self.counts > 0
        if not bool(seen.any()):
            raise ValueError("no sample is left of which its units' outputs are finite numbers")
        counts = self.counts[seen]
        means = self.sums[seen] / counts.unsqueeze(1)
        scatter = self.products[seen] / counts.view(-1, 1, 1) - means.unsqueeze(2) * means.unsqueeze(1)
        rows, columns = torch.tril_indices(means.shape[1], means.shape[1])
        return Gaussians(counts.long(), means.float(), scatter[:, rows, columns].float())


class Judge:
    """Log densities of all tasks' classes in one task's space.

    Each class has a covariance of its own, shrunk towards that of all classes in the space, the more the fewer samples
    it has: ``(1 - a) S + a P`` with ``a = d / (d + n)`` (regularised discriminant analysis, Friedman 1989).

    Args:
        of_tasks: by task, all in the same space.
    """

    def __init__(self, of_tasks: Mapping[str, Gaussians]) -> None:
        self.tasks = tuple(of_tasks)
        self._owners = torch.tensor([index for index, one in enumerate(of_tasks.values()) for _ in one.counts])
        counts = torch.cat([one.counts for one in of_tasks.values()]).double().view(-1, 1, 1)
        every = torch.cat([one.full() for one in of_tasks.values()])
        size = every.shape[1]
        together = (every * counts).sum(0) / counts.sum()
        share = size / (size + counts)
        shrunk = (1 - share) * every + share * together
        shrunk += RIDGE * together.diagonal().mean().clamp(min=1e-12) * torch.eye(size, dtype=torch.float64)
        factors, failed = torch.linalg.cholesky_ex(shrunk)
        eye = torch.eye(size, dtype=torch.float64).expand_as(factors)
        whiten = torch.linalg.solve_triangular(factors, eye, upper=False)
        if bool(failed.any()) or not bool((whiten.norm(dim=(1, 2)) <= LARGEST_PRECISION).all()):
            raise ValueError(
                f"what is remembered of the classes of {', '.join(map(repr, self.tasks))} are no covariances: the file "
                "or checkpoint that it came from is damaged"
            )
        # To float32 where samples are: what comes of them is compared, not summed over many.
        self._whiten = whiten.float()
        self._logdets = factors.diagonal(dim1=1, dim2=2).log().sum(1).float()
        means = torch.cat([one.means for one in of_tasks.values()])
        self._shifts = (self._whiten @ means.unsqueeze(2)).squeeze(2)

    def __call__(self, points: Tensor) -> Tensor:
        """For each sample ``(N, dimensions)`` the log densities of each task's classes, summed: ``(N, tasks)``.

        Constants that are the same for all are left out.
        """
        of_classes = self.of_classes(points)
        owners = self._owners.to(points.device)
        return torch.stack([of_classes[:, owners == task].logsumexp(1) for task in range(len(self.tasks))], dim=1)

    def of_classes(self, points: Tensor) -> Tensor:
        """Log densities of all classes: ``(N, classes)``; NaN: of a sample that the space has no place for."""
        whiten, shifts, logdets = (one.to(points.device) for one in (self._whiten, self._shifts, self._logdets))
        found = []
        with torch.autocast(points.device.type, enabled=False):  # in bfloat16 they would be nothing like the task's own
            for some in points.float().split(max(CHUNK // shifts.numel(), 1)):
                distances = (torch.einsum("cij,nj->nci", whiten, some) - shifts).square().sum(2)
                found.append(-0.5 * distances - logdets)
        return torch.cat(found)


def quantiles(values: Tensor) -> Tensor:
    """From the least to the largest: float32 ``(LEVELS,)``."""
    return values.float().cpu().quantile(torch.linspace(0, 1, LEVELS))


def posterior(portraits: Mapping[str, Portrait], densities: Sequence[Tensor]) -> Tensor:
    """How likely each sample is of each task: log probabilities ``(N, tasks)``.

    In the space of the first task's sub-network all tasks have densities, in that of the second all but the first, and
    so on: each task's data were sent through the sub-networks that there were. So it is asked space by space whether a
    sample is of the task whose space it is, or of a later one, and the answers are multiplied. All tasks are as likely
    beforehand, and stay so in a space that has no place for the sample.

    Args:
        portraits: by task, in the order of their ends.
        densities: for each task's space ``(N, tasks from there on)``, as `Judge` gives them, NaN without a place.
    """
    tasks = list(portraits)
    found, rest = [], torch.zeros_like(densities[0][:, 0])
    for index in range(len(tasks)):
        here = densities[index]
        shares = here.masked_fill(here.isnan(), 0).log_softmax(1)
        found.append(rest + shares[:, 0])
        if index + 1 < len(tasks):
            rest = rest + shares[:, 1:].logsumexp(1)
    return torch.stack(found, dim=1)


_Judges = tuple[tuple[Judge, Judge], ...]

_made: WeakKeyDictionary[Portrait, tuple[list[ReferenceType[Portrait]], _Judges]] = WeakKeyDictionary()
"""The latest judges, by the first task's portrait: with it they go, and with later tasks others take their place."""


def judges(portraits: tuple[tuple[str, Portrait], ...]) -> _Judges:
    """Two for each task's space: of that task and all later ones, and of that task alone, as it was at its end.

    Beside others' classes each is shrunk towards something else. They are made once for the same portraits.
    """
    own = [portrait for _, portrait in portraits]
    known, made = _made.get(own[0], ([], ()))
    if len(known) != len(own) or any(one() is not portrait for one, portrait in zip(known, own, strict=True)):
        made = tuple(
            (
                Judge({task: portrait.classes[space] for task, portrait in portraits[index:]}),
                Judge({space: of_space.classes[space]}),
            )
            for index, (space, of_space) in enumerate(portraits)
        )
        _made[own[0]] = [ref(portrait) for portrait in own], made
    return made


def levels(usual: Iterable[Tensor], chosen: Tensor, densities: Tensor) -> Tensor:
    """How usual each sample is for its task: the share of that task's reference data that is less so, ``(N,)``.

    Args:
        usual: `Portrait.usual` of each task.
        chosen: int64 ``(N,)``: which task.
        densities: ``(N, tasks)``: the largest log density of that task's classes, in its own space. NaN: there is no
            place for the sample, which no data are less usual than.
    """
    found = torch.zeros(len(chosen))
    for task, of_task in enumerate(usual):
        here = (chosen == task).cpu()
        own = densities[:, task].float().cpu()[here].contiguous()
        own = own.masked_fill(own.isnan(), -torch.inf)  # NaN is sorted behind all numbers
        found[here] = torch.searchsorted(of_task, own).float() / len(of_task)
    return found
