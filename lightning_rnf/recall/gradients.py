"""Whether a parameter asks for gradients changes no bit of what is recalled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from lightning_rnf.anatomy import SilentHook


@contextmanager
def asking_none(module: nn.Module) -> Iterator[None]:
    """While the module or a part of it runs without gradients, no parameter asks for them; all do afterwards that did.

    Where an input of three or more dimensions is not contiguous, torch's `matmul` and `linear` add up in another order
    for a weight that asks for gradients, under `torch.no_grad` too. So a head would be rounded in one way when its task
    ends and in another when the next one learns.
    """
    flags = _Flags(module)
    begin, end = _Begin(flags), _End(flags)
    with ExitStack() as hooks:
        for part in module.modules():
            hooks.callback(part.register_forward_pre_hook(begin, prepend=True).remove)
            hooks.callback(part.register_forward_hook(end, always_call=True).remove)
        try:
            yield
        finally:
            flags.give_back()


class _Flags:
    """Of a module's parameters, while some part of it runs."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.running = 0
        self.held = False
        self.asking: list[nn.Parameter] = []

    def take(self) -> None:
        self.held = True
        self.asking = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        for parameter in self.asking:
            parameter.requires_grad_(False)

    def put_back(self) -> None:
        self.held = False
        while self.asking:
            self.asking.pop().requires_grad_(True)

    def give_back(self) -> None:
        self.running = 0
        self.put_back()


def _is_transformed() -> bool:
    """Whether flags can't be set: inside of `torch.func`'s transforms, or of what makes a graph."""
    return torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling()


class _Begin(SilentHook):
    def __init__(self, flags: _Flags) -> None:
        self.flags = flags

    def __call__(self, part: nn.Module, args: Any) -> None:
        flags = self.flags
        if torch.is_grad_enabled():
            flags.put_back()  # a part that runs with gradients, inside of one without or after one that was broken off
        elif not flags.held and not _is_transformed():
            flags.take()
        flags.running += 1


class _End(SilentHook):
    def __init__(self, flags: _Flags) -> None:
        self.flags = flags

    def __call__(self, part: nn.Module, args: Any, output: Any) -> None:
        self.flags.running -= 1
        if self.flags.running <= 0:  # below: a hook of others failed before ours began
            self.flags.give_back()
