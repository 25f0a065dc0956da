"""Let only a task's relevant units speak: while searching, and in recall for ever after."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_rnf.anatomy import UnitLayer, UnitMap, Wider, torch_class
from lightning_rnf.freezing import harmless, rows
from lightning_rnf.heads import MultiHead
from lightning_rnf.memory import TaskRecord, layers_before, record_before
from lightning_rnf.recall import embeddings, gradients
from lightning_rnf.recall.packed import spoken_by_parts
from lightning_rnf.recall.recurrent import silent_cells
from lightning_rnf.recall.widened import as_it_was
from lightning_rnf.runtime import Ranks, attention_by_its_parts, evaluating, sharding


@contextmanager
def silence(
    module: nn.Module,
    layers: Iterable[UnitLayer],
    relevant: Mapping[str, Tensor],
    *,
    by_columns: Callable[[], bool] | None = None,
) -> Iterator[None]:
    """Inside the context all units that are not relevant put out zero.

    The output is filled, not multiplied: zero times NaN is NaN, and a later task may have diverged. It is filled again
    after the norm and the slopes that follow: a norm's shift leaks through a zeroed filter. Without gradients, the
    silent units of a layer are not even computed where that pays, see `rows.computed`. A recurrent layer's are zero in
    each step, see `silent_cells`. Attention of torch's runs by its parts, see `spoken_by_parts`.

    Args:
        module: the model.
        layers: its unit layers.
        relevant: bool ``(units,)`` by layer name.
        by_columns: whether to leave out what is zero of what layers hear, too: faster, and rounded in another way;
            None: never.
    """
    with ExitStack() as hooks:
        layers = tuple(layers)
        hooks.enter_context(attention_by_its_parts())
        hooks.enter_context(spoken_by_parts(module, layers, relevant))
        for layer in layers:
            irrelevant = ~relevant[layer.name]
            if layer.packed or not irrelevant.any():
                continue
            if layer.recurrent is not None:
                hooks.enter_context(silent_cells(module.get_submodule(layer.name), layer, relevant[layer.name]))
                continue
            # The layer has a weight to tell the device by; a norm may have none.
            device = module.get_parameter(layer.weight).device
            for part in map(module.get_submodule, layer.modules):
                is_done = hooks.enter_context(rows.computed(part, relevant[layer.name], by_columns=by_columns))
                hooks.callback(part.register_forward_hook(_filler(irrelevant, layer.axis, device, is_done)).remove)
            fill = _filler(irrelevant, layer.axis, device)
            for name in (layer.norm, layer.slopes):
                if name is not None:
                    hooks.callback(module.get_submodule(name).register_forward_hook(fill).remove)
        yield


@contextmanager
def recall(
    module: nn.Module,
    layers: Iterable[UnitLayer],
    record: TaskRecord,
    widenings: Sequence[Wider] = (),
    *,
    masked: bool = True,
) -> Iterator[None]:
    """Run the model as a finished task's sub-network: in eval mode, with the task's head if it is in a `MultiHead`.

    While it runs without gradients, no parameter has ``requires_grad``, see `gradients.asking_none`.

    Args:
        module: the model.
        layers: its unit layers.
        record: of the task, as from `FreezeState.recalled`: with rows of embeddings that were changed since its end.
        widenings: of the model; those since the task's end are undone inside.
        masked: silence the units that are irrelevant to the task and use the statistics that its norms had at its end.
            If not, the whole network speaks (the paper).
    """
    with ExitStack() as stack:
        stack.enter_context(evaluating(module))
        stack.enter_context(as_it_was(module, widenings, record.widenings))
        later = widenings[record.widenings :]
        layers, record = layers_before(layers, later), record_before(record, later)
        head = module.get_submodule(record.head)
        for multi_head in module.modules():
            if isinstance(multi_head, MultiHead):
                for task, candidate in multi_head.tasks.items():
                    if candidate is head:
                        stack.enter_context(multi_head.running(task))
        if masked:
            stack.enter_context(harmless(module, layers, record.relevant))
            stack.enter_context(silence(module, layers, record.relevant))
            stack.enter_context(_own_statistics(module, record.norm_statistics))
        stack.enter_context(_own_norms(module, record.norm_statistics))
        stack.enter_context(embeddings.heard(module, record.old_rows))
        if masked and not sharding.is_sharded(module):  # the parameters that FSDP computes with have flags of their own
            stack.enter_context(gradients.asking_none(module))
        yield


@contextmanager
def refusing(module: nn.Module, names: Iterable[str], task: str) -> Iterator[None]:
    """Inside the context none of these modules may run: the finished task never ran them, nobody silenced them.

    Raises:
        ValueError: in the forward, naming the one that runs.
    """
    with ExitStack() as hooks:
        for name in names:

            def refuse(part: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                raise ValueError(
                    f"{name!r} ({type(part).__name__}) runs in the recall of task {task!r}, but the model had no such "
                    "module when the last task ended: the masks are another model's, or another task's head is active"
                )

            hooks.callback(module.get_submodule(name).register_forward_pre_hook(refuse).remove)
        yield


@contextmanager
def telling(module: nn.Module, names: Iterable[str], task: str) -> Iterator[None]:
    """Inside the context it is a warning, once each, if one of these modules runs, which nothing holds."""
    handles: dict[str, Any] = {}
    with ExitStack() as hooks:
        for name in names:

            def tell(part: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                handles[name].remove()
                rank_zero_warn(
                    f"{name!r} ({type(part).__name__}) runs in the recall of {task!r}, but ran on none of its "
                    "reference data, so it is not frozen and these logits may change: let those have such samples"
                )

            handles[name] = module.get_submodule(name).register_forward_pre_hook(tell)
            hooks.callback(handles[name].remove)
        yield


@contextmanager
def with_leading_buffers(module: nn.Module, ranks: Ranks) -> Iterator[None]:
    """Inside the context all ranks have the buffers of rank 0, which a checkpoint gets: statistics differ by rank."""
    leading: dict[str, Tensor] = {}
    if ranks.size > 1:
        leading = ranks.decided(lambda: {name: buffer.detach().cpu() for name, buffer in module.named_buffers()})
    with _swapped(module, leading):
        yield


def statistics(module: nn.Module, units: UnitMap) -> dict[str, Tensor]:
    """What `recall` brings back: copies on the CPU of buffers of the modules that ran, and of a task's own norms."""
    own = _tensors(module)
    return {name: own[name].detach().to("cpu", copy=True) for name in (*units.buffers, *units.own)}


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return parameters | dict(module.named_buffers(remove_duplicate=False))


def _filler(silent: Tensor, axis: int, device: torch.device, is_done: Callable[[], bool] = lambda: False) -> Any:
    """A forward hook that makes units zero, ``(units,)`` along an axis, unless that is done already."""
    as_mask = silent.view(-1, *[1] * (-axis - 1)).to(device)
    chosen = silent.cpu().nonzero().view(-1)  # for outputs on the CPU alone: counting elsewhere would wait

    def fill(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if is_done():
            return output
        if _is_new(output, module):
            return output.index_fill_(axis, chosen, 0.0)  # writes to the silent ones alone
        return torch.where(as_mask, 0.0, output)  # masked_fill would make channels_last contiguous: a slow way to pool

    return fill


def _global_hooks() -> bool:
    return bool(nn.modules.module._global_forward_hooks)


def _is_new(output: Tensor, module: nn.Module) -> bool:
    """Whether nobody but torch's own module, which has just put it out, can have seen an output."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack() or _global_hooks():
        return False  # whoever looks on may keep what it sees
    if type(output) is not Tensor or output.device.type != "cpu" or output.is_inference() or output._is_view():
        return False
    ours = __name__.partition(".")[0]
    of_ours = [getattr(hook, "__module__", "").partition(".")[0] == ours for hook in module._forward_hooks.values()]
    return all(of_ours) and torch_class(module) is not nn.Module


@contextmanager
def _swapped(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    own = dict(module.named_buffers(remove_duplicate=False))
    with _written(own, {name: value for name, value in tensors.items() if name in own}):
        yield


@contextmanager
def _own_statistics(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the context buffers are others, those that would not change but for them."""
    own = dict(module.named_buffers(remove_duplicate=False))
    # Most never change, and whoever writes to one of those in a forward is not to lose it.
    others = {name: value for name, value in tensors.items() if name in own and not _equal(own[name], value)}
    held = _held_beside(module) if others else frozenset[int]()
    in_dicts = {
        name: value
        for name, value in others.items()
        if _can_be_replaced(module, name) and _storage(own[name]) not in held
    }
    with _replaced(module, in_dicts), _swapped(module, {name: others[name] for name in others.keys() - in_dicts}):
        yield


@contextmanager
def _own_norms(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the context parameters are others: the model's own are not written to, so graphs of theirs stay whole."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    tensors = {name: value for name, value in tensors.items() if name in parameters}
    if sharding.is_sharded(module):  # FSDP has parameters of its own, and puts its rows together for each forward
        sharding.reshard(module)
        rows = {name: sharding.local_rows(parameters[name], value) for name, value in tensors.items()}
        with _written({name: sharding.local(parameters[name]) for name in rows}, rows):
            try:
                yield
            finally:
                sharding.reshard(module)
        return
    with _replaced(module, tensors):
        yield


@contextmanager
def _replaced(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the context other tensors stand in the place of parameters and buffers; nothing is written to."""
    with ExitStack() as undo:
        for name, value in tensors.items():
            holder, key = _holder(module, name)
            before = holder[key]
            others = value.to(before, copy=True)
            if isinstance(before, nn.Parameter):
                others = nn.Parameter(others, requires_grad=before.requires_grad)
            vars(others).update(vars(before))  # what the user has noted on it, and what it was before `as_it_was`
            holder[key] = others
            undo.callback(holder.__setitem__, key, before)
        yield


def _holder(module: nn.Module, name: str) -> tuple[Any, str]:
    owner, _, key = name.rpartition(".")
    part = module.get_submodule(owner)
    return (part._parameters if key in part._parameters else part._buffers), key


def _can_be_replaced(module: nn.Module, name: str) -> bool:
    """Whether the buffer is in a dict that its module looks it up in: not that of a script, say."""
    return isinstance(_holder(module, name)[0], dict)


def _held_beside(module: nn.Module) -> frozenset[int]:
    """Storages of tensors that are in attributes of modules, or in lists, tuples and dicts there: some may be buffers'.

    A module that reads such a buffer of its own would not hear of one that stands in its place.
    """
    found: list[Any] = []
    for part in module.modules():
        for name, value in vars(part).items():
            if name not in ("_parameters", "_buffers", "_modules"):
                values = value.values() if isinstance(value, dict) else value
                found += values if isinstance(value, (dict, list, tuple)) else [value]
    return frozenset(_storage(one) for one in found if type(one) is Tensor and one.numel())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else id(tensor)


def _equal(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.cpu(), other.cpu())


@contextmanager
def _written(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Iterator[None]:
    # Most never change, and some can't be written to (a mask that is an expanded view).
    tensors = {name: value for name, value in tensors.items() if not _equal(own[name], value)}
    before = {name: own[name].clone() for name in tensors}
    with torch.no_grad():
        for name, value in tensors.items():
            own[name].copy_(value)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in before.items():
                own[name].copy_(value)
