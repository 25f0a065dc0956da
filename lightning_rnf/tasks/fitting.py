"""The head fitted to the sub-network in front of it: in closed form, from what that says to the labels."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_rnf.anatomy import predict_checked, true_labels
from lightning_rnf.packages import Trainer, isolate_rng
from lightning_rnf.runtime import arguments, borrowed, evaluating
from lightning_rnf.tasks import leastsquares, loaders
from lightning_rnf.tasks.leastsquares import Moments, scales
from lightning_rnf.tasks.reference import Reference, ReferenceData, ReferenceSource

FitHead = Literal["auto", False]
"""``"auto"``: a task's head is fitted to its sub-network where it ends in a linear layer or a 1 × 1 convolution."""

SEARCHED = 1000
"""A candidate of the search is judged with a head that was fitted on so many samples at most."""

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

ALIKE = 0.02
"""How far logits may be from the last layer's output, as a share of the largest, to be that output: half precision."""

SCALES = range(-6, 6)
"""Powers of two that the fitted logits may be multiplied by: products with them are exact, so no answer changes. Up to
32: between a yes and a no least squares put 1, and few labels that are all met would have it grow without end."""

STEEP = 2.0
"""A head that is to be trained on has weights at most so many times as large as those that it was trained to: where the
features are small those of least squares are so large that a step would throw it far off."""

WIDEST = 2048
"""A head that hears more features is not fitted: what has to be solved grows with the third power."""


class UnfitError(Exception):
    """The data that the head was to be fitted on are not what ``predict`` takes."""


@dataclass(frozen=True)
class HeadFit:
    """Whether a task's head is fitted to its sub-network, and on what.

    Attributes:
        fit: ``"auto"``: where it ends in a linear layer or a 1 × 1 convolution. False: it stays as it was trained.
        source: of the data, as for the reference; None: the training data of the fit, in eval mode.
        samples: so many of them at most; None: all.

    Raises:
        TypeError, ValueError: if an option is out of its range.
    """

    fit: FitHead = "auto"
    source: ReferenceSource = None
    samples: int | None = 10_000

    def __post_init__(self) -> None:
        if self.fit is not False and self.fit != "auto":
            raise ValueError(f"fit_head is {self.fit!r}, expected 'auto' or False")
        arguments.at_least("fit_samples", self.samples, 1, or_none=True)

    def offers(self, trainer: Trainer | None, reference: Reference, drawn: ReferenceData) -> Iterator[Offer]:
        """On what the head may be fitted and its sub-networks measured, the best first; in the end not at all.

        Args:
            trainer: of the fit; None: there is none, and heads are not fitted.
            reference: draws data.
            drawn: the reference data.
        """
        if self.fit == "auto" and trainer is not None:
            fitted_on = self._drawn(trainer, reference, drawn)
            if fitted_on is not None:
                yield Offer(drawn, fitted_on)
            if self.source is None:
                yield from _halves(drawn)
        yield Offer(drawn)

    def _drawn(self, trainer: Trainer, reference: Reference, drawn: ReferenceData) -> ReferenceData | None:
        if self.source is not None:
            return self._drawn_from(self.source, trainer, reference)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                data = drawn.ranks.agreed(lambda: trainer.train_dataloader)
                if data is None or loaders.is_stream(data):
                    return None  # the fit would lack what was taken out of it
                return self._drawn_from(data, trainer, reference)
        except Exception:  # several loaders, batches of another kind: nothing may be lost for what training data are
            return None

    def _drawn_from(self, source: ReferenceSource, trainer: Trainer, reference: Reference) -> ReferenceData:
        # Training data are augmented at random: a fit that is resumed has to see what it would have seen.
        with isolate_rng():
            for seeded in (random.seed, np.random.seed, torch.manual_seed):
                seeded(reference.seed % 2**32)
            return reference.to_fit(source, self.samples, SEARCHED).draw(trainer)


@dataclass(frozen=True)
class Offer:
    """Reference data, and what the head is fitted on; None: it stays as it was trained."""

    reference: ReferenceData
    fitted_on: ReferenceData | None = None


def _halves(drawn: ReferenceData) -> Iterator[Offer]:
    """Every other batch of the reference data to fit on, the rest to measure on."""
    size, rank = drawn.ranks.size, drawn.ranks.rank
    ours = [(index * size + rank) % 2 == 0 for index in range(len(drawn.batches))]  # by its place in one process
    measured, fitted_on = (
        [batch for batch, is_ours in zip(drawn.batches, ours, strict=True) if is_ours == which]
        for which in (True, False)
    )
    if any(drawn.ranks.gather(bool(fitted_on))):
        attributed = sum(ours[: drawn.attributed])
        yield Offer(
            replace(drawn, batches=measured, attributed=attributed),
            replace(drawn, batches=fitted_on, attributed=len(fitted_on)),
        )


@dataclass(frozen=True, eq=False)
class Head:
    """The weights of a head's last layer.

    Attributes:
        weight: in the layer's own shape, dtype and device.
        bias: None: it has none.
    """

    weight: Tensor
    bias: Tensor | None

    def as_flat_as(self, trained: Head) -> Head:
        """The same answers by weights that are at most `STEEP` times as large as those of the trained head."""
        size, limit = (float(one.weight.double().norm()) for one in (self, trained))
        if not 0 < limit * STEEP < size:
            return self
        return self.scaled(2.0 ** math.floor(math.log2(limit * STEEP / size)))

    def scaled(self, factor: float) -> Head:
        """With logits that are so many times as large."""
        return Head(self.weight * factor, None if self.bias is None else self.bias * factor)


class Fitting:
    """Fits the last layer of a task's head, linear or a 1 × 1 convolution, to what the module says in front of it.

    What reaches the layer is seen as ``predict`` gives it when the layer hands its input on: so it goes through
    whatever ``predict`` makes of logits (pixels are flattened, padding is left out), and belongs to the targets beside.

    Args:
        module: the model.
        layer: name of the head's last layer, as `last_layer` finds it.
        data: what it is fitted on; the first batches of them, ``data.attributed``, during the search.
        balanced: whether classes weigh the same, however many samples they have, by their share of the first batches.
            Accuracy is best served by samples that weigh the same, a metric that averages over classes is not.
    """

    def __init__(self, module: nn.Module, layer: str, data: ReferenceData, *, balanced: bool = False) -> None:
        self.module = module
        self.layer: Any = module.get_submodule(layer)
        self.data = data
        self.balanced = balanced

    @classmethod
    def of(cls, module: nn.Module, head: str, data: ReferenceData, *, balanced: bool = False) -> Fitting | None:
        """None: the head does not end in such a layer, it does not learn, or ``predict`` changes its output."""
        ranks = data.ranks
        with borrowed(module), evaluating(module):
            found = ranks.agreed(lambda: _tried(module, head, data))
        names = {name for name in ranks.gather(found) if name is not None}
        # Ranks without a batch go by the others; where the others disagree nobody can be followed.
        refused = any(ranks.gather(bool(data.batches) and found is None))
        if len(names) != 1 or refused:
            return None
        fitting = cls(module, names.pop(), data, balanced=balanced)
        return fitting if all(parameter.requires_grad for parameter in fitting.layer.parameters()) else None

    @property
    def trained(self) -> Head:
        """The layer's weights as they are."""
        bias = self.layer.bias
        return Head(self.layer.weight.detach().clone(), None if bias is None else bias.detach().clone())

    def fit(self, *, all_data: bool) -> Head:
        """The head that is nearest to the labels, for the module as it speaks now; not all data: the first batches.

        All ranks get the same, and the same as one process.

        Raises:
            UnfitError: if ``predict`` can't do with the data.
        """
        own, ranks = self.layer.weight, self.data.ranks
        leading, rest = self.data.batches[: self.data.attributed], self.data.batches[self.data.attributed :]

        def seen() -> tuple[list[tuple[Tensor, Tensor]], tuple[Tensor, Tensor] | None]:
            found = [self._in_front(batch) for batch in leading]
            if not found:
                return found, None
            features, wanted = (torch.cat(parts) for parts in zip(*found, strict=True))
            largest = features.nan_to_num().abs().amax(dim=0).double().cpu()
            return found, (largest, wanted.clamp(min=0).sum(dim=0).double().cpu())

        try:
            first, share = ranks.agreed(seen)
            of_ranks, counts = zip(*(one for one in ranks.gather(share) if one is not None), strict=True)
            largest = torch.stack(of_ranks).amax(dim=0)
            of_class = leastsquares.weights(torch.stack(counts).sum(dim=0)) if self.balanced else None
            speaks = largest > 0  # what silent units leave at 0 is most of it, where few are kept
            if speaks.sum() > WIDEST:
                raise ValueError(f"the head hears {int(speaks.sum())} features, more than the {WIDEST} it is fitted to")
            scale = scales(largest[speaks])

            def of_share() -> Moments | None:
                found: list[Moments] = []
                if first:
                    features, wanted = (torch.cat(parts) for parts in zip(*first, strict=True))
                    found.append(self._moments(features, wanted, speaks, scale, of_class))
                for batch in rest if all_data else ():
                    found.append(self._moments(*self._in_front(batch), speaks, scale, of_class))
                return reduce(add, found).cpu() if found else None

            shares = [share for share in ranks.each(of_share) if share is not None]
            some, bias = ranks.decided(lambda: reduce(add, shares).solve(bias=self.layer.bias is not None))
        except Exception as error:
            raise UnfitError(str(error)) from error
        weight = some.new_zeros(len(some), len(speaks))
        weight[:, speaks] = some
        return Head(
            weight.reshape(own.shape).to(own),
            None if self.layer.bias is None else bias.to(self.layer.bias),
        )

    @contextmanager
    def wearing(self, head: Head) -> Iterator[None]:
        """Inside the context the layer has these weights; the module has to be borrowed."""
        before = self.layer.weight.data, None if self.layer.bias is None else self.layer.bias.data
        self._put(head.weight, head.bias)
        try:
            yield
        finally:
            self._put(*before)

    @torch.no_grad()
    def write(self, head: Head) -> None:
        """Give the layer these weights for good."""
        self.layer.weight.copy_(head.weight)
        if self.layer.bias is not None:
            self.layer.bias.copy_(head.bias)

    def _moments(
        self, features: Tensor, wanted: Tensor, speaks: Tensor, scale: Tensor, of_class: Tensor | None
    ) -> Moments:
        # Several labels have no class that a sample could weigh by.
        is_weighed = of_class is not None and bool((wanted >= 0).all())
        weight = wanted.cpu().double() @ of_class if of_class is not None and is_weighed else None
        return Moments.of(features[:, speaks.to(features.device)], wanted, scale, weight)

    def _put(self, weight: Tensor, bias: Tensor | None) -> None:
        self.layer.weight.data = weight
        if bias is not None:
            self.layer.bias.data = bias

    def _in_front(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Features ``(N, features)``, and what the layer should say of them ``(N, outputs)``."""
        outputs = len(self.layer.weight)
        features, target = _in_front(self.module, self.layer, self.data, self.data.convert(batch))
        labels = true_labels(features.new_zeros(len(features), outputs), target)
        # Of several labels each is a yes or a no, and a yes is above 0.
        return features, labels if target.ndim == 1 else 2 * labels - 1


def last_layer(module: nn.Module, head: str, data: ReferenceData) -> str | None:
    """Name of the linear layer or 1 × 1 convolution whose output a head's logits are; None: there is none.

    Tried on one batch, in eval mode: the layer runs once, last in the head, and ``predict`` gives its output as it is.
    """
    layers = {name: part for name, part in module.get_submodule(head).named_modules() if _is_linear(part)}
    ran: list[str] = []
    batch = data.convert(data.batches[0])
    hooks = [part.register_forward_hook(lambda *call, name=name: ran.append(name)) for name, part in layers.items()]
    try:
        with torch.no_grad(), data.forward_context():
            logits, _ = predict_checked(data.predict, module, batch, finite=False)
    finally:
        for hook in hooks:
            hook.remove()
    if not ran or ran.count(ran[-1]) > 1:
        return None
    layer: Any = layers[ran[-1]]
    try:
        features, _ = _in_front(module, layer, data, batch)
    except Exception:  # whatever a forward of the user's makes of another width
        return None
    weight = layer.weight.detach().flatten(1)
    if features.shape != (len(logits), weight.shape[1]) or logits.shape[1] != len(weight):
        return None
    said = nn.functional.linear(features.to(weight), weight, layer.bias)
    far = (said - logits.to(weight)).abs().max()
    if not bool(far <= ALIKE * logits.abs().max().to(weight)):
        return None
    return f"{head}.{ran[-1]}" if ran[-1] else head


def _tried(module: nn.Module, head: str, data: ReferenceData) -> str | None:
    try:
        return last_layer(module, head, data) if data.batches else None
    except Exception:  # training data may be anything
        return None


def scale_of(logits: Tensor, target: Tensor) -> float:
    """The power of two by which logits have to be multiplied so that their softmax is least surprised by the labels.

    Least squares give logits between 0 and 1, whose softmax is flat: a task that is trained on, or asked for
    probabilities, needs them as its loss would have made them. For several labels it is the sigmoid.
    """
    logits = logits.double()
    loss = nn.functional.cross_entropy if target.ndim == 1 else nn.functional.binary_cross_entropy_with_logits
    wanted = target if target.ndim == 1 else target.double()
    return min((2.0**power for power in SCALES), key=lambda factor: float(loss(factor * logits, wanted)))


def _is_linear(part: nn.Module) -> bool:
    if "forward" in vars(part) or is_parametrized(part):
        return False
    if type(part) in _CONVOLUTIONS:
        convolution: Any = part
        plain = convolution.groups == 1 and set(convolution.kernel_size) == {1} == set(convolution.stride)
        return bool(plain and set(convolution.padding) == {0})
    return type(part) is nn.Linear


def _in_front(module: nn.Module, layer: nn.Module, data: ReferenceData, batch: Any) -> tuple[Tensor, Tensor]:
    """What reaches a layer, ``(N, features)``, and the targets ``(N,)`` or ``(N, classes)``."""
    vars(layer)["forward"] = _handed_on
    try:
        with torch.no_grad(), data.forward_context():
            features, target = data.predict(module, batch)
    finally:
        del vars(layer)["forward"]
    return features.detach(), target.detach().long()


def _handed_on(input: Tensor) -> Tensor:
    return input
