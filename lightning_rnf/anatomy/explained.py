"""How well numbers are predicted: the share of their variance that is explained, from sums over rows."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Explained:
    """Sums over rows of numbers, by column: as large for a million rows as for one.

    Attributes:
        rows: how many.
        mean: float64 ``(columns,)``: of the targets.
        spread: float64 ``(columns,)``: the sum of their squared distances to it.
        missed: float64 ``(columns,)``: the sum of the squared errors.
    """

    rows: int
    mean: Tensor
    spread: Tensor
    missed: Tensor

    @classmethod
    def of(cls, output: Tensor, target: Tensor) -> Explained:
        """Of some rows, both ``(rows, columns)``; what is not finite is as wrong as can be."""
        output, target = output.detach().cpu().double(), target.detach().cpu().double()
        mean = target.mean(dim=0) if len(target) else target.new_zeros(target.shape[1])
        missed = (output - target).square().nan_to_num(nan=float("inf"), posinf=float("inf")).sum(dim=0)
        return cls(len(target), mean, (target - mean).square().sum(dim=0), missed)

    def __add__(self, other: Explained) -> Explained:
        """Of both (Chan, Golub and LeVeque 1983): without the squares of large means, which would swallow the rest."""
        rows = self.rows + other.rows
        apart, share = other.mean - self.mean, other.rows / max(rows, 1)
        spread = self.spread + other.spread + apart.square() * self.rows * share
        return Explained(rows, self.mean + apart * share, spread, self.missed + other.missed)

    @property
    def share(self) -> float:
        """R² in [0, 1]: 1 less the squared errors' share of the targets' spread, at least 0, mean over columns.

        Columns that do not vary tell nothing and are left out; if none varies it is 0.
        """
        varies = self.spread > 1e-12 * (self.rows * self.mean.square()).clamp(min=1e-300)
        if not bool(varies.any()):
            return 0.0
        return float((1 - self.missed[varies] / self.spread[varies]).clamp(min=0).mean())
