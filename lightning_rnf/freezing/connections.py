"""Which entries of a weight a finished task needs: those between units that it uses and channels that are not silent.

Under recall a task's other units put out zero. What is zero then whatever parameters become is read off the graph of
the forward (`Flow`), so which entries are frozen follows from the masks and the model, and is never stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rnf.anatomy import UnitLayer, Wiring
from lightning_rnf.memory import FreezeState
from lightning_rnf.runtime import sharding

LARGEST = 1e4
"""Of a weight that is multiplied by a zero: in half precision more may be infinite, and that times zero is no zero."""


def heard(module: nn.Module, state: FreezeState, wiring: Wiring | None = None) -> dict[str, dict[str, Tensor]]:
    """What the layers read of which a finished task needs connections only: `Wiring.heard` by task.

    Args:
        module: the model, as it runs: nothing is silenced.
        state: the finished tasks.
        wiring: of the model, if it is known.
    """
    wanted = {name: record for name, record in state.tasks.items() if record.connections}
    if not wanted:
        return {}
    wiring = Wiring.of(module, state.layers) if wiring is None else wiring
    return {
        name: {layer: read for layer, read in wiring.heard(record.relevant).items() if layer in record.connections}
        for name, record in wanted.items()
    }


def frozen_connections(
    module: nn.Module, state: FreezeState, heard: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Which entries of each layer's weight some finished task needs, where those are not whole rows.

    Args:
        module: the model.
        state: the finished tasks.
        heard: as from `heard`. A task needs whole rows of layers that are not in it.

    Returns:
        Bool by layer, of the first two dimensions of its weight.
    """
    found: dict[str, Tensor] = {}
    for layer in state.layers:
        if not any(layer.name in of_task for of_task in heard.values()):
            continue
        shape = module.get_parameter(layer.weight).shape
        frozen = torch.zeros(shape[:2], dtype=torch.bool)
        for name, record in state.tasks.items():
            frozen |= layer.connections(record.relevant[layer.name], heard.get(name, {}).get(layer.name), shape)
        if not torch.equal(frozen, layer.connections(state.frozen()[layer.name], None, shape)):
            found[layer.name] = frozen
    return found


def free_weights(state: FreezeState, connections: Mapping[str, Tensor]) -> dict[str, float]:
    """Share of each layer's weight that no finished task needs, in [0, 1], by layer in execution order.

    Args:
        state: the finished tasks.
        connections: as from `frozen_connections`.
    """
    rows = state.frozen()
    frozen = {layer.name: connections.get(layer.name, rows[layer.name]) for layer in state.layers}
    return {name: 1.0 - int(needed.sum()) / needed.numel() for name, needed in frozen.items()}


@contextmanager
def harmless(module: nn.Module, layers: Iterable[UnitLayer], relevant: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the context no weight matters that a relevant unit has for a silent channel, NaN and infinite ones either.

    In the ordinary case nothing is changed. Else the layer has another weight: nothing is written to its own.

    Args:
        module: the model, before anything is silenced.
        layers: its unit layers.
        relevant: bool ``(units,)`` by layer: those that will speak.
    """
    layers = () if sharding.is_sharded(module) else tuple(layers)
    wild = _wild(module, layers)
    read = Wiring.of(module, layers).heard(relevant) if wild else {}
    with ExitStack() as undo:
        for layer in wild:
            if layer.name in read:
                weight = module.get_parameter(layer.weight)
                silent = layer.connections(relevant[layer.name].cpu(), ~read[layer.name], weight.shape)
                chosen = silent.to(weight.device)
                if _is_wild(weight.detach()[chosen]):
                    tamed = nn.Parameter(weight.detach().clone(), weight.requires_grad)
                    tamed.detach()[chosen] = 0.0
                    vars(tamed).update(vars(weight))  # what the user has noted on it, and what it was before widening
                    owner, _, key = layer.weight.rpartition(".")
                    part = module.get_submodule(owner)
                    setattr(part, key, tamed)  # not into its dict: a recurrent layer keeps a list, too
                    undo.callback(setattr, part, key, weight)
        yield


@dataclass(eq=False)
class Listening:
    """Checks on a forward that the channels that are said to be zero are zero.

    Attributes:
        wrong: names of layers that read something else in them.
        seen: names of layers that ran.
    """

    wrong: set[str] = field(default_factory=set)
    seen: set[str] = field(default_factory=set)

    @contextmanager
    def to(self, module: nn.Module, layers: Iterable[UnitLayer], heard: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside the context every forward is listened to.

        Args:
            module: the model, silenced.
            layers: its unit layers.
            heard: bool ``(channels,)`` by layer: all others are said to be zero.
        """
        with ExitStack() as hooks:
            for layer in layers:
                if layer.name in heard:

                    def look(part: nn.Module, args: tuple[Any, ...], layer: UnitLayer = layer) -> None:
                        self.seen.add(layer.name)
                        if not args or not _is_silent(args[0], layer.axis, ~heard[layer.name]):
                            self.wrong.add(layer.name)

                    hooks.callback(module.get_submodule(layer.name).register_forward_pre_hook(look).remove)
            yield


def _is_silent(x: Tensor, axis: int, silent: Tensor) -> bool:
    x = x.detach().movedim(axis, 0)
    return len(x) == len(silent) and not bool(x[silent.to(x.device)].count_nonzero())


def _wild(module: nn.Module, layers: Iterable[UnitLayer]) -> list[UnitLayer]:
    """Layers in whose weights something may be too large: their norm is an upper bound, and one look tells all."""
    layers = list(layers)
    if not layers:
        return []
    norms = [torch.linalg.vector_norm(module.get_parameter(layer.weight).detach()).double() for layer in layers]
    together = torch.stack([norm.to(norms[0].device) for norm in norms]).cpu()
    return [layer for layer, norm in zip(layers, together.tolist(), strict=True) if not norm <= LARGEST]


def _is_wild(weight: Tensor) -> bool:
    if not weight.numel():
        return False
    least, most = weight.aminmax()
    return not (bool(least >= -LARGEST) and bool(most <= LARGEST))  # NaN is neither
