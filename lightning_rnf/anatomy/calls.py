"""Calls of functions in a graph: their names and arguments, and those that do what a module of torch does."""

from __future__ import annotations

from typing import Any

from torch import fx, nn
from torch.nn import functional

from lightning_rnf.anatomy.layers import BATCH_NORMS

_NORM_TENSORS = ("running_mean", "running_var", "weight", "bias")


def function_name(node: fx.Node) -> str:
    """Of a call: in-place variants, operators and overloads like their function."""
    return called_name(node).strip("_")


def called_name(node: fx.Node) -> str:
    """Of a call, without what tells overloads of an operation apart."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return str(name).partition(".")[0]


def node_argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """Of a call, by position or name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def name_norms(graph: fx.Graph, module: nn.Module, leaves: dict[str, nn.Module]) -> None:
    """Let a batch norm that a forward computes as a function be a call of torch's module with the same tensors.

    A norm with an activation of its own (timm's ``BatchNormAct2d``, or a subclass that goes on with what its base has
    computed) is then two steps in the graph, and each of them is known.

    Args:
        graph: of the module's forward in eval mode.
        module: that was traced.
        leaves: modules of torch that the graph calls, by name; such norms are added.
    """
    for node in list(graph.nodes):
        owner = _owner(node, module)
        if owner is None:
            continue
        norm, plain = module.get_submodule(owner), leaves.get(owner)
        if plain is None:
            plain = _plain(norm, node_argument(node, 7, "eps", 1e-5))
        elif plain.eps != node_argument(node, 7, "eps", 1e-5):
            continue
        leaves[owner] = plain
        with graph.inserting_before(node):
            node.replace_all_uses_with(graph.call_module(owner, (node_argument(node, 0, "input"),)))
        graph.erase_node(node)
    for node in reversed(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)


def _owner(node: fx.Node, module: nn.Module) -> str | None:
    """Name of the batch norm whose tensors, all of them, a call normalises with as the norm would in eval mode."""
    if node.op != "call_function" or node.target is not functional.batch_norm:
        return None
    tensors = [node_argument(node, place, name) for place, name in enumerate(_NORM_TENSORS, start=1)]
    if not all(one is None or (isinstance(one, fx.Node) and one.op == "get_attr") for one in tensors):
        return None
    given = [None if one is None else str(one.target) for one in tensors]
    owner = next((name for name in given if name is not None), "").rpartition(".")[0]
    norm: Any = module.get_submodule(owner)
    if not isinstance(norm, BATCH_NORMS):
        return None
    own = [None if getattr(norm, key) is None else f"{owner}.{key}" for key in _NORM_TENSORS]
    by_batch = norm.running_mean is None  # a norm that keeps no statistics has no others
    return owner if given == own and node_argument(node, 5, "training", False) is by_batch else None


def _plain(norm: Any, eps: float) -> Any:
    """Torch's batch norm with the tensors of one that may do more."""
    kind = next(kind for kind in type(norm).__mro__ if kind in BATCH_NORMS)
    plain = object.__new__(kind)
    nn.Module.__init__(plain)
    vars(plain).update({key: vars(norm)[key] for key in ("num_features", "momentum", "affine", "track_running_stats")})
    vars(plain).update(eps=eps, training=False, _parameters=dict(norm._parameters), _buffers=dict(norm._buffers))
    return plain
