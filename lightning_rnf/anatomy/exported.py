"""The graph of a forward that `torch.fx` can't follow, as `torch.export` records it on inputs of an example.

It has the path that the example takes. What that took for granted is checked whenever the graph runs: the kinds of
inputs that are no tensors, and the sizes that the forward has not left open.
"""

from __future__ import annotations

import inspect
import operator
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from lightning_rnf.anatomy.calls import function_name, node_argument
from lightning_rnf.anatomy.graph import NotFollowedError, Traced, silenced, torch_class
from lightning_rnf.anatomy.grouped import LAYERS
from lightning_rnf.anatomy.inputs import Inputs, leaves_of, plain
from lightning_rnf.anatomy.kinds import TRANSPOSED
from lightning_rnf.anatomy.layers import UnitLayer
from lightning_rnf.anatomy.packed import OUTPUT, is_attention

_CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device)
_DEFAULTS = {"stride": 1, "padding": 0, "output_padding": 0, "dilation": 1, "groups": 1}
_ROOT = "module"  # in the wrapper's names


def followed(module: nn.Module, layers: Iterable[UnitLayer], inputs: Callable[[], Inputs | None] | None) -> Traced:
    """A model's graph by `torch.fx`, or else by `torch.export`. The caller has to borrow the model: hooks are hung in.

    Args:
        module: the model, in eval mode.
        layers: its unit layers.
        inputs: of its forward; asked for if `torch.fx` can't follow it.

    Raises:
        NotFollowedError: if neither can follow the forward, or there are no inputs.
        ValueError: if a unit layer doesn't run in it.
    """
    layers = tuple(layers)
    try:
        return Traced.of(module, layers)
    except NotFollowedError as error:
        example = None if inputs is None else inputs()
        if example is None:
            raise
        try:
            return _recorded(module, layers, example)
        except NotFollowedError as second:
            raise NotFollowedError(f"{error}; nor can {second}") from second


def _recorded(module: nn.Module, layers: tuple[UnitLayer, ...], inputs: Inputs) -> Traced:
    for _, leaf in inputs.leaves():
        if not isinstance(leaf, (Tensor, *_CONSTANTS)):
            raise NotFollowedError(f"torch.export: an input holds a {type(leaf).__name__}")
    inputs = inputs.to(next((parameter.device for parameter in module.parameters()), torch.device("cpu"))).several()
    called: set[str] = set()
    with ExitStack() as hooks:
        for name, part in module.named_modules():
            hooks.callback(part.register_forward_pre_hook(partial(_note, called, name)).remove)
        for layer in layers:
            if not layer.is_open:
                continue
            for name in layer.speakers:
                speaker = module.get_submodule(name)
                hooks.callback(speaker.register_forward_hook(partial(_mark, layer.name)).remove)
        flat = _Flat(module, inputs)
        program = _exported(flat, inputs.tensors())
    parts = dict(module.named_modules(remove_duplicate=False))
    called |= {f"{name}.{OUTPUT}" for name in called if is_attention(parts[name])}  # torch reads its weight
    signature = program.graph_signature
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        raise NotFollowedError("torch.export: the forward writes into buffers or inputs")
    graph, constants = _rebuilt(program, flat, inputs, module)
    leaves = _raised(graph, module)
    return Traced.read(graph, module, layers, leaves, called, constants)


class _Flat(nn.Module):
    """A model that takes tensors only, and returns them in a tuple: classes of inputs and outputs don't matter."""

    def __init__(self, module: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.module = module
        self.inputs = inputs
        self.returned = _Returned()

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = iter(tensors)
        inputs = self.inputs.each(lambda leaf: next(given))
        found: list[Tensor] = []

        def numbered(leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                found.append(leaf)
                return _Number(len(found) - 1)
            return leaf if isinstance(leaf, _CONSTANTS) else None

        self.returned.form = plain(self.module(*inputs.args, **inputs.kwargs), numbered)
        return tuple(found)


class _Returned:
    """What came back, in plain containers, with the number of each tensor; `torch.export` puts lists and dicts back."""

    form: Any = None


class _Number(int):
    """Of a tensor among those that come back."""


def _by_number(returned: list[Any], leaf: Any) -> Any:
    return returned[leaf] if isinstance(leaf, _Number) else leaf


def _exported(flat: _Flat, tensors: list[Tensor]) -> Any:
    """With sizes left open where nothing but their range was asked for: the number of samples, and lengths of tokens.

    Those of images and the like are the example's: to leave them open, too, takes minutes where windows are cut.
    """
    auto = torch.export.Dim.AUTO
    samples = tuple({0: auto} if tensor.ndim else {} for tensor in tensors)
    every = tuple(
        of_samples if tensor.is_floating_point() else dict.fromkeys(range(tensor.ndim), auto)
        for tensor, of_samples in zip(tensors, samples, strict=True)
    )
    errors: list[Exception] = []
    for shapes in (samples,) if every == samples else (every, samples):
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")  # of how torch's own modules keep their weights
                program: Any = torch.export.export(flat, tuple(tensors), dynamic_shapes=(shapes,), strict=False)
        except Exception as error:  # whatever a forward of the user's makes of it
            errors.append(error)
            continue
        asked = [guard.expr for guard in _shape_environment(program).guards if not _is_range(guard.expr)]
        if not asked:
            return program
        errors.append(ValueError(f"the forward asks of sizes whether {asked[0]}"))
    said = " ".join(str(errors[-1]).split()).partition(". ")[0]  # what follows are hints for those who wrote torch
    raise NotFollowedError(f"torch.export: {said[:300]}") from errors[-1]


def _shape_environment(program: Any) -> Any:
    values = (node.meta.get("val") for node in program.graph.nodes)
    fake: Any = next(value for value in values if isinstance(value, Tensor))
    return fake.fake_mode.shape_env


def _is_range(guard: Any) -> bool:
    """Whether all that was asked of sizes is to be one, another's, or in a range: that is said of them afterwards."""
    if not guard.free_symbols:
        return True
    told = type(guard).__name__ in {"Equality", "LessThan", "StrictLessThan", "GreaterThan", "StrictGreaterThan"}
    sides = guard.args
    if not told or not all(side.is_Symbol or side.is_Integer for side in sides):
        return False
    return bool(type(guard).__name__ == "Equality" or any(side.is_Integer for side in sides))


def _rebuilt(program: Any, flat: _Flat, inputs: Inputs, module: nn.Module) -> tuple[fx.Graph, dict[str, Any]]:
    """The graph with the forward's own parameters, and outputs in plain containers."""
    source = program.module()
    graph, constants = fx.Graph(), dict[str, Any]()
    values = [node for node in program.graph.nodes if node.op == "placeholder"][-len(inputs.tensors()) :]
    tensors = _parameters(graph, inputs, module, [node.meta["val"] for node in values], program.range_constraints)
    given = iter(tensors)
    nodes: dict[fx.Node, Any] = {}
    for node in source.graph.nodes:
        if node.op == "placeholder":
            nodes[node] = next(given)
        elif node.op == "get_attr":
            if node.users:
                nodes[node] = _attribute(graph, node, source, module, constants)
        elif node.op == "output":
            returned = [nodes[one] for one in node.args[0]]
            graph.output(plain(flat.returned.form, partial(_by_number, returned)))
        elif node.op == "call_module" or function_name(node) == "assert_tensor_metadata":
            continue  # checks of what goes in, for which there are our own
        elif function_name(node) == "dropout" and node_argument(node, 2, "train") is False:
            nodes[node] = nodes[node.args[0]]
        elif function_name(node) == "sym_size":
            nodes[node] = graph.call_method("size", (nodes[node.args[0]], node.args[1]))
        else:
            nodes[node] = copied = graph.node_copy(node, lambda one: nodes[one])
            if node.target is _marker():
                copied.target = silenced
            value, stack = node.meta.get("val"), node.meta.get("nn_module_stack") or {}
            inside = {path.removeprefix(_ROOT).strip("."): kind for path, kind in stack.values() if _is_in_model(path)}
            copied.meta = {"nn_module_stack": {path: (path, kind) for path, kind in (inside or {"": ""}).items()}}
            if isinstance(value, Tensor):
                copied.meta["ndim"] = value.ndim
                _make_of(copied, tensors[0], value)
    return graph, constants


def _make_of(node: fx.Node, tensor: fx.Node, made: Tensor) -> None:
    """Let a tensor that is made of nothing be made where an input is: then it follows the module to other devices.

    And it can be stored: to load a graph torch runs it on stand-ins for sizes, which a list of sizes alone can't hold.
    """
    name = function_name(node)
    if _is_aten(node) and name in {"zeros", "ones", "empty", "full"}:
        node.target = getattr(torch.ops.aten, f"new_{name}").default
        node.args, node.kwargs = (tensor, *node.args), {"dtype": made.dtype}


def _is_in_model(path: str) -> bool:
    return f"{path}.".startswith(f"{_ROOT}.")


def _attribute(graph: fx.Graph, node: fx.Node, source: nn.Module, module: nn.Module, constants: dict[str, Any]) -> Any:
    """A parameter or buffer of the model's, or a constant."""
    value: Any = operator.attrgetter(str(node.target))(source)
    name = str(node.target).removeprefix(f"{_ROOT}.")
    try:
        operator.attrgetter(name)(module)
    except AttributeError:
        if isinstance(value, nn.Module) and any(True for _ in value.parameters()):
            raise NotFollowedError(f"torch.export: {name} is computed apart, with parameters of its own") from None
        name = f"constant_{name.replace('.', '_')}"
        constants[name] = value
    return graph.get_attr(name)


def _parameters(
    graph: fx.Graph, inputs: Inputs, module: nn.Module, values: list[Any], ranges: Mapping[Any, Any]
) -> list[fx.Node]:
    """The forward's parameters, the tensors in them, and checks that they are what was taken for granted."""
    named = [*zip(_names(module, len(inputs.args)), inputs.args, strict=True), *inputs.kwargs.items()]
    without = [name for name, value in inputs.kwargs.items() if not Inputs((value,), {}).tensors()]
    parameters = {name: graph.placeholder(name) for name, _ in named if name not in without}
    # What is given by name and no tensor may be left out.
    parameters.update((name, graph.placeholder(name, default_value=inputs.kwargs[name])) for name in without)
    found, said = [], []
    for name, value in named:
        for path, leaf in leaves_of(value):
            node = parameters[name]
            for key in path:
                node = graph.call_function(operator.getitem, (node, key))
            where = name + "".join(f"[{key!r}]" for key in path)
            if isinstance(leaf, Tensor):
                found.append(node)
                said.append(where)
            else:
                same = operator.eq if isinstance(leaf, (int, float, str)) else operator.is_
                _assert(graph, graph.call_function(same, (node, leaf)), f"exported for {where} = {leaf!r}")
    _check_tensors(graph, found, said, values, ranges, alone=inputs.first() is not None)
    return found


def _check_tensors(
    graph: fx.Graph,
    nodes: list[fx.Node],
    names: list[str],
    values: list[Any],
    ranges: Mapping[Any, Any],
    *,
    alone: bool,
) -> None:
    """Check kinds and sizes; ``alone``: one sample is tried, so nothing is said against it."""
    seen: dict[Any, fx.Node] = {}
    for node, name, value in zip(nodes, names, values, strict=True):
        if not value.is_floating_point():
            kind = graph.call_function(getattr, (node, "dtype"))
            _assert(
                graph, graph.call_function(operator.eq, (kind, value.dtype)), f"exported for {name} in {value.dtype}"
            )
        _assert_size(graph, graph.call_method("dim", (node,)), operator.eq, value.ndim, f"{name}.dim()")
        for dim, size in enumerate(value.shape):
            here = graph.call_method("size", (node, dim))
            symbol = None if isinstance(size, int) else size.node.expr
            if symbol is None or symbol.is_Integer:
                _assert_size(graph, here, operator.eq, int(size), f"{name}.size({dim})")
                continue
            if symbol in seen:
                _assert_size(graph, here, operator.eq, seen[symbol], f"{name}.size({dim})")
                continue
            seen[symbol] = here
            if symbol not in ranges:
                continue
            least, most = ranges[symbol].lower, ranges[symbol].upper
            if least.is_Integer and not (alone and dim == 0):
                _assert_size(graph, here, operator.ge, int(least), f"{name}.size({dim})")
            if most.is_Integer:
                _assert_size(graph, here, operator.le, int(most), f"{name}.size({dim})")


def _assert_size(graph: fx.Graph, node: fx.Node, compare: Any, size: Any, name: str) -> None:
    sign = {"eq": "=", "ge": ">=", "le": "<="}[compare.__name__]
    said = f"that of {size.args[0]}" if isinstance(size, fx.Node) else size
    _assert(graph, graph.call_function(compare, (node, size)), f"exported for {name} {sign} {said}")


def _assert(graph: fx.Graph, holds: fx.Node, message: str) -> None:
    graph.call_function(torch._assert, (holds, message))


def _names(module: nn.Module, count: int) -> list[str]:
    """Of the forward's parameters by position."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(module.forward).parameters.values()
    names = [parameter.name for parameter in parameters if parameter.kind in positional]
    return (names + [f"args_{index}" for index in range(count)])[:count]


# -- modules -----------------------------------------------------------------------------------------------------------


def _raised(graph: fx.Graph, module: nn.Module) -> dict[str, nn.Module]:
    """Let the operation of a layer or of slopes be a call of its module; batch norms become functions of torch's."""
    names = {id(part): name for name, part in module.named_modules()}
    leaves: dict[str, nn.Module] = {}
    for node in list(graph.nodes):
        kind = function_name(node) if _is_aten(node) else ""
        if kind == "batch_norm":
            x, weight, bias, mean, var, *rest = node.args
            node.target, node.args = functional.batch_norm, (x, mean, var, weight, bias, *rest[:3])
            continue
        if not (kind in {"linear", "prelu"} or kind.startswith("conv")):
            continue
        part: Any = module.get_submodule(next(reversed(node.meta["nn_module_stack"])))
        if torch_class(part) in (*LAYERS, nn.PReLU) and _computes(node, part, names[id(part)]):
            name = names[id(part)]
            leaves[name] = part
            with graph.inserting_before(node):
                called = graph.call_module(name, (node.args[0],))
            called.meta = dict(node.meta)
            node.replace_all_uses_with(called)
            graph.erase_node(node)
    return leaves


def _computes(node: fx.Node, part: Any, name: str) -> bool:
    """Whether an operation is what a module would do with the same input."""
    given = [argument.target if isinstance(argument, fx.Node) else argument for argument in node.args[1:]]
    own: list[str | None] = [f"{name}.weight"]
    if not isinstance(part, nn.PReLU):
        own.append(None if part.bias is None else f"{name}.bias")
    given += [None] * (len(own) - len(given))
    if given[: len(own)] != own or node.kwargs:
        return False
    if isinstance(part, (nn.PReLU, nn.Linear)):
        return True
    dims = part.weight.ndim - 2
    if part.padding_mode != "zeros" or node.meta.get("ndim") != dims + 2:
        return False
    more = ("output_padding", "groups", "dilation") if isinstance(part, TRANSPOSED) else ("dilation", "groups")
    keys = ("stride", "padding", *more)
    found = [*given[2:], *(_DEFAULTS[key] for key in keys[len(given) - 2 :])]
    return all(
        _each_dim(value, dims) == _each_dim(getattr(part, key), dims) for key, value in zip(keys, found, strict=True)
    )


def _each_dim(value: Any, dims: int) -> Any:
    if isinstance(value, str):
        return value
    values = list(value) if isinstance(value, (tuple, list)) else [value]
    return values * dims if len(values) == 1 else values


def _is_aten(node: fx.Node) -> bool:
    return node.op == "call_function" and str(node.target).startswith("aten.")


# -- markers -------------------------------------------------------------------------------------------------


@cache
def _operation() -> Any:
    @torch.library.custom_op("lightning_rnf::silenced", mutates_args=())
    def silenced(output: Tensor, layer: str) -> Tensor:
        return output.clone()

    silenced.register_fake(lambda output, layer: torch.empty_like(output))
    return silenced


def _marker() -> Any:
    _operation()
    return torch.ops.lightning_rnf.silenced.default


def _mark(layer: str, module: nn.Module, args: Any, output: Tensor) -> Any:
    return _marker()(output, layer)


def _note(called: set[str], name: str, module: nn.Module, args: Any) -> None:
    called.add(name)
