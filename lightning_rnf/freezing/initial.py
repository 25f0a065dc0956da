"""What units start from, and free ones go back to: a new task learns better from there than from leftovers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lightning_rnf.anatomy import UnitLayer
from lightning_rnf.freezing.freezer import elasticities
from lightning_rnf.memory import FreezeState


def remember(state: FreezeState, module: nn.Module, layers: Iterable[UnitLayer]) -> None:
    """Keep copies on the CPU of every unit's parameters and its norm's channel as they are now."""
    own = _tensors(module)
    names = {name for layer in layers for name in (*layer.parameters, *_statistics(layer, own))}
    state.initial = {name: own[name].detach().to("cpu", copy=True) for name in sorted(names)}


@torch.no_grad()
def reset_free(
    state: FreezeState,
    module: nn.Module,
    connections: Mapping[str, Tensor] | None = None,
    *,
    is_last: bool = True,
) -> None:
    """Give units that are relevant to no task the values that were remembered, once after each task.

    Args:
        state: the finished tasks.
        module: the model.
        connections: as for `elasticities`: what is free in the rows of relevant units is reset, too.
        is_last: whether nothing more will be reset before this task.

    Raises:
        ValueError: if none were.
    """
    if state.resets == len(state.tasks):
        return
    if not state.initial:
        raise ValueError(
            "free units can't be reset: the finished tasks were trained without reset_free, or loaded from a file of "
            "masks, so what units started from is not known; leave reset_free out"
        )
    own = _tensors(module)
    free_rows = {name: factor == 1 for name, factor in elasticities(state, 0.0, 1.0, None, connections).items()}
    frozen = state.frozen()
    for layer in state.layers:
        free_rows.update(dict.fromkeys(_statistics(layer, own), ~frozen[layer.name]))
    for name, value in state.initial.items():
        if name not in free_rows:  # of an expert that the first batch ran and no sub-network has: it is nobody's
            continue
        chosen = free_rows[name].to(own[name].device)
        own[name][chosen] = value.to(own[name])[chosen]
    if is_last:
        state.resets = len(state.tasks)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters(remove_duplicate=False)}
    return {**parameters, **dict(module.named_buffers(remove_duplicate=False))}


def _statistics(layer: UnitLayer, own: Mapping[str, Tensor]) -> list[str]:
    """Names of a layer's norm's running statistics, and of its scale and shift, if they are not the layer's."""
    names = [f"{layer.norm}.{key}" for key in ("running_mean", "running_var", "weight", "bias")]
    return [name for name in names if name in own and name not in layer.parameters]
