"""Norms as linear maps: what they divide by is a constant (Ali et al. 2022, section 3.2; AttnLRP, proposition 3.4).

So all relevance goes through the numerator. A shift takes its share, as a bias does.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def _scaled(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _of_layer(x: Tensor, given: Mapping[str, Any]) -> Tensor:
    dims = tuple(range(-len(given["normalized_shape"]), 0))
    centred = x - x.mean(dims, keepdim=True)
    spread = (x.detach().var(dims, correction=0, keepdim=True) + given["eps"]).rsqrt()
    return _scaled(centred * spread, given["weight"], given["bias"])


def _of_root(x: Tensor, given: Mapping[str, Any]) -> Tensor:
    dims = tuple(range(-len(given["normalized_shape"]), 0))
    eps = torch.finfo(x.dtype).eps if given["eps"] is None else given["eps"]
    return _scaled(x * (x.detach().square().mean(dims, keepdim=True) + eps).rsqrt(), given["weight"], None)


def _of_groups(x: Tensor, given: Mapping[str, Any], groups: int | None = None) -> Tensor:
    grouped = x.reshape(x.shape[0], groups or given["num_groups"], -1)
    centred = grouped - grouped.mean(-1, keepdim=True)
    spread = (grouped.detach().var(-1, correction=0, keepdim=True) + given["eps"]).rsqrt()
    of_channels = (-1,) + (1,) * (x.ndim - 2)
    weight, bias = (None if given[name] is None else given[name].view(of_channels) for name in ("weight", "bias"))
    return _scaled((centred * spread).view_as(x), weight, bias)


def _of_instances(x: Tensor, given: Mapping[str, Any]) -> Tensor:
    return _of_groups(x, given, x.shape[1])


def _of_length(x: Tensor, given: Mapping[str, Any]) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(x.detach(), given["p"], given["dim"], keepdim=True)
    result: Tensor = x / length.clamp_min(given["eps"])
    return result


_LINEAR: dict[Any, tuple[inspect.Signature, Callable[[Tensor, Mapping[str, Any]], Tensor]]] = {
    function: (inspect.signature(function), linear)
    for function, linear in (
        (nn.functional.layer_norm, _of_layer),
        (nn.functional.rms_norm, _of_root),
        (nn.functional.group_norm, _of_groups),
        (nn.functional.instance_norm, _of_instances),
        (nn.functional.normalize, _of_length),
    )
}
_ALSO = {torch.rms_norm: nn.functional.rms_norm}
NORMS = (*_LINEAR, *_ALSO)


def as_linear(
    function: Any, args: Sequence[Any], options: Mapping[str, Any]
) -> tuple[Callable[[Tensor], Tensor], bool] | None:
    """The linear map that a norm is at its input, and whether it shifts; None if it normalises with given statistics.

    Args:
        function: one of `NORMS`.
        args: of the call.
        options: of the call.
    """
    signature, linear = _LINEAR[_ALSO.get(function, function)]
    bound = signature.bind(*args, **options)
    bound.apply_defaults()
    given = bound.arguments
    if not given.get("use_input_stats", True) or given.get("out") is not None:
        return None
    bias = given.get("bias")
    return lambda x: linear(x, given), isinstance(bias, Tensor) and bool(bias.any())
