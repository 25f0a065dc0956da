"""What a task's data look like to sub-networks: Gaussians of its classes, by which a sample can be told to be its."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_rnf.memory.plain import get_names, get_tensors

LEVELS = 101
"""Of the quantiles that a portrait keeps: 0 to 100 %."""


@dataclass(frozen=True, eq=False)
class Space:
    """What is read of a task's sub-network: outputs of relevant units, averaged over positions.

    Attributes:
        layers: whose units they are, in execution order.
        center: float32 ``(features,)``: their mean over the task's own samples.
        scale: float32 ``(features,)``: by which they are divided, one number a layer.
        projection: float32 ``(features, dimensions)``, which makes fewer of them; or ``(features, 0)``: all are kept.
    """

    layers: tuple[str, ...]
    center: Tensor
    scale: Tensor
    projection: Tensor

    @property
    def dimensions(self) -> int:
        """Of what comes out."""
        return self.projection.shape[1] or len(self.center)

    @property
    def reach(self) -> float:
        """The largest coordinate that a point can have, of either sign."""
        return LARGEST * float(self.projection.double().abs().sum(0).amax()) if self.projection.shape[1] else LARGEST

    def __call__(self, features: Tensor) -> Tensor:
        """Features ``(N, features)`` to float32 ``(N, dimensions)``; NaN: a sample whose features aren't all finite."""
        shares = (features.float() - self.center.to(features.device)) / self.scale.to(features.device)
        shares = shares.nan_to_num().clamp(-LARGEST, LARGEST)
        if self.projection.shape[1]:
            with torch.autocast(shares.device.type, enabled=False):
                shares = shares @ self.projection.to(shares.device)
        # Any place would be like some task's data: the centre is where they are most usual.
        return shares.masked_fill(~features.isfinite().all(1, keepdim=True), torch.nan)


LARGEST = 30.0
"""Features are cut off at so many deviations: beyond, all that counts is that they are."""

DRAWN = 10.0
"""A projection has numbers of a normal distribution, divided by more than one: none is larger, in float32."""

SLACK = 1.001
"""By so much a mean may be rounded beyond the points that it is of."""


@dataclass(frozen=True, eq=False)
class Gaussians:
    """Of the classes of a task in some `Space`.

    Attributes:
        counts: int64 ``(classes,)``, samples of each, at least one.
        means: float32 ``(classes, dimensions)``.
        covariances: float32 ``(classes, dimensions · (dimensions + 1) / 2)``: lower triangles, row by row.
    """

    counts: Tensor
    means: Tensor
    covariances: Tensor

    def full(self) -> Tensor:
        """The covariances, float64 ``(classes, dimensions, dimensions)``."""
        size = self.means.shape[1]
        rows, columns = torch.tril_indices(size, size)
        found = torch.zeros(len(self.means), size, size, dtype=torch.float64)
        found[:, rows, columns] = self.covariances.double()
        found[:, columns, rows] = self.covariances.double()
        return found


@dataclass(frozen=True, eq=False)
class Portrait:
    """What a task's data look like to its own sub-network, and to those of tasks that had ended before.

    Sub-networks are recalled bit by bit for ever, so what they make of a sample can be compared with it at any time.

    Attributes:
        space: of its own sub-network.
        classes: of its samples, by the task in whose space they are: earlier ones in the order of their ends, itself.
        usual: float32 ``(LEVELS,)``: quantiles, over its reference data, of the largest log density of its classes.
    """

    space: Space
    classes: Mapping[str, Gaussians]
    usual: Tensor

    @property
    def nbytes(self) -> int:
        """Of its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """All of them, by a name each."""
        found = {"center": self.space.center, "scale": self.space.scale, "projection": self.space.projection}
        found["usual"] = self.usual
        for index, gaussians in enumerate(self.classes.values()):
            found |= {f"{index}.{key}": getattr(gaussians, key) for key in _KEYS}
        return found

    def without(self, task: str) -> Portrait:
        """The same without what is said of the space of a task that is given up."""
        return replace(self, classes={name: one for name, one in self.classes.items() if name != task})

    def to_plain(self) -> dict[str, Any]:
        """Lists, texts and CPU tensors."""
        return {"layers": list(self.space.layers), "spaces": list(self.classes), "tensors": self.tensors()}

    @classmethod
    def from_plain(cls, plain: object, sizes: Mapping[str, int]) -> Portrait:
        """The opposite of `to_plain`.

        Args:
            plain: of a stranger's.
            sizes: relevant units of the task, by layer.

        Raises:
            ValueError: if it is something else, is of other layers, or has what is no number.
        """
        layers, spaces = get_names(plain, "layers"), get_names(plain, "spaces")
        tensors = get_tensors(plain, "tensors")
        if len(set(layers)) < len(layers) or not set(layers) <= set(sizes):
            raise ValueError(f"not a state of lightning_rnf: a portrait is of layers {layers!r:.80}")
        if not spaces or len(set(spaces)) < len(spaces):
            raise ValueError(f"not a state of lightning_rnf: a portrait is in the spaces of {spaces!r:.80}")
        features = sum(sizes[layer] for layer in layers)
        center, scale = (_taken(tensors, key, (features,)) for key in ("center", "scale"))
        projection = _taken(tensors, "projection", (features, None))
        usual = _taken(tensors, "usual", (LEVELS,))
        is_drawn = bool((projection.abs() <= DRAWN).all()) and projection.shape[1] <= features
        if not bool((scale > 0).all()) or not bool((usual.diff() >= 0).all()) or not is_drawn:
            raise ValueError("not a state of lightning_rnf: a portrait's scale, projection or quantiles are none")
        classes = {}
        for index, name in enumerate(spaces):
            means = _taken(tensors, f"{index}.means", (None, None))
            count, size = means.shape
            counts = _taken(tensors, f"{index}.counts", (count,), torch.int64)
            covariances = _taken(tensors, f"{index}.covariances", (count, size * (size + 1) // 2))
            if not count or not size or not bool((counts > 0).all()):
                raise ValueError(f"not a state of lightning_rnf: a portrait in the space of {name!r:.80} is empty")
            classes[name] = Gaussians(counts, means, covariances)
        portrait = cls(Space(layers, center, scale, projection), classes, usual)
        if unknown := sorted(set(tensors) - set(portrait.tensors())):
            raise ValueError(f"not a state of lightning_rnf: a portrait has {unknown!r:.80}, which nobody reads")
        return portrait


_KEYS = ("counts", "means", "covariances")


def _taken(
    tensors: Mapping[str, Tensor], key: str, shape: tuple[int | None, ...], dtype: torch.dtype = torch.float32
) -> Tensor:
    """A tensor of this form, without NaN."""
    found = tensors.get(key)
    if (
        found is None
        or found.dtype != dtype
        or found.ndim != len(shape)
        or any(wanted not in (None, size) for size, wanted in zip(found.shape, shape, strict=True))
        or not _is_held(found)
        or not bool(found.isfinite().all())
    ):
        raise ValueError(
            f"not a state of lightning_rnf: a portrait's {key!r:.40} should be finite numbers {dtype} of shape {shape}"
        )
    return found


def _is_held(tensor: Tensor) -> bool:
    """Whether all its entries are in memory: a few bytes may say that they are one of any shape."""
    return tensor.layout == torch.strided and tensor.untyped_storage().nbytes() >= tensor.nbytes


def check(portraits: Mapping[str, Portrait | None]) -> None:
    """Check that tasks' portraits are in the spaces of all that had one by then, of their dimensions and within them.

    Points of a space have coordinates up to its `Space.reach`, so means have no larger ones, and covariances at most
    their square. What is larger was measured nowhere, and densities of it would overflow.

    Args:
        portraits: of all finished tasks, in the order of their ends.

    Raises:
        ValueError: if not.
    """
    known: dict[str, Portrait] = {}
    for name, portrait in portraits.items():
        if portrait is None:
            continue
        known[name] = portrait
        if list(portrait.classes) != list(known):
            raise ValueError(
                f"not a state of lightning_rnf: the portrait of {name!r:.80} is in the spaces of "
                f"{list(portrait.classes)!r:.80}, expected {list(known)!r:.80}"
            )
        for space, gaussians in portrait.classes.items():
            if gaussians.means.shape[1] != known[space].space.dimensions:
                raise ValueError(
                    f"not a state of lightning_rnf: the portrait of {name!r:.80} doesn't fit that of {space!r:.80}"
                )
            reach = known[space].space.reach * SLACK
            for what, found, most in (
                ("mean", gaussians.means, reach),
                ("covariance", gaussians.covariances, reach**2),
            ):
                if float(found.abs().max()) > most:
                    raise ValueError(
                        f"not a state of lightning_rnf: the portrait of {name!r:.80} has a {what} of "
                        f"{float(found.abs().max()):.3g} in the space of {space!r:.80}, where none is beyond {most:.3g}"
                    )
