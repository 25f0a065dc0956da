"""Relevance of every unit on reference batches: layer-wise relevance propagation on a borrowed module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from zennit.core import Composite

from lightning_rnf.anatomy import (
    BATCH_NORMS,
    Flat,
    Predict,
    UnitLayer,
    computes_itself,
    is_attention,
    is_layer,
    is_recurrent,
    supervised,
    torch_class,
    true_labels,
)
from lightning_rnf.relevance.conservation import Conservation, Journal, is_of_torch
from lightning_rnf.relevance.functions import FunctionRules
from lightning_rnf.relevance.layers import layer_rules, ruled
from lightning_rnf.relevance.propagation import over_positions, propagate
from lightning_rnf.relevance.recurrent import SignalTakesAll
from lightning_rnf.relevance.splits import WrittenToError
from lightning_rnf.runtime import ALONE, Ranks

OverSamples = Literal["absolute", "signed"]


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
        composite: Zennit's rules, used as they are; None: `layers`, which is what its ``EpsilonPlus`` gives, epsilon
            for linear layers and z⁺ for convolutions, on a network whose layers have the batch norms that directly
            follow merged into them. A layer with a forward of its own is propagated through function by function;
            there is no z⁺ for that, so it is epsilon for convolutions, too, and a note says so.
            `FunctionRules` hold for functions in both cases, but not inside of layers that a composite passes over.
            Only with None norms, attention and gates have theirs, also in modules of torch, and convolutions beside
            norms, attention or sums of smooth activations have `layers.by_sign`.
        progress: called after each batch with the number of samples so far.
        ranks: whose sums are added up; they all get the same.
        arrived: called after each batch with the network's inputs, leaves that its first layers read, and the
            relevance that arrived at each.
        over_samples: ``"signed"``: the sum over samples (the paper): a unit that speaks for some classes and as much
            against others comes to nothing. ``"absolute"``: the sum of each sample's absolute relevance. Conservation
            is of signed relevance in both cases.
        embedded: whether what embeddings look up is an input of the network; not beside a composite.

    Raises:
        ValueError: if there is no sample, relevance can't reach a layer or is not finite, the forward insists on half
            precision, or as `anatomy.predict_checked`.
    """
    functions = FunctionRules(aware=composite is None)
    journal = Journal(layers)

    def true_class_logit(logits: Tensor, target: Tensor) -> Tensor:
        return logits * true_labels(logits, target)

    def summed(layer: UnitLayer, output: Tensor | None, relevance: Tensor) -> Tensor:
        of_samples = over_positions(layer, relevance)
        return torch.stack([of_samples.sum(dim=0), of_samples.abs().sum(dim=0)], dim=1)

    @contextmanager
    def applied(module: nn.Module) -> Iterator[None]:
        with ExitStack() as rules:
            if composite is None:
                own = layer_rules(module, functions.smooth)
                known, left = set(own), set[str]()
            else:
                own = {}
                known = rules.enter_context(_zennit(composite, module))
                # What a composite of the user's own has no rule for is to be a plain gradient.
                left = {name for name, submodule in module.named_modules() if _is_layer(submodule)}
            rules.enter_context(journal.recording(module, known))
            rules.enter_context(ruled(module, own, functions.keeps_copies))
            recurrent = {name for name, submodule in module.named_modules() if is_recurrent(submodule)}
            rules.enter_context(functions.attached(module, known | left | recurrent))
            try:
                yield
            except WrittenToError as error:
                if functions.copies:
                    raise error.__cause__ or error from None
                functions.copies = True
                raise

    def conserving(module: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        with functions:
            logits, target = predict(module, batch)
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
        outputs=False,
    )
    journal.join(ranks)
    # Of a layer that did not run there is one zero a unit.
    pairs = {name: found if found.ndim == 2 else found.unsqueeze(1).expand(-1, 2) for name, found in sums.items()}
    signed, absolute = ({name: pair[:, kind] for name, pair in pairs.items()} for kind in (0, 1))
    return Attribution(absolute if over_samples == "absolute" else signed, journal.conservation(signed))


@contextmanager
def _zennit(composite: Composite, module: nn.Module) -> Iterator[set[str]]:
    """The user's own rules, and the names of the modules that they are for.

    For attention there are none: Zennit takes it for an activation, and fails on its three inputs.
    """

    def module_map(context: dict[str, Any], name: str, module: nn.Module) -> Any:
        return None if is_attention(module) else composite.module_map(context, name, module)

    with Composite(module_map, composite.canonizers).context(module):
        context: dict[str, Any] = {}  # after the canonizers, which may add modules
        yield {name for name, submodule in module.named_modules() if module_map(context, name, submodule) is not None}


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
            vars(norm)["forward"] = nn.Identity().forward
