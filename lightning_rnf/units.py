"""Which units, heads and shared parameters a model has: found by tracing one forward, or refused by name."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.overrides import TorchFunctionMode

from lightning_rnf.evaluation import Predict, predict_checked, supervised
from lightning_rnf.guard import borrowed, evaluating, forget_gradient_hooks

OUTPUT_AXIS: dict[type[nn.Module], int] = {nn.Linear: -1, nn.Conv1d: -2, nn.Conv2d: -3, nn.Conv3d: -4}
"""Unit layers and the axis of their output that counts units, from the end; weight and bias have units along axis 0."""

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# Norms that treat every channel by itself. Others mix channels: their parameters are shared.


@dataclass(frozen=True)
class UnitLayer:
    """A layer whose outputs are units.

    Attributes:
        name: of the module.
        units: how many.
        axis: of the output that counts units, negative: -1 for linear, -3 for two-dimensional convolution.
        parameters: names of the parameters that belong to the units, each with units along its first dimension: weight,
            bias, and those of the norm.
        norm: name of the norm that directly follows, or None. Its output is then the unit's.
    """

    name: str
    units: int
    axis: int
    parameters: tuple[str, ...]
    norm: str | None = None

    @property
    def speaker(self) -> str:
        """Name of the module whose output is what the units say to the rest of the network."""
        return self.norm or self.name


@dataclass(frozen=True)
class UnitMap:
    """What each parameter of a model belongs to: a unit, the active head, all units (shared), or nothing that ran.

    Attributes:
        layers: in execution order.
        head: name of the module that made the logits.
        head_parameters: parameters of the head.
        shared: parameters that belong to no unit and no head; of modules that ran detached from the logits, too.
        idle: parameters that took no part in the forward: other tasks' heads, or unused.
        buffers: of the modules that ran, and those of the outermost that were read: norms' statistics, and whatever
            else may move.
    """

    layers: tuple[UnitLayer, ...]
    head: str
    head_parameters: tuple[str, ...]
    shared: tuple[str, ...]
    idle: tuple[str, ...]
    buffers: tuple[str, ...]

    @classmethod
    def of(
        cls,
        module: nn.Module,
        example_batch: Any,
        predict: Predict = supervised,
        units: str | Sequence[str] | None = None,
        heads: str | Sequence[str] | None = None,
    ) -> UnitMap:
        """Trace one forward, in eval mode and eagerly, and leave the module as it was.

        Args:
            module: the model, with the task's head active.
            example_batch: on the module's device.
            predict: how to get logits of a batch.
            units: globs of module names; None: every layer of `OUTPUT_AXIS` outside the head.
            heads: globs of module names; None: the module whose output is the logits. If it stands in a ``ModuleDict``
                or ``ModuleList`` whose other entries did not run, the whole entry is the head.

        Raises:
            ValueError: if no head or no unit layer is found, if a unit layer is used in a way that units can't follow
                (it runs twice, shares its weight, is parametrized), or if ``units`` or ``heads`` match nothing usable.
        """
        trace = _Trace.of(module, example_batch, predict)
        head = _find_head(trace, _globs(heads))
        names = _select(trace, head, _globs(units))
        layers = tuple(_unit_layer(trace, name) for name in names)
        if not layers:
            raise ValueError(
                f"no unit layers: no Linear or convolution ran before the head {head!r}, or units={units!r} excludes "
                "all of them; a network needs a hidden layer for units to freeze"
            )
        return cls(layers, head, *_assign(trace, layers, head))

    def __str__(self) -> str:
        lines = [
            f"{layer.name}: {layer.units} units" + (f", normalised by {layer.norm}" if layer.norm else "")
            for layer in self.layers
        ]
        lines.append(f"head {self.head}: {', '.join(self.head_parameters)}")
        lines.extend(
            f"{word}: {', '.join(names)}" for word, names in (("shared", self.shared), ("idle", self.idle)) if names
        )
        return "\n".join(lines)


@dataclass(frozen=True)
class _Call:
    """One run of a module: its output, and the node that made it (a later in-place function changes that)."""

    name: str
    output: Tensor | None
    node: Any


class _Trace:
    """Everything that one forward tells: which modules ran in which order, and which tensors the logits depend on."""

    def __init__(self, module: nn.Module, calls: list[_Call], read: set[int], logits: Tensor) -> None:
        self.modules: dict[str, nn.Module] = dict(module.named_modules())
        self.calls = calls
        self.read = read
        self.logits = logits
        self.runs = Counter(call.name for call in calls)
        self.edges, self.leaves = _walk_graph(logits)
        self.owners: dict[nn.Parameter, list[str]] = defaultdict(list)
        for name, parameter in module.named_parameters(remove_duplicate=False):
            self.owners[parameter].append(name)

    @classmethod
    def of(cls, module: nn.Module, batch: Any, predict: Predict) -> _Trace:
        calls: list[_Call] = []
        with borrowed(module), evaluating(module), torch.enable_grad():
            for parameter in module.parameters():
                # The graph has to show what the user keeps from training, too.
                parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
            forget_gradient_hooks(module)
            for name, submodule in module.named_modules():
                submodule.register_forward_hook(_recorder(name, calls))
            with _Reads() as reads:
                logits, _ = predict_checked(predict, module, batch)
            return cls(module, calls, reads.tensors, logits)

    def own_parameters(self, name: str) -> dict[str, nn.Parameter]:
        """Parameters of this module alone, by full name."""
        prefix = f"{name}." if name else ""
        return {prefix + key: value for key, value in self.modules[name].named_parameters(recurse=False)}

    def used(self, parameter: nn.Parameter) -> bool:
        """Whether the logits depend on it."""
        if parameter in self.leaves:
            return True
        # detach, no_grad and reentrant checkpointing hide what the logits depend on: what ran unseen may be needed.
        unseen = {call.name for call in self.calls if not self.reached(call)}
        return any(name.rpartition(".")[0] in unseen for name in self.owners[parameter])

    def reached(self, call: _Call) -> bool:
        """Whether the graph of the logits has this output in it."""
        return call.node is not None and (self.edges[call.node] > 0 or call.node is self.logits.grad_fn)


class _Reads(TorchFunctionMode):
    """Notes the identity of every tensor that a function is given."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: set[int] = set()

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        for argument in (*args, *(kwargs or {}).values()):
            several = argument if isinstance(argument, (list, tuple)) else (argument,)
            self.tensors.update(id(tensor) for tensor in several if isinstance(tensor, Tensor))
        return function(*args, **(kwargs or {}))


def _recorder(name: str, calls: list[_Call]) -> Any:
    def record(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        tensor = output if isinstance(output, Tensor) else None
        calls.append(_Call(name, tensor, None if tensor is None else tensor.grad_fn))

    return record


def _walk_graph(logits: Tensor) -> tuple[Counter[Any], dict[Tensor, Any]]:
    """How many edges lead to each node of the autograd graph, and the node of each leaf that it reaches."""
    edges: Counter[Any] = Counter()
    leaves: dict[Tensor, Any] = {}
    pending: list[Any] = [logits.grad_fn] if logits.grad_fn is not None else []
    while pending:
        node = pending.pop()
        if hasattr(node, "variable"):
            leaves[node.variable] = node
        for successor, _ in node.next_functions:
            if successor is None:
                continue
            edges[successor] += 1
            if edges[successor] == 1:
                pending.append(successor)
    return edges, leaves


def _find_head(trace: _Trace, globs: tuple[str, ...] | None) -> str:
    if globs is not None:
        return _named_head(trace, globs)
    makers = [
        call.name
        for call in trace.calls
        if call.output is not None
        and call.output.numel() == trace.logits.numel()
        and call.output.untyped_storage().data_ptr() == trace.logits.untyped_storage().data_ptr()
        and any(True for _ in trace.modules[call.name].parameters())
    ]
    if not makers or makers[0] == "" or _is_all(trace, makers[0]):
        raise ValueError(
            "head not found: no module's output is the logits (they are computed from it by a function, or by the "
            "LightningModule itself); name the heads' modules with heads=, for example heads='heads.*'"
        )
    return _whole_entry(trace, makers[0]) or makers[0]


def _is_all(trace: _Trace, name: str) -> bool:
    """Whether a module with parts holds every layer: then it makes logits of its parts' by a function of its own."""
    return any(trace.modules[name].children()) and all(_inside(call.name, name) for call in _candidates(trace))


def _named_head(trace: _Trace, globs: tuple[str, ...]) -> str:
    matched = [name for name in trace.modules if name and _matches(name, globs) and trace.runs[name]]
    outermost = [name for name in matched if not any(_inside(name, other) for other in matched if other != name)]
    if len(outermost) != 1:
        raise ValueError(
            f"head not found: heads={list(globs)} matches {outermost or 'no module'} of those that ran, expected "
            "exactly one, the active task's"
        )
    (found,) = outermost
    # A glob may name the container of all heads: the head is the entry that ran last.
    parts = [call.name for call in trace.calls if _inside(call.name, found) and trace.own_parameters(call.name)]
    entry = _whole_entry(trace, parts[-1]) if parts else None
    return entry if entry is not None and _inside(entry, found) else found


def _whole_entry(trace: _Trace, name: str) -> str | None:
    """The outermost entry of a container of alternatives that ``name`` is in, if there is one."""
    parts = name.split(".")
    for depth in range(1, len(parts)):
        container = trace.modules[".".join(parts[:depth])]
        entry = ".".join(parts[: depth + 1])
        if not isinstance(container, (nn.ModuleDict, nn.ModuleList)):
            continue
        others = [f"{'.'.join(parts[:depth])}.{key}" for key, _ in container.named_children()]
        others.remove(entry)
        # One entry alone is an alternative in a dict of heads; in a list it may as well be the only block of a stack.
        alternatives = bool(others) or isinstance(container, nn.ModuleDict)
        leaves_units = any(call.name and not _inside(call.name, entry) for call in _candidates(trace))
        if alternatives and leaves_units and not any(trace.runs[other] for other in others):
            return entry
    return None


def _candidates(trace: _Trace) -> Iterator[_Call]:
    """Runs of layers that relevance can reach, or that have no graph: those are refused when it doesn't."""
    for call in trace.calls:
        if isinstance(trace.modules[call.name], tuple(OUTPUT_AXIS)) and (call.node is None or trace.reached(call)):
            yield call


def _select(trace: _Trace, head: str, globs: tuple[str, ...] | None) -> list[str]:
    """Names of the unit layers, in execution order."""
    names = [
        name
        for name in dict.fromkeys(call.name for call in _candidates(trace))
        if not _inside(name, head) and _has_rows(trace, name)
    ]
    for glob in globs or ():
        if not any(fnmatchcase(name, glob) for name in names):
            found = "matches no unit layer"
            if glob in trace.modules:
                kind = type(trace.modules[glob]).__name__
                found = f"names a {kind}, whose parameters can't be assigned to units"
            if _inside(glob, head):
                found = f"names the head {head!r}, which is never made of units"
            raise ValueError(f"units={glob!r} {found}; this model's unit layers are {_listed(names)}")
    return [name for name in names if globs is None or _matches(name, globs)]


def _has_rows(trace: _Trace, name: str) -> bool:
    """Whether the layer's parameters are its rows alone; an adapter's, say, compute something else and are shared."""
    keys = {key.rpartition(".")[2] for key in trace.own_parameters(name)}
    return is_parametrized(trace.modules[name]) or (
        {"weight"} <= keys <= {"weight", "bias"} and not any(trace.modules[name].children())
    )


def _unit_layer(trace: _Trace, name: str) -> UnitLayer:
    module = trace.modules[name]
    calls = [call for call in trace.calls if call.name == name]
    found = None
    if is_parametrized(module):
        found = "is parametrized: its weight is computed, so no row of it can be pinned"
    elif len(calls) > 1:
        found = f"runs {len(calls)} times in one forward, so the relevance of its units is not defined"
    for key, parameter in trace.own_parameters(name).items():
        if len(trace.owners[parameter]) > 1:
            found = f"shares {key!r} with {sorted(set(trace.owners[parameter]) - {key})}"
        elif parameter in trace.leaves and trace.edges[trace.leaves[parameter]] > 1 and len(calls) == 1:
            found = f"has its {key!r} used a second time outside the layer"
    if found:
        raise ValueError(f"layer {name!r} {found}; leave it out of units= and it is frozen whole after the first task")
    (call,) = calls
    axis = next(axis for kind, axis in OUTPUT_AXIS.items() if isinstance(module, kind))
    norm = _following_norm(trace, call, axis)
    parameters = [*trace.own_parameters(name), *(trace.own_parameters(norm) if norm else ())]
    return UnitLayer(name, len(trace.own_parameters(name)[f"{name}.weight"]), axis, tuple(parameters), norm)


def _following_norm(trace: _Trace, call: _Call, axis: int) -> str | None:
    """The norm that reads this output along the axis of its units, if nothing else does."""
    if call.output is None or call.output.ndim + axis != 1 or trace.edges[call.node] != 1:
        return None
    for other in trace.calls:
        if not isinstance(trace.modules[other.name], _NORMS) or trace.runs[other.name] != 1 or other.node is None:
            continue
        reads = any(node is call.node for node, _ in other.node.next_functions)
        shared = any(len(trace.owners[parameter]) > 1 for parameter in trace.own_parameters(other.name).values())
        if reads and not shared:
            return other.name
    return None


def _assign(trace: _Trace, layers: Iterable[UnitLayer], head: str) -> tuple[tuple[str, ...], ...]:
    """Head parameters, shared parameters, idle parameters, buffers: every parameter outside the layers exactly once."""
    of_units = {name for layer in layers for name in layer.parameters}
    of_head, shared, idle = [], [], []
    for parameter, owners in trace.owners.items():
        if not of_units.isdisjoint(owners):
            continue
        if all(_inside(name, head) for name in owners):
            of_head.append(owners[0])
        elif trace.used(parameter):
            shared.append(owners[0])
        else:
            idle.append(owners[0])
    buffers = [
        f"{name}.{key}"
        for name, module in trace.modules.items()
        if name and trace.runs[name]
        for key, _ in module.named_buffers(recurse=False)
    ]
    # The outermost module's own may be anything: a replay memory, say, that is not read when it predicts.
    own = trace.modules[""].named_buffers(recurse=False)
    buffers += [key for key, buffer in own if id(buffer) in trace.read]
    return tuple(of_head), tuple(shared), tuple(idle), tuple(buffers)


def _globs(patterns: str | Sequence[str] | None) -> tuple[str, ...] | None:
    return (patterns,) if isinstance(patterns, str) else None if patterns is None else tuple(patterns)


def _matches(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


def _inside(name: str, ancestor: str) -> bool:
    return name == ancestor or name.startswith(f"{ancestor}.")


def _listed(names: Sequence[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
