"""Which module is the head: the one whose output is the logits, or what they are made of by functions alone."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import takewhile
from typing import Any

from torch import nn

from lightning_rnf.anatomy.layers import inside, layer_calls, matches
from lightning_rnf.anatomy.trace import Call, Trace
from lightning_rnf.heads import MultiHead

_PRODUCTS = frozenset(
    (
        *("Mm", "Bmm", "Mv", "Dot", "Addmm", "Addbmm", "Baddbmm", "Addmv", "Addr", "Linear", "Bilinear"),
        *("Cdist", "PairwiseDistance", "CosineSimilarity", "Convolution", "SlowConv2D", "ConvolutionOverrideable"),
    )
)
"""Nodes of the autograd graph that make new channels: what is before them is no head of what is behind them."""


def find_head(trace: Trace, globs: tuple[str, ...] | None) -> str:
    """The name of the head.

    It is the active task's entry of a `MultiHead`, if no other layer runs behind it; or the module whose output is the
    logits, or that they are made of by functions with no other input that is trained and no matrix product
    (``log_softmax``, the last token, the mean over tokens, a slice, another shape, a cast). Of several heads at once it
    is the module that holds them and nothing else. If it stands in a
    ``ModuleDict`` or ``ModuleList`` whose other entries did not run, the whole entry is the head.

    Args:
        trace: of the model.
        globs: of the heads' names, one of which ran; None: it is found.

    Raises:
        ValueError: if there is no such module, or more than one, naming candidates.
    """
    if globs is not None:
        return _named(trace, globs)
    # One that other layers come behind is a stem or an adapter of its task.
    *_, last = ("", *(call.name for call in layer_calls(trace)))
    entries = [name for name in _of_multi_heads(trace) if not _is_all(trace, name) and inside(last, name)]
    if len(entries) == 1:
        return entries[0]
    found = next((call.name for call in trace.calls if _is_logits(trace, call)), None)
    candidates: list[str] = []
    if not found or _is_all(trace, found):
        found, candidates = _behind_functions(trace)
    several = found is None and len(trace.layout.heads or ()) > 1
    if several:
        found = _around(trace, candidates)
    if found is None:
        if several:
            raise ValueError(
                f"head not found: the logits are those of {', '.join(map(repr, candidates))}, which do not stand in "
                "one module apart from all others; put the heads of a task into one nn.ModuleDict, or name the module "
                "that holds them with heads="
            )
        raise ValueError(
            "head not found: no module's output is the logits, nor what functions of it alone make them of (they are "
            "computed from several, with a weight, or by the LightningModule itself); name the heads' modules with "
            f"heads=, for example heads={_example(candidates)!r}"
            + (f"; the last modules before the logits are {', '.join(map(repr, candidates))}" if candidates else "")
        )
    return _whole_entry(trace, found) or found


def _example(candidates: Iterable[str]) -> str:
    return next((f"{name.rpartition('.')[0]}.*" for name in candidates if "." in name), "heads.*")


def _of_multi_heads(trace: Trace) -> list[str]:
    """Entries of `MultiHead`s that ran, and that the logits depend on."""
    found = []
    for name, module in trace.modules.items():
        if isinstance(module, MultiHead):
            before = f"{name}.tasks." if name else "tasks."
            entries = {before + task for task in module.tasks}
            ran = {call.name for call in trace.calls if call.name in entries and trace.reached(call)}
            found += sorted(ran)
    return found


def _is_logits(trace: Trace, call: Call) -> bool:
    return (
        call.output is not None
        and call.output.numel() == trace.logits.numel()
        and call.output.untyped_storage().data_ptr() == trace.logits.untyped_storage().data_ptr()
        and _has_parameters(trace, call.name)
        and call.name not in trace.inner
    )


def _has_parameters(trace: Trace, name: str) -> bool:
    return any(True for _ in trace.modules[name].parameters())


def _behind_functions(trace: Trace) -> tuple[str | None, list[str]]:
    """The module whose output the logits are a function of, and of nothing else; or candidates, the last that ran."""
    makers: dict[Any, str] = {}
    for call in trace.calls:  # the innermost ends first
        is_maker = call.name not in trace.inner and _has_parameters(trace, call.name)
        if call.output is not None and is_maker and not _is_all(trace, call.name):
            for node in (call.node, call.output.grad_fn):
                makers.setdefault(node, call.name)
    makers.pop(None, None)
    node = trace.logits.grad_fn
    while node is not None and node not in makers:
        before = [other for other, _ in node.next_functions if other is not None]
        if len(before) != 1 or _kind(node) in _PRODUCTS:
            return None, _makers_before(before, makers)
        (node,) = before
    return (None, []) if node is None else (makers[node], [])


def _around(trace: Trace, makers: list[str]) -> str | None:
    """The innermost module that holds all these, if each of its parts that ran holds one of them."""
    if not makers:
        return None
    parts = zip(*(maker.split(".")[:-1] for maker in makers), strict=False)
    shared = [part[0] for part in takewhile(lambda part: len(set(part)) == 1, parts)]
    around, depth = ".".join(shared), len(shared)
    ran = {call.name.split(".")[depth] for call in layer_calls(trace) if around and inside(call.name, around)}
    holding = {maker.split(".")[depth] for maker in makers}
    return around if around and ran <= holding and not _is_all(trace, around) else None


def _makers_before(nodes: list[Any], makers: dict[Any, str]) -> list[str]:
    found: dict[str, None] = {}
    seen: set[Any] = set()
    pending = list(reversed(nodes))
    while pending:
        node = pending.pop()
        if node in makers:
            found[makers[node]] = None
        elif node not in seen:
            seen.add(node)
            pending.extend(other for other, _ in node.next_functions if other is not None)
    return list(found)


def _kind(node: Any) -> str:
    return str(node.name()).rpartition("::")[2].partition("Backward")[0]


def _is_all(trace: Trace, name: str) -> bool:
    """Whether a module with parts holds every layer: then it makes logits of its parts' by a function of its own."""
    if not name:
        return True
    return any(trace.modules[name].children()) and all(inside(call.name, name) for call in layer_calls(trace))


def _named(trace: Trace, globs: tuple[str, ...]) -> str:
    matched = [name for name in trace.modules if name and matches(name, globs) and trace.runs[name]]
    outermost = [name for name in matched if not any(inside(name, other) for other in matched if other != name)]
    if len(outermost) != 1:
        raise ValueError(
            f"head not found: heads={list(globs)} matches {outermost or 'no module'} of those that ran, expected "
            "exactly one, the active task's"
        )
    (found,) = outermost
    # A glob may name the container of all heads: the head is the entry that ran last.
    parts = [call.name for call in trace.calls if inside(call.name, found) and trace.own_parameters(call.name)]
    entry = _whole_entry(trace, parts[-1]) if parts else None
    return entry if entry is not None and inside(entry, found) else found


def _whole_entry(trace: Trace, name: str) -> str | None:
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
        leaves_units = any(call.name and not inside(call.name, entry) for call in layer_calls(trace))
        if alternatives and leaves_units and not any(trace.runs[other] for other in others):
            return entry
    return None
