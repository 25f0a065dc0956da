"""Rows that a task newly claims, fitted to what they said when the whole network spoke: layer by layer, in closed form.

Where most units fall silent, the others hear less than they were trained with, and what they say shrinks and blurs from
layer to layer. Least squares bring each row as near to what it said before as what it still hears allows.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_rnf.anatomy import UnitLayer, mixes_channels
from lightning_rnf.recall import norms
from lightning_rnf.tasks.leastsquares import Moments, rounded, scales, spread
from lightning_rnf.tasks.loaders import rows_of
from lightning_rnf.tasks.reference import ReferenceData

log = logging.getLogger(__name__)

RIDGE = 0.01
"""How much rows are drawn to what they were trained to be, as a share of the mean variance of what they hear."""

PLACES = 16
"""Of each sample a layer is seen at so many places at most: pixels of a feature map, or tokens."""

SAMPLES = 500
"""So many samples are enough, each of which shows many places of most layers."""

ROUNDING = 1e-5
"""What rows say too little is nothing where it is a smaller share of the largest that any of them said."""

WIDEST = 2048
"""A row that hears more is not fitted: what has to be solved grows with the third power."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of a layer as they were fitted.

    Attributes:
        parameter: of a weight or a bias.
        units: bool ``(units,)``: which rows.
        values: ``(rows, …)``.
    """

    parameter: Tensor
    units: Tensor
    values: Tensor

    @torch.no_grad()
    def write(self) -> None:
        """Give the parameter these rows."""
        self.parameter.data[self.units] = self.values


class Refitting:
    """Fits the rows of a module's layers to its sub-networks.

    What can be fitted are linear layers and convolutions of one group that run once in a forward, learn, and hear
    something else than before; others stay as they were trained.

    Args:
        module: the model, borrowed and in eval mode, with nothing silenced: what its layers say now is what is aimed
            at.
        layers: its units' layers, in the order in which they run.
        frozen: bool ``(units,)`` by layer: units of finished tasks, whose rows stay.
        data: the first of its batches, ``data.attributed``, are run, as many as `SAMPLES` need.
    """

    def __init__(
        self,
        module: nn.Module,
        layers: Sequence[UnitLayer],
        frozen: Mapping[str, Tensor],
        data: ReferenceData,
    ) -> None:
        self.module = module
        self.frozen = frozen
        self.data = data
        self.batches = _some(data)
        self.layers = {
            layer.name: layer for layer in layers if not layer.tied and _can_be_fitted(module.get_submodule(layer.name))
        }
        self.said: dict[str, list[Tensor]] | None = None

    @contextmanager
    def wearing(self, relevant: Mapping[str, Tensor], moving: Sequence[nn.Module] = ()) -> Iterator[list[Rows]]:
        """Inside the context a sub-network, already silenced, has rows that are fitted to it.

        All ranks get the same, and the same as one process. Where anything goes wrong, such as a forward that sends
        samples another way now, there are none: nothing depends on them.

        Args:
            relevant: bool ``(units,)`` by layer: the units that speak.
            moving: norms whose statistics are estimated anew for each sub-network.

        Yields:
            The rows, as they were fitted front to back.
        """
        with ExitStack() as undo:
            fitted: list[Rows] = []
            try:
                with norms.of_batch(moving):  # as layers will hear them once the statistics are estimated anew
                    for name, layer in self.layers.items():
                        claimed = relevant[name] & ~self.frozen[name] if name in self.frozen else relevant[name]
                        for rows in self._fit(layer, claimed) if claimed.any() else ():
                            undo.callback(replace(rows, values=rows.parameter.data[rows.units].clone()).write)
                            rows.write()
                            fitted.append(rows)
            except Exception as error:
                log.debug("no rows are fitted to the sub-network: %s", error)
                undo.close()
                fitted = []
            yield fitted

    def look(self) -> None:
        """Note what the layers of the whole network say; those that do not run once in each forward are left out."""
        if self.said is not None:
            return
        said: dict[str, list[Tensor]] = {name: [] for name in self.layers}
        with ExitStack() as hooks:
            for name, layer in self.layers.items():

                def note(part: nn.Module, args: Any, output: Tensor, name: str = name, axis: int = layer.axis) -> None:
                    if args:
                        said[name].append(_in_rows(output, axis, self._places(output, axis)))

                hooks.callback(self.module.get_submodule(name).register_forward_hook(note).remove)
            try:
                self.data.ranks.agreed(self._run)
            except Exception as error:
                log.debug("no rows are fitted to sub-networks: %s", error)
                self.layers, self.said = {}, {}
                return
        once = [name for name, seen in said.items() if len(seen) == len(self.batches)]
        everywhere = set.intersection(*map(set, self.data.ranks.gather(once)))
        self.layers = {name: layer for name, layer in self.layers.items() if name in everywhere}
        self.said = {name: said[name] for name in self.layers}

    def _run(self) -> None:
        for index, batch in self.batches.items():
            self._batch = self.data.place(index)
            with torch.no_grad(), self.data.forward_context():
                self.data.predict(self.module, batch)

    def _places(self, values: Tensor, axis: int) -> Tensor:
        """Of all pixels or tokens of a sample, in order: other ones in each batch, the same for any number of ranks."""
        return self._chosen(values[0].numel() // values.shape[axis])

    def _chosen(self, every: int) -> Tensor:
        return spread(every, PLACES, self._batch)

    @torch.no_grad()
    def _fit(self, layer: UnitLayer, claimed: Tensor) -> list[Rows]:
        part: Any = self.module.get_submodule(layer.name)
        units = claimed.to(part.weight.device)
        assert self.said is not None, "look has to be called before anything is silenced"
        said, ranks = self.said[layer.name], self.data.ranks

        def seen() -> tuple[Tensor, Tensor, Tensor] | None:
            """What reaches the layer, what its rows say too little, how large both come and what they said before."""
            if not self.batches:
                return None
            reaches = torch.cat(self._reaching(layer))
            weight, bias = part.weight.detach()[units].flatten(1), part.bias
            says = nn.functional.linear(reaches, weight.to(reaches), None if bias is None else bias[units].to(reaches))
            before = torch.cat(said)[:, units].to(reaches)
            lacks = before - says
            sizes = torch.cat([reaches, lacks, before], dim=1).nan_to_num().abs().amax(dim=0)
            return reaches, lacks, sizes.cpu().double()

        found = ranks.agreed(seen)
        sizes = torch.stack([one for one in ranks.gather(found and found[2]) if one is not None]).amax(dim=0)
        rows = int(claimed.sum())
        heard, lacking, before = sizes.split([len(sizes) - 2 * rows, rows, rows])
        speaks = heard > 0
        if not (lacking > ROUNDING * before.max()).any() or speaks.sum() > WIDEST:
            return []
        scale_of_heard, scale_of_lack = scales(heard)[speaks], scales(lacking)

        def of_share() -> Moments | None:
            if found is None:
                return None
            reaches, lacks, _ = found
            targets = rounded(lacks, scale_of_lack)
            return Moments.of(reaches[:, speaks.to(reaches.device)], targets, scale_of_heard).cpu()

        shares = [share for share in ranks.each(of_share) if share is not None]
        # A norm behind the layer takes means away, as a bias would; one of several channels does not.
        norm = None if layer.norm is None else self.module.get_submodule(layer.norm)
        shifts = part.bias is not None or not (norm is None or mixes_channels(norm))
        more, shift = ranks.decided(lambda: reduce(add, shares).drawn(RIDGE, bias=shifts))
        weight = part.weight.detach()[units].flatten(1)
        weight[:, speaks.to(weight.device)] += (more * scale_of_lack[:, None]).to(weight)
        fitted = [Rows(part.weight, units, weight.view(-1, *part.weight.shape[1:]))]
        if part.bias is not None:
            fitted.append(Rows(part.bias, units, part.bias.detach()[units] + (shift * scale_of_lack).to(part.bias)))
        return fitted

    def _reaching(self, layer: UnitLayer) -> list[Tensor]:
        """What a layer's rows are multiplied with, ``(places, weights of a row)``, by batch."""
        part: Any = self.module.get_submodule(layer.name)
        found: list[Tensor] = []

        def note(part: nn.Module, args: tuple[Any, ...]) -> None:
            found.append(self._heard(part, args[0].detach()))

        with part.register_forward_pre_hook(note):
            self._run()
        return found

    def _heard(self, part: Any, x: Tensor) -> Tensor:
        if isinstance(part, nn.Linear):
            return _in_rows(x, -1, self._places(x, -1)).float()
        kind = "constant" if part.padding_mode == "zeros" else part.padding_mode
        x = nn.functional.pad(x, part._reversed_padding_repeated_twice, mode=kind)
        reach = [dilation * (size - 1) + 1 for dilation, size in zip(part.dilation, part.kernel_size, strict=True)]
        shape = [(of - far) // step + 1 for of, far, step in zip(x.shape[2:], reach, part.stride, strict=True)]
        # Patches at the chosen places alone: those of a whole map are many times as large as it.
        patches = []
        for place in self._chosen(math.prod(shape)).tolist():
            corner = [int(one) * step for one, step in zip(np.unravel_index(place, shape), part.stride, strict=True)]
            window = zip(corner, reach, part.dilation, strict=True)
            index = (slice(None), slice(None), *(slice(at, at + far, step) for at, far, step in window))
            patches.append(x[index].flatten(1))
        return torch.stack(patches, dim=1).flatten(0, 1).float()


def _some(data: ReferenceData) -> dict[int, Any]:
    """Batches by their place in one process, whatever the number of ranks."""
    batches = data.of_like_size
    sizes = {data.place(index): rows_of(batch) for index, batch in batches.items()}
    wanted, seen = set[int](), 0
    for place, size in sorted(one for share in data.ranks.gather(sizes) for one in share.items()):
        if seen < SAMPLES:
            wanted.add(place)
        seen += size or 0
    return {index: one for index, one in batches.items() if data.place(index) in wanted}


def _in_rows(values: Tensor, axis: int, places: Tensor) -> Tensor:
    """``(samples · places, channels)`` of what has channels along an axis and samples along the first."""
    flat = values.detach().movedim(axis, -1).flatten(1, -2) if values.ndim > 2 else values.detach().unsqueeze(1)
    return flat[:, places.to(flat.device)].flatten(0, 1)


def _can_be_fitted(part: nn.Module) -> bool:
    if "forward" in vars(part) or not all(parameter.requires_grad for parameter in part.parameters()):
        return False
    if type(part) in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        convolution: Any = part
        return bool(convolution.groups == 1)
    return type(part) is nn.Linear
