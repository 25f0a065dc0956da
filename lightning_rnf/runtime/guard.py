"""Borrow a module: whatever happens to it inside the context, it comes back as it was."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def borrowed(module: nn.Module) -> Iterator[None]:
    """Put back everything reachable from ``module`` when the context is left, after an exception too.

    Restored to *identity*: each submodule's attributes, and what its dicts, lists and sets hold (parameters, buffers,
    children, hooks; Zennit 1.0 replaces the parameters, its canonizers plant attributes); each parameter's and buffer's
    storage, ``grad`` and ``requires_grad``; the training flags. Restored by value: the buffers. The
    random states of torch (CPU and the module's device) are forked. Parameters' values must not be written in place.
    """
    modules = [(submodule, _Attributes(submodule)) for submodule in module.modules()]
    tensors = [(tensor, _Tensor(tensor)) for tensor in (*module.parameters(), *module.buffers())]
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    with _forked_random_state(module):
        try:
            for submodule, _ in modules:
                # A LightningModule that logs in its forward: these are no results of the user's.
                vars(submodule).update((name, _log_nothing) for name in ("log", "log_dict") if hasattr(submodule, name))
            yield
        finally:
            for submodule, attributes in modules:
                attributes.put_back(submodule)
            for tensor, saved in tensors:
                saved.put_back(tensor)
            with torch.no_grad():
                for buffer, value in buffers:
                    # Batch norm writes to its own behind the version counter; an expanded view can't be written to.
                    if not torch.equal(buffer, value):
                        buffer.copy_(value)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode and eager execution, every submodule by itself.

    Each one's own training flag comes back (some are in eval on purpose).
    """
    flags = [(submodule, submodule.training) for submodule in module.modules()]
    try:
        module.eval()
        with eager(), attention_by_its_parts():
            yield
    finally:
        for submodule, training in flags:
            submodule.training = training


def forget_gradient_hooks(module: nn.Module) -> None:
    """For a borrowed module: users' hooks would read relevance as gradients, and put nodes of theirs into the graph."""
    for submodule in module.modules():
        submodule._backward_hooks.clear()
        submodule._backward_pre_hooks.clear()


def eager() -> AbstractContextManager[Any]:
    """Run compiled modules eagerly: a compiled one ignores hooks that were added after its first call."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and importing the compiler takes seconds
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


@contextmanager
def recompiled() -> Iterator[None]:
    """For hooks that act while a compiled module trains: inside the context it is compiled anew, and after it again.

    Otherwise a compiled module would go on without hooks that were added after its first call.
    """
    _forget_compiled()
    try:
        yield
    finally:
        _forget_compiled()


def _forget_compiled() -> None:
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@contextmanager
def attention_by_its_parts() -> Iterator[None]:
    """Switch the fast path of torch's transformer encoders off, for all threads.

    It runs an encoder layer as one function. It is not taken where a hook hangs in the layer, but which layers have
    one depends on the task, and logits should not. And with a padding mask the encoder packs its input into a nested
    tensor without looking at hooks, and those, and the layers below, can't take one.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _forked_random_state(module: nn.Module) -> AbstractContextManager[Any]:
    devices = {parameter.device for parameter in module.parameters() if parameter.device.type != "cpu"}
    kind = next(iter(devices)).type if devices else "cuda"
    return torch.random.fork_rng([device for device in devices if device.type == kind], device_type=kind)


class _Attributes:
    """A submodule's ``__dict__``, and one level into its dicts, lists and sets."""

    def __init__(self, module: nn.Module) -> None:
        self.values = dict(vars(module))
        self.contents = {name: value.copy() for name, value in self.values.items() if _is_container(value)}

    def put_back(self, module: nn.Module) -> None:
        attributes = vars(module)
        attributes.clear()
        attributes.update(self.values)
        for name, content in self.contents.items():
            container = attributes[name]
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(content)


class _Tensor:
    """A parameter's or buffer's storage, gradient and flag."""

    def __init__(self, tensor: Tensor) -> None:
        self.data = tensor.data  # an alias, not a copy
        self.grad = tensor.grad
        self.requires_grad = tensor.requires_grad

    def put_back(self, tensor: Tensor) -> None:
        if tensor.dtype != self.data.dtype or tensor.data_ptr() != self.data.data_ptr():
            tensor.data = self.data
        tensor.grad = self.grad
        tensor.requires_grad_(self.requires_grad)


def _log_nothing(*args: Any, **kwargs: Any) -> None: ...


def _is_container(value: object) -> bool:
    # Exactly these: a subclass may count on never being emptied.
    return type(value).__name__ in {"dict", "OrderedDict", "list", "set"} and isinstance(value, (dict, list, set))
