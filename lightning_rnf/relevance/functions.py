"""Rules for what a forward computes without a module: sums, products, pooling and activations that are functions.

Zennit's rules sit on modules. What a forward writes as a function, ``x + y`` or ``x * gate``, gets plain gradients,
which hand the whole relevance to both operands: 256 times in a ResNet-18. These rules need no canonizer written for a
class.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

STABILISER = 1e-6  # that of Zennit's epsilon rule

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
_AFFINE = "addmm addmv addbmm baddbmm"
# Sums of entries that an index puts together, as in message passing.
_GATHERED = "scatter_add index_add scatter_reduce index_reduce"
# Element by element, as the modules that Zennit lets relevance pass; ReLU's gradient does the same without a rule.
_ACTIVATIONS = (
    "sigmoid tanh silu gelu elu selu celu mish softplus softsign logsigmoid hardswish hardsigmoid hardtanh relu6 "
    "leaky_relu prelu rrelu tanhshrink softshrink hardshrink threshold clamp clip clamp_min clamp_max neg negative "
    "__neg__ batch_norm"
)


class FunctionRules(TorchFunctionMode):
    """Inside the context, functions of tensors of the graph conserve relevance.

    What is linear in its operands (sums, means, pooling, products with a constant matrix) splits relevance by
    contribution: the epsilon rule (equation 2 of the paper), for a sum ``R_x = x / (x + y) R``. What is bilinear (the
    product of two matrices of the graph) does so too, half to each factor, and a product element by element hands each
    factor half: the uniform rule of AttnLRP (Achtibat et al. 2024). Activations let
    relevance pass. What was broadcast gets the sum.

    Constants and parameters get no relevance: what is added to a tensor leaves its relevance whole, as do factors.
    """

    def __init__(self) -> None:
        super().__init__()
        self._active = False
        self._inside = 0

    def __enter__(self) -> FunctionRules:
        """Rules apply from here on."""
        self._active = True
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        """No longer."""
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        self._active = False

    @contextmanager
    def attached(self, module: nn.Module, ruled: Container[str]) -> Iterator[None]:
        """Let modules with rules of their own compute in peace, and the others have these rules in a backward, too.

        There they run again if they are checkpointed, and have to do what they did before.

        Args:
            module: a borrowed one.
            ruled: names of its modules with rules of their own.
        """
        running: list[tuple[nn.Module, Callable[[], None]]] = []  # and what to do when it ends

        def begin(name: str, module: nn.Module, args: Any) -> None:
            if name in ruled:
                self._inside += 1
                running.append((module, self._resume))
            elif not self._active and not self._inside:
                self.__enter__()
                running.append((module, partial(self.__exit__, None, None, None)))

        def end(module: nn.Module, args: Any, output: Any) -> None:
            if running and running[-1][0] is module:  # not if another hook kept it from running
                running.pop()[1]()

        with ExitStack() as hooks:
            for name, submodule in module.named_modules():
                hooks.callback(submodule.register_forward_pre_hook(partial(begin, name)).remove)
                hooks.callback(submodule.register_forward_hook(end, always_call=True).remove)
            yield

    def _resume(self) -> None:
        self._inside -= 1

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Called by torch in place of ``function``."""
        options = dict(kwargs or {})
        rule = None if self._inside or not torch.is_grad_enabled() else _RULES.get(function)
        if rule is None:
            return function(*args, **options)
        tensors = _of_graph(args, options)
        split = rule(tensors, args, options) if tensors else None
        return function(*args, **options) if split is None else _apply(split, function, tensors, args, options)


class _ByContribution(torch.autograd.Function):
    """``R_i = x_i (∂f/∂x_i)ᵀ R / (k f)``, where f is linear in each of its k factors: by Euler, the sum is R."""

    @staticmethod
    def forward(ctx: Any, call: Callable[..., Tensor], factors: int, *tensors: Tensor) -> Tensor:
        ctx.call, ctx.factors = call, factors
        # Copies, since a plain sum doesn't mind what is done in place to its operands afterwards.
        ctx.save_for_backward(*(tensor.clone() for tensor in tensors))
        return call(*tensors)

    @staticmethod
    def backward(ctx: Any, relevance: Tensor) -> tuple[Tensor | None, ...]:
        tensors = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        with torch.enable_grad():
            output = ctx.call(*tensors)
        total = ctx.factors * output.detach()
        share = relevance / (total + torch.where(total < 0, -STABILISER, STABILISER))
        gradients = torch.autograd.grad(output, tensors, share)
        return None, None, *(x.detach() * gradient for x, gradient in zip(tensors, gradients, strict=True))


class _Evenly(torch.autograd.Function):
    """``R_i = R / k``, summed over what was broadcast."""

    @staticmethod
    def forward(ctx: Any, call: Callable[..., Tensor], factors: int, *tensors: Tensor) -> Tensor:
        ctx.shapes = [tensor.shape for tensor in tensors]
        ctx.factors = factors
        return call(*tensors)

    @staticmethod
    def backward(ctx: Any, relevance: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *((relevance / ctx.factors).sum_to_size(shape) for shape in ctx.shapes)


_Split = tuple[type[torch.autograd.Function], int]  # how relevance is split, and among how many factors
_Rule = Callable[[list[Tensor], Sequence[Any], Mapping[str, Any]], "_Split | None"]


def _addition(tensors: list[Tensor], args: Sequence[Any], options: Mapping[str, Any]) -> _Split | None:
    return (_ByContribution, 1) if len(tensors) > 1 else None  # what is added to a constant keeps its relevance


def _difference(tensors: list[Tensor], args: Sequence[Any], options: Mapping[str, Any]) -> _Split:
    return _addition(tensors, args, options) or (_Evenly, 1)  # a gradient would turn the sign of what is subtracted


def _product(tensors: list[Tensor], args: Sequence[Any], options: Mapping[str, Any]) -> _Split:
    return _Evenly, len(tensors)


def _quotient(tensors: list[Tensor], args: Sequence[Any], options: Mapping[str, Any]) -> _Split | None:
    return (_Evenly, 1) if len(tensors) == 1 and tensors[0] is args[0] else None


def _linear(tensors: list[Tensor], args: Sequence[Any], options: Mapping[str, Any]) -> _Split:
    return _ByContribution, len(tensors)


def _affine(tensors: list[Tensor], args: Sequence[Any], options: Mapping[str, Any]) -> _Split:
    """Linear in what is added and in either of the factors together, as long as only one of these is of the graph."""
    factors = (*args[1:3], *(options.get(name) for name in ("mat1", "mat2", "mat", "vec", "batch1", "batch2")))
    return _ByContribution, max(1, sum(isinstance(one, Tensor) and one.requires_grad for one in factors))


def _gathered(tensors: list[Tensor], args: Sequence[Any], options: Mapping[str, Any]) -> _Split | None:
    reduce = options.get("reduce", next((one for one in args if isinstance(one, str)), "sum"))
    return None if reduce == "prod" else (_ByContribution, 1)  # of a largest or smallest it is the whole


def _activation(tensors: list[Tensor], args: Sequence[Any], options: Mapping[str, Any]) -> _Split | None:
    elementwise = len(tensors) == 1 and tensors[0] is args[0] and not options.get("training")
    return (_Evenly, 1) if elementwise else None


def _rules() -> dict[Any, _Rule]:
    """By function, in every form that torch has of it: of ``torch``, of ``Tensor``, functional, in place."""
    rules: dict[Any, _Rule] = {}
    for names, rule in (
        (_ADDITIONS, _addition),
        (f"{_DIFFERENCES} {_REVERSED_DIFFERENCES}", _difference),
        (_PRODUCTS, _product),
        (_QUOTIENTS, _quotient),
        (f"{_POOLING} {_LINEAR}", _linear),
        (_AFFINE, _affine),
        (_GATHERED, _gathered),
        (_ACTIVATIONS, _activation),
    ):
        for name in names.split():
            for form in (name, f"{name}_"):
                for namespace in (torch, Tensor, nn.functional):
                    if hasattr(namespace, form):
                        rules[getattr(namespace, form)] = rule
    return rules


_RULES = _rules()


def _of_graph(args: Sequence[Any], options: Mapping[str, Any]) -> list[Tensor]:
    """The tensors of the graph among the arguments, in their order."""
    found: list[Tensor] = []
    apply_to_collection((list(args), dict(options)), Tensor, lambda x: found.append(x) if x.requires_grad else None)
    return found


class _Operand:
    """Stands for a tensor of the graph among arguments."""


def _apply(
    split: _Split, function: Callable[..., Any], tensors: list[Tensor], args: Sequence[Any], options: dict[str, Any]
) -> Tensor:
    name = function.__name__
    in_place = name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))
    if _RULES[function] is _activation:  # a flag of theirs, by name or by position
        in_place = in_place or bool(options.get("inplace")) or any(argument is True for argument in args[1:])

    # What is written to in place gets a graph that leads here: with the tensor itself the graph would hold itself, and
    # nobody could free it.
    form = apply_to_collection((list(args), options), Tensor, lambda x: _Operand() if x.requires_grad else x)
    if in_place and isinstance(form[0][0], Tensor):
        form[0][0] = form[0][0].clone()  # a constant: in the backward it is no longer what it was

    def call(*given: Tensor) -> Tensor:
        following = iter(given)
        own_args, own_options = apply_to_collection(form, _Operand, lambda _: next(following))
        if in_place:
            own_args[0] = own_args[0].clone()
        result: Tensor = function(*own_args, **own_options)
        return result

    rule, factors = split
    if not in_place:
        result: Tensor = rule.apply(call, factors, *tensors)
        return result
    # Others may hold what is written to, or a view of it.
    written: Tensor = args[0]
    return written.copy_(rule.apply(call, factors, *(x.clone() if x is written else x for x in tensors)))
