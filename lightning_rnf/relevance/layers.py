"""Rules for layers: epsilon for linear ones, z⁺ for convolutions; activations pass relevance on.

What Zennit's ``EpsilonPlus`` gives, without hooks: those copy every input, keep what arrives at every output until the
batch ends, know the last run of a layer only, and let an activation that writes to its input write to a copy. Here a
layer keeps its input by reference, for each run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from zennit.types import Activation, Convolution

from lightning_rnf.anatomy import computes_itself
from lightning_rnf.relevance.splits import Call, Evenly, kept, not_a_view, stabilised

Forward = Callable[[Tensor], Tensor]
Rule = Callable[[Any, Forward, Tensor, Tensor], Tensor]
"""Of a layer, its forward, its input and the relevance of its output: the relevance of its input."""

_GATES = (nn.Sigmoid, nn.Hardsigmoid, nn.MultiheadAttention)  # their functions have rules of their own: see `functions`


def layer_rules(module: nn.Module, smooth: Callable[[], bool]) -> dict[str, Rule | None]:
    """The layers with a rule, by name, and which; None: relevance passes.

    A layer with a forward of its own is left out: what it computes with its weight is not known.

    Args:
        module: the model.
        smooth: asked in the backward, whether the network is none of ReLUs: then convolutions have `by_sign`.
    """
    found: dict[str, Rule | None] = {}
    for name, layer in module.named_modules():
        if computes_itself(layer) or isinstance(layer, _GATES):
            continue
        if isinstance(layer, Convolution):
            found[name] = partial(_plus_or_by_sign, smooth)
        elif isinstance(layer, nn.Linear):
            found[name] = epsilon
        elif isinstance(layer, Activation):
            found[name] = None
    return found


@contextmanager
def ruled(module: nn.Module, rules: Mapping[str, Rule | None], copies: Callable[[], bool]) -> Iterator[None]:
    """For a borrowed module: inside the context layers have these rules.

    Args:
        module: the model.
        rules: by name of layer.
        copies: whether layers keep copies of their inputs; asked when they run.
    """
    with ExitStack() as undo:
        for name, rule in rules.items():
            layer: Any = module.get_submodule(name)
            undo.callback(_put_back, layer, vars(layer).get("forward"))
            forward = layer.forward
            vars(layer)["forward"] = (
                partial(_passed, layer, forward) if rule is None else partial(_split, layer, forward, rule, copies)
            )
        yield


def _put_back(layer: nn.Module, forward: Any) -> None:
    if forward is None:
        del vars(layer)["forward"]
    else:
        vars(layer)["forward"] = forward


def _split(
    layer: Any, forward: Callable[..., Any], rule: Rule, copies: Callable[[], bool], *args: Any, **options: Any
) -> Any:
    x, run = _of_graph(forward, args, options)
    if x is None:
        return forward(*args, **options)
    return _Split.apply(layer, rule, run, x.clone() if copies() else x)


def _passed(layer: Any, forward: Callable[..., Any], *args: Any, **options: Any) -> Any:
    x, run = _of_graph(forward, args, options)
    if x is None:
        return forward(*args, **options)
    written = getattr(layer, "inplace", False)
    result = Evenly.apply(Call(lambda x: run(x.clone())) if written else Call(run), x)
    return x.copy_(result) if written else result  # others may hold what is written to, or a view of it


def _of_graph(
    forward: Callable[..., Any], args: tuple[Any, ...], options: Mapping[str, Any]
) -> tuple[Tensor | None, Forward]:
    """What is given first, by position or as ``input``, if relevance flows to it alone; and the forward of it."""
    rest, named = args[1:], {name: value for name, value in options.items() if args or name != "input"}
    x = args[0] if args else options.get("input")
    others = (one for one in (*rest, *named.values()) if isinstance(one, Tensor))
    flows = isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled()
    return x if flows and not any(one.requires_grad for one in others) else None, lambda x: forward(x, *rest, **named)


class _Split(torch.autograd.Function):
    """A layer whose rule splits relevance."""

    @staticmethod
    def forward(ctx: Any, layer: Any, rule: Rule, run: Forward, x: Tensor) -> Tensor:
        """What the layer says."""
        ctx.layer, ctx.rule, ctx.run = layer, rule, run
        ctx.save_for_backward(x)
        return not_a_view(run(x))

    @staticmethod
    def backward(ctx: Any, relevance: Tensor) -> tuple[Tensor | None, ...]:
        """The shares."""
        (x,) = kept(ctx)
        return None, None, None, ctx.rule(ctx.layer, ctx.run, x.detach(), relevance)


def epsilon(layer: Any, run: Forward, x: Tensor, relevance: Tensor) -> Tensor:
    """``R_i = x_i Σ_j w_ij R_j / (z_j + ε)`` (equation 2 of the paper)."""
    x, z = _run(layer, run, x, layer.weight, layer.bias)
    return _shares([x], [z], [relevance / stabilised(z.detach())])


def plus(layer: Any, run: Forward, x: Tensor, relevance: Tensor) -> Tensor:
    """z⁺: what speaks for an output shares its relevance (Bach et al. 2015; Montavon et al. 2017)."""
    bias = None if layer.bias is None else layer.bias.clamp(min=0)
    parts = [_run(layer, run, x.clamp(min=0), layer.weight.clamp(min=0), bias)]
    if x.numel() and not bool(x.amin() >= 0):  # behind a ReLU this part would be 0
        parts.append(_run(layer, run, x.clamp(max=0), layer.weight.clamp(max=0), None))
    inputs, outputs = [x for x, _ in parts], [z for _, z in parts]
    share = relevance / stabilised(sum((z.detach() for z in outputs[1:]), start=outputs[0].detach()))
    return _shares(inputs, outputs, [share] * len(parts))


def by_sign(layer: Any, run: Forward, x: Tensor, relevance: Tensor) -> Tensor:
    """Contributions of the output's own sign: ``R_i = z_i^s / Σ z_j^s R``, where s is the sign of z.

    z⁺ where outputs are positive, and the same for negative ones, whose relevance z⁺ would hand to the few
    contributions that speak against them, or to none. So no share is larger than its part of the output.

    What speaks for an output and what speaks against it are half the sum and half the difference of the layer and the
    layer of absolute values, so each of the two runs once.
    """
    bias = None if layer.bias is None else layer.bias.abs()
    (x, said), (size, absolute) = (
        _run(layer, run, x, layer.weight, layer.bias),
        _run(layer, run, x.abs(), layer.weight.abs(), bias),
    )
    with torch.no_grad():
        share = relevance / stabilised((absolute + said.abs()) / 2) / 2
        signed = torch.where(said > 0, share, -share)
    return _shares([x, size], [said, absolute], [signed, share])


def _plus_or_by_sign(smooth: Callable[[], bool], layer: Any, run: Forward, x: Tensor, relevance: Tensor) -> Tensor:
    """What a network is shows when its forward has run."""
    return (by_sign if smooth() else plus)(layer, run, x, relevance)


def _run(layer: Any, run: Forward, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """A leaf of a graph of its own, and what the layer makes of it with other parameters."""
    x = x.detach().requires_grad_()
    own = {"weight": layer.weight, "bias": layer.bias}
    # Weight norm of the old kind leaves a plain attribute.
    places = {name: vars(layer) if name in vars(layer) else layer._parameters for name in own}
    try:
        for name, value in (("weight", weight), ("bias", bias)):
            places[name][name] = value
        with torch.enable_grad():
            return x, run(x)
    finally:
        for name, value in own.items():
            places[name][name] = value


def _shares(inputs: list[Tensor], outputs: list[Tensor], at_outputs: list[Tensor]) -> Tensor:
    gradients = torch.autograd.grad(outputs, inputs, at_outputs)
    parts = [x.detach() * gradient for x, gradient in zip(inputs, gradients, strict=True)]
    return sum(parts[1:], start=parts[0])
