"""What of a sub-network's silent units is still there after it was cut out, and which operations are why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_rnf.anatomy import Traced, UnitLayer
from lightning_rnf.recall.pruning import Plan

MOST = 0.5
"""Share of the parameters of silent units beyond which it is said that they are still there."""

LEAST = 0.1
"""Share of a network's parameters below which nobody misses what is still there."""


@dataclass(frozen=True)
class Kept:
    """What is left of a network.

    Attributes:
        parameters: of the network that was cut out, heads of other tasks left out, before and after.
        of_silent: those of silent units, before and after.
        layers: by layer, how many units it has, how many are silent, how many are left.
        reasons: why silent units are left, and how many, the most first.
    """

    parameters: tuple[int, int]
    of_silent: tuple[float, float]
    layers: Mapping[str, tuple[int, int, int]]
    reasons: Mapping[str, int]

    @classmethod
    def of(
        cls,
        found: Plan,
        traced: Traced,
        layers: Iterable[UnitLayer],
        silent: Mapping[str, Tensor],
        before: nn.Module,
        after: nn.Module,
    ) -> Kept:
        """Count.

        Args:
            found: what could go.
            traced: the model's graph.
            layers: its unit layers.
            silent: bool ``(units,)`` by layer.
            before: the model.
            after: what was cut out of it.
        """
        nodes = {node.target: node for node in traced.graph.nodes if node.op == "call_module"}
        counts, reasons = {}, Counter[str]()
        of_silent = [0.0, 0.0]
        for layer in layers:
            mute = silent[layer.name]
            node = next((nodes[name] for name in layer.modules if name in nodes), None)
            left = mute if node is None else mute & found.kept_outputs(node, layer.units)
            units = layer.units if node is None else int(found.kept_outputs(node, layer.units).sum())
            counts[layer.name] = (layer.units, int(mute.sum()), units)
            why = [_inside(layer, traced)] * layer.units if node is None else found.reasons(node, layer.units)
            reasons.update(why[unit] for unit in left.nonzero().flatten().tolist())
            for name in layer.parameters:
                of_silent[0] += of_silent_units(before.get_parameter(name).numel(), name, layer, mute)
                if layer.is_open:
                    of_silent[1] += _numel(after, name) * int(left.sum()) / max(units, 1)
                else:  # nothing of it is cut
                    of_silent[1] += of_silent_units(before.get_parameter(name).numel(), name, layer, left)
        whole = sum(parameter.numel() for parameter in _distinct(traced))
        small = sum(parameter.numel() for parameter in after.parameters())
        return cls((whole, small), (of_silent[0], of_silent[1]), counts, dict(reasons.most_common()))

    @property
    def disappoints(self) -> bool:
        """Whether more than `MOST` of the silent units' parameters are left, and they are over `LEAST` of all."""
        before, after = self.of_silent
        return after > MOST * before and after > LEAST * self.parameters[0]

    def __str__(self) -> str:
        """Says what is left, and the reasons that count most."""
        before, after = self.of_silent
        said = [f"{reason} ({units} units)" for reason, units in list(self.reasons.items())[:3]]
        more = f"; and {len(self.reasons) - 3} more reasons" if len(self.reasons) > 3 else ""
        return (
            f"{after / before:.0%} of the parameters of its silent units are still there, {self.parameters[1]:,} of "
            f"{self.parameters[0]:,} parameters in all, since they have to stay where something reads them that can't "
            f"be cut: {'; '.join(said)}{more}"
        )

    def to_plain(self) -> dict[str, Any]:
        """Dicts and built-in types, that any program can read without this package.

        Returns:
            ``parameters`` and ``parameters_before`` the cut, heads of other tasks left out; of them those
            ``of_silent_units``, and ``of_silent_units_before``; ``layers``: by name the number of ``units``, of
            ``silent`` ones, and of those ``kept``; ``reasons``: how many silent units are kept, by why.
        """
        keys = ("units", "silent", "kept")
        layers = {name: dict(zip(keys, counts, strict=True)) for name, counts in self.layers.items()}
        before, after = (round(count) for count in self.of_silent)
        return {
            "parameters": self.parameters[1],
            "parameters_before": self.parameters[0],
            "of_silent_units": after,
            "of_silent_units_before": before,
            "layers": layers,
            "reasons": dict(self.reasons),
        }


def of_silent_units(numel: int, name: str, layer: UnitLayer, silent: Tensor) -> float:
    """How many entries of one of a layer's parameters belong to silent units."""
    return numel * float(layer.spread(name, silent).double().mean())


def _inside(layer: UnitLayer, traced: Traced) -> str:
    """Why a layer stays whole that is no operation of the graph."""
    for name, module in traced.modules.items():
        if layer.name.startswith(f"{name}."):
            return f"{name} ({type(module).__name__}) is not taken apart"
    if layer.recurrent is not None:
        return f"{layer.name} hears itself in each step, and is not taken apart"
    if layer.packed:
        return f"{layer.name} (MultiheadAttention) is not taken apart"
    return f"{layer.name} has a forward of its own"


def _numel(module: nn.Module, name: str) -> int:
    """Of a parameter that may have been left out, or have another name now that nobody asks for."""
    owner, _, key = name.rpartition(".")
    try:
        found: Tensor = getattr(module.get_submodule(owner), key)
    except AttributeError:
        return 0
    return found.numel()


def _distinct(traced: Traced) -> Iterable[nn.Parameter]:
    found = [value for value in traced.tensors.values() if isinstance(value, nn.Parameter)]
    found += [parameter for module in traced.modules.values() for parameter in module.parameters()]
    return {id(parameter): parameter for parameter in found}.values()
