"""Relevance through attention: softmax, what it weighs, and the functions of torch that have both inside.

Attention is ``A(s) v``. At its scores, ``A = (A − J s) + J s`` (Taylor, as in AttnLRP, Achtibat et al. 2024, equation
13, where the first part takes its relevance away like a bias). Here the first part is attention that doesn't depend on
the scores: all of its relevance is that of the values, as in Ali et al. 2022. Of ``(J s) v`` half is that of the values
and half that of the scores: the uniform rule of AttnLRP. So nothing is lost, and queries and keys get as much as they
say about where to look.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rnf.relevance.splits import LAYOUT_KEPT, MOVES, Call, behind, kept, kind_of, not_a_view, over


class Softmax(torch.autograd.Function):
    """``R = s Jᵀ g``, where g is relevance over the weights; what weighs values sends g itself (`weighing`)."""

    @staticmethod
    def forward(ctx: Any, call: Call, dim: int, scores: Tensor) -> Tensor:
        """The value."""
        weights = call.run(scores)
        ctx.dim, ctx.weighing = dim, False
        ctx.save_for_backward(scores, weights)
        return weights

    @staticmethod
    def backward(ctx: Any, arrived: Tensor) -> tuple[Tensor | None, ...]:
        """The shares."""
        scores, weights = kept(ctx)
        gradient = arrived if ctx.weighing else over(arrived, weights)
        gradient = weights * (gradient - (weights * gradient).sum(ctx.dim, keepdim=True))
        return None, None, torch.where(weights == 0, 0.0, scores * gradient)  # masked scores are infinite

    @staticmethod
    def told_by_scores(ctx: Any) -> Tensor:
        """``J s``."""
        scores, weights = kept(ctx)
        scores = torch.where(weights == 0, 0.0, scores)
        result: Tensor = weights * (scores - (weights * scores).sum(ctx.dim, keepdim=True))
        return result


class Weighing(torch.autograd.Function):
    """A product of softmax's weights and values, in any of torch's forms: to the values relevance, to the weights g.

    If the weights are in another order than softmax made them, the values get all of the relevance.
    """

    @staticmethod
    def forward(ctx: Any, call: Call, softmax: Any, first: int, *tensors: Tensor) -> Tensor:
        """The value."""
        ctx.call, ctx.softmax, ctx.first = call, softmax, first
        ctx.save_for_backward(*tensors)
        return not_a_view(call.run(*tensors))

    @staticmethod
    def backward(ctx: Any, relevance: Tensor) -> tuple[Tensor | None, ...]:
        """The shares."""
        tensors = [tensor.detach().requires_grad_() for tensor in kept(ctx)]
        weights, values = tensors[ctx.first], tensors[1 - ctx.first]
        with torch.enable_grad():
            output = ctx.call.run(*tensors)
        share = over(relevance, output.detach())
        at_weights, at_values = torch.autograd.grad(output, (weights, values), share)
        if ctx.softmax is None:
            at_weights = torch.zeros_like(at_weights)
        else:
            told = Softmax.told_by_scores(ctx.softmax).reshape(weights.shape)
            told = torch.where(weights.detach() == 0, 0.0, told)
            tensors[ctx.first] = weights.detach() - told / 2
            with torch.enable_grad():
                output = ctx.call.run(*tensors)
            (at_values,) = torch.autograd.grad(output, values, share)
        shares = [values.detach() * at_values, at_weights / 2]
        return None, None, None, *(shares if ctx.first else reversed(shares))


def softmax_behind(tensor: Tensor) -> tuple[Any, bool] | None:
    """The node of the softmax whose weights these are; whether they are in the same order, and the same size."""
    for told, moves in ((True, LAYOUT_KEPT), (False, MOVES)):
        node = behind(tensor, moves, scaled=not told)
        if node is not None and kind_of(node) == "Softmax":
            return node, told
    return None


def by_parts(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    """`scaled_dot_product_attention` in functions that have rules, and its weights."""
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    if attn_mask is None:
        weights = scores.softmax(-1)
    else:
        nowhere = scores.detach().isneginf().all(-1, keepdim=True)  # rows that may look nowhere
        weights = scores.masked_fill(nowhere, 0.0).softmax(-1).masked_fill(nowhere, 0.0)
    return nn.functional.dropout(weights, dropout_p) @ value, weights


_ATTENTION = inspect.signature(nn.functional.multi_head_attention_forward)
_OF_ROWS = ("bias_k", "bias_v", "static_k", "static_v")


def of_several_heads(args: Sequence[Any], options: Mapping[str, Any]) -> tuple[Tensor, Tensor | None] | None:
    """`multi_head_attention_forward` in functions that have rules. None if it adds keys of its own."""
    bound = _ATTENTION.bind(*args, **options)
    bound.apply_defaults()
    given: dict[str, Any] = bound.arguments
    if given["add_zero_attn"] or any(given[name] is not None for name in _OF_ROWS):
        return None
    inputs = [given[name] for name in ("query", "key", "value")]
    batched = inputs[0].ndim == 3
    if not batched:
        inputs = [x.unsqueeze(1) for x in inputs]
    heads, (length, samples, width) = given["num_heads"], inputs[0].shape
    weights = (
        [given[f"{name}_proj_weight"] for name in "qkv"]
        if given["use_separate_proj_weight"]
        else given["in_proj_weight"].chunk(3)
    )
    biases = [None] * 3 if given["in_proj_bias"] is None else given["in_proj_bias"].chunk(3)
    query, key, value = (
        nn.functional.linear(x, weight, bias).unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)
        for x, weight, bias in zip(inputs, weights, biases, strict=True)
    )
    mask = None
    for found, shape in (
        (given["attn_mask"], (-1, heads, length, key.shape[-2])),
        (given["key_padding_mask"], (samples, 1, 1, -1)),
    ):
        if found is None:
            continue
        if found.dtype == torch.bool:
            found = torch.zeros_like(found, dtype=query.dtype).masked_fill(found, -torch.inf)
        found = found if found.ndim == 2 and shape[0] == -1 else found.view(shape)
        mask = found if mask is None else mask + found
    mixed, looked = by_parts(query, key, value, mask, given["dropout_p"] if given["training"] else 0.0)
    mixed = mixed.permute(2, 0, 1, 3).reshape(length, samples, width)
    output = nn.functional.linear(mixed, given["out_proj_weight"], given["out_proj_bias"])
    if not batched:
        output, looked = output.squeeze(1), looked.squeeze(0)
    if not given["need_weights"]:
        return output, None
    return output, looked.mean(-3) if given["average_attn_weights"] else looked
