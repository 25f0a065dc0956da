"""Targets of any form as rows: one for each sample, pixel, token or number that counts. All else sees only rows.

Three kinds come out of it, and the form of a target tells them apart: class indices ``(rows,)`` of integers, several
labels ``(rows, classes)`` of integers that are 0 or 1, and numbers ``(rows, columns)`` of floats.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss

IGNORED = -100
"""The label of what does not count: torch's losses leave it out by default."""

FAR = 100.0
"""So far below a row's least logit stand the columns of other heads: ``exp`` of it is nothing beside 1 in float32."""


class OneHead(NamedTuple):
    """One of several heads at once.

    Attributes:
        key: of its logits and its labels.
        classes: that it has.
        axis: of its output, that counts them; None: see `class_axes`.
    """

    key: Any
    classes: int
    axis: int | None = None


@dataclass(frozen=True)
class Layout:
    """What the first batch has shown of a task's targets, where the form of another batch alone leaves it open.

    Attributes:
        axis: of the output, that counts classes: 1 (torch's convention) or -1; None: not known.
        numbers: whether targets of floats are numbers, although in a batch they may all be 0 or 1; None: not known.
        heads: of several heads at once, in the order of their columns; None: there is one.
    """

    axis: int | None = None
    numbers: bool | None = None
    heads: tuple[OneHead, ...] | None = None


def class_axes(output: Tensor, target: Tensor) -> tuple[int, ...]:
    """Which dimension of an output may count classes or columns, beside this target: 1, -1, either, or none.

    >>> class_axes(torch.zeros(2, 9, 5), torch.zeros(2, 5)), class_axes(torch.zeros(2, 5, 9), torch.zeros(2, 5))
    ((1,), (-1,))
    >>> class_axes(torch.zeros(2, 5, 5), torch.zeros(2, 5)), class_axes(torch.zeros(2, 5, 5), torch.zeros(3, 5))
    ((1, -1), ())
    """
    shape, wanted = tuple(output.shape), tuple(target.shape)
    if not shape:
        return ()
    if shape == wanted:
        return (1, -1) if len(shape) > 2 else (1,)
    second, last = shape[:1] + shape[2:] == wanted, shape[:-1] == wanted
    return (1,) * (second and len(shape) > 1) + (-1,) * (last and len(shape) > 2)


def in_rows(values: Tensor, axis: int) -> Tensor:
    """Values whose classes, or columns, are counted by a dimension: ``(rows, columns)``."""
    if values.ndim < 3:
        return values if values.ndim == 2 else values.unsqueeze(1)
    return values.movedim(axis, -1).flatten(0, -2)


def flattened(
    output: object, target: object, layout: Layout | None = None, ignored: Collection[int] = (IGNORED,)
) -> tuple[Tensor, Tensor]:
    """What ``predict`` has returned, as rows; what does not count is left out. What is in rows already stays as it is.

    Args:
        output: floats ``(N, classes)``, ``(N, classes, …)`` or ``(N, …, classes)``; of numbers also ``(N,)``.
        target: class indices, integers ``(N,)`` or ``(N, …)``: those in ``ignored`` do not count, and of positions
            (pixels, tokens) none that is below 0. Or 0 and 1 alone, in the form of the output, for several labels. Or
            numbers: floats in the form of the output, which may have a dimension of 1 more. Of several heads at once
            output and target are dicts of the same keys, of class indices: see `side_by_side`.
        layout: what is known of the task's other batches; None: nothing. Where classes could be counted by two
            dimensions, it is the second.
        ignored: labels of what does not count.

    Returns:
        ``(rows, classes)``, and ``(rows,)`` or ``(rows, classes)``: see above.

    Raises:
        TypeError: if they are no tensors of floats and of labels or numbers.
        ValueError: if their forms disagree, or a label lies outside the head.
    """
    layout = layout or Layout()
    if isinstance(output, Mapping) and isinstance(target, Mapping):
        heads = layout.heads or heads_of(output, target, ignored)
        return side_by_side(_of_each(output, target, heads, ignored), [head.classes for head in heads])
    if not isinstance(output, Tensor) or not output.is_floating_point():
        raise TypeError(f"logits are {_described(output)}, expected a floating point tensor (N, classes){_way(output)}")
    if not isinstance(target, Tensor) or target.is_complex():
        raise TypeError(f"labels are {_described(target)}, expected an integer tensor (N,) of class indices")
    axes = class_axes(output, target)
    if not axes or (output.ndim == 1 and not target.is_floating_point()):
        raise ValueError(
            f"logits of shape {tuple(output.shape)} and labels of shape {tuple(target.shape)}, expected (N, classes) "
            "and (N,) of class indices, or (N, classes) of 0 and 1 for several labels a sample; of pixels "
            "(N, classes, …) and (N, …), of tokens (N, T, classes) and (N, T), of numbers floats of one shape"
        )
    axis = layout.axis if layout.axis in axes else axes[0]
    rows = in_rows(output, axis)
    if target.shape == output.shape:
        return rows, _in_columns(in_rows(target, axis), layout)
    return _of_positions(rows, target, rows.shape[1], layout, ignored)


def in_front(
    features: Tensor, target: Tensor, outputs: int, layout: Layout | None = None, ignored: Collection[int] = (IGNORED,)
) -> tuple[Tensor, Tensor]:
    """As `flattened`, where in the place of the output is what the layer that makes it was given.

    Args:
        features: in the form of the output, with as many features in the place of the classes as the layer hears.
        target: as it came with them.
        outputs: how many outputs the layer has.
        layout: as for `flattened`.
        ignored: as for `flattened`.
    """
    layout = layout or Layout()
    axis = layout.axis or (class_axes(features, target) or (1,))[0]
    rows = in_rows(features, axis)
    if target.ndim == features.ndim:
        return rows, _in_columns(in_rows(target, axis), layout)
    return _of_positions(rows, target, outputs, layout, ignored)


def side_by_side(parts: Mapping[int, tuple[Tensor, Tensor]], widths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Rows of several heads as rows of one, whose classes are those of all heads, one head after the other.

    Each head's targets stay rows of their own. In the columns of other heads stands what is never the largest and adds
    nothing to a softmax: `FAR` below the row's least logit. So answers, probabilities and the true class's logit are
    what they are in the head alone.

    Args:
        parts: by a head's place, ``(rows, classes)`` and class indices ``(rows,)``.
        widths: classes of all heads, of those too that have no rows here.

    >>> side_by_side({0: (torch.zeros(1, 2), torch.tensor([1])), 1: (torch.ones(1, 1), torch.tensor([0]))}, [2, 1])
    (tensor([[   0.,    0., -100.],
            [ -99.,  -99.,    1.]]), tensor([1, 2]))
    """
    outputs, labels = [], []
    for place, (rows, target) in parts.items():
        before, behind = sum(widths[:place]), sum(widths[place + 1 :])
        least = torch.finfo(rows.dtype).min
        low = (rows.detach().amin(dim=1, keepdim=True).double() - FAR).clamp(min=least).to(rows)
        outputs.append(torch.cat([low.expand(-1, before), rows, low.expand(-1, behind)], dim=1))
        labels.append(target + before)
    return torch.cat(outputs), torch.cat(labels)


def heads_of(
    output: Mapping[Any, object],
    target: Mapping[Any, object],
    ignored: Collection[int] = (IGNORED,),
    axis_of: Callable[[Tensor], int | None] = lambda output: None,
) -> tuple[OneHead, ...]:
    """The heads of a batch, in the order of their keys, whichever order the batch has them in.

    Args:
        output: of each.
        target: of each.
        ignored: as for `flattened`.
        axis_of: which dimension of an output counts classes where two might; None: not known.

    Raises:
        TypeError, ValueError: as `flattened`, naming the head.
    """
    found = []
    for key in sorted(output, key=str):
        one: Any = output[key]
        known = isinstance(one, Tensor) and isinstance(target.get(key), Tensor)
        axes = class_axes(one, target[key]) if known else ()  # type: ignore[arg-type]
        found.append(OneHead(key, 0, axis_of(one) if len(axes) > 1 else None))
    parts = _of_each(output, target, found, ignored)
    return tuple(head._replace(classes=parts[place][0].shape[1]) for place, head in enumerate(found))


def largest_logits(
    output: object,
    target: object,
    columns: int,
    layout: Layout | None = None,
    ignored: Collection[int] = (IGNORED,),
) -> Tensor:
    """The largest logit of each row, ``(rows,)``, of a head that labels of another task are shown to.

    Args:
        output: of that head, as for `flattened`: it may be narrower or wider than the labels' own.
        target: as it came with the batch; already checked beside the output of its own head.
        columns: that its own head has.
        layout: as for `flattened`.
        ignored: as for `flattened`.

    Raises:
        TypeError: if outputs are no tensors, or dicts of such.
        ValueError: if of several heads at once one has no output.
    """
    if isinstance(output, Mapping) and isinstance(target, Mapping):
        if lacking := [key for key in target if key not in output]:
            raise ValueError(f"labels are of the heads {list(target)}, but another task has no head {lacking[0]!r}")
        parts = (largest_logits(output[key], target[key], columns, None, ignored) for key in sorted(target, key=str))
        return torch.cat(list(parts))
    if not isinstance(output, Tensor) or not isinstance(target, Tensor):
        raise TypeError(f"logits are {_described(output)} and labels {_described(target)}, expected tensors")
    return in_front(output, target, columns, layout, ignored)[0].amax(dim=1)


def rows_of_samples(
    chosen: Tensor,
    output: object,
    target: object,
    layout: Layout | None = None,
    ignored: Collection[int] = (IGNORED,),
) -> Tensor:
    """Which rows of `flattened` are of chosen samples: bool ``(rows,)``.

    Args:
        chosen: bool ``(N,)``.
        output: as for `flattened`.
        target: as for `flattened`.
        layout: as for `flattened`.
        ignored: as for `flattened`.

    Raises:
        ValueError: if an output has not one entry for each sample, or as `flattened`.

    >>> rows_of_samples(torch.tensor([True, False]), torch.zeros(2, 3, 2), torch.tensor([[1, -100], [0, 2]]))
    tensor([ True, False, False])
    """

    def marked(one: Any) -> Any:
        if not isinstance(one, Tensor) or len(one) != len(chosen):
            found = f"of shape {tuple(one.shape)}" if isinstance(one, Tensor) else _described(one)
            raise ValueError(
                f"logits are {found} for {len(chosen)} samples, whose tasks differ: let predict return an entry for "
                "each sample, (N, classes), or of positions (N, classes, …) or (N, …, classes), without flattening them"
            )
        return chosen.to(one).view(-1, *[1] * (one.ndim - 1)).expand_as(one)

    of_each = {key: marked(one) for key, one in output.items()} if isinstance(output, Mapping) else marked(output)
    return flattened(of_each, target, layout, ignored)[0].amax(dim=1) > 0


def is_numbers(target: Tensor) -> bool:
    """Whether rows are of numbers."""
    return target.is_floating_point()


def ignored_by(module: nn.Module) -> frozenset[int]:
    """Labels of what does not count: torch's, and the ``ignore_index`` of every loss that is a part of the module."""
    stated = (getattr(part, "ignore_index", None) for part in module.modules() if isinstance(part, _Loss))
    return frozenset({IGNORED, *(label for label in stated if isinstance(label, int))})


def _of_each(
    outputs: Mapping[Any, object], targets: Mapping[Any, object], heads: Sequence[OneHead], ignored: Collection[int]
) -> dict[int, tuple[Tensor, Tensor]]:
    """Rows and class indices of each head that a batch has, by its place."""
    places = {head.key: place for place, head in enumerate(heads)}
    if not outputs or outputs.keys() != targets.keys() or not outputs.keys() <= places.keys():
        raise ValueError(
            f"logits are a dict of {list(outputs)}, labels of {list(targets)}"
            + (f", and the task's first batch had {list(places)}" if outputs.keys() - places.keys() else "")
            + f": several heads at once have the same keys in both; labels of what a batch lacks are {IGNORED}"
        )
    found = {}
    for key in sorted(outputs, key=str):
        head = heads[places[key]]
        try:
            rows, target = flattened(outputs[key], targets[key], Layout(head.axis), ignored)
        except (TypeError, ValueError) as error:
            raise type(error)(f"head {key!r}: {error}") from error
        if target.ndim > 1:
            kind = "numbers" if is_numbers(target) else "several labels a sample"
            raise ValueError(
                f"head {key!r} has {kind}: several heads at once are counted together where each has class indices; "
                "let predict return this head's logits and targets alone, or leave it out"
            )
        if head.classes and rows.shape[1] != head.classes:
            raise ValueError(f"head {key!r} has {rows.shape[1]} outputs, and had {head.classes} in the first batch")
        found[places[key]] = rows, target
    return found


def _in_columns(wanted: Tensor, layout: Layout) -> Tensor:
    """Targets with a column for each of the output's: several labels, or numbers."""
    if not (layout.numbers and is_numbers(wanted)) and bool(((wanted == 0) | (wanted == 1)).all()):
        return wanted.long()
    if not is_numbers(wanted) or layout.numbers is False:
        lowest, highest = wanted.min().item(), wanted.max().item()
        known = ", as in the task's first batch: numbers that all are 0 or 1 there look like labels" * is_numbers(
            wanted
        )
        raise ValueError(f"labels (N, classes) range from {lowest} to {highest}, expected 0 and 1 alone{known}")
    return _numbers(wanted, layout)


def _of_positions(
    rows: Tensor, target: Tensor, columns: int, layout: Layout, ignored: Collection[int]
) -> tuple[Tensor, Tensor]:
    """Targets with one value for each row: class indices, or numbers of one column."""
    if is_numbers(target):
        if columns > 1:
            raise TypeError(
                f"labels are {_described(target)}, expected an integer tensor {tuple(target.shape)} of class indices, "
                f"since the head has {columns} outputs; numbers have as many columns as the output"
            )
        return rows, _in_columns(target.reshape(-1, 1), layout)
    labels = target.reshape(-1).long()
    left_out = labels < 0 if target.ndim > 1 else torch.zeros_like(labels, dtype=torch.bool)
    for label in ignored:
        left_out = left_out | (labels == label)
    if bool(left_out.any()):
        rows, labels = rows[~left_out], labels[~left_out]
    lowest, highest = (labels.min().item(), labels.max().item()) if labels.numel() else (0, 0)
    if not 0 <= lowest <= highest < columns:
        binary = "; two classes of one logit are labels (N, 1), numbers are floats" if columns == 1 else ""
        raise ValueError(
            f"labels range from {lowest} to {highest}, but the head has {columns} outputs: labels of a task "
            f"are 0 to {columns - 1}{binary}, and {IGNORED}, or the ignore_index of a loss in the module, for what "
            f"does not count (let predict return target.masked_fill(target == 255, {IGNORED}), say)"
        )
    return rows, labels


def _numbers(target: Tensor, layout: Layout) -> Tensor:
    if not bool(target.isfinite().all()):
        raise ValueError("targets are not finite (NaN or infinity): let predict leave out what has no value")
    are_shares = target.shape[1] > 1 and bool((target >= 0).all() & ((target.sum(dim=1) - 1).abs() < 1e-3).all())
    if are_shares and not layout.numbers:
        raise ValueError(
            f"targets (N, {target.shape[1]}) are at least 0 and sum to 1: probabilities of classes, as soft labels or "
            "mixed samples have them, are neither class indices nor numbers; let predict return target.argmax(1), or "
            "of shares that are meant as numbers all columns but the last"
        )
    return target


def _way(output: object) -> str:
    """What to do about an output that is no tensor."""
    several: Any = output
    if isinstance(output, (list, tuple)) and len(several) and isinstance(several[0], dict):
        return (
            ". A detector's boxes are no answers that could be counted: let predict return the class logits of its "
            "anchors or queries with their labels (-100 for those without), or keep its backbone by hand, by "
            "requires_grad_(False) and eval()"
        )
    if isinstance(output, dict):
        return f": let predict return one of {list(output)}, or, for several heads at once, a dict of labels, too"
    return ""


def _described(value: object) -> str:
    return f"a {value.dtype} tensor" if isinstance(value, Tensor) else f"of type {type(value).__name__}"
