"""Rules for what a forward computes without a module: sums, products, norms, attention, pooling, activations.

Zennit's rules sit on modules. What a forward writes as a function, ``x + y`` or ``x * gate``, gets plain gradients,
which hand the whole relevance to both operands: 256 times in a ResNet-18. These rules need no canonizer written for a
class. Modules that Zennit has no rule for (LayerNorm, Softmax, MultiheadAttention) call functions, and have theirs.
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

from lightning_rnf.relevance.normalisers import NORMS
from lightning_rnf.relevance.rules import AWARE, CURVED, FLAGGED, PARTS, RULES, Site, Split
from lightning_rnf.relevance.splits import may_be_copied


class FunctionRules(TorchFunctionMode):
    """Inside the context, functions of tensors of the graph conserve relevance.

    What is linear in its operands (sums, means, pooling, products with a constant matrix) splits relevance by
    contribution: the epsilon rule (equation 2 of the paper), for a sum ``R_x = x / (x + y) R``. What is bilinear (the
    product of two matrices of the graph) does so too, half to each factor, and a product element by element hands each
    factor half: the uniform rule of AttnLRP (Achtibat et al. 2024). Activations let
    relevance pass. What was broadcast gets the sum.

    A norm is the linear map of its numerator (`normalisers`), also where it is written by hand: a factor that is
    ``rsqrt`` of something and what a tensor is divided by are constants. Attention: `attention`. A gate has half of
    what it adds to its value at 0 (`splits.Gated`). Parameters get no relevance. As factors they leave it whole, and
    what is added to a tensor takes its share, like a bias: without it, what is nearly 0 before would get much.

    Args:
        aware: False: norms, softmax and attention are plain gradients, added constants leave relevance whole. So it is
            beside a composite of the user's own.

    Attributes:
        copies: whether rules keep copies of their tensors everywhere. A plain sum doesn't mind what is done in place
            to its operands afterwards, rules do (`splits.WrittenToError`, but where it can't be seen: there they always
            keep copies); but these take as much memory again.
    """

    def __init__(self, *, aware: bool = True) -> None:
        super().__init__()
        self.copies = False
        self._rules = RULES | AWARE if aware else RULES
        self._parts = PARTS if aware else {}
        self._curved = self._summed = self._mixed = False  # what has run so far
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

    def smooth(self) -> bool:
        """Whether sums have parts that cancel and relevance behind them all the same.

        That is where functions that let negative values through ran beside sums, or norms, or attention. In a chain, or
        with ReLUs, what sums to nearly 0 has nearly no relevance.
        """
        return self._mixed or (self._curved and self._summed)

    def keeps_copies(self) -> bool:
        """Whether rules keep copies of their tensors now."""
        return self.copies or may_be_copied()

    def note_sum(self) -> None:
        """Two tensors of the graph have been added."""
        self._summed = True

    def note_attention(self) -> None:
        """Values have been weighed."""
        self._mixed = True

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
        self._curved = self._curved or function in CURVED
        self._mixed = self._mixed or function in NORMS
        if self._inside or not torch.is_grad_enabled():
            return function(*args, **options)
        tensors = _of_graph(args, options)
        if tensors and (parts := self._parts.get(function)):
            super().__enter__()  # type: ignore[no-untyped-call]  # torch leaves it while this runs
            try:
                result = parts(args, options)
            finally:
                super().__exit__(None, None, None)  # type: ignore[no-untyped-call]
            return function(*args, **options) if result is None else result
        rule = self._rules.get(function) if tensors else None
        split = rule(Site(self, function, tensors, args, options)) if rule else None
        if split is None:
            return function(*args, **options)
        return _apply(split, function, tensors, args, options, copies=self.keeps_copies())


def _of_graph(args: Sequence[Any], options: Mapping[str, Any]) -> list[Tensor]:
    """The tensors of the graph among the arguments, in their order."""
    found: list[Tensor] = []
    apply_to_collection((list(args), dict(options)), Tensor, lambda x: found.append(x) if x.requires_grad else None)
    return found


class _Operand:
    """Stands for a tensor of the graph among arguments."""


def _apply(
    split: Split,
    function: Callable[..., Any],
    tensors: list[Tensor],
    args: Sequence[Any],
    options: dict[str, Any],
    *,
    copies: bool,
) -> Tensor:
    name = function.__name__
    in_place = name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))
    if function in FLAGGED:  # by name or by position
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

    written: Tensor | None = args[0] if in_place else None
    result = split(call, [x.clone() if copies or x is written else x for x in tensors])
    # Others may hold what is written to, or a view of it.
    return result if written is None else written.copy_(result)
