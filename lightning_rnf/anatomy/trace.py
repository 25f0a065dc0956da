"""Everything that one forward tells of a model: which modules ran, on whose outputs, and what the logits depend on."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import is_parametrized
from torch.overrides import TorchFunctionMode

from lightning_rnf.anatomy.attention import Attended, Attending
from lightning_rnf.anatomy.coupling import Given, reaches_past
from lightning_rnf.anatomy.kinds import LayerKind
from lightning_rnf.anatomy.packed import OUTPUT, by_parts, is_attention, why_not_rows
from lightning_rnf.anatomy.predict import Flat, Predict, check_finite
from lightning_rnf.anatomy.recurrent import is_recurrent
from lightning_rnf.anatomy.targets import Layout, class_axes, flattened, heads_of, ignored_by, is_numbers
from lightning_rnf.runtime import borrowed, evaluating, forget_gradient_hooks


@dataclass(frozen=True)
class Call:
    """One run of a module.

    Attributes:
        name: of the module.
        output: what it returned, if that is a tensor.
        node: of the autograd graph, that made the output (a later in-place function changes that).
        source: the node that made its first input; None: no module or function with a graph did.
        nodes: those that made the output or, of a recurrent layer and of attention, all that it returned.
        inputs: of these, the nodes that made what it was given.
    """

    name: str
    output: Tensor | None
    node: Any
    source: Any
    nodes: tuple[Any, ...] = ()
    inputs: frozenset[Any] = frozenset()


class Trace:
    """One forward, in eval mode and eagerly.

    Attributes:
        modules: by name.
        calls: in the order in which they ended.
        runs: how often each module ran, by name.
        read: identities of the tensors that functions were given.
        outside: identities of parameters whose values were read while no module of theirs was running, as far as it is
            known which those are: of layers and embeddings.
        logits: of the batch, as ``predict`` has returned them; of several heads at once as rows.
        layout: what they and their targets have shown of the task's.
        edges: how many edges lead to each node of the logits' autograd graph.
        leaves: the node of each leaf that the graph reaches.
        owners: names of each parameter, one for each module that has it.
        names: the parameter of each name: a module that stands in several places has several.
        given: what each suspect was given when it ran first, by name.
        elsewhere: parameters of layers that reach the logits past their layer, where autograd does not see it.
        coupled: what was found of suspects, by name; see `layers.coupling`.
        attended: what attention has read, wherever it ran, but for torch's own module.
        inner: names of modules that run in a trace only: what attention of torch reads the weight of.
    """

    def __init__(
        self,
        module: nn.Module,
        calls: list[Call],
        read: set[int],
        logits: Tensor,
        given: Mapping[str, Given],
        layout: Layout | None = None,
        attended: Sequence[Attended] = (),
        inner: Collection[str] = (),
        outside: Collection[int] = (),
    ) -> None:
        self.modules: dict[str, nn.Module] = dict(module.named_modules())
        self.calls = calls
        self.runs = Counter(call.name for call in calls)
        self.read = read
        self.outside = outside
        self.logits = logits
        self.layout = layout or Layout()
        self.edges, self.leaves = _walk_graph(logits)
        self.owners: dict[nn.Parameter, list[str]] = defaultdict(list)
        self.names: dict[str, nn.Parameter] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            self.names[name] = parameter
            if name.rpartition(".")[0] in self.modules:
                self.owners[parameter].append(name)
        self.given = given
        self.elsewhere: set[nn.Parameter] = set()
        self.coupled: dict[str, str | None] = {}
        self.attended = attended
        self.inner = frozenset(inner)

    @classmethod
    def of(
        cls,
        module: nn.Module,
        batch: Any,
        predict: Predict,
        kind_of: Callable[[nn.Module], LayerKind | None] = lambda module: None,
        is_suspect: Callable[[nn.Module], bool] = lambda module: False,
    ) -> Trace:
        """Run ``module`` on a batch and leave it as it was.

        Args:
            module: the model.
            batch: on its device.
            predict: how to get logits of a batch.
            kind_of: what is known of a module that should be the only one to read its parameters; None: of others.
            is_suspect: whether a module may do something else than its class says.

        Raises:
            ValueError: if a parameter has no shape yet.
            TypeError, ValueError: as `anatomy.predict_checked`.
        """
        for name, parameter in module.named_parameters():
            if is_lazy(parameter):
                raise ValueError(
                    f"parameter {name!r} has no shape yet: it gets one when the model first runs. Run one batch "
                    "through it before the first fit: with torch.no_grad(): model(x)"
                )
        calls: list[Call] = []
        given: dict[str, Given] = {}
        reads, attending = _Reads(), Attending()
        with borrowed(module), evaluating(module), torch.enable_grad():
            for parameter in module.parameters():
                # The graph has to show what the user keeps from training, too.
                parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
            forget_gradient_hooks(module)
            inner = _taken_apart(module, attending)
            suspects = {name for name, submodule in module.named_modules() if is_suspect(submodule)}
            for name, submodule in module.named_modules():
                if kind_of(submodule) or isinstance(submodule, nn.Embedding):
                    reads.computed[id(submodule)] = {id(parameter) for parameter in submodule.parameters()}
                    submodule.register_forward_pre_hook(reads.enter, prepend=True)
                    submodule.register_forward_hook(reads.leave, always_call=True)
                if name in suspects:
                    submodule.register_forward_pre_hook(partial(_note, name, given), prepend=True, with_kwargs=True)
                record = _recorder_of_several if is_recurrent(submodule) or is_attention(submodule) else _recorder
                submodule.register_forward_hook(record(name, calls), with_kwargs=True)
            returned: list[Any] = []
            with reads, attending:
                rows, target = Flat.like(predict, partial(_raw, predict, returned))(module, batch)
            check_finite(rows)
            logits, wanted = returned
            heads = None
            if isinstance(logits, Mapping):
                axis_of = partial(_axis_of_maker, module, calls, kind_of=kind_of)
                heads = heads_of(logits, wanted, ignored_by(module), axis_of)
                rows, _ = flattened(logits, wanted, Layout(heads=heads), ignored_by(module))
                logits, axis = rows, None
            else:
                axes = class_axes(logits, wanted)
                axis = axes[0] if len(axes) == 1 else _axis_of_maker(module, calls, logits, kind_of) or axes[0]
            layout = Layout(axis, is_numbers(target), heads)
            shown = attending.found, inner, reads.outside
            trace = cls(module, calls, reads.tensors, logits, given, layout, *shown)
        with evaluating(module):
            for call in calls:
                owner = trace.modules[call.name]
                for parameter in trace.own_parameters(call.name).values():
                    hidden = id(parameter) in reads.outside and not trace.uses_outside(parameter, call)
                    once = trace.runs[call.name] == 1  # of those that run more often `in_each_run` tells
                    if once and kind_of(owner) and hidden and reaches_past(module, owner, parameter, batch, predict):
                        trace.elsewhere.add(parameter)
        return trace

    def own_parameters(self, name: str) -> dict[str, nn.Parameter]:
        """Parameters of this module alone, by full name; of a parametrized one, what they are computed from, too."""
        prefix, module = f"{name}." if name else "", self.modules[name]
        own = {prefix + key: value for key, value in module.named_parameters(recurse=False)}
        if is_parametrized(module):
            before = f"{prefix}parametrizations."
            own |= {key: value for key, value in self.names.items() if key.startswith(before)}
        return own

    def sharers(self, name: str, parameter: nn.Parameter) -> list[str]:
        """Other modules' names for a parameter."""
        return sorted(set(self.owners[parameter]) - {name})

    def used(self, parameter: nn.Parameter) -> bool:
        """Whether the logits depend on it."""
        if parameter in self.leaves:
            return True
        # detach, no_grad and reentrant checkpointing hide what the logits depend on: what ran unseen may be needed.
        unseen = {call.name for call in self.calls if not self.reached(call)}
        return any(name.rpartition(".")[0] in unseen for name in self.owners[parameter])

    def reached(self, call: Call) -> bool:
        """Whether the graph of the logits has this output in it."""
        if not call.nodes:
            return False
        # A function that wrote into a view has put another node in the place of the one that made it.
        nodes = call.nodes if call.output is None else (*call.nodes, call.output.grad_fn)
        return any(self.edges[node] > 0 or node is self.logits.grad_fn for node in nodes)

    def uses_outside(self, parameter: nn.Parameter, call: Call) -> int:
        """How many edges lead to a parameter from other operations than those of a module's only run."""
        leaf = self.leaves.get(parameter)
        if leaf is None:
            return 0
        if is_recurrent(self.modules[call.name]) or is_attention(self.modules[call.name]):  # in every step, each part
            return self.edges[leaf] - _edges_inside(call, self.edges)[leaf]
        if call.name not in self.given:  # torch's own layers read their parameters once
            return self.edges[leaf] - 1
        if call.node is None:  # it says something else than a tensor: trying it tells
            return 0
        return self.edges[leaf] - _edges(call.node, self.given[call.name].nodes)[leaf]

    def in_each_run(self, parameter: nn.Parameter, runs: int) -> bool:
        """Whether layers of torch's that run so many times together read a parameter once in each, nothing else does.

        Whatever else may have read its value, in the graph or out of it, is taken to have: inside of autocast there is
        one edge for all runs, and then nothing is known.
        """
        leaf = self.leaves.get(parameter)
        return (0 if leaf is None else self.edges[leaf]) == runs and id(parameter) not in self.outside


def _raw(predict: Predict, returned: list[Any], module: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """What a predict returns, which is noted."""
    inner = predict.predict if isinstance(predict, Flat) else predict
    returned[:] = inner(module, batch)
    return returned[0], returned[1]


def _axis_of_maker(
    module: nn.Module, calls: Sequence[Call], logits: Tensor, kind_of: Callable[[nn.Module], LayerKind | None]
) -> int | None:
    """By the layer whose output the logits are: which of their dimensions, 1 or -1, counts its units."""
    for call in reversed(calls):
        kind, made = kind_of(module.get_submodule(call.name)), call.output
        if kind is None or made is None or made.untyped_storage().data_ptr() != logits.untyped_storage().data_ptr():
            continue
        if made.ndim == logits.ndim:  # the logits may be another view of it: what is as far apart in memory is the same
            return next((one for one in (-1, 1) if logits.stride(one) == made.stride(kind.axis)), None)
    return None


def form(tensor: Tensor) -> str:
    """Dtype and shape in words.

    >>> form(torch.zeros(2, 3))
    'float32 (2, 3)'
    """
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


class _Reads(TorchFunctionMode):
    """Notes the identity of every tensor that a function is given.

    Attributes:
        tensors: all of them.
        outside: parameters whose values were read while no layer of theirs was running.
        computed: what the weights of a layer may be computed from, by its identity.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tensors: set[int] = set()
        self.outside: set[int] = set()
        self.computed: dict[int, set[int]] = {}
        self._running: list[nn.Module] = []

    def enter(self, module: nn.Module, args: Any) -> None:
        """A hook: a layer begins to run."""
        self._running.append(module)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """A hook: it has run."""
        if module in self._running:  # not if a hook before ours kept it from running
            self._running.remove(module)

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        for argument in (*args, *(kwargs or {}).values()):
            several = argument if isinstance(argument, (list, tuple)) else (argument,)
            self.tensors.update(id(tensor) for tensor in several if isinstance(tensor, Tensor))
        result = function(*args, **(kwargs or {}))
        if isinstance(result, (Tensor, tuple, list)) and not _reads_form(function):
            of_values = args[:1] if function in _LIKE_ANOTHER else (*args, *(kwargs or {}).values())
            own = {id(parameter) for module in self._running for parameter in module.parameters()}
            read = {id(parameter) for parameter in of_values if isinstance(parameter, nn.Parameter)}
            self.outside.update(read - own)
            running = {id(module) for module in self._running}
            given = {id(value) for value in of_values if isinstance(value, Tensor)}
            for (owner, _), value in parametrize._cache.items():  # inside of `parametrize.cached` it is computed once
                if id(value) in given and owner not in running:
                    self.outside.update(self.computed.get(owner, ()))
        return result


_LIKE_ANOTHER = (Tensor.to, Tensor.type_as, Tensor.expand_as, Tensor.view_as, Tensor.reshape_as)
"""They read values of their first argument alone."""


def _reads_form(function: Any) -> bool:
    """Whether it makes a tensor like another one, whose values it does not look at."""
    name = str(getattr(function, "__name__", ""))
    return name.endswith("_like") or name.startswith("new_") or name == "requires_grad_"


def _note(name: str, given: dict[str, Given], module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
    if name not in given:
        given[name] = Given.to(args, kwargs)


def _recorder(name: str, calls: list[Call]) -> Any:
    def record(module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: object) -> None:
        tensor = output if isinstance(output, Tensor) else None
        first = args[0] if args and isinstance(args[0], Tensor) else None
        node = None if tensor is None else tensor.grad_fn
        nodes = () if node is None else (node,)
        calls.append(Call(name, tensor, node, None if first is None else first.grad_fn, nodes))

    return record


def _recorder_of_several(name: str, calls: list[Call]) -> Any:
    def record(module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: object) -> None:
        found = Call(name, None, None, None, tuple(_makers(output)), frozenset(_makers((args, kwargs))))
        behind = bool(calls) and calls[-1].name == f"{name}.{OUTPUT}"  # which has run last, but comes behind it
        calls.insert(len(calls) - behind, found)

    return record


def _taken_apart(module: nn.Module, attending: Attending) -> set[str]:
    """For a borrowed module: attention of torch's runs by its parts. The names of modules that only run for that."""
    found = set()
    for name, part in module.named_modules():
        if is_attention(part) and why_not_rows(part) is None:
            vars(part)["forward"] = _unnoted(by_parts(part), attending)
            found.add(f"{name}.{OUTPUT}" if name else OUTPUT)
    return found


def _unnoted(run: Callable[..., Any], attending: Attending) -> Callable[..., Any]:
    """A forward of attention of which it is known by itself which rows make what."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        known = len(attending.found)
        result = run(*args, **kwargs)
        del attending.found[known:]
        return result

    return forward


def _makers(value: object) -> list[Any]:
    """The nodes that made the tensors in a value, packed sequences among them."""
    if isinstance(value, Tensor):
        return [] if value.grad_fn is None else [value.grad_fn]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return [node for part in parts for node in _makers(part)]


def _edges_inside(call: Call, reached: Mapping[Any, int]) -> Counter[Any]:
    """How many edges of the logits' graph lead to each node from those between a call's inputs and its outputs."""
    edges: Counter[Any] = Counter()
    seen = {node for node in call.nodes if node in reached}
    pending = list(seen)
    while pending:
        for successor, _ in pending.pop().next_functions:
            if successor is None:
                continue
            edges[successor] += 1
            if successor not in seen and successor not in call.inputs:
                seen.add(successor)
                pending.append(successor)
    return edges


def _walk_graph(logits: Tensor) -> tuple[Counter[Any], dict[Tensor, Any]]:
    """How many edges lead to each node of the autograd graph, and the node of each leaf that it reaches."""
    edges = _edges(logits.grad_fn)
    nodes = (*edges, logits.grad_fn)
    return edges, {node.variable: node for node in nodes if hasattr(node, "variable")}


def _edges(start: Any, end: Collection[Any] = ()) -> Counter[Any]:
    """How many edges lead to each node below ``start``; those in ``end`` lead nowhere."""
    edges: Counter[Any] = Counter()
    pending: list[Any] = [start] if start is not None else []
    while pending:
        for successor, _ in pending.pop().next_functions:
            if successor is None:
                continue
            edges[successor] += 1
            if edges[successor] == 1 and successor not in end:
                pending.append(successor)
    return edges
