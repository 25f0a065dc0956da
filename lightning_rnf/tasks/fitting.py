"""The head fitted to the sub-network in front of it: in closed form, from what that says to the labels."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_rnf.anatomy import Flat, ignored_by, in_front, is_numbers, predict_checked, true_labels
from lightning_rnf.packages import Trainer, isolate_rng
from lightning_rnf.runtime import arguments, borrowed, evaluating
from lightning_rnf.tasks import leastsquares, loaders
from lightning_rnf.tasks.leastsquares import Moments, Sizes, rounded, scales, spread
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

OUTPUTS = 4096
"""Nor is one that says more: a vocabulary. What is added up grows with the square of it."""

NOTED = 2**23
"""Logits of positions that are kept at once, as floats: those of all pixels and tokens would not have room."""

ROWS = 2**17
"""Where `predict` has more targets than there are data (pixels, tokens), a head is fitted to so many of them at most:
so many products add up exactly, see `leastsquares.BITS`, and as many have room."""


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
    ours = [drawn.place(index) % 2 == 0 for index in range(len(drawn.batches))]  # the same for any number of ranks
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
        says_numbers: whether what it says is meant as it is, so that no multiple of it says the same.
    """

    weight: Tensor
    bias: Tensor | None
    says_numbers: bool = False

    def as_flat_as(self, trained: Head) -> Head:
        """The same answers by weights that are at most `STEEP` times as large as those of the trained head.

        Numbers are other ones then: the trained head.
        """
        size, limit = (float(one.weight.double().norm()) for one in (self, trained))
        if not 0 < limit * STEEP < size:
            return self
        return trained if self.says_numbers else self.scaled(2.0 ** math.floor(math.log2(limit * STEEP / size)))

    def scaled(self, factor: float) -> Head:
        """With logits that are so many times as large."""
        return replace(self, weight=self.weight * factor, bias=None if self.bias is None else self.bias * factor)


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
            Numbers always weigh the same.
        scaled: whether fitted logits are to be as large as probabilities want them, by `scale_of` on the first batches:
            for metrics that look at more than which is the largest, such as perplexity.
    """

    def __init__(
        self, module: nn.Module, layer: str, data: ReferenceData, *, balanced: bool = False, scaled: bool = False
    ) -> None:
        self.module = module
        self.layer: Any = module.get_submodule(layer)
        self.data = data
        self.balanced = balanced
        self.scaled = scaled
        self._is_of_numbers = self._is_of_labels = False  # until a batch shows it

    @classmethod
    def of(
        cls, module: nn.Module, head: str, data: ReferenceData, *, balanced: bool = False, scaled: bool = False
    ) -> Fitting | None:
        """None: the head does not end in such a layer, it does not learn, or ``predict`` changes its output."""
        ranks = data.ranks
        with borrowed(module), evaluating(module):
            found = ranks.agreed(lambda: _tried(module, head, data))
        names = {name for name in ranks.gather(found) if name is not None}
        # Ranks without a batch go by the others; where the others disagree nobody can be followed.
        refused = any(ranks.gather(bool(data.batches) and found is None))
        if len(names) != 1 or refused:
            return None
        fitting = cls(module, names.pop(), data, balanced=balanced, scaled=scaled)
        return fitting if all(parameter.requires_grad for parameter in fitting.layer.parameters()) else None

    @property
    def trained(self) -> Head:
        """The layer's weights as they are."""
        bias = self.layer.bias
        return Head(self.layer.weight.detach().clone(), None if bias is None else bias.detach().clone())

    def fit(self, *, all_data: bool) -> Head:
        """The head that is nearest to the targets, for the module as it speaks now; not all data: the first batches.

        All ranks get the same, and the same as one process.

        Raises:
            UnfitError: if ``predict`` can't do with the data.
        """
        own, ranks = self.layer.weight, self.data.ranks
        leading, rest = self.data.batches[: self.data.attributed], self.data.batches[self.data.attributed :]
        most = ROWS // max(sum(ranks.gather(len(self.data.batches))), 1)

        def seen() -> tuple[list[tuple[Tensor, Tensor]], Sizes | None]:
            found = [self._in_front(batch, most) for batch in leading]
            if not found:
                return found, None
            features, wanted = (torch.cat(parts) for parts in zip(*found, strict=True))
            return found, Sizes.of(features, wanted, of_numbers=self._is_of_numbers)

        try:
            if len(own) > OUTPUTS:
                raise ValueError(f"the head has {len(own)} outputs, more than the {OUTPUTS} that are fitted")
            first, share = ranks.agreed(seen)
            sizes = reduce(add, (one for one in ranks.gather(share) if one is not None))
            wants_classes = self.balanced and not sizes.of_numbers
            of_class = leastsquares.weights(sizes.counts) if wants_classes else None
            speaks = sizes.largest > 0  # what silent units leave at 0 is most of it, where few are kept
            if speaks.sum() > WIDEST:
                raise ValueError(f"the head hears {int(speaks.sum())} features, more than the {WIDEST} it is fitted to")
            scale = scales(sizes.largest[speaks])
            middle, reach = sizes.of_targets(around_zero=self.layer.bias is None)

            def moments(features: Tensor, wanted: Tensor) -> Moments:
                if sizes.of_numbers:
                    wanted = rounded(wanted - middle.to(wanted), reach)
                return self._moments(features, wanted, speaks, scale, of_class)

            def of_share() -> Moments | None:
                found: list[Moments] = []
                if first:
                    features, wanted = (torch.cat(parts) for parts in zip(*first, strict=True))
                    found.append(moments(features, wanted))
                for batch in rest if all_data else ():
                    found.append(moments(*self._in_front(batch, most)))
                return reduce(add, found).cpu() if found else None

            shares = [share for share in ranks.each(of_share) if share is not None]
            some, bias = ranks.decided(lambda: reduce(add, shares).solve(bias=self.layer.bias is not None))
            if sizes.of_numbers:
                some, bias = some * reach.unsqueeze(1), bias * reach + middle
            weight = some.new_zeros(len(some), len(speaks))
            weight[:, speaks] = some
            head = Head(
                weight.reshape(own.shape).to(own),
                None if self.layer.bias is None else bias.to(self.layer.bias),
                sizes.of_numbers,
            )
            if not self.scaled or sizes.of_numbers:
                return head
            few = NOTED // max(len(own) * sum(ranks.gather(len(leading))), 1)
            return head.scaled(_least(reduce(add, ranks.each(lambda: self._surprise(head, first, few)))))
        except Exception as error:
            raise UnfitError(str(error)) from error

    def _surprise(self, head: Head, batches: Sequence[tuple[Tensor, Tensor]], most: int) -> Tensor:
        """Of a head's logits by each of `SCALES`, summed over batches; of positions over some."""
        found = torch.zeros(len(SCALES), dtype=torch.float64)
        for features, wanted in batches:
            some = spread(len(wanted), max(most, 1), 0).to(wanted.device)
            weight, bias = head.weight.flatten(1), head.bias
            logits = nn.functional.linear(features[some].to(weight), weight, bias)
            target = (wanted[some] > 0).long() if self._is_of_labels else wanted[some].argmax(dim=1)
            found += len(some) * surprise(logits, target) if len(some) else 0
        return found

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

    def _in_front(self, batch: Any, most: int = ROWS) -> tuple[Tensor, Tensor]:
        """Features ``(rows, features)``, and what the layer should say of them ``(rows, outputs)``."""
        features, target = _in_front(self.module, self.layer, self.data, self.data.convert(batch))
        features, target = thinned(features, target, batch, most)
        if is_numbers(target):
            self._is_of_numbers = True
            return features, target.cpu().double()
        self._is_of_labels = target.ndim == 2
        labels = true_labels(features.new_zeros(len(features), len(self.layer.weight)), target)
        # Of several labels each is a yes or a no, and a yes is above 0.
        return features, labels if target.ndim == 1 else 2 * labels - 1


def thinned(values: Tensor, target: Tensor, batch: Any, most: int) -> tuple[Tensor, Tensor]:
    """Rows of a batch, at most about so many where there are more than the batch has data: pixels, tokens.

    Those are evenly far apart: by an odd number, so that they are not all of one column of the pictures.
    """
    given = loaders.rows_of(batch)
    if given is None or not max(given, most) < len(target):
        return values, target
    places = spread(len(target), max(most - 1, 0) | 1, 0)
    return values[places.to(values.device)], target[places.to(target.device)]


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

    Of numbers 1: they are meant as they are.

    Least squares give logits between 0 and 1, whose softmax is flat: a task that is trained on, or asked for
    probabilities, needs them as its loss would have made them. For several labels it is the sigmoid.
    """
    if is_numbers(target):
        return 1.0
    return _least(surprise(logits, target))


def surprise(logits: Tensor, target: Tensor) -> Tensor:
    """Mean loss of logits by each of `SCALES`: float64 on the CPU."""
    logits = logits.cpu().double()
    loss = nn.functional.cross_entropy if target.ndim == 1 else nn.functional.binary_cross_entropy_with_logits
    wanted = target.cpu() if target.ndim == 1 else target.cpu().double()
    return torch.stack([loss(2.0**power * logits, wanted) for power in SCALES])


def _least(surprises: Tensor) -> float:
    """The power of two of the least surprise; in doubt the least power."""
    return min(zip(surprises.tolist(), (2.0**power for power in SCALES), strict=True))[1]


def _is_linear(part: nn.Module) -> bool:
    if "forward" in vars(part) or is_parametrized(part):
        return False
    if type(part) in _CONVOLUTIONS:
        convolution: Any = part
        plain = convolution.groups == 1 and set(convolution.kernel_size) == {1} == set(convolution.stride)
        return bool(plain and set(convolution.padding) == {0})
    return type(part) is nn.Linear


def _in_front(module: nn.Module, layer: Any, data: ReferenceData, batch: Any) -> tuple[Tensor, Tensor]:
    """What reaches a layer, ``(rows, features)``, and the targets ``(rows,)`` or ``(rows, classes)``."""
    known = Flat.like(data.predict, data.predict)
    predict = known.predict.predict if isinstance(known.predict, Flat) else known.predict
    vars(layer)["forward"] = _handed_on
    try:
        with torch.no_grad(), data.forward_context():
            features, target = predict(module, batch)
    finally:
        del vars(layer)["forward"]
    given = (features.detach(), target.detach(), len(layer.weight), known.layout)
    return in_front(*given, ignored_by(module))


def _handed_on(input: Tensor) -> Tensor:
    return input
