"""A linear layer in closed form: ridge regression from sums over samples that no order of adding changes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RIDGES = tuple(10 ** (exponent / 2) for exponent in range(-12, 3))
"""Ridges to choose from, as shares of the features' mean variance: from 1e-6 to 10, two a decade."""


BITS = 15
"""Features are rounded to so many bits behind the point: products of them, and sums of up to 2^17, are exact then."""


def scales(largest: Tensor) -> Tensor:
    """Powers of two, float64 ``(features,)``, by which features come to at most 1, of the largest that was seen."""
    return torch.where(largest > 0, torch.exp2(torch.ceil(torch.log2(largest.clamp(min=1e-300)))), 1.0)


def rounded(values: Tensor, scale: Tensor) -> Tensor:
    """As shares of a scale ``(columns,)``, float64, rounded to `BITS` and cut off at 8."""
    shares = (values.cpu() if values.device.type == "mps" else values).double()  # it has no float64
    shares = (shares / scale.to(shares.device)).nan_to_num().clamp(-8, 8)
    return torch.round(shares * 2**BITS).div(2**BITS)


GOLDEN = 0.6180339887498949
"""Places in one batch are shifted against those in the one before by this share of their distance."""


def spread(every: int, most: int, turn: int) -> Tensor:
    """At most so many places out of ``range(every)``, evenly far apart, in order: int64, other ones in each turn."""
    some = min(every, most)
    shifted = torch.arange(some, dtype=torch.float64) + (turn * GOLDEN) % 1.0
    return (shifted / max(some, 1) * every).long().clamp(max=every - 1)


LIGHT, HEAVY = 2.0**-4, 2.0**4
"""What a sample may weigh at least and at most, so that sums stay exact."""


def weights(counts: Tensor) -> Tensor:
    """What a sample of each class weighs, so that classes weigh the same: powers of two, 1 on average, for exact sums.

    Args:
        counts: samples ``(classes,)``; of a class without any the weight is 1.
    """
    shares = counts.double() * int((counts > 0).sum()) / counts.sum()
    return torch.where(counts > 0, torch.exp2(torch.round(-torch.log2(shares.clamp(1e-9)))), 1.0).clamp(LIGHT, HEAVY)


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over samples of features, targets and their products: as large for a million samples as for one.

    What is added are rounded features, so that float64 holds every sum exactly: in whatever order and shares samples
    are added, it is the same.

    Attributes:
        sums: float64 ``(features + outputs + 1, features + outputs + 1)``: products of all columns of features, as
            shares of their scale, targets and a column of ones.
        scale: float64 ``(features,)``: of each feature, as `scales` gives it.
    """

    sums: Tensor
    scale: Tensor

    @classmethod
    def of(cls, features: Tensor, targets: Tensor, scale: Tensor, weight: Tensor | None = None) -> Moments:
        """Of some samples.

        Args:
            features: ``(N, features)``; beyond 8 times their scale they are cut off.
            targets: ``(N, outputs)``, what the layer should say: whole numbers, or `rounded`.
            scale: ``(features,)``.
            weight: ``(N,)``, of each sample, as `weights` has it for its class; None: 1.
        """
        shares = rounded(features, scale)
        ones = shares.new_ones(len(shares), 1)
        every = torch.cat([shares, targets.to(shares), ones], dim=1)
        weighed = every if weight is None else every * weight.to(every).unsqueeze(1)
        return cls(every.T @ weighed, scale.cpu())

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.sums + other.sums, self.scale)

    def cpu(self) -> Moments:
        """The same on the CPU."""
        return Moments(self.sums.cpu(), self.scale)

    @property
    def samples(self) -> int:
        """How many they are, or what they weigh together."""
        return round(float(self.sums[-1, -1]))

    def solve(self, *, bias: bool = True) -> tuple[Tensor, Tensor]:
        """The layer whose outputs are nearest to the targets: weight ``(outputs, features)`` and bias ``(outputs,)``.

        The ridge is the one of `RIDGES` with the least generalised cross-validation, residual / (1 - degrees of freedom
        / samples)² (Golub, Heath and Wahba 1979), summed over outputs: no sample has to be held out for it. The bias is
        not shrunk. A feature that does not vary gets weight 0.

        Args:
            bias: if there is none, weights alone are fitted, and zeros come in its place.
        """
        count, split = float(self.sums[-1, -1]), len(self.scale)
        sums, means, products = self._products(bias)
        of_features, mixed, of_targets = products[:split, :split], products[:split, split:], products[split:, split:]
        variances = of_features.diagonal()
        # What rounding leaves of a constant feature is no variance.
        varies = variances > 1e-12 * sums.diagonal()[:split]
        weight = torch.zeros(split, mixed.shape[1], dtype=torch.float64)
        if varies.any():
            values, vectors = _eigh(of_features[varies][:, varies])
            values, turned = values.clamp(min=0), vectors.T @ mixed[varies]
            scale, total = variances[varies].mean(), of_targets.diagonal().sum()
            tried = []
            for share in RIDGES:
                shrunk = turned / (values + share * scale).unsqueeze(1)
                residual = total - (shrunk * (2 * turned - values.unsqueeze(1) * shrunk)).sum()
                freedom = count - bias - float((values / (values + share * scale)).sum())
                tried.append((float(residual) / max(freedom, 1e-9 * count) ** 2, shrunk))
            weight[varies] = vectors @ min(tried, key=lambda one: one[0])[1]
        return weight.T.contiguous(), means[split:] - weight.T @ means[:split]

    def drawn(self, ridge: float, *, bias: bool = True) -> tuple[Tensor, Tensor]:
        """As `solve`, with this ridge, a share of the features' mean variance, whatever it costs or brings."""
        split = len(self.scale)
        _, means, products = self._products(bias)
        of_features, mixed = products[:split, :split], products[:split, split:]
        weight = torch.zeros(split, mixed.shape[1], dtype=torch.float64)
        shrinking = ridge * of_features.diagonal().mean() if split else 0.0
        if shrinking > 0:
            weight = torch.linalg.solve(of_features + shrinking * torch.eye(split, dtype=torch.float64), mixed)
        return weight.T.contiguous(), means[split:] - weight.T @ means[:split]

    def _products(self, bias: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Sums in the features' own size, means, and sums of products of what differs from them."""
        back = torch.cat([self.scale, self.scale.new_ones(len(self.sums) - len(self.scale))])
        sums = self.sums * torch.outer(back, back)  # by powers of two: exact
        count = float(sums[-1, -1])
        means = sums[-1, :-1] / count if bias else torch.zeros_like(sums[-1, :-1])
        return sums, means, sums[:-1, :-1] - count * torch.outer(means, means)


@dataclass(frozen=True, eq=False)
class Sizes:
    """How large features and targets come, in all shares together: it does not matter who has seen what.

    Attributes:
        largest: float64 ``(features,)``: sizes.
        counts: float64 ``(outputs,)``: samples of each class.
        low: float64 ``(outputs,)``: the least of the targets.
        high: float64 ``(outputs,)``: the largest.
        of_numbers: whether targets are numbers and no labels.
    """

    largest: Tensor
    counts: Tensor
    low: Tensor
    high: Tensor
    of_numbers: bool

    @classmethod
    def of(cls, features: Tensor, wanted: Tensor, *, of_numbers: bool = False) -> Sizes:
        """Of a share, ``(rows, features)`` and ``(rows, outputs)``."""
        wanted = wanted.cpu().double()
        if not len(wanted):  # predict has dropped all that this share has
            none = wanted.new_zeros(features.shape[1]), wanted.new_zeros(wanted.shape[1])
            return cls(*none, none[1] + torch.inf, none[1] - torch.inf, of_numbers=of_numbers)
        largest = features.nan_to_num().abs().amax(dim=0).double().cpu()
        return cls(largest, wanted.clamp(min=0).sum(dim=0), wanted.amin(dim=0), wanted.amax(dim=0), of_numbers)

    def __add__(self, other: Sizes) -> Sizes:
        return Sizes(
            torch.maximum(self.largest, other.largest),
            self.counts + other.counts,
            torch.minimum(self.low, other.low),
            torch.maximum(self.high, other.high),
            self.of_numbers or other.of_numbers,
        )

    def of_targets(self, *, around_zero: bool) -> tuple[Tensor, Tensor]:
        """What numbers lie around, and how far at most, rounded up to powers of two."""
        middle = torch.zeros_like(self.low) if around_zero else (self.low + self.high) / 2
        return middle, scales(torch.maximum(self.high - middle, middle - self.low))


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors; of what does not converge, after a little is added to the diagonal."""
    for little in (0.0, 1e-12, 1e-9):
        shifted = matrix + little * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=matrix.dtype)
        try:
            values, vectors = torch.linalg.eigh(shifted)
        except RuntimeError:  # torch's LinAlgError is one
            continue
        return values, vectors
    raise RuntimeError("the features in front of the head are too much alike to be solved for")
