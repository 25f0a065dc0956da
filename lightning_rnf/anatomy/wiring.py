"""Which channels a layer reads that may be other than zero while only some units speak, whatever parameters become."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_rnf.anatomy.flow import Flow, described
from lightning_rnf.anatomy.graph import Traced, silenced
from lightning_rnf.anatomy.insides import insides
from lightning_rnf.anatomy.layers import UnitLayer
from lightning_rnf.runtime import borrowed, evaluating, sharding


@dataclass(frozen=True, eq=False)
class Wiring:
    """The graph of a model's forward, as far as it can be followed.

    Attributes:
        module: the model.
        traced: the graph; None: it can't be traced.
        layers: unit layers.
        reasons: why a unit layer's inputs are not known, by its name.
    """

    module: nn.Module
    traced: Traced | None
    layers: tuple[UnitLayer, ...]
    reasons: Mapping[str, str]

    @classmethod
    def of(cls, module: nn.Module, layers: Iterable[UnitLayer]) -> Wiring:
        """Follow a model's forward in eval mode. The model comes back as it was."""
        layers = tuple(layers)
        known = insides(module, layers)
        try:
            with sharding.whole(module), borrowed(module), evaluating(module):
                _forget_own(module)
                traced = Traced.of(module, layers)
                flow = Flow.of(traced, {layer.name: torch.zeros(layer.units).bool() for layer in layers}, layers)
        except Exception as error:  # whatever a forward of the user's makes of it
            said = " ".join(str(error).split())
            return cls(module, None, layers, {layer.name: said for layer in layers if layer.name not in known})
        return cls(module, traced, layers, {name: why for name, why in _unknown(flow, layers) if name not in known})

    def heard(self, relevant: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Which channels each layer reads that may be other than zero while only these units speak.

        Args:
            relevant: bool ``(units,)`` by layer.

        Returns:
            Bool ``(channels,)`` by layer; layers that read all of them, or can't be followed, are left out.
        """
        found = {}
        for name, inside in insides(self.module, self.layers).items():
            if inside.source.name in relevant:
                channels = inside.channels(relevant[inside.source.name])
                if not channels.all():
                    found[name] = channels
        if self.traced is None:
            return found
        with suppress(KeyError), sharding.whole(self.module):  # its parts are read
            flow = Flow.of(self.traced, {layer.name: ~relevant[layer.name] for layer in self.layers}, self.layers)
            for name, node in _nodes(self.traced, self.layers).items():
                effect = flow.effects.get(node)
                if effect is not None and effect.inputs is not None and bool((effect.inputs.constant == 0).any()):
                    found[name] = effect.inputs.constant != 0
        return found


def _nodes(traced: Traced, layers: Iterable[UnitLayer]) -> dict[str, fx.Node]:
    """Where each unit layer runs, by its name; not those that run inside of another module, or twice, or are tied.

    One of these may run alone here, and with the others for another task.
    """
    names = {layer.name for layer in layers if not layer.tied}
    nodes = [node for node in traced.graph.nodes if node.op == "call_module" and node.target in names]
    return {str(node.target): node for node in nodes if node.target not in traced.bound}


def _unknown(flow: Flow, layers: Iterable[UnitLayer]) -> Iterator[tuple[str, str]]:
    layers = tuple(layers)
    nodes = _nodes(flow.traced, layers)
    closed = [nodes.get(layer.name) for layer in layers if not layer.is_open]
    behind: set[fx.Node] = set()  # nodes that hear some unit
    for node in flow.traced.graph.nodes:
        if node.target is silenced or node in closed or behind.intersection(node.all_input_nodes):
            behind.add(node)
    for layer in layers:
        node = nodes.get(layer.name)
        if node is None:
            several = layer.name in flow.traced.bound
            why = "it runs several times" if several else "where it runs can't be followed"
            yield layer.name, f"it has one weight with {', '.join(layer.tied)}" if layer.tied else why
        elif layer.recurrent is not None:
            yield layer.name, "it hears all of its units in each step"
        elif layer.packed:
            if behind.intersection(node.all_input_nodes):
                yield layer.name, f"{described(node, flow.traced)} is not taken apart"
        elif node.all_input_nodes and node.all_input_nodes[0] in behind:
            effect = flow.effects.get(node)
            if effect is None or effect.inputs is None:
                source = node.all_input_nodes[0]
                while unknown := [one for one in source.all_input_nodes if one in flow.whole and one in behind]:
                    source = unknown[0]
                yield (
                    layer.name,
                    flow.whole.get(source) or f"{described(source, flow.traced)} is not read by units",
                )


def _forget_own(module: nn.Module) -> None:
    """For a borrowed module: what we have hung into it silences units or spares work, it is not the user's forward."""
    for part in module.modules():
        for hooks in (part._forward_hooks, part._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if _is_own(hook)]:
                del hooks[key]
        if _is_own(vars(part).get("forward")):
            del vars(part)["forward"]


def _is_own(made: Any) -> bool:
    origin = getattr(made, "__module__", None) or type(made).__module__
    return made is not None and origin.partition(".")[0] == __name__.partition(".")[0]
