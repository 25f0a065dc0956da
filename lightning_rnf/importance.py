"""Other scores than relevance, to compare it with: each goes through the same ranking, search and freezing.

All are signed like relevance, or not negative: the larger, the more important.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_rnf.attribution import over_positions, propagate
from lightning_rnf.evaluation import Predict, true_labels
from lightning_rnf.ranks import ALONE, Ranks
from lightning_rnf.units import UnitLayer

ImportanceName = Literal["lrp", "gradient_x_activation", "taylor", "activation", "magnitude", "random"]
Importance = Callable[[nn.Module, Sequence[UnitLayer], Iterable[Any], Predict], dict[str, Tensor]]
"""``(module, layers, batches, predict) -> {layer name: one score per unit, (units,)}``."""


def gradient_x_activation(
    module: nn.Module,
    layers: Sequence[UnitLayer],
    batches: Iterable[Any],
    predict: Predict,
    ranks: Ranks = ALONE,
) -> dict[str, Tensor]:
    """Output times gradient of the true labels' logits, summed over positions and samples; signed."""

    def contribution(layer: UnitLayer, output: Tensor, gradient: Tensor) -> Tensor:
        return over_positions(layer, output * gradient).sum(dim=0)

    return propagate(module, layers, batches, predict, true_labels, contribution, ranks=ranks)


def taylor(
    module: nn.Module,
    layers: Sequence[UnitLayer],
    batches: Iterable[Any],
    predict: Predict,
    ranks: Ranks = ALONE,
) -> dict[str, Tensor]:
    """First-order change of the loss without the unit (Molchanov et al. 2017, equation 8): absolute for each sample.

    The loss is cross entropy; binary cross entropy, summed, where a sample may have several labels. The equation has
    the mean over positions: to a ranking within a layer that is the same.
    """

    def of_loss(logits: Tensor, target: Tensor) -> Tensor:
        probabilities = logits.softmax(dim=1) if target.ndim == 1 else logits.sigmoid()
        return probabilities - true_labels(logits, target)

    def change(layer: UnitLayer, output: Tensor, gradient: Tensor) -> Tensor:
        return over_positions(layer, output * gradient).abs().sum(dim=0)

    return propagate(module, layers, batches, predict, of_loss, change, ranks=ranks)


def activation(
    module: nn.Module,
    layers: Sequence[UnitLayer],
    batches: Iterable[Any],
    predict: Predict,
    ranks: Ranks = ALONE,
) -> dict[str, Tensor]:
    """What units say: the positive part of their output, as a ReLU passes it on, summed over positions and samples."""

    def nothing(logits: Tensor, target: Tensor) -> Tensor:
        return torch.zeros_like(logits)

    def said(layer: UnitLayer, output: Tensor, gradient: Tensor) -> Tensor:
        return over_positions(layer, output.clamp(min=0)).sum(dim=0)

    return propagate(module, layers, batches, predict, nothing, said, ranks=ranks)


def magnitude(
    module: nn.Module, layers: Sequence[UnitLayer], batches: Iterable[Any], predict: Predict
) -> dict[str, Tensor]:
    """Sum of the absolute weights of each row or filter (Li et al. 2017); looks at no data."""
    weights = {layer: (name := f"{layer.name}.weight", module.get_parameter(name).detach()) for layer in layers}
    return {
        layer.name: layer.by_unit(name, weight).abs().flatten(1).sum(dim=1).cpu().double()
        for layer, (name, weight) in weights.items()
    }


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


SUMMED: dict[str, Callable[..., dict[str, Tensor]]] = {
    "gradient_x_activation": gradient_x_activation,
    "taylor": taylor,
    "activation": activation,
}
"""Those that are sums over samples, so that several ranks can each add up a share (``ranks=``)."""

IMPORTANCES: dict[str, Importance] = {**SUMMED, "magnitude": magnitude, "random": random}
