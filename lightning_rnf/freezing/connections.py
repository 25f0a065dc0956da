"""Which entries of a weight a finished task needs: those between units that it uses and channels that are not silent.

Under recall a task's other units put out zero. What is zero then whatever parameters become is read off the graph of
the forward (`Flow`), so which entries are frozen follows from the masks and the model, and is never stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_rnf.anatomy import Flow, Traced, UnitLayer, described, silenced
from lightning_rnf.memory import FreezeState
from lightning_rnf.runtime import borrowed, evaluating, sharding

LARGEST = 1e4
"""Of a weight that is multiplied by a zero: in half precision more may be infinite, and that times zero is no zero."""


@dataclass(frozen=True, eq=False)
class Wiring:
    """The graph of a model's forward, as far as it can be followed.

    Attributes:
        traced: the graph; None: it can't be traced.
        layers: unit layers.
        reasons: why a unit layer's inputs are not known, by its name.
    """

    traced: Traced | None
    layers: tuple[UnitLayer, ...]
    reasons: Mapping[str, str]

    @classmethod
    def of(cls, module: nn.Module, layers: Iterable[UnitLayer]) -> Wiring:
        """Follow a model's forward in eval mode. The model comes back as it was."""
        layers = tuple(layers)
        try:
            with sharding.whole(module), borrowed(module), evaluating(module):
                _forget_own(module)
                traced = Traced.of(module, layers)
                flow = Flow.of(traced, {layer.name: torch.zeros(layer.units).bool() for layer in layers}, layers)
        except Exception as error:  # whatever a forward of the user's makes of it
            said = " ".join(str(error).split())
            return cls(None, layers, {layer.name: said for layer in layers})
        return cls(traced, layers, dict(_unknown(flow, layers)))

    def heard(self, relevant: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Which channels each layer reads that may be other than zero while only these units speak.

        Args:
            relevant: bool ``(units,)`` by layer.

        Returns:
            Bool ``(channels,)`` by layer; layers that read all of them, or can't be followed, are left out.
        """
        if self.traced is None:
            return {}
        with suppress(KeyError):
            flow = Flow.of(self.traced, {layer.name: ~relevant[layer.name] for layer in self.layers}, self.layers)
            found = {}
            for name, node in _nodes(self.traced, self.layers).items():
                effect = flow.effects.get(node)
                if effect is not None and effect.inputs is not None and bool((effect.inputs.constant == 0).any()):
                    found[name] = effect.inputs.constant != 0
            return found
        return {}


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
        shape = module.get_parameter(f"{layer.name}.weight").shape
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

    In the ordinary case nothing is written; what is, is put back.

    Args:
        module: the model, before anything is silenced.
        layers: its unit layers.
        relevant: bool ``(units,)`` by layer: those that will speak.
    """
    layers = () if sharding.is_sharded(module) else tuple(layers)
    weights = {layer.name: module.get_parameter(f"{layer.name}.weight").detach() for layer in layers}
    wild = [layer for layer in layers if _is_wild(weights[layer.name])]
    read = Wiring.of(module, layers).heard(relevant) if wild else {}
    with ExitStack() as undo:
        for layer in wild:
            if layer.name in read:
                weight = weights[layer.name]
                silent = layer.connections(relevant[layer.name].cpu(), ~read[layer.name], weight.shape)
                chosen = silent.to(weight.device)
                entries = weight[chosen]
                if _is_wild(entries):
                    undo.callback(_put, weight, chosen, entries)
                    _put(weight, chosen, torch.zeros((), dtype=weight.dtype, device=weight.device))
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


def _is_silent(x: Tensor, axis: int, silent: Tensor) -> bool:
    x = x.detach().movedim(axis, 0)
    return len(x) == len(silent) and not bool(x[silent.to(x.device)].count_nonzero())


def _is_wild(weight: Tensor) -> bool:
    if not weight.numel():
        return False
    least, most = weight.aminmax()
    return not (bool(least >= -LARGEST) and bool(most <= LARGEST))  # NaN is neither


@torch.no_grad()
def _put(weight: Tensor, chosen: Tensor, entries: Tensor) -> None:
    weight[chosen] = entries


def _nodes(traced: Traced, layers: Iterable[UnitLayer]) -> dict[str, fx.Node]:
    """Where each unit layer runs, by its name; those that run inside of another module, or twice, are not in it."""
    names = {layer.name for layer in layers}
    nodes = [node for node in traced.graph.nodes if node.op == "call_module" and node.target in names]
    return {str(node.target): node for node in nodes if node.target not in traced.bound}


def _unknown(flow: Flow, layers: Iterable[UnitLayer]) -> Iterator[tuple[str, str]]:
    nodes = _nodes(flow.traced, layers)
    behind: set[fx.Node] = set()  # nodes that hear some unit
    for node in flow.traced.graph.nodes:
        if node.target is silenced or behind.intersection(node.all_input_nodes):
            behind.add(node)
    for layer in layers:
        node = nodes.get(layer.name)
        if node is None:
            yield layer.name, "where it runs can't be followed"
        elif node.all_input_nodes and node.all_input_nodes[0] in behind:
            effect = flow.effects.get(node)
            if effect is None or effect.inputs is None:
                source = node.all_input_nodes[0]
                while source not in flow.whole and source.all_input_nodes:
                    source = source.all_input_nodes[0]
                yield layer.name, flow.whole.get(source) or f"what reads {described(source, flow.traced)} is not known"
