"""Relevance of every unit on reference batches: Zennit's layer-wise relevance propagation on a borrowed module."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.rnn import PackedSequence
from zennit.core import Composite
from zennit.rules import Pass

from lightning_rnf.anatomy import (
    BATCH_NORMS,
    Flat,
    Predict,
    UnitLayer,
    computes_itself,
    is_attention,
    is_layer,
    is_recurrent,
    predict_checked,
    supervised,
    torch_class,
    true_labels,
    why_not_units,
)
from lightning_rnf.relevance.composite import applicable
from lightning_rnf.relevance.conservation import Conservation, Journal, is_of_torch
from lightning_rnf.relevance.functions import FunctionRules
from lightning_rnf.relevance.packed import Projected, take_apart
from lightning_rnf.relevance.precision import RunsAgainError, SinglePrecision, UnreachableError
from lightning_rnf.relevance.recurrent import GRADIENTS, Gradients, Seen, SignalTakesAll, unrolled
from lightning_rnf.runtime import ALONE, Ranks, borrowed, evaluating, forget_gradient_hooks

OverSamples = Literal["absolute", "signed"]

_LOST_IN_ONE = torch.finfo(torch.float32).tiny
"""An epsilon for norms of variance 1: added to it nothing changes, and it is not 0, which torch 2.11 refuses."""


@dataclass(frozen=True, eq=False)
class Attribution:
    """Relevance of every unit, and how well it was conserved on its way.

    Attributes:
        relevance: by layer, float64 ``(units,)`` on the CPU: summed over positions, then over samples as asked for.
        conservation: empty for scores that are no relevance.
    """

    relevance: dict[str, Tensor]
    conservation: Conservation = field(default_factory=Conservation)


def attribute(
    module: nn.Module,
    layers: Sequence[UnitLayer],
    batches: Iterable[Any],
    predict: Predict = supervised,
    composite: Composite | None = None,
    progress: Callable[[int], None] = lambda samples: None,
    ranks: Ranks = ALONE,
    arrived: Callable[[Sequence[Tensor], Sequence[Tensor | None]], None] = lambda roots, relevance: None,
    over_samples: OverSamples = "signed",
    embedded: bool = True,
) -> Attribution:
    """Relevance of every unit, propagated from the logit of each sample's true class (equations 1 and 2 of the paper).

    A sample with several labels starts it from the logits of all of them, one without a label from none. Of pixels and
    tokens each that counts starts it from its own true class. Of numbers it starts at the size of each output, whose
    reference value is 0 (Letzgus et al. 2022, "Toward Explainable AI for Regression Models"): what speaks for what was
    said is positive, whether that is above 0 or below.

    Runs in eval mode, eagerly, in at least single precision, whatever the forward casts to. The module comes back as
    it was; hooks of the user's on the gradients of its submodules do not run.
    Relevance is reduced while it flows, so memory depends on the size of a batch and not on how many there are.

    Args:
        module: the bare model, not a wrapper around it.
        layers: its unit layers.
        batches: on the module's device; of several ranks, this one's share.
        predict: how to get logits and labels of a batch.
        composite: Zennit's rules, used as they are; None: ``EpsilonPlus``, epsilon for linear layers and z⁺ for
            convolutions, on a network whose layers have the batch norms that directly follow merged into them. A
            layer with a forward of its own, or that runs several times (Zennit's rules know its last run only), is
            propagated through function by function, with the weight that it computes; there is no z⁺ for that, so it
            is epsilon for convolutions, too, and a note says so.
            `FunctionRules` hold for functions in both cases, but not inside of layers that a composite passes over.
            Only with None norms, attention and gates have theirs, also in modules of torch, and convolutions beside
            norms, attention or sums of smooth activations have `composite.BySign`.
        progress: called after each batch with the number of samples so far.
        ranks: whose sums are added up; they all get the same.
        arrived: called after each batch with the inputs of the layers and the relevance that arrived at each; the
            leaves among them are the network's input.
        over_samples: ``"signed"``: the sum over samples (the paper): a unit that speaks for some classes and as much
            against others comes to nothing. ``"absolute"``: the sum of each sample's absolute relevance. Conservation
            is of signed relevance in both cases.
        embedded: whether what embeddings look up is an input of the network; not beside a composite.

    Raises:
        ValueError: if there is no sample, relevance can't reach a layer or is not finite, the forward insists on half
            precision, or as `anatomy.predict_checked`.
    """
    repeated: set[str] = set()
    runs: Counter[str] = Counter()
    functions = FunctionRules(aware=composite is None)
    rules = applicable(composite, functions.smooth, repeated)
    journal = Journal(layers)

    def true_class_logit(logits: Tensor, target: Tensor) -> Tensor:
        return logits * true_labels(logits, target)

    def summed(layer: UnitLayer, output: Tensor, relevance: Tensor) -> Tensor:
        of_samples = over_positions(layer, relevance)
        return torch.stack([of_samples.sum(dim=0), of_samples.abs().sum(dim=0)], dim=1)

    @contextmanager
    def applied(module: nn.Module) -> Iterator[None]:
        with rules.context(module):
            context: dict[str, Any] = {}  # after the canonizers, which may add modules
            ruled = {
                name
                for name, submodule in module.named_modules()
                if rules.module_map(context, name, submodule) is not None
            }
            # What a composite of the user's own has no rule for is to be a plain gradient.
            left = {
                name for name, submodule in module.named_modules() if composite is not None and _is_layer(submodule)
            }
            runs.clear()
            with ExitStack() as hooks:
                for name in ruled if composite is None else ():
                    if not isinstance(rules.module_map(context, name, module.get_submodule(name)), Pass):
                        count = partial(_count, runs, name)
                        hooks.callback(module.get_submodule(name).register_forward_pre_hook(count).remove)
                hooks.enter_context(journal.recording(module, ruled, repeated))
                recurrent = {name for name, submodule in module.named_modules() if is_recurrent(submodule)}
                hooks.enter_context(functions.attached(module, ruled | left | recurrent))
                yield

    def conserving(module: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        with functions:
            logits, target = predict(module, batch)
        if again := {name for name, count in runs.items() if count > 1} - repeated:
            repeated.update(again)
            raise RunsAgainError
        journal.read(logits)
        return logits, target

    def prepare(module: nn.Module) -> None:
        _bake(module)
        if composite is None:
            _merge_norms(module, layers)

    def note(sent: Tensor, roots: Sequence[Tensor], at_roots: Sequence[Tensor | None]) -> None:
        journal.add(sent, roots, at_roots)
        arrived(roots, at_roots)

    sums = propagate(
        *(module, layers, batches, Flat.like(predict, conserving), true_class_logit, summed),
        *(applied, progress, prepare, note, ranks, embedded and composite is None),
        recurrent=SignalTakesAll(),
    )
    journal.join(ranks)
    # Of a layer that did not run there is one zero a unit.
    pairs = {name: found if found.ndim == 2 else found.unsqueeze(1).expand(-1, 2) for name, found in sums.items()}
    signed, absolute = ({name: pair[:, kind] for name, pair in pairs.items()} for kind in (0, 1))
    return Attribution(absolute if over_samples == "absolute" else signed, journal.conservation(signed))


def _count(runs: Counter[str], name: str, *call: object) -> None:
    runs[name] += 1


def _is_layer(module: nn.Module) -> bool:
    return is_of_torch(module) and not any(module.children())


@torch.no_grad()
def _bake(module: nn.Module) -> None:
    """For a borrowed module: parametrized layers become plain ones, with the weights that they have now.

    Rules change a layer's parameters for as long as they need others, and there are none where weights are computed.
    """
    plain: dict[nn.Module, nn.Module] = {}
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if child is not None and is_parametrized(child) and is_layer(child) and not _is_closed(child):
                if child not in plain:
                    plain[child] = _plain(child)
                parent._modules[name] = plain[child]


def _is_closed(module: nn.Module) -> bool:
    """Whether its units are inside of it."""
    return is_recurrent(module) or is_attention(module)


def _plain(layer: Any) -> nn.Module:
    kind = type(layer).__mro__[1]  # torch makes a class of its own for each that is parametrized
    made: nn.Module = object.__new__(kind)
    own = {name: getattr(layer, name).detach() for name in layer.parametrizations}
    parts = {name: part for name, part in layer._modules.items() if name != "parametrizations"}
    parameters = {
        **layer._parameters,
        **{name: nn.Parameter(value, requires_grad=False) for name, value in own.items()},
    }
    vars(made).update(vars(layer) | {"_modules": parts, "_parameters": parameters})
    return made


def _merge_norms(module: nn.Module, layers: Sequence[UnitLayer]) -> None:
    """For a borrowed module: a layer and its batch norm become one layer, and the norm an identity.

    The pairs are those that the trace has found. Zennit's canonizers could do the same to pairs with weights, but leave
    parameters in the graph.
    """
    for layer in layers:
        norm = module.get_submodule(layer.norm) if layer.norm else None
        if not isinstance(norm, BATCH_NORMS) or norm.running_mean is None or norm.running_var is None:
            continue  # other norms, and those that always use the batch's statistics
        submodule = module.get_submodule(layer.name)
        if computes_itself(submodule) or torch_class(norm) not in BATCH_NORMS:
            continue  # what they do with other weights is not known
        with torch.no_grad():
            scale = (norm.running_var + norm.eps).rsqrt() * (1.0 if norm.weight is None else norm.weight)
            shift = (0.0 if norm.bias is None else norm.bias) - norm.running_mean * scale
            weight = submodule.get_parameter("weight")
            bias = shift if submodule._parameters["bias"] is None else submodule._parameters["bias"] * scale + shift
            of_rows = layer.spread(f"{layer.name}.weight", scale)
            merged = {"weight": weight * of_rows[(...,) + (None,) * (weight.ndim - of_rows.ndim)], "bias": bias}
            for name, value in merged.items():
                submodule._parameters[name] = nn.Parameter(value, requires_grad=False)
            norm._parameters.update(weight=None, bias=None)
            norm._buffers.update(running_mean=torch.zeros_like(scale), running_var=torch.ones_like(scale))
            norm.eps = _LOST_IN_ONE


def propagate(
    module: nn.Module,
    layers: Sequence[UnitLayer],
    batches: Iterable[Any],
    predict: Predict,
    start: Callable[[Tensor, Tensor], Tensor],
    reduce: Callable[[UnitLayer, Tensor, Tensor], Tensor],
    rules: Callable[[nn.Module], AbstractContextManager[Any]] = nullcontext,
    progress: Callable[[int], None] = lambda samples: None,
    prepare: Callable[[nn.Module], None] = lambda module: None,
    arrived: Callable[[Tensor, Sequence[Tensor], Sequence[Tensor | None]], None] = lambda *batch: None,
    ranks: Ranks = ALONE,
    embedded: bool = False,
    recurrent: Gradients = GRADIENTS,
) -> dict[str, Tensor]:
    """Send something back from the logits and add up what arrives at the units, on a borrowed module.

    Args:
        module: the bare model.
        layers: its unit layers.
        batches: on the module's device; of several ranks, this one's share.
        predict: how to get logits and labels of a batch.
        start: ``(logits, target)`` to what is sent back from the logits, ``(rows, classes)``.
        reduce: ``(layer, output, what arrives at it)`` to ``(units,)`` or ``(units, numbers)``; called while it flows.
        rules: entered around each batch: how it flows. None: as gradients do.
        progress: called after each batch with the number of samples so far.
        prepare: called once with the borrowed module, which it may change.
        arrived: called after each batch with what was sent back, the inputs of the layers and what arrived there.
        ranks: whose sums are added up; they all get the same.
        embedded: what embeddings look up is an input of the network, too, and what other layers than the units' read
            first, so that it goes along every path from there, past the first layers as well.
        recurrent: how it flows from step to step of recurrent layers, which are `unrolled`. What arrives at their units
            is what arrives at the hidden states of all steps.

    Returns:
        By layer: float64 on the CPU, as ``reduce`` gives it, summed over batches and ranks; 0 where nothing ran.

    Raises:
        ValueError: as `attribute`.
    """
    sums = {layer.name: _Sum(layer, reduce) for layer in layers}

    def of_share() -> tuple[int, dict[str, Tensor | bool]]:
        samples = 0
        with borrowed(module), evaluating(module), torch.enable_grad(), ExitStack() as hooks:
            single = hooks.enter_context(SinglePrecision(module))
            module.requires_grad_(False)  # the only leaves are the inputs of the first layers: no parameter's gradient
            forget_gradient_hooks(module)
            prepare(module)
            roots: list[Tensor] = []
            _unroll(module, sums, recurrent)
            take_apart(module, {name: total.see for name, total in sums.items()}, roots)
            for layer in layers:
                submodule = module.get_submodule(layer.name)
                if layer.packed:
                    continue
                hooks.callback(submodule.register_forward_pre_hook(_rooted(layer.name, roots)).remove)
                if layer.is_open:
                    hooks.callback(submodule.register_forward_hook(sums[layer.name].watch).remove)
            for name, submodule in module.named_modules() if embedded else ():
                if isinstance(submodule, (nn.Embedding, nn.EmbeddingBag)):
                    hooks.callback(submodule.register_forward_hook(_looked_up(roots)).remove)
                elif name not in sums and is_layer(submodule) and not is_recurrent(submodule):  # an adapter's base, say
                    beside = _rooted(name, roots, is_needed=False)
                    hooks.callback(submodule.register_forward_pre_hook(beside).remove)

            def of_batch(batch: Any) -> int:
                roots.clear()
                # Zennit keeps what its hooks stored until the context is left: once per batch, or memory grows.
                with rules(module):
                    single_predict = Flat.like(predict, single.predicting(predict))
                    logits, target = predict_checked(single_predict, module, single.batch(batch))
                    sent, ends = start(logits.detach(), target), tuple(roots)  # checkpointed layers add to it
                    arrived(sent, ends, torch.autograd.grad(logits, ends, grad_outputs=sent, allow_unused=True))
                    for total in sums.values():
                        total.close()
                return len(target)

            for batch in batches:
                found = None
                while found is None:
                    with suppress(RunsAgainError):  # then with other rules, and fewer each time
                        found = of_batch(batch)
                samples += found
                progress(samples)
        return samples, {name: total.of_share() for name, total in sums.items()}

    shares = ranks.each(of_share)
    if not any(samples for samples, _ in shares):
        raise ValueError("no reference sample to attribute")
    return {layer.name: _total(layer, [found[layer.name] for _, found in shares]) for layer in layers}


def over_positions(layer: UnitLayer, values: Tensor) -> Tensor:
    """Sum the values at a layer's output over positions: ``(N, units)`` in float64 (MPS has none: float32)."""
    wide = torch.float32 if values.device.type == "mps" else torch.float64
    positions = [axis for axis in range(1, values.ndim) if axis != values.ndim + layer.axis]
    return values.sum(dim=positions, dtype=wide) if positions else values.to(wide)


class _Sum:
    """What arrives at one layer's output, reduced to units and summed over batches."""

    def __init__(self, layer: UnitLayer, reduce: Callable[[UnitLayer, Tensor, Tensor], Tensor]) -> None:
        self.layer = layer
        self.reduce = reduce
        self.total: Tensor | None = None
        self.ran = False
        self._seen: list[Seen | Projected] = []

    def watch(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self.ran = True
        value = output.detach()  # an in-place ReLU behind it shows: a negative output whose gradient is 0 anyway

        def add(arrived: Tensor) -> None:
            self._add(value, arrived)

        output.register_hook(add)

    def see(self, seen: Seen | Projected) -> None:
        """A layer has run whose units are inside: what arrives at them is not complete before the backward ends."""
        self.ran = True
        self._seen.append(seen)

    def close(self) -> None:
        """After the backward of a batch."""
        for seen in self._seen:
            if seen.arrived:  # of a checkpointed layer that has run again nothing has
                self._add(*seen.whole())
        self._seen.clear()

    def _add(self, value: Tensor, arrived: Tensor) -> None:
        summed = self.reduce(self.layer, value, arrived)
        self.total = summed if self.total is None else self.total + summed

    def of_share(self) -> Tensor | bool:
        """The sum; without any, whether the layer ran."""
        return self.ran if self.total is None else self.total.to("cpu", torch.float64)


def _unroll(module: nn.Module, sums: Mapping[str, _Sum], recurrent: Gradients) -> None:
    """For a borrowed module: recurrent layers of units run step by step, for relevance the others do, too."""
    for name, part in module.named_modules():
        if is_recurrent(part) and why_not_units(part) is None:
            if name in sums:
                vars(part)["forward"] = unrolled(part, recurrent, sums[name].see)
            elif isinstance(recurrent, SignalTakesAll):
                vars(part)["forward"] = unrolled(part, recurrent)


def _total(layer: UnitLayer, shares: Sequence[Tensor | bool]) -> Tensor:
    found = [share for share in shares if isinstance(share, Tensor)]
    if not found and not any(shares):  # an expert, say, that none of these samples were sent to
        return torch.zeros(layer.units, dtype=torch.float64)
    if not found:
        raise ValueError(f"no relevance reached layer {layer.name!r}: the logits do not depend on it")
    total = sum(found[1:], start=found[0])
    finite = total.isfinite().view(layer.units, -1).all(dim=1)  # of a unit there may be several numbers
    if not finite.all():
        raise ValueError(
            f"relevance of layer {layer.name!r} is not finite in {int((~finite).sum())} of {layer.units} units"
        )
    return total


def _rooted(name: str, roots: list[Tensor], *, is_needed: bool = True) -> Any:
    """A hook that makes the input of a first layer a leaf of the graph, for relevance to end in; if it is needed."""

    def root(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not is_needed and not (args and torch.is_grad_enabled() and isinstance(args[0], Tensor)):
            return None
        if not args or not torch.is_grad_enabled():
            how = "runs without a graph (torch.no_grad, reentrant checkpointing)" if args else "is called by keyword"
            raise UnreachableError(f"layer {name!r} {how}, so no relevance can reach it; leave it out of units=")
        packed = args[0] if isinstance(args[0], PackedSequence) else None
        data = args[0] if packed is None else packed.data
        if data.requires_grad:
            roots.append(data)  # if it is the user's own leaf nothing else ends in it
            return None
        roots.append(data.detach().requires_grad_())
        return (roots[-1] if packed is None else PackedSequence(roots[-1], *packed[1:]), *args[1:])

    return root


def _looked_up(roots: list[Tensor]) -> Any:
    """A hook that makes what an embedding looks up a leaf of the graph."""

    def root(module: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or not torch.is_grad_enabled():
            return None
        if output.requires_grad:
            roots.append(output)  # the user's own leaf
            return None
        roots.append(output.detach().requires_grad_())
        return roots[-1]

    return root
