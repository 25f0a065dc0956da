"""Which function has which rule: what `functions.FunctionRules` looks up.

`RULES` hold beside a composite of the user's own, too; `AWARE` are those of norms, attention and gates, and what they
ask of others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_rnf.relevance.attention import Softmax, Weighing, by_parts, of_several_heads, softmax_behind
from lightning_rnf.relevance.normalisers import NORMS, as_linear
from lightning_rnf.relevance.splits import (
    MOVES,
    ByContribution,
    Call,
    Evenly,
    Gated,
    ToOne,
    behind,
    is_of_a_sum,
    kind_of,
)

_ADDITIONS = "add __add__ __radd__ __iadd__"
_DIFFERENCES = "sub subtract __sub__ __isub__"
_REVERSED_DIFFERENCES = "rsub __rsub__"
_PRODUCTS = "mul multiply __mul__ __rmul__ __imul__"
_QUOTIENTS = "div divide true_divide __truediv__ __itruediv__"
_POOLING = (
    "sum mean avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d interpolate"
)
_LINEAR = (
    "linear matmul mm bmm einsum __matmul__ __rmatmul__ conv1d conv2d conv3d "
    "conv_transpose1d conv_transpose2d conv_transpose3d"
)
# Sums of a tensor and a product of two others.
_AFFINE = "addmm addmv addbmm baddbmm addr"
# Sums of entries that an index puts together, as in message passing.
_GATHERED = "scatter_add index_add scatter_reduce index_reduce"
# Element by element, as the modules that Zennit lets relevance pass; ReLU's gradient does the same without a rule.
_ACTIVATIONS = (
    "sigmoid tanh silu gelu elu selu celu mish softplus softsign logsigmoid hardswish hardsigmoid hardtanh relu6 "
    "leaky_relu prelu rrelu tanhshrink softshrink hardshrink threshold clamp clip clamp_min clamp_max neg negative "
    "__neg__"
)
# Beyond what a composite of the user's own leaves to these rules.
_POWERS = "pow __pow__ float_power"
_FROM_ZERO = "square abs absolute __abs__ erf sqrt sin expm1 log1p sinh atan arctan asinh arcsinh"
# Not 0 at 0: Taylor at what they read. A gradient alone would be relevance of what is 0 itself, such as the largest
# score in `exp(s - s.max())`, and what has made that from a difference would hand on any multiple of it.
_NOT_FROM_ZERO = "exp exp2 cos cosh log log2 log10"
_LENGTHS = "norm std"  # of degree 1: Euler's theorem holds for them, too
_SOFTMAX = "softmax"
# They let negative values through, which a ReLU doesn't.
_CURVED = "silu gelu elu selu celu mish softsign hardswish tanh tanhshrink glu"


class Network(Protocol):
    """What is known of the network whose forward runs."""

    def smooth(self) -> bool:
        """Whether sums have parts that cancel and relevance behind them all the same."""

    def note_sum(self) -> None:
        """Two tensors of the graph have been added."""

    def note_attention(self) -> None:
        """Values have been weighed."""


class Site:
    """A call that is to have a rule.

    Attributes:
        tensors: those of the graph among the arguments.
    """

    def __init__(
        self,
        network: Network,
        function: Callable[..., Any],
        tensors: list[Tensor],
        args: Sequence[Any],
        options: Mapping[str, Any],
    ) -> None:
        self.network, self.function, self.tensors, self.args, self.options = network, function, tensors, args, options

    def argument(self, position: int, name: str) -> Any:
        """By position or by name; None if it isn't given."""
        return self.args[position] if len(self.args) > position else self.options.get(name)

    @property
    def is_elementwise(self) -> bool:
        """Whether its first argument is all that it takes from the graph."""
        return len(self.tensors) == 1 and self.tensors[0] is self.argument(0, "input")


_Run = Callable[..., Tensor]
Split = Callable[[_Run, Sequence[Tensor]], Tensor]  # the function and its tensors of the graph to its value
_Rule = Callable[[Site], "Split | None"]


def _by_contribution(**details: Any) -> Split:
    return lambda run, tensors: ByContribution.apply(Call(run, **details), *tensors)


def _evenly(factors: int = 1, at_zero: float | None = None) -> Split:
    return lambda run, tensors: Evenly.apply(Call(run, factors=factors, at_zero=at_zero), *tensors)


def _to_one(index: int) -> Split:
    return lambda run, tensors: ToOne.apply(Call(run), index, *tensors)


# -- rules that hold in any case --------------------------------------------------------------------------------------


def _addition(site: Site) -> Split | None:
    # What is added to a constant keeps its relevance.
    return _by_contribution(sums=True) if len(site.tensors) > 1 else None


def _difference(site: Site) -> Split:
    return _addition(site) or _evenly()  # a gradient would turn the sign of what is subtracted


def _product(site: Site) -> Split:
    return _evenly(len(site.tensors))


def _quotient(site: Site) -> Split | None:
    return _evenly() if site.is_elementwise else None


def _linear(site: Site) -> Split:
    return _by_contribution(factors=len(site.tensors))


def _affine(site: Site) -> Split:
    """Linear in what is added and in either of the factors together, as long as only one of these is of the graph."""
    named = ("mat1", "mat2", "mat", "vec", "vec1", "vec2", "batch1", "batch2")
    factors = (*site.args[1:3], *(site.options.get(name) for name in named))
    return _by_contribution(factors=max(1, sum(isinstance(one, Tensor) and one.requires_grad for one in factors)))


def _gathered(site: Site) -> Split | None:
    reduce = site.options.get("reduce", next((one for one in site.args if isinstance(one, str)), "sum"))
    return None if reduce == "prod" else _by_contribution()  # of a largest or smallest it is the whole


def _activation(site: Site) -> Split | None:
    return _evenly() if site.is_elementwise and not site.options.get("training") else None


# -- and those of networks that are not made of ReLUs -----------------------------------------------------------------


def _added(site: Site) -> Split | None:
    if len(site.tensors) > 1:
        site.network.note_sum()
        return _by_contribution(sums=True)
    given = [*site.args[:2], *(site.options[name] for name in ("input", "other") if name in site.options)]
    (constant,) = [x for x in given if x is not site.tensors[0]]
    if isinstance(constant, Tensor):
        return _by_contribution(biased=_says_something(constant))
    if not isinstance(constant, (int, float)) or constant == 0:
        return None
    turned = site.function.__name__.strip("_") in {"sub", "subtract", "isub"} and given[0] is site.tensors[0]
    at_zero = None if "alpha" in site.options else float(-constant if turned else constant)
    return _by_contribution(biased=True, at_zero=at_zero)


def _subtracted(site: Site) -> Split | None:
    return _added(site) or _evenly()


def _says_something(constant: Tensor) -> bool:
    """Not of masks, whose numbers are the smallest that there are."""
    if not constant.is_floating_point():
        return bool(constant.any())
    return bool(((constant != 0) & (constant > torch.finfo(constant.dtype).min / 4)).any())


def _multiplied(site: Site) -> Split:
    if len(site.tensors) == 1:
        return _evenly()
    for index, factor in enumerate(site.tensors):
        if _is_normaliser(factor):
            return _to_one(1 - index)
    for index, factor in enumerate(site.tensors):
        node = behind(factor, MOVES)
        if getattr(node, "at_zero", None) is not None:
            return _gated_by(index, node, site.network.smooth)
    return _evenly(len(site.tensors))


def _gated_by(index: int, node: Any, smooth: Callable[[], bool]) -> Split:
    return lambda run, tensors: Gated.apply(Call(run), smooth, index, node, *tensors)


def _is_normaliser(tensor: Tensor) -> bool:
    """One over something, or over the root of something."""
    node = behind(tensor, MOVES, scaled=True)
    if node is None:
        return False
    exponent = getattr(node, "_saved_exponent", None)
    return kind_of(node) in {"Rsqrt", "Reciprocal"} or (isinstance(exponent, (int, float)) and exponent < 0)


def _divided(site: Site) -> Split | None:
    return _to_one(0) if site.tensors[0] is site.args[0] else None


def _linear_or_weighing(site: Site) -> Split:
    if len(site.tensors) == 2:
        for first, tensor in enumerate(site.tensors):
            if (softmax := softmax_behind(tensor)) is not None:
                site.network.note_attention()
                return _weighed_by(*softmax, first)
        return _by_contribution(factors=2, exact=True)
    bias = site.argument(2, "bias")
    return _by_contribution(factors=len(site.tensors), biased=isinstance(bias, Tensor) and bool(bias.any()))


def _weighed_by(softmax: Any, told: bool, first: int) -> Split:
    softmax.weighing = True
    return lambda run, tensors: Weighing.apply(Call(run), softmax if told else None, first, *tensors)


def _affine_biased(site: Site) -> Split:
    constant = site.argument(0, "input")
    if any(constant is tensor for tensor in site.tensors):
        return _affine(site)
    return _by_contribution(factors=len(site.tensors), biased=_says_something(constant))


def _power(site: Site) -> Split | None:
    exponent = site.argument(1, "exponent")
    return _evenly() if site.is_elementwise and isinstance(exponent, (int, float)) and exponent > 0 else None


def _gate(site: Site) -> Split | None:
    return _evenly(at_zero=0.5) if site.is_elementwise else None


def _taylor(site: Site) -> Split | None:
    return _by_contribution() if site.is_elementwise else None


def _normed(site: Site) -> Split | None:
    linear = as_linear(site.function, site.args, site.options) if site.is_elementwise else None
    return None if linear is None else _by_contribution(linear=linear[0], exact=True, biased=linear[1])


def _batch_normed(site: Site) -> Split | None:
    """With given statistics it is affine. Its shift takes a share where a sum is read; else relevance passes."""
    if not site.is_elementwise:
        return None
    of_batch = site.argument(5, "training")
    return _by_contribution(biased=True) if not of_batch and is_of_a_sum(site.tensors[0]) else _evenly()


def _weights(site: Site) -> Split | None:
    dim = site.argument(1, "dim")
    if not site.is_elementwise or not isinstance(dim, int):
        return None
    return lambda run, tensors: Softmax.apply(Call(run), dim, *tensors)


def _attention_by_parts(args: Sequence[Any], options: Mapping[str, Any]) -> Tensor:
    return by_parts(*args, **options)[0]


def _gated_unit(args: Sequence[Any], options: Mapping[str, Any]) -> Tensor:
    x = args[0] if args else options["input"]
    gated, gate = x.chunk(2, args[1] if len(args) > 1 else options.get("dim", -1))
    result: Tensor = gated * gate.sigmoid()
    return result


def _named(*groups: tuple[str, _Rule]) -> dict[Any, _Rule]:
    """By function, in every form that torch has of it: of ``torch``, of ``Tensor``, functional, in place."""
    return {function: rule for names, rule in groups for function in _forms(names)}


def _forms(names: str) -> list[Any]:
    spaces = (torch, Tensor, nn.functional)
    forms = [form for name in names.split() for form in (name, f"{name}_")]
    return [getattr(space, form) for form in forms for space in spaces if hasattr(space, form)]


RULES = _named(
    (_ADDITIONS, _addition),
    (f"{_DIFFERENCES} {_REVERSED_DIFFERENCES}", _difference),
    (_PRODUCTS, _product),
    (_QUOTIENTS, _quotient),
    (f"{_POOLING} {_LINEAR}", _linear),
    (_AFFINE, _affine),
    (_GATHERED, _gathered),
    (f"{_ACTIVATIONS} batch_norm", _activation),
)
AWARE = _named(
    (_ADDITIONS, _added),
    (f"{_DIFFERENCES} {_REVERSED_DIFFERENCES}", _subtracted),
    (_PRODUCTS, _multiplied),
    (_QUOTIENTS, _divided),
    (_LINEAR, _linear_or_weighing),
    (_AFFINE, _affine_biased),
    (_POWERS, _power),
    (_FROM_ZERO, _activation),
    ("sigmoid hardsigmoid", _gate),
    (f"{_LENGTHS} {_NOT_FROM_ZERO}", _taylor),
    ("batch_norm", _batch_normed),
    (_SOFTMAX, _weights),
) | {**dict.fromkeys(NORMS, _normed), torch.linalg.vector_norm: _taylor, torch.special.softmax: _weights}
PARTS: dict[Any, Callable[[Sequence[Any], Mapping[str, Any]], Any]] = {
    nn.functional.scaled_dot_product_attention: _attention_by_parts,
    nn.functional.multi_head_attention_forward: of_several_heads,
    nn.functional.glu: _gated_unit,
}
FLAGGED = frozenset(_forms(_ACTIVATIONS))
"""They may be told to write to their input."""

CURVED = frozenset(_forms(_CURVED))
