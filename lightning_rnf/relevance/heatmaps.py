"""What the model looks at: relevance of the input for the true class, right after a task and after later ones.

The paper's Figure 5.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from zennit.core import Composite
from zennit.image import palette

from lightning_rnf.anatomy import LAYERS, Predict, UnitLayer, layer_form, supervised
from lightning_rnf.memory import shortened
from lightning_rnf.packages import Trainer
from lightning_rnf.relevance.attribution import attribute
from lightning_rnf.report import literal, new_figure, tracking

if TYPE_CHECKING:
    from matplotlib.figure import Figure, FigureBase


def heatmaps(
    module: nn.Module,
    layers: Sequence[UnitLayer],
    batch: Any,
    predict: Predict = supervised,
    composite: Composite | None = None,
) -> Tensor:
    """Relevance of every pixel for each sample's true class: summed over channels, signed.

    Inside of a recall it is that of the task's sub-network.

    Args:
        module: the bare model, with the task's head active.
        layers: its unit layers.
        batch: images, and whatever else ``predict`` needs, on the module's device.
        predict: how to get logits and labels of the batch.
        composite: Zennit's rules; None: as for units.

    Returns:
        ``(N, height, width)`` on the CPU.

    Raises:
        ValueError: if the batch holds no images ``(N, channels, height, width)`` whose pixels are the network's input;
            or as `attribution.attribute`.
    """
    found: list[Tensor] = []

    def keep(roots: Sequence[Tensor], arrived: Sequence[Tensor | None]) -> None:
        leaves = {id(root): of_root for root, of_root in zip(roots, arrived, strict=True) if root.is_leaf}
        found.extend(of_root.detach() for of_root in leaves.values() if of_root is not None)

    # Of a task that ended before the model was made wider, the recall has fewer units.
    parts = {layer.name: module.get_submodule(layer.name) for layer in layers}
    now = [
        replace(layer, units=layer_form(parts[layer.name])[1]) if isinstance(parts[layer.name], LAYERS) else layer
        for layer in layers
    ]
    attribute(module, now, [batch], predict, composite, arrived=keep, embedded=False)  # pixels alone
    shape = images_of(batch).shape
    if any(one.numel() != shape.numel() for one in found):
        raise ValueError(
            f"relevance arrives at inputs of shape {[tuple(one.shape) for one in found]}, images are {tuple(shape)}: "
            "what changes their size before the first unit layer has no heatmap"
        )
    total = sum((one.reshape(shape) for one in found[1:]), start=found[0].reshape(shape))
    return total.sum(dim=1).float().cpu()


def images_of(batch: Any) -> Tensor:
    """The first tensor of floats ``(N, channels, height, width)`` in a batch, or else of bytes, on the CPU as float32.

    Bytes are images if ``predict`` makes floats of them.

    Raises:
        ValueError: if there is none.
    """
    found: list[Tensor] = []
    apply_to_collection(batch, Tensor, found.append, allow_frozen=True)
    images = [tensor for tensor in found if tensor.ndim == 4]
    floats = [tensor for tensor in images if tensor.is_floating_point()]
    for tensor in floats or [tensor for tensor in images if tensor.dtype == torch.uint8]:
        return tensor.detach().float().cpu()
    shapes = [tuple(tensor.shape) for tensor in found]
    raise ValueError(f"heatmaps need images (N, channels, height, width), the batch has tensors of shape {shapes}")


@dataclass(frozen=True)
class Drift:
    """How far two heatmaps of the same images are apart.

    Attributes:
        cosine: of the angle between them, in [-1, 1], mean over images; 1: the same up to a factor. Where either is
            zero everywhere: 1 if both are, else 0.
        signs: share of pixels that speak for the class in both or against it in both, in [0, 1], of those that speak in
            either; mean over images.
    """

    cosine: float
    signs: float

    @classmethod
    def between(cls, before: Tensor, after: Tensor) -> Drift:
        """Compare ``(N, height, width)`` with the same."""
        one, other = before.double().flatten(1), after.double().flatten(1)
        both_zero = (one == 0).all(dim=1) & (other == 0).all(dim=1)
        cosine = torch.where(both_zero, 1.0, torch.cosine_similarity(one, other, dim=1, eps=1e-300).clamp(-1, 1))
        speaking = (one != 0) | (other != 0)
        agreed = (one.sign() == other.sign()) & speaking
        signs = torch.where(both_zero, 1.0, agreed.sum(dim=1) / speaking.sum(dim=1).clamp(min=1))
        return cls(float(cosine.mean()), float(signs.mean()))


def draw(images: Tensor, columns: Mapping[str, Tensor], title: str = "") -> Figure:
    """Images in the first column, and beside them their heatmaps: red speaks for the class, blue against it.

    Args:
        images: ``(N, channels, height, width)``, of any range: each is stretched to what can be shown.
        columns: heatmaps ``(N, height, width)`` by what is written above them; each is scaled by itself.
        title: of the figure.

    Raises:
        ImportError: if matplotlib is not installed (extra ``plots``).
    """
    figure = new_figure(1.5 * (len(columns) + 1), 1.5 * len(images) + 0.8)
    _fill(figure, images, columns)
    if title:
        figure.suptitle(literal(title), fontsize=10)
    return figure


def compare_heatmaps(
    images: Tensor, methods: Mapping[str, Mapping[str, Tensor]], drifts: Mapping[str, Sequence[Drift]] | None = None
) -> Figure:
    """Images of one task under several methods, one under the other: heatmaps right after it and after later tasks.

    Above each heatmap is how far it has drifted from the method's first one.

    Args:
        images: ``(N, channels, height, width)``.
        methods: by name, heatmaps ``(N or more, height, width)`` by what is written above them, in order of time.
        drifts: by name, as many as there are heatmaps, if they were measured on other images, too; None: on all images
            that the heatmaps are of.

    Raises:
        ImportError: if matplotlib is not installed (extra ``plots``).
    """
    columns = max(map(len, methods.values()))
    figure = new_figure(1.25 * (columns + 1), (1.25 * len(images) + 0.9) * len(methods))
    parts = figure.subfigures(len(methods), 1, squeeze=False).flat
    for part, (method, maps) in zip(parts, methods.items(), strict=True):
        _fill(part, images, _with_drift(maps, None if drifts is None else drifts[method]))
        part.suptitle(literal(method), fontsize=11, fontweight="bold", x=0.01, ha="left")
    return figure


def _with_drift(maps: Mapping[str, Tensor], drifts: Sequence[Drift] | None = None) -> dict[str, Tensor]:
    """The same with the drift since the first of them under each name."""
    first = next(iter(maps.values()))
    drifts = drifts or [Drift.between(first, later) for later in maps.values()]
    return {
        f"{name}\ncosine {drift.cosine:.3f}\nsigns {drift.signs:.0%}": of_images
        for (name, of_images), drift in zip(maps.items(), drifts, strict=True)
    }


def _fill(part: FigureBase, images: Tensor, columns: Mapping[str, Tensor]) -> None:
    """A row for each image: itself, and its heatmaps under their names."""
    grid = part.subplots(len(images), len(columns) + 1, squeeze=False)
    for row, image in enumerate(images):
        low, high = image.min(), image.max()
        shown = ((image - low) / (high - low).clamp(min=1e-12)).permute(1, 2, 0)
        shown = shown[..., 0] if shown.shape[2] != 3 else shown
        grid[row][0].imshow(shown.numpy(), cmap="gray", vmin=0, vmax=1)
        for place, maps in enumerate(columns.values(), start=1):
            grid[row][place].imshow(_coloured(maps[row]))
    for axes, name in zip(grid[0], ["image", *columns], strict=True):
        axes.set_title("\n".join(literal(line) for line in name.split("\n")), fontsize=8)
    for axes in grid.flat:
        axes.set_axis_off()


def _coloured(heatmap: Tensor) -> Any:
    """Zennit's colours from the most negative over none to the most positive: uint8 ``(height, width, 3)``.

    What is no number is grey.
    """
    # Its imgify makes a palette of them that Pillow 12 does not read.
    known = heatmap.isfinite()
    largest = heatmap[known].abs().max() if known.any() else heatmap.new_ones(())
    share = torch.where(known, heatmap, 0) / largest.clamp(min=torch.finfo(heatmap.dtype).tiny)
    colours = palette("bwr")[((share + 1) * 127.5).round().long().numpy()]
    colours[~known.numpy()] = 128
    return colours


_COLUMNS = 8
"""More heatmaps side by side would be too small to see, or the figure too wide for a page."""


@dataclass
class Gallery:
    """Heatmaps of the same images of each task, made again after every later task.

    Attributes:
        images: by task, ``(N, channels, height, width)``.
        maps: by task, then by the task that had just ended: ``(N, height, width)``.
    """

    images: dict[str, Tensor] = field(default_factory=dict)
    maps: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def add(self, task: str, ended: str, images: Tensor, maps: Tensor) -> None:
        """Keep a task's heatmaps as they are after another one has ended."""
        self.images.setdefault(task, images)
        self.maps.setdefault(task, {})[ended] = maps

    def of(self, tasks: Collection[str]) -> Gallery:
        """What there is of these tasks."""
        images = {task: images for task, images in self.images.items() if task in tasks}
        return Gallery(images, {task: maps for task, maps in self.maps.items() if task in tasks})

    def drift(self, task: str) -> Drift:
        """Between a task's first heatmaps and its last."""
        maps = list(self.maps[task].values())
        return Drift.between(maps[0], maps[-1])

    def draw(self, task: str) -> Figure:
        """A task's images and heatmaps, with their drift since its end: after every later task, of many after some."""
        own = list(self.maps[task].items())
        step = max((len(own) - 1) / (_COLUMNS - 1), 1)
        places = dict.fromkeys(round(step * column) for column in range(min(len(own), _COLUMNS)))
        names = shortened([ended for ended, _ in own], most=16)
        kept = {f"after {names[place]}": own[place][1] for place in places}
        return draw(
            self.images[task], _with_drift(kept), f"relevance for the true class, {shortened([task], most=40)[0]}"
        )

    def log(self, trainer: Trainer, step: int) -> None:
        """Send drifts to all loggers, and figures to those that take some, if matplotlib is there."""
        drifts = {task: self.drift(task) for task in self.maps}
        numbers = {f"rnf/heatmap_cosine/{task}": drift.cosine for task, drift in drifts.items()}
        numbers |= {f"rnf/heatmap_signs/{task}": drift.signs for task, drift in drifts.items()}
        tracking.log_scalars(trainer, numbers, step)
        tracking.log_figures(trainer, {f"rnf/heatmaps/{task}": partial(self.draw, task) for task in drifts}, step)
