"""A finished task's sub-network where nothing can be cut: a copy of the model in which irrelevant units are zeros."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_rnf.anatomy import (
    CHANNEL_NORMS,
    LAYERS,
    OUTPUT,
    Inputs,
    UnitLayer,
    by_group,
    torch_class,
)
from lightning_rnf.recall.kept import Kept, of_silent_units
from lightning_rnf.recall.packed import zeroed_rows
from lightning_rnf.recall.recurrent import zeroed_cells

_FOLLOWERS = (*CHANNEL_NORMS, nn.GroupNorm, nn.PReLU)  # what `UnitLayer` may name as norm and slopes
_CLOSE = 1e-5
"""Of the largest output; the sums of a smaller network are rounded otherwise."""


@torch.no_grad()
def zeroed(part: Callable[[str], Any], layer: UnitLayer, silent: Tensor) -> bool:
    """Zero the rows of silent units. False if that does not silence them, because a forward is not torch's.

    Args:
        part: a module by its name, or None.
        layer: of units.
        silent: bool ``(units,)``.
    """
    if not silent.any():
        return True
    if layer.recurrent is not None:
        return zeroed_cells(partial(_parameter, part), layer, silent)
    is_output = layer.name.endswith(f".{OUTPUT}") and isinstance(
        part(layer.name), (NonDynamicallyQuantizableLinear, type(None))
    )
    if layer.packed or is_output:
        return zeroed_rows(partial(_parameter, part), layer, silent)
    own = [part(name) for name in layer.modules]
    followers = [part(name) for name in (layer.norm, layer.slopes) if name is not None]
    known = (*LAYERS, *_FOLLOWERS)
    if any(module is None or torch_class(module) not in known for module in (*own, *followers)):
        return False  # of those that are tied one may not have run, too
    grouped = by_group(own[0], own[0].weight)  # a view: (groups, units, features, ...)
    grouped[silent.view(len(grouped), -1).to(grouped.device)] = 0
    # Zeros stay zeros in a norm without shift, and in a slope that is a number: those of silent units may be NaN.
    rows = [(module, "bias", 0) for module in own]
    for follower in followers:
        rows += [(follower, name, 0) for name in ("weight", "bias", "running_mean")] + [(follower, "running_var", 1)]
    for module, name, value in rows:
        tensor = getattr(module, name, None)
        if tensor is not None:
            tensor[silent.to(tensor.device)] = value
    return True


def _parameter(part: Callable[[str], Any], name: str) -> Tensor | None:
    """A copied parameter: a tensor of the graph by itself, or one of a module."""
    owner, _, key = name.rpartition(".")
    inside: Tensor | None = getattr(part(owner), key, None)
    return part(name) if inside is None else inside


def whole(
    module: nn.Module, layers: Iterable[UnitLayer], silent: Mapping[str, Tensor], why: str
) -> tuple[nn.Module, Kept]:
    """A copy of a model of which there is no graph, and what is to be said of it.

    Args:
        module: the model as recall runs it, in eval mode.
        layers: its unit layers.
        silent: bool ``(units,)`` by layer.
        why: there is no graph.

    Raises:
        ValueError: if it can't be copied.
    """
    try:
        twin = copy.deepcopy(module)  # a LightningModule leaves its Trainer behind
    except Exception as error:  # whatever a user's attribute makes of it
        raise ValueError(f"{why}; nor can {type(module).__name__} be copied ({error})") from error
    for parameter in twin.parameters():
        parameter.grad = None
    for part in twin.modules():  # what `borrowed` puts in the place of a LightningModule's own
        for name in [name for name, value in vars(part).items() if _is_own(value)]:
            del vars(part)[name]
    parts = dict(twin.named_modules(remove_duplicate=False))
    sizes, of_silent = {}, 0.0
    for layer in layers:
        mute = silent[layer.name]
        if not zeroed(parts.get, layer, mute):
            _zero_own(twin, layer, mute)
        sizes[layer.name] = (layer.units, int(mute.sum()), layer.units)
        of_silent += sum(
            of_silent_units(module.get_parameter(name).numel(), name, layer, mute) for name in layer.parameters
        )
    count = sum(parameter.numel() for parameter in twin.parameters())
    stay = sum(muted for _, muted, _ in sizes.values())
    return twin, Kept((count, count), (of_silent, of_silent), sizes, {why: stay} if stay else {})


@torch.no_grad()
def _zero_own(module: nn.Module, layer: UnitLayer, silent: Tensor) -> None:
    """Zero all that silent units own, in a layer of whatever kind; whether that silences them has to be tried.

    Of a weight that is computed from a length and a direction the latter stays: it is divided by its own length.
    """
    for name in layer.parameters:
        if name != layer.weight or ".parametrizations." not in name:
            parameter = module.get_parameter(name)
            parameter[layer.spread(name, silent).to(parameter.device)] = 0


class Expected:
    """What a small module has to give for some inputs: what recall gives, all of them together and the first alone.

    Args:
        module: the model, as recall runs it.
        inputs: of its forward.
    """

    def __init__(self, module: nn.Module, inputs: Inputs) -> None:
        device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
        self.inputs = [one for one in (inputs.to(device), inputs.to(device).first()) if one is not None]
        with torch.no_grad(), _precise():
            self.outputs = [one.run(module) for one in self.inputs]

    def differs(self, small: nn.Module) -> str:
        """How a module differs; nothing if it gives the same within 1e-5 of the largest."""
        for inputs, expected in zip(self.inputs, self.outputs, strict=True):
            try:
                with torch.no_grad(), _precise():
                    found = inputs.run(small)
            except Exception as error:  # whatever the user's part in it makes of it
                return f"it fails with {type(error).__name__}: {error}"
            if found.keys() != expected.keys():
                return "it returns something else"
            for path, value in expected.items():
                if said := _difference(found[path], value):
                    return said
        return ""


def _difference(found: Tensor, expected: Tensor) -> str:
    if found.shape != expected.shape:
        return f"it returns {tuple(found.shape)} where recall returns {tuple(expected.shape)}"
    if not expected.is_floating_point():
        return "" if torch.equal(found, expected) else "it returns other numbers than recall"
    precision = max(_CLOSE, 8 * torch.finfo(expected.dtype).eps)
    finite = expected[expected.isfinite()]  # an infinite logit may be a mask's, and would allow any difference
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    if torch.allclose(found, expected, rtol=0, atol=precision * max(largest, 1e-3), equal_nan=True):
        return ""
    return f"it is off by {float((found - expected).abs().max()):.2g} where the largest output is {largest:.2g}"


def _precise() -> Any:
    """On a GPU, convolutions without shortened factors: a smaller one would take others."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


def _is_own(value: Any) -> bool:
    return inspect.isfunction(value) and value.__module__.partition(".")[0] == __name__.partition(".")[0]
