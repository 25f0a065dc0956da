"""What a model computes, as a graph of torch's own operations: no class of the user's is left, and none of ours."""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_rnf.anatomy.calls import called_name, name_norms
from lightning_rnf.anatomy.kinds import is_layer
from lightning_rnf.anatomy.layers import BATCH_NORMS, UnitLayer, has_foreign_hooks

_SILENT_IN_EVAL = ("StochasticDepth", "DropPath")
# Torchvision's and timm's: identities in eval mode, but they would tie the graph to their packages.

_VIEWS = frozenset(
    (
        *("view", "view_as", "reshape", "flatten", "unflatten", "permute", "transpose", "swapaxes", "movedim", "t"),
        *("squeeze", "unsqueeze", "expand", "expand_as", "getitem", "getattr", "narrow", "select", "chunk", "split"),
        *("unbind", "contiguous", "detach", "float", "double", "half", "to", "type_as", "dropout", "dropout2d"),
        *("slice", "split_with_sizes", "alias", "diagonal", "unfold", "feature_dropout", "alpha_dropout", "lift_fresh"),
    )
)
_CHECKS = ("_check_input_dim", "_check_non_zero_input_channels")
_ASSIGNMENTS = frozenset(("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow"))
_VIEW_MODULES = frozenset(("Flatten", "Unflatten", "Identity", "Dropout", "Dropout1d", "Dropout2d", "Dropout3d"))


def silenced(output: Tensor, layer: str) -> Tensor:
    """Marks in the graph where the units of ``layer`` speak. It never runs."""
    raise RuntimeError(f"the graph ran with the marker of {layer!r} still in it: it has to be replaced before")


def computes_itself(module: nn.Module) -> bool:
    """Whether a layer has a forward of its own; a parametrized one of torch's has torch's."""
    return is_layer(module) and not hasattr(module, "parametrizations") and torch_class(module) is nn.Module


class NotFollowedError(ValueError):
    """A forward of which there is no graph."""


@dataclass(frozen=True)
class Traced:
    """A model's forward in eval mode.

    Attributes:
        graph: its operations; a call of `silenced` follows what the units of a layer say.
        modules: what its ``call_module`` nodes name: modules of torch, the model's own objects; for a batch norm that
            does more than that, torch's with its tensors.
        tensors: what its ``get_attr`` nodes name, the model's own objects, too.
        called: names of all modules that ran, those inside a module of ``modules`` left out.
        bound: names among ``modules`` that can't change their shape: they have parameters, and run twice or share one.
        aliased: nodes whose output is written to in place, and read as something else after that.
    """

    graph: fx.Graph
    modules: dict[str, nn.Module]
    tensors: dict[str, Any]
    called: frozenset[str]
    bound: frozenset[str]
    aliased: frozenset[fx.Node]

    @classmethod
    def of(cls, module: nn.Module, layers: Iterable[UnitLayer]) -> Traced:
        """Trace the forward as the model is now. The caller has to borrow it: constants are planted in it.

        Raises:
            NotFollowedError: if the forward can't be traced.
            ValueError: if a unit layer doesn't run in it.
        """
        layers = tuple(layers)
        tracer = _Tracer({name: layer.name for layer in layers if layer.is_open for name in layer.speakers})
        try:
            recorded = tracer.trace(module)
        except Exception as error:
            raise NotFollowedError(
                f"the forward of {type(module).__name__} can't be traced by torch.fx ({error}): a sub-network is cut "
                "out of its graph, so which operations run must not depend on values or sizes of the input. Decide in "
                "__init__ instead, or hide a function that has to decide with torch.fx.wrap"
            ) from error
        # A graph of its own has no reference to our tracer, which would be stored with the module.
        graph = fx.Graph()
        graph.output(graph.graph_copy(recorded, {}))
        for node in graph.nodes:
            node.type = None  # annotations of the user's code would have to be importable
        return cls.read(graph, module, layers, tracer.leaves, tracer.called)

    @classmethod
    def read(
        cls,
        graph: fx.Graph,
        module: nn.Module,
        layers: tuple[UnitLayer, ...],
        leaves: dict[str, nn.Module],
        called: set[str],
        constants: Mapping[str, Any] | None = None,
    ) -> Traced:
        """Of a graph that has been recorded.

        Args:
            graph: with calls of `silenced`; it is changed.
            module: the model.
            layers: its unit layers.
            leaves: modules that the graph calls, by name.
            called: names of the modules that ran.
            constants: what ``get_attr`` nodes name that the model doesn't have.

        Raises:
            ValueError: if a unit layer doesn't run in it.
        """
        constants = constants or {}
        name_norms(graph, module, leaves)
        aliased = _follow_in_place(graph, leaves)
        nodes = [node for node in graph.nodes if node.op == "call_module"]
        modules = {node.target: leaves[node.target] for node in nodes}
        named = [node.target for node in graph.nodes if node.op == "get_attr"]
        tensors = {name: constants[name] if name in constants else _attribute(module, name) for name in named}
        _check_layers(module, layers, called, modules)
        runs = Counter(node.target for node in nodes)
        owners = Counter(id(value) for value in tensors.values())
        owners.update(id(value) for leaf in modules.values() for value in leaf.parameters())
        bound = {
            name
            for name, leaf in modules.items()
            if any(runs[name] > 1 or owners[id(value)] > 1 for value in leaf.parameters())
        }
        return cls(graph, modules, tensors, frozenset(called), frozenset(bound), aliased)


def bare(module: nn.Module, memo: dict[int, Tensor]) -> nn.Module:
    """A copy of a module of torch with tensors of its own, without hooks, gradients, and what others have left on it.

    Args:
        module: of torch's, or of a class that only inherits.
        memo: copies of tensors by identity of the original: what was shared stays shared.
    """
    twin: nn.Module = object.__new__(torch_class(module))
    blank = vars(nn.Module())
    # What users leave on a layer (a logger, a trainer) may not be copied or stored.
    own = {key: value for key, value in vars(module).items() if key not in blank and _is_plain(value)}
    vars(twin).update(blank | {key: copy.copy(value) for key, value in own.items()}, training=False)
    for key, parameter in module._parameters.items():
        twin._parameters[key] = None if parameter is None else _parameter(parameter, memo)
    for key, buffer in module._buffers.items():
        twin._buffers[key] = None if buffer is None else tensor_copy(buffer, memo)
    twin._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
    for key, child in module._modules.items():
        twin._modules[key] = None if child is None else bare(child, memo)
    if isinstance(twin, nn.TransformerEncoder):  # recall runs it without its fast path, see `guard`
        vars(twin).update(use_nested_tensor=False, enable_nested_tensor=False)
    if isinstance(twin, nn.RNNBase):
        nn.RNNBase._init_flat_weights(twin)  # it lists its parameters in a second place
    return twin


def tensor_copy(tensor: Tensor, memo: dict[int, Tensor]) -> Tensor:
    """A copy that shares nothing, the same one for the same tensor; a parameter stays one."""
    if isinstance(tensor, nn.Parameter):
        return _parameter(tensor, memo)
    return memo.setdefault(id(tensor), tensor.detach().clone())


def torch_class(module: nn.Module) -> type[nn.Module]:
    """The class of torch whose forward this module runs; `nn.Module` if it has a forward of its own."""
    for kind in type(module).__mro__:
        if kind.__module__.startswith("torch.nn."):
            computes = ("forward", "_conv_forward", "__call__")
            same = all(getattr(type(module), name, None) is getattr(kind, name, None) for name in computes)
            same = same and not set(computes).intersection(vars(module))
            return kind if same and not hasattr(module, "parametrizations") else nn.Module
    return nn.Module


class _Tracer(fx.Tracer):
    """Stops at torch's modules and marks what units say."""

    def __init__(self, speakers: dict[str, str]) -> None:
        super().__init__()
        self.speakers = speakers
        self.leaves: dict[str, nn.Module] = {}
        self.called: set[str] = set()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # Hooks of the user's may change what goes in or comes out: fx follows them where it follows the call.
        hooked = any(has_foreign_hooks(part) for part in m.modules())
        is_own = any(torch_class(part) is nn.Module for part in m.modules())
        return not hooked and not is_own and torch_class(m) is not nn.Sequential

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        name = self.path_of_module(m)
        self.called.add(name)
        if type(m).__name__ in _SILENT_IN_EVAL:
            return args[0]
        if hasattr(m, "_orig_mod"):  # torch.compile wraps it
            inner: Any = m._orig_mod
            return inner(*args, **kwargs)
        if self.is_leaf_module(m, name):
            self.leaves[name] = m
        elif isinstance(m, BATCH_NORMS):
            # A forward of its own may go on in torch's, which checks its input, and fx can't. The module is borrowed.
            vars(m).update((check, _passes) for check in _CHECKS if hasattr(m, check))
        output = super().call_module(m, forward, args, kwargs)
        if name in self.speakers:
            return self.create_proxy("call_function", silenced, (output, self.speakers[name]), {})
        return output


def _passes(input: object) -> None:
    """In the place of a check."""


def _follow_in_place(graph: fx.Graph, modules: dict[str, nn.Module]) -> frozenset[fx.Node]:
    """Let everything after an in-place operation read its output: the same tensor, but the graph can't know.

    Returns:
        Nodes that are read later in spite of that, through another view of the same memory.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    origin: dict[fx.Node, fx.Node] = {}
    aliased: set[fx.Node] = set()
    for node in graph.nodes:
        writes = bool(node.all_input_nodes) and _is_in_place(node, modules)
        source = node.all_input_nodes[0] if writes or _may_be_view(node, modules) else node
        origin[node] = origin.get(source, source)
        if not writes:
            continue
        for user in list(source.users):
            if order[user] > order[node]:
                user.replace_input_with(source, node)
        same = [other for other, root in origin.items() if root is origin[node]]
        if any(order[user] > order[node] for other in same if other is not node for user in other.users):
            aliased.update(same)
    return frozenset(node for node in graph.nodes if origin[node] in {origin[other] for other in aliased})


def _may_be_view(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return type(modules[str(node.target)]).__name__ in _VIEW_MODULES
    name = called_name(node)
    return node.op in {"call_method", "call_function"} and bool(node.all_input_nodes) and name in _VIEWS


def _is_in_place(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return bool(getattr(modules[str(node.target)], "inplace", False))
    name = called_name(node)
    return bool(node.kwargs.get("inplace")) or name in _ASSIGNMENTS or (name.endswith("_") and name[-2:] != "__")


def _check_layers(
    module: nn.Module, layers: tuple[UnitLayer, ...], called: set[str], leaves: dict[str, nn.Module]
) -> None:
    for layer in layers:
        # Of those that are tied one is enough.
        for name in {layer.name, layer.speaker} - called if called.isdisjoint(layer.tied) else ():
            if not any(name.startswith(f"{leaf}.") for leaf in leaves):
                raise ValueError(
                    f"unit layer {name!r} did not run when the forward of {type(module).__name__} was traced: export "
                    "the model whose task ended, with a forward that runs the same layers"
                )


def _attribute(module: nn.Module, path: str) -> Any:
    value: Any = module
    for key in path.split("."):
        value = getattr(value, key)
    return value


def _parameter(parameter: nn.Parameter, memo: dict[int, Tensor]) -> nn.Parameter:
    if id(parameter) not in memo:
        floating = parameter.is_floating_point() or parameter.is_complex()
        memo[id(parameter)] = nn.Parameter(parameter.detach().clone(), requires_grad=floating)
    twin = memo[id(parameter)]
    assert isinstance(twin, nn.Parameter)
    return twin


def _is_plain(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_plain(entry) for entry in value)
    if callable(value):  # an activation; nothing that is bound to something
        origin = str(getattr(value, "__module__", ""))
        return origin.startswith("torch") and vars(sys.modules[origin]).get(getattr(value, "__name__", "")) is value
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device))
