"""Attention of torch's own module: which rows of its packed parameters are whose, and its forward by its parts.

`nn.MultiheadAttention` makes queries, keys and values with one packed weight, and reads the weight of its ``out_proj``
without running that module. A layer of ``width`` channels has ``3 · width`` units, queries, keys and values one after
the other; those of ``out_proj`` are a linear layer's of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

OUTPUT = "out_proj"
"""What the module calls its last layer."""

ROLES = ("query", "key", "value")

Through = Callable[[str, Tensor], Tensor]
"""What is made of queries, keys or values, by `ROLES`: ``(N, positions, width)`` to the same."""

_OWN = {"in_proj_weight": 0, "in_proj_bias": 0, "q_proj_weight": 0, "k_proj_weight": 1, "v_proj_weight": 2}
"""Parameters by name, and where their rows begin among the units, in widths."""

_PACKED = ("in_proj_weight", "in_proj_bias")


@dataclass(frozen=True)
class Packed:
    """What the parameters of such a module look like.

    Attributes:
        width: how many queries, keys and values there are each.
    """

    width: int

    def rows(self, parameter: str) -> slice:
        """The units that a parameter has rows for, by its name.

        Raises:
            ValueError: if it has no name that torch gives.
        """
        key = parameter.rpartition(".")[2]
        if key not in _OWN:
            raise ValueError(f"{parameter!r:.80} makes no queries, keys or values")
        first = _OWN[key] * self.width
        return slice(first, first + self.width * (3 if key in _PACKED else 1))

    def spread(self, parameter: str, values: Tensor) -> Tensor:
        """Give each row of a parameter the value of its unit: ``(units,)`` to ``(rows,)``."""
        return values[self.rows(parameter)]

    def of(self, role: str, values: Tensor) -> Tensor:
        """The part of ``(units,)`` that queries, keys or values have, by `ROLES`: ``(width,)``."""
        first = ROLES.index(role) * self.width
        return values[first : first + self.width]


def is_attention(module: nn.Module) -> bool:
    """Whether it is torch's attention, or inherits from it."""
    return isinstance(module, nn.MultiheadAttention)


def why_not_rows(module: Any) -> str | None:
    """Why queries, keys and values of such a module can't be told apart by rows; None: they can."""
    output = module.out_proj
    if is_parametrized(module) or is_parametrized(output):
        return "is parametrized, and what its weights are computed from has no rows for its units"
    if _is_own(module, nn.MultiheadAttention):
        return "has a forward of its own"
    if not isinstance(output, nn.Linear) or _is_own(output, nn.Linear) or any(output.children()):
        return "has an out_proj that is not torch's"
    if any(map(_is_foreign, (*output._forward_hooks.values(), *output._forward_pre_hooks.values()))):
        return "has hooks on its out_proj, which torch never runs"
    if module.bias_k is not None or module.bias_v is not None:
        return "adds a key and a value of its own (add_bias_kv)"
    own = {name for name, _ in module.named_parameters()} - {f"{OUTPUT}.weight", f"{OUTPUT}.bias"}
    return None if own <= set(_OWN) else "has other parameters than torch's"


def _is_foreign(hook: Any) -> bool:
    """Whether a hook is the user's, and not hung in for as long as we watch."""
    origin: str = getattr(hook, "__module__", None) or type(hook).__module__
    return origin.partition(".")[0] != __name__.partition(".")[0]


def _is_own(module: nn.Module, kind: type[nn.Module]) -> bool:
    here = vars(module).get("forward")
    return type(module).forward is not kind.forward or not (here is None or hasattr(here, "through"))


def by_parts(module: Any, through: Through = lambda role, made: made) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """A forward that computes what torch's does, one part after the other, and runs ``out_proj``.

    Its bits may be others: three products instead of a packed one.

    Args:
        module: a `nn.MultiheadAttention` of which `why_not_rows` has nothing to say.
        through: what goes on instead of queries, keys and values; behind that of such a forward that it has already.

    Returns:
        It takes what the module's own forward takes, positions before samples unless ``batch_first``, and returns
        what that returns.
    """
    before: Through | None = getattr(vars(module).get("forward"), "through", None)

    def every(role: str, made: Tensor) -> Tensor:
        return through(role, made if before is None else before(role, made))

    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if query.is_nested or key.is_nested or value.is_nested:
            raise ValueError("nn.MultiheadAttention is given a nested tensor, which it can't take apart: pad it")
        if is_causal and attn_mask is None:
            raise ValueError("nn.MultiheadAttention is given is_causal without an attn_mask, which torch refuses, too")
        batched, heads = query.ndim == 3, module.num_heads
        made = {
            role: every(role, nn.functional.linear(_samples_first(module, x), *of_role))
            for role, x, of_role in zip(ROLES, (query, key, value), _projections(module), strict=True)
        }
        q, k, v = (one.unflatten(-1, (heads, -1)).transpose(1, 2) for one in made.values())
        if module.add_zero_attn:
            k, v = (nn.functional.pad(one, (0, 0, 0, 1)) for one in (k, v))
        # As torch has it: then the hint counts, and not the mask.
        is_hint = is_causal and key_padding_mask is None and not need_weights
        mask = None if is_hint else _mask(module, q, k, attn_mask, key_padding_mask)
        dropout = module.dropout if module.training else 0.0
        looked = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
            if mask is not None:
                scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
            looked = nn.functional.dropout(scores.softmax(-1), dropout)
            mixed = looked @ v
        else:
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, mask, dropout, is_hint)
        output = module.out_proj(mixed.transpose(1, 2).flatten(2))
        output = output.squeeze(0) if not batched else output if module.batch_first else output.transpose(0, 1)
        if looked is not None:
            looked = looked.mean(1) if average_attn_weights else looked
            looked = looked if batched else looked.squeeze(0)
        return output, looked

    forward.through = every  # type: ignore[attr-defined]
    return forward


def _samples_first(module: Any, x: Tensor) -> Tensor:
    """``(N, positions, features)``."""
    return x.unsqueeze(0) if x.ndim == 2 else x if module.batch_first else x.transpose(0, 1)


def _projections(module: Any) -> list[tuple[Tensor, Tensor | None]]:
    """Weight and bias of queries, keys and values."""
    if module.in_proj_weight is None:
        weights = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
    else:
        weights = module.in_proj_weight.chunk(3)
    biases = [None] * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    return list(zip(weights, biases, strict=True))


def _mask(
    module: Any, q: Tensor, k: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None
) -> Tensor | None:
    """What may be looked at (bool) or is added to the scores, and can be broadcast to these; None: there is no mask.

    In torch's attention a True keeps from looking, in its functions it lets look.
    """
    samples, heads, length = q.shape[:3]
    given = []
    for mask, shape in ((attn_mask, (samples, heads, length, -1)), (key_padding_mask, (samples, 1, 1, -1))):
        if mask is None:
            continue
        mask = mask if mask is attn_mask and mask.ndim == 2 else mask.reshape(shape)
        if module.add_zero_attn:
            mask = nn.functional.pad(mask, (0, 1))
        given.append(~mask if mask.dtype == torch.bool else mask)
    if len(given) == 2 and given[0].dtype != given[1].dtype:
        given = [_added(mask, q.dtype) for mask in given]
    if not given:
        return None
    (mask, *others) = given
    return (mask & others[0] if mask.dtype == torch.bool else mask + others[0]) if others else mask


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else mask
