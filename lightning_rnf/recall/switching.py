"""A model that goes from one task's sub-network to another's between two forwards, or within a batch.

Entering a recall reads the model and hangs hooks into it. All that it leaves there is in attributes of modules. So it
is entered once, what differs is noted, and from then on it is put on and taken off by assignments: no weight is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_rnf.runtime import evaluating

_ABSENT = object()

_BY_KEY = frozenset({"_parameters", "_buffers"})
"""Dicts of a module in which an entry is changed; other dicts (of hooks, whose order counts) are changed as a whole."""

Recalls = Callable[[str], AbstractContextManager[None]]
"""The recall of a task, by its name."""


class Patch:
    """What a context changes in a module and its parts, which can be put on again after the context was left.

    Args:
        module: the model. Its own hooks are those of the context alone while the patch is on: whoever puts it on runs
            the model from inside of its own forward, and the user's hooks there have been called.
        context: entered and left once.

    Raises:
        ValueError: if the context writes to a tensor of the module: that can't be put on again.
    """

    def __init__(self, module: nn.Module, context: AbstractContextManager[None]) -> None:
        before = {part: _Attributes(part) for part in module.modules()}
        tensors = _Known.all_of(module)
        # What stands in the place of buffers may be needed backward later, though this forward is for inference.
        with torch.inference_mode(False), context:
            written = [tensor.name for tensor in tensors if tensor.is_written()]
            if written:
                raise ValueError(
                    f"{written[0]!r} is kept by another attribute of the model, too, so it has to be written to in a "
                    "recall, which can't be switched in one batch: recall one task after the other"
                )
            changes = [change for part, known in before.items() for change in known.changes(part, whole=part is module)]
        self._changes = changes
        self._tensors = _Known.all_of(module)  # anew: what was written to has been written back

    def fits(self) -> bool:
        """Whether the module is what it was when the patch was made: the same hooks where it has some, and tensors."""
        return all(known.fits() for known in self._tensors) and all(change.fits() for change in self._changes)

    @contextmanager
    def on(self) -> Iterator[None]:
        """Inside the context the module is as it was in the context that the patch was made of."""
        done = []
        try:
            for change in self._changes:
                done.append((change, change.holder.get(change.key, _ABSENT)))
                change.write(change.inside)
            yield
        finally:
            for change, value in reversed(done):
                change.write(value)


class Switch:
    """Patches of several recalls of one model, made when they are first asked for.

    Args:
        module: the model.
        recalls: by task.
    """

    def __init__(self, module: nn.Module, recalls: Recalls) -> None:
        self.module = module
        run = vars(module).get("forward", _ABSENT)
        outer = getattr(run, "switch", None)  # a recall that this one is inside of
        self.before: Any = outer.before if isinstance(outer, Switch) else run  # what the model runs by itself
        self._recalls = recalls
        self._patches: dict[str, Patch] = {}

    @contextmanager
    def to(self, task: str) -> Iterator[None]:
        """Inside the context the model runs as in the recall of the task: to be called from its own forward.

        Raises:
            What entering the recall raises.
        """
        patch = self._patches.get(task)
        if patch is None or not patch.fits():  # a hook has come; other weights were loaded, or moved to another device
            patch = self._patches[task] = Patch(self.module, self._recalls(task))
        with patch.on():
            yield


@contextmanager
def mixed(module: nn.Module, recalls: Recalls, tasks: Sequence[str], heads: Mapping[str, str]) -> Iterator[None]:
    """Inside the context each sample of a batch runs through the sub-network of its own task.

    The forward of the model is called once for each task that has samples in the batch, with those alone: with
    ``x[[i for i, name in enumerate(tasks) if name == task]]`` for each tensor ``x`` of its arguments that has as many
    entries in its first dimension as there are samples, and with all else as it is. So what comes of each sample is to
    the bit what the recall of its task makes of that part of the batch. Then outputs are put together: logits
    ``(N, C)``, of pixels ``(N, C, …)``, of tokens ``(N, …, C)``, are as wide as those of the task with the most
    classes, with ``-inf`` for classes that a task doesn't have.

    Args:
        module: the model.
        recalls: by task.
        tasks: of each sample, ``(N,)``, read at each forward.
        heads: name of the module that makes a task's logits, by task.

    Raises:
        ValueError: in the forward, if no input has so many samples, a task's head does not run, or what comes out
            can't be put together.
    """
    with switched(module, recalls) as switch:
        run = _Mixed(switch, tasks, heads)
        with own_forward(module, run):
            yield


@contextmanager
def switched(module: nn.Module, recalls: Recalls) -> Iterator[Switch]:
    """Inside the context the model is in eval mode and can be switched, from its own forward."""
    with evaluating(module):
        yield Switch(module, recalls)


class _Mixed:
    """In the place of a model's forward."""

    def __init__(self, switch: Switch, tasks: Sequence[str], heads: Mapping[str, str]) -> None:
        self.switch, self.tasks, self.heads = switch, tasks, heads

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tasks = list(self.tasks)
        places: dict[str, list[int]] = {}
        for index, task in enumerate(tasks):
            places.setdefault(task, []).append(index)
        module = self.switch.module
        if not tasks:
            raise ValueError("recall was given the tasks of no samples: name one task for each sample of the batch")
        if not _has_samples((args, kwargs), len(tasks)):
            raise ValueError(
                f"recall was given the tasks of {len(tasks)} samples, but no tensor that {type(module).__name__} gets "
                f"has {len(tasks)} entries in its first dimension"
            )
        outputs = []
        heads = [module.get_submodule(self.heads[task]) for task in places]
        with own_forward(module, self.switch.before):
            for task, indices in places.items():
                given = (args, kwargs) if len(places) == 1 else part_of_batch((args, kwargs), indices, len(tasks))
                with self.switch.to(task), _watched(module.get_submodule(self.heads[task])) as ran:
                    outputs.append(module(*given[0], **given[1]))
                if not ran:
                    raise ValueError(
                        f"the head of task {task!r}, {self.heads[task]!r}, did not run: a batch of several tasks can "
                        "be recalled only where the heads are a MultiHead, which is switched; recall one task after "
                        "the other"
                    )
        return joined_outputs(outputs, list(places.values()), heads)


@contextmanager
def own_forward(module: nn.Module, forward: Any) -> Iterator[None]:
    """Inside the context a module has this forward of its own, or, as `Switch.before` may say, that of its class."""
    change = _Change(vars(module), "forward", vars(module).get("forward", _ABSENT), forward, None)
    try:
        change.write(forward)
        yield
    finally:
        change.write(change.before)


@contextmanager
def unswitched(module: nn.Module) -> Iterator[None]:
    """Inside the context the model runs by itself, also inside of a recall that goes from task to task."""
    outer = getattr(vars(module).get("forward"), "switch", None)
    with own_forward(module, outer.before) if isinstance(outer, Switch) else nullcontext():
        yield


@contextmanager
def _watched(head: nn.Module) -> Iterator[list[bool]]:
    ran: list[bool] = []
    handle = head.register_forward_hook(lambda *_: ran.append(True))
    try:
        yield ran
    finally:
        handle.remove()


def _has_samples(given: Any, samples: int) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.shape[:1] == (samples,) for leaf in pytree.tree_leaves(given))


def part_of_batch(given: Any, indices: list[int], samples: int) -> Any:
    """Some samples of a batch: of tensors with so many entries in their first dimension; all else is as it is."""

    def of_part(tensor: Tensor) -> Tensor:
        return tensor[indices] if tensor.shape[:1] == (samples,) else tensor

    return apply_to_collection(given, Tensor, of_part)


def joined_outputs(outputs: list[Any], places: list[list[int]], heads: Sequence[nn.Module]) -> Any:
    """What came of each part of a batch, in the order of the batch: see `mixed`.

    Args:
        outputs: of each part, of any form.
        places: of each part's samples in the batch.
        heads: that made its logits.

    Raises:
        ValueError: if they have different forms, or are not of samples.
    """
    if len(outputs) == 1:
        return outputs[0]
    leaves, forms = zip(*(pytree.tree_flatten(output) for output in outputs), strict=True)
    if any(form != forms[0] for form in forms):
        raise ValueError(f"the outputs of two tasks have another form: {forms[0]} and {forms[-1]}")
    order = torch.tensor([index for indices in places for index in indices]).argsort()
    of_pixels = all(dimension_of_classes(head) == 1 for head in heads)
    joined = [_joined_leaf(leaf, places, order, of_pixels=of_pixels) for leaf in zip(*leaves, strict=True)]
    return pytree.tree_unflatten(joined, forms[0])


def dimension_of_classes(head: nn.Module) -> int:
    """Of the logits that a head makes of positions: the last of a linear layer, the second of a convolution."""
    weights = [one for one in head.parameters() if one.ndim > 1]
    return -1 if weights and weights[-1].ndim == 2 else 1


def _joined_leaf(parts: tuple[Any, ...], places: list[list[int]], order: Tensor, *, of_pixels: bool) -> Any:
    of_samples = [isinstance(part, Tensor) and part.ndim > 0 for part in parts]
    if not any(of_samples):
        if any(isinstance(part, Tensor) or (part is not parts[0] and part != parts[0]) for part in parts):
            raise ValueError(
                f"an output of type {type(parts[0]).__name__} is one for a whole batch: those of several tasks can't "
                "be put together, so recall one task after the other"
            )
        return parts[0]
    shapes = [tuple(part.shape) if of_sample else None for part, of_sample in zip(parts, of_samples, strict=True)]
    fit = [shape is not None and shape[0] == len(of_task) for shape, of_task in zip(shapes, places, strict=True)]
    axis = _where_they_differ(shapes)
    if not all(fit) or axis not in (None, -1, 1 if of_pixels else -1):
        raise ValueError(
            f"outputs of {[len(of_task) for of_task in places]} samples of several tasks have the shapes {shapes}: "
            "only what has one entry for each sample, and one shape but for the dimension of the classes (the last; of "
            "a convolution the second), can be put together, so recall one task after the other"
        )
    if axis is not None:
        widest = max(part.shape[axis] for part in parts)
        if any(part.shape[axis] < widest and not part.is_floating_point() for part in parts):
            raise ValueError(f"outputs of several tasks have the shapes {shapes} and are no logits")
        parts = tuple(_padded(part, widest, axis) for part in parts)
    return torch.cat(parts)[order.to(parts[0].device)]


def _where_they_differ(shapes: Sequence[tuple[int, ...] | None]) -> int | None:
    """The dimension behind the first in which shapes differ, -1 for the last; None: in none; 0: in several."""
    known = [shape for shape in shapes if shape is not None]
    if len({len(shape) for shape in known}) > 1:
        return 0
    differ = [axis for axis, sizes in enumerate(zip(*known, strict=True)) if axis and len(set(sizes)) > 1]
    if len(differ) > 1:
        return 0
    return None if not differ else -1 if differ[0] == len(known[0]) - 1 else differ[0]


def _padded(logits: Tensor, width: int, axis: int) -> Tensor:
    missing = width - logits.shape[axis]
    behind = [0, 0] * (logits.ndim - 1 - axis if axis > 0 else 0)  # pad counts from the last dimension
    return nn.functional.pad(logits, (*behind, 0, missing), value=-torch.inf) if missing else logits


class _Known:
    """A parameter or buffer of a module, and how often it was written to."""

    def __init__(self, name: str, holder: Mapping[str, Tensor | None], key: str) -> None:
        self.name, self.holder, self.key = name, holder, key
        self.tensor = holder[key]
        self.state = self._state()

    @staticmethod
    def all_of(module: nn.Module) -> list[_Known]:
        return [
            _Known(f"{name}.{key}" if name else key, holder, key)
            for name, part in module.named_modules()
            for holder in (part._parameters, part._buffers)
            for key in holder
            if holder[key] is not None
        ]

    def fits(self) -> bool:
        return self.holder.get(self.key) is self.tensor and not self.is_written()

    def is_written(self) -> bool:
        return self._state() != self.state

    def _state(self) -> tuple[Any, ...]:
        tensor: Any = self.tensor
        return (None if tensor.is_inference() else tensor._version, tensor.dtype, tensor.device)


class _Change:
    """An attribute of a module, or an entry of one of its dicts: what it is inside of a context."""

    def __init__(self, holder: dict[str, Any], key: str, before: Any, inside: Any, keys: list[Any] | None) -> None:
        self.holder, self.key, self.before, self.inside, self.keys = holder, key, before, inside, keys

    def fits(self) -> bool:
        now = self.holder.get(self.key, _ABSENT)
        return now is self.before and (self.keys is None or _same(list(now), self.keys))

    def write(self, value: Any) -> None:
        if value is _ABSENT:
            self.holder.pop(self.key, None)
        else:
            self.holder[self.key] = value


class _Attributes:
    """A module's ``__dict__``, and one level into its dicts and lists."""

    def __init__(self, part: nn.Module) -> None:
        self.values = dict(vars(part))
        self.contents = {name: value.copy() for name, value in self.values.items() if isinstance(value, (dict, list))}

    def changes(self, part: nn.Module, *, whole: bool) -> Iterator[_Change]:
        """What the part has come to have. The hooks of the ``whole`` model are the new ones alone."""
        own = vars(part)
        for name in dict.fromkeys((*self.values, *own)):
            before, now = self.values.get(name, _ABSENT), own.get(name, _ABSENT)
            if now is not before:
                yield _Change(own, name, before, now, None)
            elif name in self.contents:
                yield from self._changes_in(own, name, now, whole=whole)

    def _changes_in(self, own: dict[str, Any], name: str, now: Any, *, whole: bool) -> Iterator[_Change]:
        before: Any = self.contents[name]
        if isinstance(now, list):
            if len(now) != len(before) or any(one is not other for one, other in zip(now, before, strict=True)):
                yield _Change(own, name, now, list(now), list(before))
        elif name in _BY_KEY:
            for key in dict.fromkeys((*before, *now)):
                if now.get(key, _ABSENT) is not before.get(key, _ABSENT):
                    yield _Change(now, key, before.get(key, _ABSENT), now.get(key, _ABSENT), None)
        elif _differ(now, before) or (whole and "hooks" in name):  # also where there are none: one may come
            inside = type(now)((key, value) for key, value in now.items() if not whole or key not in before)
            yield _Change(own, name, now, inside, list(before))


def _same(one: list[Any], other: list[Any]) -> bool:
    """By identity for tensors, which are equal only entry by entry."""
    return len(one) == len(other) and all(
        a is b or (not isinstance(a, Tensor) and a == b) for a, b in zip(one, other, strict=True)
    )


def _differ(one: Mapping[Any, Any], other: Mapping[Any, Any]) -> bool:
    return list(one) != list(other) or any(one[key] is not other[key] for key in one)
