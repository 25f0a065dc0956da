"""Everything that one forward tells of a model: which modules ran, on whose outputs, and what the logits depend on."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_rnf.anatomy.predict import Predict, predict_checked
from lightning_rnf.runtime import borrowed, evaluating, forget_gradient_hooks


@dataclass(frozen=True)
class Call:
    """One run of a module.

    Attributes:
        name: of the module.
        output: what it returned, if that is a tensor.
        node: of the autograd graph, that made the output (a later in-place function changes that).
        source: the node that made its first input; None: no module or function with a graph did.
    """

    name: str
    output: Tensor | None
    node: Any
    source: Any


class Trace:
    """One forward, in eval mode and eagerly.

    Attributes:
        modules: by name.
        calls: in the order in which they ended.
        runs: how often each module ran, by name.
        read: identities of the tensors that functions were given.
        logits: of the batch.
        edges: how many edges lead to each node of the logits' autograd graph.
        leaves: the node of each leaf that the graph reaches.
        owners: all names of each parameter.
    """

    def __init__(self, module: nn.Module, calls: list[Call], read: set[int], logits: Tensor) -> None:
        self.modules: dict[str, nn.Module] = dict(module.named_modules())
        self.calls = calls
        self.runs = Counter(call.name for call in calls)
        self.read = read
        self.logits = logits
        self.edges, self.leaves = _walk_graph(logits)
        self.owners: dict[nn.Parameter, list[str]] = defaultdict(list)
        for name, parameter in module.named_parameters(remove_duplicate=False):
            self.owners[parameter].append(name)

    @classmethod
    def of(cls, module: nn.Module, batch: Any, predict: Predict) -> Trace:
        """Run ``module`` on a batch and leave it as it was.

        Raises:
            TypeError, ValueError: as `anatomy.predict_checked`.
        """
        calls: list[Call] = []
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

    def reached(self, call: Call) -> bool:
        """Whether the graph of the logits has this output in it."""
        if call.node is None or call.output is None:
            return False
        # A function that wrote into a view has put another node in the place of the one that made it.
        nodes = (call.node, call.output.grad_fn)
        return any(self.edges[node] > 0 or node is self.logits.grad_fn for node in nodes)


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


def _recorder(name: str, calls: list[Call]) -> Any:
    def record(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        tensor = output if isinstance(output, Tensor) else None
        first = args[0] if args and isinstance(args[0], Tensor) else None
        calls.append(
            Call(
                name,
                tensor,
                None if tensor is None else tensor.grad_fn,
                None if first is None else first.grad_fn,
            )
        )

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
