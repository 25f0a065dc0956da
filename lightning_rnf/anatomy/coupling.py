"""Whether rows stand for themselves: where a layer's class does not say so, it is found out by trying."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_rnf.anatomy.predict import Predict, predict_checked
from lightning_rnf.runtime import borrowed, evaluating

SAMPLES = 2
"""So many are enough: rows that are coupled are so for any input."""

LARGE = 64.0
"""Times the largest weight: changes what a scale, a norm, a threshold or a mean over all rows would be."""


@dataclass(frozen=True)
class Given:
    """What a module was given when it ran.

    Attributes:
        args: copies, of a few samples where that can be told.
        kwargs: by name.
        nodes: of the autograd graph, that made the tensors among them.
        autocast: what it ran in; None: as it is.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    nodes: frozenset[Any]
    autocast: tuple[str, torch.dtype] | None

    @classmethod
    def to(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Given:
        """Copies what a module is about to be given."""
        found: list[Tensor] = []

        def seen(x: Tensor) -> Tensor:
            found.append(x)
            return x  # a packed sequence is put together again of what comes back

        apply_to_collection((list(args), dict(kwargs)), Tensor, seen)
        few = len(found) == 1 and bool(args) and found[0] is args[0] and found[0].ndim > 1
        copied = apply_to_collection((tuple(args), dict(kwargs)), Tensor, lambda x: _copied(x[:SAMPLES] if few else x))
        device = found[0].device.type if found else "cpu"
        autocast = (device, torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None
        nodes = frozenset(x.grad_fn for x in found if x.grad_fn is not None)
        return cls(copied[0], copied[1], nodes, autocast)

    def around(self) -> AbstractContextManager[Any]:
        """The autocast that it ran in."""
        return nullcontext() if self.autocast is None else torch.autocast(self.autocast[0], self.autocast[1])


@torch.no_grad()
def why_coupled(
    module: nn.Module, given: Given, units: int, axis: int, spread: Callable[[str, Tensor], Tensor], *, hears: bool
) -> str | None:
    """Change some rows and see that no other output changes by a bit, and that theirs do; the module stays as it is.

    Tried with the weights as they are, row by row, and with random ones on random inputs, half of the rows at a time:
    whatever two rows are chosen, some half holds one and not the other.

    Args:
        module: a layer, or what follows one, on its own.
        given: what it is given.
        units: how many rows.
        axis: of the output that counts them, from the end.
        spread: ``(name of a parameter, (units,))`` to an entry for each slice of the parameter, as `UnitLayer.spread`.
        hears: its input has a channel for each unit, too, and each is to be heard by its own row alone.

    Returns:
        None if the rows stand for themselves; else what was found.
    """
    trial = _Trial(module, given, units, axis, spread, hears)
    try:
        return trial.found()
    except Exception as error:  # a forward of somebody's: whatever it raises, its rows are not known
        return f"it can't be tried alone ({type(error).__name__}: {str(error).partition(chr(10))[0]})"


@torch.no_grad()
def reaches_past(module: nn.Module, layer: nn.Module, parameter: nn.Parameter, batch: Any, predict: Predict) -> bool:
    """Whether the logits change with a layer's parameter although the layer goes on saying what it said.

    Args:
        module: the model, in eval mode; it stays as it is.
        layer: a part of it.
        parameter: of the layer.
        batch: on the module's device.
        predict: how to get logits of a batch.
    """
    said: list[Any] = []

    def note(layer: nn.Module, args: Any, output: Any) -> None:
        said.append(apply_to_collection(output, Tensor, _copied))

    with borrowed(module):
        layer.register_forward_hook(note)
        before, _ = predict_checked(predict, module, batch)
    saying = iter(said)
    with borrowed(module):  # which puts the parameter's storage back
        layer.register_forward_hook(lambda *_: next(saying, None))
        parameter.data = _stirred(parameter.detach(), LARGE, torch.Generator().manual_seed(0))
        after, _ = predict_checked(predict, module, batch, finite=False)
    return bool(_differs(before, after).any())


@dataclass
class _Trial:
    module: nn.Module
    given: Given
    units: int
    axis: int
    spread: Callable[[str, Tensor], Tensor]
    hears: bool

    def found(self) -> str | None:
        # Without parts, but for what a parametrized weight is computed from.
        own = {key: value.detach() for key, value in self.module.named_parameters()}
        generator = torch.Generator().manual_seed(0)
        drawn = {key: _drawn(value, generator) for key, value in own.items()}
        tensors = [value for value in self.given.args if isinstance(value, Tensor)]
        any_input = len(tensors) == 1 and not self.given.kwargs and tensors[0].is_floating_point()
        noise = tuple(_drawn(x, generator) if isinstance(x, Tensor) else x for x in self.given.args)
        effect = False
        for values, args, rows, changes in (
            (own, self.given.args, self._single(own), (1.0, LARGE, 0.0)),
            (drawn, noise if any_input else self.given.args, self._halves(), (LARGE,)),
        ):
            before = self._run(values, args)
            if not isinstance(before, Tensor) or before.ndim < -self.axis or before.shape[self.axis] != self.units:
                return "its output does not have one channel for each row"
            if self._moved(before, self._run(values, args)).any():
                return "it says something else when it runs again"
            for chosen in rows:
                for change in changes:
                    changed = {key: self._changed(key, value, chosen, change) for key, value in values.items()}
                    moved = self._moved(before, self._run(changed, self._heard(args, chosen)))
                    if (moved & ~chosen).any():
                        other = int((moved & ~chosen).nonzero()[0])
                        which = chosen.nonzero().view(-1).tolist()
                        return f"output {other} changes with " + (
                            f"row {which[0]}" if len(which) == 1 else f"{len(which)} other rows"
                        )
                    effect = effect or bool(moved.any())
        return None if effect else "no output changes with its own row"

    def _run(self, values: Mapping[str, Tensor], args: Sequence[Any]) -> Any:
        """Once, from the same random state and buffers each time, and with tensors that it may write to."""
        args, kwargs = apply_to_collection((tuple(args), dict(self.given.kwargs)), Tensor, torch.clone)
        own: dict[str, Tensor] = {key: nn.Parameter(value.clone(), False) for key, value in values.items()}
        with borrowed(self.module), evaluating(self.module), self.given.around():
            return torch.func.functional_call(self.module, own, args, kwargs)

    def _moved(self, before: Tensor, after: Tensor) -> Tensor:
        """Of which units the output has changed by a bit: bool ``(units,)`` on the CPU."""
        return _differs(before, after).movedim(self.axis, 0).flatten(1).any(dim=1).cpu()

    def _single(self, own: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """The first, the middle, the last row, and the one with the largest weight."""
        chosen = dict.fromkeys((0, self.units // 2, self.units - 1))
        for key, value in own.items():
            rows = self._rows(key).reshape(-1)
            chosen[int(rows[value.reshape(len(rows), -1).abs().amax(dim=1).argmax()])] = None
        for row in chosen:
            yield torch.arange(self.units) == row

    def _halves(self) -> Iterator[Tensor]:
        rows = torch.arange(self.units)
        for bit in range((self.units - 1).bit_length()):
            half = (rows >> bit) % 2 == 1
            yield half
            yield ~half

    def _rows(self, key: str) -> Tensor:
        return self.spread(key, torch.arange(self.units))

    def _changed(self, key: str, value: Tensor, chosen: Tensor, change: float) -> Tensor:
        entries = chosen[self._rows(key)].to(value.device)
        generator = torch.Generator().manual_seed(1)
        stirred = _stirred(value, change, generator) if change else torch.zeros_like(value)
        return torch.where(entries.view(*entries.shape, *[1] * (value.ndim - entries.ndim)), stirred, value)

    def _heard(self, args: tuple[Any, ...], chosen: Tensor) -> tuple[Any, ...]:
        if not self.hears:
            return args
        channels = chosen.view(-1, *[1] * (-self.axis - 1)).to(args[0].device)
        stirred = _stirred(args[0], LARGE, torch.Generator().manual_seed(2))
        return (torch.where(channels, stirred, args[0]), *args[1:])


def _stirred(value: Tensor, change: float, generator: torch.Generator) -> Tensor:
    """Noise added, so many times as large as the largest entry: mean, largest, norm and signs change."""
    size = value.abs().max() if value.numel() else value.new_zeros(())
    noise = torch.randn(value.shape, generator=generator).to(value)
    return value + noise * change * torch.where(size > 0, size, torch.ones_like(size))


def _drawn(value: Tensor, generator: torch.Generator) -> Tensor:
    width = value[0].numel() if value.ndim > 1 else 1
    return (torch.randn(value.shape, generator=generator) / math.sqrt(max(width, 1))).to(value)


def _differs(before: Tensor, after: Tensor) -> Tensor:
    differs: Tensor = torch.ne(before, after) & ~(before.isnan() & after.isnan())
    return differs


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()
