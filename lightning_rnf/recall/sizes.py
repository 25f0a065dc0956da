"""How large a module is, and how large a sub-network of it would be: parameters and floating point operations."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_rnf.anatomy import LAYERS, TRANSPOSED, Inputs, UnitLayer, followed, layer_form, torch_class
from lightning_rnf.recall.pruning import Plan, plan
from lightning_rnf.runtime import borrowed, evaluating


@dataclass(frozen=True)
class Size:
    """How large a module is.

    Attributes:
        parameters: how many numbers its parameters hold, those of other tasks' heads included.
        flops: floating point operations of one sample's forward, a multiplication and an addition counted as two:
            those of linear layers, convolutions and matrix products, which is nearly all.
    """

    parameters: int
    flops: int


@torch.no_grad()
def size_of(module: nn.Module, example: Any) -> Size:
    """Count a module's parameters and the floating point operations of one sample.

    Args:
        module: any; it stays as it is.
        example: inputs of its ``forward`` as in Lightning's ``example_input_array``: a tensor ``(N, ...)``, a tuple of
            them, or a dict of them by name. Only the first sample is run.
    """
    parameters = sum(parameter.numel() for parameter in module.parameters())
    with borrowed(module), evaluating(module):
        return Size(parameters, _flops(module, example))


class SubnetworkFlops:
    """Counts the floating point operations of sub-networks without building them.

    Calling it with ``relevant``, bool ``(units,)`` by layer, gives what `measure` gives of the exported module. The
    model is run once, at the start, in eval mode and with the head that is active.

    Args:
        module: the model.
        layers: its unit layers.
        example: as in `measure`.

    Raises:
        ValueError: as `export`.
    """

    def __init__(self, module: nn.Module, layers: Iterable[UnitLayer], example: Any) -> None:
        self.layers = tuple(layers)
        with borrowed(module), evaluating(module), torch.no_grad():
            self.traced = followed(module, self.layers, lambda: Inputs.of(example))
            self._positions: dict[str, int] = {}
            for name, leaf in self.traced.modules.items():
                if torch_class(leaf) in LAYERS and name not in self.traced.bound:
                    leaf.register_forward_hook(self._recorder(name))
            self.total = _flops(module, example)
        self._fixed = self.total - sum(
            2 * positions * self.traced.modules[name].get_parameter("weight").numel()
            for name, positions in self._positions.items()
        )

    def __call__(self, relevant: Mapping[str, Tensor]) -> int:
        """Operations of one sample when only the relevant units speak."""
        found = plan(self.traced, {layer.name: ~relevant[layer.name].cpu() for layer in self.layers})
        flops = self._fixed
        for node in self.traced.graph.nodes:
            if node.op == "call_module" and node.target in self._positions:
                weights = _weights_left(found, node, self.traced.modules[node.target])
                flops += 2 * self._positions[node.target] * weights
        return flops

    def _recorder(self, name: str) -> Any:
        def record(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            features, units, _, _ = layer_form(module)
            transposed = isinstance(module, TRANSPOSED)
            self._positions[name] = args[0].numel() // features if transposed else output.numel() // units

        return record


def _flops(module: nn.Module, example: Any) -> int:
    with warnings.catch_warnings(), FlopCounterMode(display=False) as counter:
        # The counter names the modules that run. Nothing here reads the names.
        warnings.filterwarnings("ignore", message=".*global hooks on modules")
        if isinstance(example, Mapping):
            module(**{key: value[:1] for key, value in example.items()})
        else:
            module(*(value[:1] for value in (example if isinstance(example, (tuple, list)) else (example,))))
    return int(counter.get_total_flops())


def _weights_left(found: Plan, node: fx.Node, module: Any) -> int:
    features, units, groups, _ = layer_form(module)
    said, read = found.kept_outputs(node, units).view(groups, -1), found.kept_inputs(node, features).view(groups, -1)
    kernel: int = module.weight.numel() // (features * units // groups)
    return int((said.sum(dim=1) * read.sum(dim=1)).sum()) * kernel
