"""Other scores than relevance, to compare it with: each goes through the same ranking, search and freezing.

All are signed like relevance, or not negative: the larger, the more important.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_rnf.anatomy import Predict, UnitLayer, is_numbers, true_labels
from lightning_rnf.relevance.propagation import over_positions, propagate
from lightning_rnf.runtime import ALONE, Ranks, evaluating

ImportanceName = Literal["lrp", "gradient_x_activation", "taylor", "activation", "magnitude", "random"]
Importance = Callable[[nn.Module, Sequence[UnitLayer], Iterable[Any], Predict], dict[str, Tensor]]
"""``(module, layers, batches, predict) -> {layer name: one score per unit, (units,)}``."""


@dataclass(frozen=True)
class Summed:
    """An `Importance` that is a sum over samples, so that several ranks can each add up a share (``ranks=``).

    Attributes:
        start: of logits and target, both ``(rows, classes)`` or ``(rows,)`` for the target: the gradient at the logits.
        share: of a layer, its output and the gradient there: what its units are given, ``(units,)``.
    """

    start: Callable[[Tensor, Tensor], Tensor]
    share: Callable[[UnitLayer, Tensor, Tensor], Tensor]

    def __call__(
        self,
        module: nn.Module,
        layers: Sequence[UnitLayer],
        batches: Iterable[Any],
        predict: Predict,
        ranks: Ranks = ALONE,
    ) -> dict[str, Tensor]:
        """One score per unit, ``(units,)``, by layer."""
        return propagate(module, layers, batches, predict, self.start, self.share, ranks=ranks)


def _of_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross entropy's gradient at the logits; binary cross entropy's, summed, if a sample may have several labels.

    Of numbers that of half the squared error.
    """
    if is_numbers(target):
        return logits - target
    probabilities = logits.softmax(dim=1) if target.ndim == 1 else logits.sigmoid()
    return probabilities - true_labels(logits, target)


def _nothing(logits: Tensor, target: Tensor) -> Tensor:
    return torch.zeros_like(logits)


def _product(layer: UnitLayer, output: Tensor, gradient: Tensor) -> Tensor:
    return over_positions(layer, output * gradient).sum(dim=0)


def _change(layer: UnitLayer, output: Tensor, gradient: Tensor) -> Tensor:
    return over_positions(layer, output * gradient).abs().sum(dim=0)


def _said(layer: UnitLayer, output: Tensor, gradient: Tensor) -> Tensor:
    return over_positions(layer, output.clamp(min=0)).sum(dim=0)


gradient_x_activation = Summed(true_labels, _product)
"""Output times gradient of the true labels' logits, summed over positions and samples; signed."""

taylor = Summed(_of_loss, _change)
"""First-order change of the loss without the unit (Molchanov et al. 2017, equation 8): absolute for each sample.

The equation has the mean over positions: to a ranking within a layer that is the same.
"""

activation = Summed(_nothing, _said)
"""What units say: the positive part of their output, as a ReLU passes it on, summed over positions and samples."""


def magnitude(
    module: nn.Module, layers: Sequence[UnitLayer], batches: Iterable[Any], predict: Predict
) -> dict[str, Tensor]:
    """Sum of the absolute weights of each row or filter (Li et al. 2017); looks at no data.

    Of a recurrent layer's unit that is the sum over its rows in all gates, of what it reads and of what it hears.
    """
    with torch.no_grad(), evaluating(module):  # a parametrized weight is computed now
        weights: dict[UnitLayer, Any] = {
            layer: module.get_submodule(layer.name).weight for layer in layers if layer.is_open
        }
    found = {}
    for layer in layers:
        if layer in weights:
            weight = layer.by_unit(f"{layer.name}.weight", weights[layer].detach())
            found[layer.name] = weight.abs().flatten(1).sum(dim=1).cpu().double()
        else:
            found[layer.name] = _magnitude_of_blocks(module, layer)
    return found


def _magnitude_of_blocks(module: nn.Module, layer: UnitLayer) -> Tensor:
    found = torch.zeros(layer.units, dtype=torch.float64)
    for name in layer.parameters:
        weight = module.get_parameter(name).detach()
        if weight.ndim > 1:  # no bias
            owners = layer.spread(name, torch.arange(layer.units))
            found.index_add_(0, owners, weight.abs().sum(dim=1).cpu().double())
    return found


def random(
    module: nn.Module, layers: Sequence[UnitLayer], batches: Iterable[Any], predict: Predict, seed: int = 0
) -> dict[str, Tensor]:
    """Uniform in (0, 1]: what any score has to beat."""
    generator = torch.Generator().manual_seed(seed)
    return {layer.name: 1 - torch.rand(layer.units, generator=generator, dtype=torch.float64) for layer in layers}


def check_scores(scores: dict[str, Tensor], layers: Sequence[UnitLayer]) -> dict[str, Tensor]:
    """The scores in layer order, if there is one for each unit.

    Raises:
        ValueError: naming a layer that lacks them.
    """
    for layer in layers:
        found = scores.get(layer.name)
        if not isinstance(found, Tensor) or found.shape != (layer.units,):
            shape = tuple(found.shape) if isinstance(found, Tensor) else found
            raise ValueError(
                f"importance gave {shape} for layer {layer.name!r}, expected one score for each of {layer.units} units"
            )
    return {layer.name: scores[layer.name] for layer in layers}


IMPORTANCES: dict[str, Importance] = {
    "gradient_x_activation": gradient_x_activation,
    "taylor": taylor,
    "activation": activation,
    "magnitude": magnitude,
    "random": random,
}
