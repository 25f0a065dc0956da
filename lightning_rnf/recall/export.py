"""A finished task's sub-network as a small, dense, ordinary module: the units it does without are gone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, fx, nn

from lightning_rnf.anatomy import (
    LAYERS,
    TRANSPOSED,
    Channels,
    Inputs,
    Known,
    NotFollowedError,
    Traced,
    UnitLayer,
    Wider,
    bare,
    by_group,
    effect_of_function,
    effect_of_module,
    folded,
    followed,
    layer_form,
    node_argument,
    silenced,
    tensor_copy,
    torch_class,
)
from lightning_rnf.freezing import harmless
from lightning_rnf.memory import TaskRecord, layers_before, record_before
from lightning_rnf.recall import embeddings
from lightning_rnf.recall.kept import Kept
from lightning_rnf.recall.pruning import Plan, plan
from lightning_rnf.recall.subnetwork import recall
from lightning_rnf.recall.whole import Expected, whole, zeroed
from lightning_rnf.runtime import borrowed

log = logging.getLogger(__name__)

_OF_COPIES = "_user_preserved_attributes"  # torch's key for attributes of a graph module that a deep copy has, too


def export(
    module: nn.Module,
    layers: Iterable[UnitLayer],
    record: TaskRecord,
    widenings: Sequence[Wider] = (),
    *,
    masked: bool = True,
    inputs: Callable[[], Inputs | None] | None = None,
) -> nn.Module:
    """Cut a finished task's sub-network out of a model; the model itself stays as it is.

    What comes back is made of torch's own modules and functions (and whatever functions of others the forward calls):
    it loads and runs without this package and without the model's class. Its logits are those of recall up to the
    rounding of sums. It is in eval mode; its parameters are copies that share nothing with the model's.

    Example::

        small = rnf.export(model, "digits-01")
        torch.save(small, "digits-01.pt")                       # torch.load(path, weights_only=False)
        torch.onnx.export(small, (x,), "digits-01.onnx")
        print(size_of(model, x), size_of(small, x))

    Irrelevant units go wherever nothing has to count them. They stay, with zero weights, where they share channels with
    relevant ones (the sum of a residual network), where a grouped convolution needs groups of equal size, and where an
    operation reads them that mixes channels (LayerNorm, GroupNorm, attention) or that is not known. At least one
    channel of each layer stays. What stayed, and for which operation, is in the attribute ``kept`` of what comes back,
    as plain data (see `Kept.to_plain`); a warning says so where it is more than half of the parameters of silent units,
    and more than a tenth of all.

    A forward that ``torch.fx`` can't trace is followed by ``torch.export`` on some inputs. Then the small module goes
    the way that these went, on the device where they were: it takes the arguments that were given, refuses sizes for
    which the forward goes another way, and returns plain dicts and tuples for objects with fields. It is compared with
    recall on these inputs. If that fails, too, what comes back is a copy of the model in which silent units are zeros;
    nothing is cut, and to load it takes the model's class.

    Args:
        module: the model.
        layers: its unit layers.
        record: of the task, as for `recall`.
        widenings: of the model; what came since the task's end is left out.
        masked: as in recall; if not, all units stay.
        inputs: gives some inputs of the forward; asked for if ``torch.fx`` can't trace it.

    Returns:
        A module that takes what the model's ``forward`` takes, in batches, and returns the task's logits.

    Raises:
        ValueError: if ``torch.fx`` can't trace the model and there are no inputs, or no way gives recall's logits; or
            its forward runs another head than the task's.
    """
    with embeddings.written(module, record.old_rows):
        return _export(module, tuple(layers), replace(record, old_rows={}), widenings, masked, inputs)


def _export(
    module: nn.Module,
    layers: tuple[UnitLayer, ...],
    record: TaskRecord,
    widenings: Sequence[Wider],
    masked: bool,
    inputs: Callable[[], Inputs | None] | None,
) -> nn.Module:
    given = (layers, record)
    asked: list[Inputs] = []

    def example() -> Inputs | None:
        found = None if inputs is None else inputs()
        asked.extend([] if found is None else [found])
        return found

    small: nn.Module | None = None
    with borrowed(module), recall(module, (), record, widenings, masked=masked), ExitStack() as undone:
        later = widenings[record.widenings :]
        layers, record = layers_before(layers, later), record_before(record, later)
        if masked:
            undone.enter_context(harmless(module, layers, record.relevant))
        nobody = {layer.name: torch.zeros(layer.units, dtype=torch.bool) for layer in layers}
        silent = {name: ~record.relevant[name].cpu() for name in nobody} if masked else nobody
        try:
            traced = followed(module, layers, example)
        except NotFollowedError as error:
            if not asked:
                raise ValueError(
                    f"{error}. Or give example=, inputs of the forward, or the module an example_input_array, for "
                    "torch.export to follow"
                ) from error
            why = str(error)
        else:
            _check_head(traced.called, record)
            found = plan(traced, silent)
            small = _build(traced, found, layers, silent)
            kept = Kept.of(found, traced, layers, silent, module, small)
        before = sum(parameter.numel() for parameter in module.parameters())
    if asked:
        expected = _of_recall(module, *given, widenings, masked, asked[0])
        if small is not None and (differs := expected.differs(small)):
            small, why = None, f"what torch.export has followed is not what recall runs: {differs}"
        if small is None:
            small, kept = _whole(module, *given, widenings, masked, why)
            if differs := expected.differs(small):
                raise ValueError(
                    f"{why}; a copy with zeros for silent units is not recall's network, either: {differs}"
                )
    assert small is not None
    log.info("%s: exported with %d of the model's %d parameters", record.name, kept.parameters[1], before)
    if kept.disappoints:
        rank_zero_warn(f"{record.name}: {kept}")
    # A file keeps attributes, and a copy of a graph module what torch has a key for.
    plain: Any = {"task": record.name, **kept.to_plain()}
    if isinstance(small, fx.GraphModule):
        small.meta[_OF_COPIES] = {"kept": plain}
    small.kept = plain
    return small


def _check_head(called: Collection[str], record: TaskRecord) -> None:
    if not any(f"{name}.".startswith(f"{record.head}.") for name in called):
        raise ValueError(
            f"the model runs another head than {record.head!r}, which is that of task {record.name!r}: activate "
            "it before the export (lightning_rnf.MultiHead does so by itself)"
        )


def _of_recall(
    module: nn.Module,
    layers: tuple[UnitLayer, ...],
    record: TaskRecord,
    widenings: Sequence[Wider],
    masked: bool,
    inputs: Inputs,
) -> Expected:
    called: set[str] = set()
    with borrowed(module), recall(module, layers, record, widenings, masked=masked):
        module.get_submodule(record.head).register_forward_hook(lambda *call: called.add(record.head))
        expected = Expected(module, inputs)
    _check_head(called, record)
    return expected


def _whole(
    module: nn.Module,
    layers: tuple[UnitLayer, ...],
    record: TaskRecord,
    widenings: Sequence[Wider],
    masked: bool,
    why: str,
) -> tuple[nn.Module, Kept]:
    with borrowed(module), recall(module, (), record, widenings, masked=masked):
        later = widenings[record.widenings :]
        layers, record = layers_before(layers, later), record_before(record, later)
        silent = {
            layer.name: ~record.relevant[layer.name].cpu() if masked else torch.zeros(layer.units, dtype=torch.bool)
            for layer in layers
        }
        return whole(module, layers, silent, why)


@torch.no_grad()
def _build(traced: Traced, found: Plan, layers: tuple[UnitLayer, ...], silent: Mapping[str, Tensor]) -> fx.GraphModule:
    memo: dict[int, Tensor] = {}
    parts: dict[str, Any] = {name: bare(leaf, memo) for name, leaf in traced.modules.items()}
    tensors = traced.tensors.items()
    parts.update({name: tensor_copy(value, memo) if isinstance(value, Tensor) else value for name, value in tensors})
    by_name = {layer.name: layer for layer in layers}
    rows = {name: zeroed(partial(_part, parts), layer, silent[name]) for name, layer in by_name.items()}
    for node in traced.graph.nodes:
        _check_state(node, by_name, silent, parts)
    for node in list(traced.graph.nodes):
        if node.op == "call_module" and node in found.outputs:
            _cut(parts[node.target], node, found)
        elif node in found.literals:
            _resize(node, found)
        elif node.target is silenced:
            source, name = node.args
            layer, left = by_name[name], silent[name][found.kept_outputs(node, len(silent[name]))]
            if not left.any() or (rows[name] and _stays_zero(source, layer, parts)):
                node.replace_all_uses_with(source)
            else:
                _fill(traced.graph, node, layer.axis, left, parts)
            traced.graph.erase_node(node)
    traced.graph.lint()
    return fx.GraphModule(parts, traced.graph).eval()


def _check_state(
    node: fx.Node, layers: Mapping[str, UnitLayer], silent: Mapping[str, Tensor], parts: Mapping[str, Any]
) -> None:
    """Refuse what zeros don't silence: recurrent units without biases that may be given a state to begin with."""
    layer = layers.get(str(node.target)) if node.op == "call_module" else None
    if layer is None or layer.cells is None or not silent[layer.name].any() or parts[layer.name].bias:
        return
    if layer.cells.gates > 1 and node_argument(node, 1, "hx") is not None:
        raise ValueError(
            f"{layer.name!r} ({type(parts[layer.name]).__name__}) is given an initial state and has no biases, so its "
            "silent units can't be kept from passing that on: let it begin with zeros, or build it with bias=True"
        )


def _stays_zero(node: fx.Node, layer: UnitLayer, parts: Mapping[str, Any]) -> bool:
    """Whether zeros of the speaker are still zeros where the units speak: a norm may have an activation of its own."""
    steps = []
    while node.op != "call_module" or node.target not in layer.speakers:
        if len(node.all_input_nodes) != 1:
            return False
        steps.append(node)
        (node,) = node.all_input_nodes
    zeros = Channels(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64), layer.axis, None)
    known = Known({node: zeros})
    for step in reversed(steps):
        module = parts.get(str(step.target))
        effect = effect_of_function(step, known) if module is None else effect_of_module(step, module, known)
        if effect is None or bool(effect.channels.constant != 0):
            return False
        known.channels[step] = effect.channels
    return True


def _part(parts: Mapping[str, Any], name: str) -> Any:
    """A copied module by the name of its original, also inside a module that stays whole; or a tensor of the graph."""
    if isinstance(parts.get(name), Tensor):
        return parts[name]
    for target, part in parts.items():
        if isinstance(part, nn.Module) and f"{name}.".startswith(f"{target}."):
            return part.get_submodule(name[len(target) + 1 :])
    return None


def _fill(graph: fx.Graph, node: fx.Node, axis: int, silent: Tensor, parts: dict[str, Any]) -> None:
    """Fill the output with zero as recall does: that works with any forward."""
    name = f"silent_{str(node.args[1]).replace('.', '_')}"
    tensors = (tensor for part in parts.values() if isinstance(part, nn.Module) for tensor in part.parameters())
    parts[name] = silent.view(-1, *[1] * (-axis - 1)).to(next(tensors, silent).device)
    with graph.inserting_before(node):
        filled = graph.call_method("masked_fill", (node.args[0], graph.get_attr(name), 0.0))
    node.replace_all_uses_with(filled)


def _cut(module: Any, node: fx.Node, found: Plan) -> None:
    if torch_class(module) in LAYERS:
        _cut_layer(module, node, found)
        return
    if node not in found.inputs:
        return
    kept = found.kept(found.inputs[node])
    for tensors in (module._parameters, module._buffers):
        for key, value in tensors.items():
            if value is not None and value.ndim == 1:
                tensors[key] = _rows(value, kept)
    setattr(module, "num_parameters" if isinstance(module, nn.PReLU) else "num_features", int(kept.sum()))


def _cut_layer(module: Any, node: fx.Node, found: Plan) -> None:
    features, units, groups, _ = layer_form(module)
    said, read = found.kept_outputs(node, units), found.kept_inputs(node, features)
    if node in found.inputs:
        _fold(module, found.inputs[node].constant.masked_fill(read, 0.0).nan_to_num(0.0))
    weight = by_group(module, module.weight.detach())
    sides = [(units, inputs) for units, inputs in zip(said.view(groups, -1), read.view(groups, -1), strict=True)]
    parts = [
        weight[group][units.to(weight.device)][:, inputs.to(weight.device)]
        for group, (units, inputs) in enumerate(sides)
        if units.any() or inputs.any()
    ]
    cut = torch.stack(parts)
    cut = cut.transpose(1, 2) if isinstance(module, TRANSPOSED) else cut
    module.weight = nn.Parameter(cut.flatten(0, 1).contiguous())
    if module.bias is not None:
        module.bias = _rows(module.bias, said)
    if isinstance(module, nn.Linear):
        module.in_features, module.out_features = int(read.sum()), int(said.sum())
    else:
        module.in_channels, module.out_channels, module.groups = int(read.sum()), int(said.sum()), len(parts)


def _fold(module: Any, constant: Tensor) -> None:
    """Take constant inputs that go into the bias."""
    if not constant.any():
        return
    added = folded(module, constant).to(module.weight)
    bias = torch.zeros_like(added) if module.bias is None else module.bias.detach()
    module.bias = nn.Parameter(bias + added)


def _rows(value: Tensor, kept: Tensor) -> Tensor:
    rows = value.detach()[kept.to(value.device)]
    return nn.Parameter(rows) if isinstance(value, nn.Parameter) else rows


def _resize(node: fx.Node, found: Plan) -> None:
    literal, source = found.literals[node], found.outputs[node]
    size = int(found.kept(source).sum()) * literal.width
    if literal.nested:
        sizes: Any = node.args[1]
        node.update_arg(1, (*sizes[: literal.position], size, *sizes[literal.position + 1 :]))
    else:
        node.update_arg(literal.position, size)
