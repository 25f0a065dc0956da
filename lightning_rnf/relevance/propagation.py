"""Something sent back from the logits, and what arrives at units added up: relevance by its rules, or a gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from functools import partial
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_rnf.anatomy import (
    Flat,
    Predict,
    UnitLayer,
    is_layer,
    is_recurrent,
    predict_checked,
    why_not_units,
)
from lightning_rnf.relevance.ends import Ends
from lightning_rnf.relevance.packed import Projected, take_apart
from lightning_rnf.relevance.precision import SinglePrecision, UnreachableError
from lightning_rnf.relevance.recurrent import GRADIENTS, Gradients, Seen, SignalTakesAll, unrolled
from lightning_rnf.relevance.splits import WrittenToError
from lightning_rnf.runtime import ALONE, Ranks, borrowed, evaluating, forget_gradient_hooks

Reduce = Callable[[UnitLayer, Any, Tensor], Tensor]
"""``(layer, what it said, what arrives at it)`` to ``(units,)`` or ``(units, numbers)``."""


def propagate(
    module: nn.Module,
    layers: Sequence[UnitLayer],
    batches: Iterable[Any],
    predict: Predict,
    start: Callable[[Tensor, Tensor], Tensor],
    reduce: Reduce,
    rules: Callable[[nn.Module], AbstractContextManager[Any]] = nullcontext,
    progress: Callable[[int], None] = lambda samples: None,
    prepare: Callable[[nn.Module], None] = lambda module: None,
    arrived: Callable[[Tensor, Sequence[Tensor], Sequence[Tensor | None]], None] = lambda *batch: None,
    ranks: Ranks = ALONE,
    embedded: bool = False,
    recurrent: Gradients = GRADIENTS,
    outputs: bool = True,
) -> dict[str, Tensor]:
    """Send something back from the logits and add up what arrives at the units, on a borrowed module.

    Args:
        module: the bare model.
        layers: its unit layers.
        batches: on the module's device; of several ranks, this one's share.
        predict: how to get logits and labels of a batch.
        start: ``(logits, target)`` to what is sent back from the logits, ``(rows, classes)``.
        reduce: called while it flows.
        rules: entered around each batch: how it flows. None: as gradients do.
        progress: called after each batch with the number of samples so far.
        prepare: called once with the borrowed module, which it may change.
        arrived: called after each batch with what was sent back, the network's inputs and what arrived there.
        ranks: whose sums are added up; they all get the same.
        embedded: what embeddings look up is an input of the network, too, and what other layers than the units' read
            first, so that it goes along every path from there, past the first layers as well.
        recurrent: how it flows from step to step of recurrent layers, which are `unrolled`. What arrives at their units
            is what arrives at the hidden states of all steps.
        outputs: whether ``reduce`` is given what layers said, and so it has to be kept; else it may be None.

    Returns:
        By layer: float64 on the CPU, as ``reduce`` gives it, summed over batches and ranks; 0 where nothing ran.

    Raises:
        ValueError: as `attribute`.
    """
    sums = {layer.name: _Sum(layer, reduce, outputs=outputs) for layer in layers}

    def of_share() -> tuple[int, dict[str, Tensor | bool]]:
        samples = 0
        with borrowed(module), evaluating(module), torch.enable_grad(), ExitStack() as hooks:
            single = hooks.enter_context(SinglePrecision(module))
            module.requires_grad_(False)  # the only leaves are the inputs of the first layers: no parameter's gradient
            forget_gradient_hooks(module)
            prepare(module)
            roots = Ends()
            _unroll(module, sums, recurrent)
            take_apart(module, {name: total.see for name, total in sums.items()}, roots)
            known = {name: layer for layer in layers for name in layer.modules}
            for name, layer in known.items():
                submodule = module.get_submodule(name)
                if layer.packed:
                    continue
                hooks.callback(submodule.register_forward_pre_hook(_rooted(name, roots)).remove)
                if layer.is_open:
                    hooks.callback(submodule.register_forward_hook(sums[layer.name].watch).remove)
            for name, submodule in module.named_modules() if embedded else ():
                if isinstance(submodule, (nn.Embedding, nn.EmbeddingBag)):
                    hooks.callback(submodule.register_forward_hook(_looked_up(roots)).remove)
                elif name in known or is_recurrent(submodule):
                    continue
                elif is_layer(submodule):  # an adapter's base, say
                    beside = _rooted(name, roots, is_needed=False)
                    hooks.callback(submodule.register_forward_pre_hook(beside).remove)

            def of_batch(batch: Any) -> int:
                roots.clear()
                for total in sums.values():
                    total.begin()
                # Beside a composite Zennit keeps what its hooks stored until the context is left: once per batch.
                # A forward that writes to its input may run again.
                own = apply_to_collection(single.batch(batch), Tensor, Tensor.clone, allow_frozen=True)
                with rules(module):
                    single_predict = Flat.like(predict, single.predicting(predict))
                    logits, target = predict_checked(single_predict, module, own)
                    sent, ends = start(logits.detach(), target), tuple(roots.found)  # checkpointed layers add to it
                    arrived(sent, ends, torch.autograd.grad(logits, ends, grad_outputs=sent, allow_unused=True))
                    for total in sums.values():
                        total.close()
                roots.clear()
                return len(target)

            for batch in batches:
                found = None
                while found is None:
                    with suppress(WrittenToError):  # then rules keep copies
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

    def __init__(self, layer: UnitLayer, reduce: Reduce, *, outputs: bool) -> None:
        self.layer = layer
        self.reduce = reduce
        self.outputs = outputs
        self.total: Tensor | None = None
        self.ran = False
        self._seen: list[Seen | Projected] = []
        self._of_batch: list[Tensor] = []

    def begin(self) -> None:
        """Before a batch; one that has not been closed doesn't count."""
        self._seen.clear()
        self._of_batch.clear()

    def watch(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self.ran = True
        # An in-place ReLU behind it shows: a negative output whose gradient is 0 anyway.
        output.register_hook(partial(self._add, output.detach() if self.outputs else None))

    def see(self, seen: Seen | Projected) -> None:
        """A layer has run whose units are inside: what arrives at them is not complete before the backward ends."""
        self.ran = True
        self._seen.append(seen)

    def close(self) -> None:
        """After the backward of a batch."""
        for seen in self._seen:
            if seen.arrived:  # of a checkpointed layer that has run again nothing has
                self._add(*seen.whole())
        for summed in self._of_batch:
            self.total = summed if self.total is None else self.total + summed
        self.begin()

    def _add(self, value: Tensor | None, arrived: Tensor) -> None:
        self._of_batch.append(self.reduce(self.layer, value, arrived))

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


def _rooted(name: str, roots: Ends, *, is_needed: bool = True) -> Any:
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
            roots.note(data)
            return None
        leaf = data.detach().requires_grad_()
        roots.note(leaf)
        return (leaf if packed is None else PackedSequence(leaf, *packed[1:]), *args[1:])

    return root


def _looked_up(roots: Ends) -> Any:
    """A hook that makes what an embedding looks up a leaf of the graph."""

    def root(module: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or not torch.is_grad_enabled():
            return None
        if output.requires_grad:
            roots.note(output)
            return None
        leaf = output.detach().requires_grad_()
        roots.note(leaf)
        return leaf.clone()  # which may be written to

    return root
