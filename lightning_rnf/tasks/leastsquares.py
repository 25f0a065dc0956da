"""A linear layer in closed form: ridge regression from sums over samples, the same however many processes add them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RIDGES = tuple(10 ** (exponent / 2) for exponent in range(-12, 3))
"""Ridges to choose from, as shares of the features' mean variance: from 1e-6 to 10, two a decade."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over samples of features, targets and their products: as large for a million samples as for one.

    Each sum is kept as two float64 numbers, the second what rounding took from the first: so the order in which shares
    of the samples are added makes no difference.

    Attributes:
        sums: float64 ``(features + outputs + 1, features + outputs + 1)``: products of all columns of features, targets
            and a column of ones.
        rests: the same shape.
        features: how many of the columns, the first, are features.
    """

    sums: Tensor
    rests: Tensor
    features: int

    @classmethod
    def of(cls, features: Tensor, targets: Tensor) -> Moments:
        """Of some samples.

        Args:
            features: ``(N, features)``.
            targets: ``(N, outputs)``, what the layer should say.
        """
        if features.device.type == "mps":  # it has no float64
            features = features.cpu()
        columns = [features.double(), targets.to(features.device).double()]
        every = torch.cat([*columns, features.new_ones(len(features), 1, dtype=torch.float64)], dim=1)
        sums = every.T @ every
        return cls(sums, torch.zeros_like(sums), features.shape[1])

    def cpu(self) -> Moments:
        """The same on the CPU."""
        return Moments(self.sums.cpu(), self.rests.cpu(), self.features)

    def __add__(self, other: Moments) -> Moments:
        sums = self.sums + other.sums
        part = sums - self.sums
        lost = (self.sums - (sums - part)) + (other.sums - part)  # Knuth's sum of two: exact
        rests = self.rests + other.rests + lost
        return Moments(sums + rests, rests - ((sums + rests) - sums), self.features)

    @property
    def samples(self) -> int:
        """How many they are."""
        return round(float(self.sums[-1, -1]))

    def solve(self, *, bias: bool = True) -> tuple[Tensor, Tensor]:
        """The layer whose outputs are nearest to the targets: weight ``(outputs, features)`` and bias ``(outputs,)``.

        The ridge is the one of `RIDGES` with the least generalised cross-validation, residual / (1 - degrees of freedom
        / samples)² (Golub, Heath and Wahba 1979), summed over outputs: no sample has to be held out for it. The bias is
        not shrunk. A feature that does not vary gets weight 0.

        Args:
            bias: if there is none, weights alone are fitted, and zeros come in its place.
        """
        count, split = float(self.sums[-1, -1]), self.features
        means = self.sums[-1, :-1] / count if bias else torch.zeros_like(self.sums[-1, :-1])
        products = self.sums[:-1, :-1] - count * torch.outer(means, means)
        of_features, mixed, of_targets = products[:split, :split], products[:split, split:], products[split:, split:]
        variances = of_features.diagonal()
        # What rounding leaves of a constant feature is no variance.
        varies = variances > 1e-12 * self.sums.diagonal()[:split]
        weight = torch.zeros(split, mixed.shape[1], dtype=torch.float64)
        if varies.any():
            values, vectors = torch.linalg.eigh(of_features[varies][:, varies])
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
