"""What finished tasks keep, as tables of plain text: of one state, and of two side by side."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from math import prod
from typing import Any

import torch
from torch import Tensor

from lightning_rnf.memory.model import sizes_of
from lightning_rnf.memory.record import TaskRecord
from lightning_rnf.memory.state import FreezeState
from lightning_rnf.memory.widening import layers_before


def claims(state: FreezeState) -> dict[str, Tensor]:
    """Which task froze each unit: int64 ``(units,)`` by layer, the task's place in the order of training; -1: free."""
    found = {layer.name: torch.full((layer.units,), -1) for layer in state.layers}
    for index, record in enumerate(state.tasks.values()):
        for layer, mask in record.relevant.items():
            found[layer][mask & (found[layer] < 0)] = index
    return found


def overlap(state: FreezeState) -> Tensor:
    """How many units are relevant to both of two tasks: int64 ``(tasks, tasks)``, on the diagonal those of one.

    With ``candidates="free"`` all units of earlier tasks count as relevant to later ones, too: a row holds the same
    number from the diagonal on, whatever is reused. Only with ``"all"`` it is a finding.
    """
    if not state.tasks:
        return torch.zeros(0, 0, dtype=torch.int64)
    flat = [torch.cat([record.relevant[layer.name] for layer in state.layers]) for record in state.tasks.values()]
    masks = torch.stack(flat).double()  # exact: there is no product of integers on every device
    return (masks @ masks.T).long()


def free_capacity_over_tasks(state: FreezeState) -> list[float]:
    """Share of units that were relevant to no task yet, after each finished task."""
    claimed = torch.cat([*claims(state).values(), torch.empty(0, dtype=torch.int64)])
    units = [units_at(state, record) for record in state.tasks.values()]
    taken = [int(((claimed >= 0) & (claimed <= index)).sum()) for index in range(len(units))]
    return [(there - gone) / max(there, 1) for there, gone in zip(units, taken, strict=True)]


def free_weights_of_layers(state: FreezeState) -> dict[str, float]:
    """Share of each layer's weight that may still move, as the last task's record says it; if it doesn't, of rows."""
    last = next(reversed(state.tasks.values()), None)
    if last is not None and last.free_weights and not state.later(last):
        return {layer.name: last.free_weights[layer.name] for layer in state.layers}
    return {name: 1.0 - int(units.sum()) / len(units) for name, units in state.frozen().items()}


def free_weights(state: FreezeState, of_layers: Mapping[str, float]) -> float:
    """Share of all layers' and embeddings' weights that may still move, from that of each; 1 before any task has ended.

    Args:
        state: the finished tasks.
        of_layers: by layer; of an embedding it is told by the state.
    """
    sizes = {
        layer.name: sum(
            prod(sizes_of(state.forms.get(name) or f"float32 ({layer.units},)"))
            for name in ([layer.weight] if layer.is_open else layer.parameters)
        )
        for layer in state.layers
    }
    sizes |= {name.rpartition(".")[0]: prod(sizes_of(state.forms[name])) for name in state.embeddings}
    shares = {**of_layers, **free_rows(state)}
    total = sum(sizes.values())
    return sum(sizes[name] * shares[name] for name in sizes) / total if total else 1.0


def free_rows(state: FreezeState) -> dict[str, float]:
    """Share of each embedding's rows that are not frozen, by the embedding's name."""
    frozen = {name: state.frozen_rows(name) for name in state.embeddings}
    return {
        name.rpartition(".")[0]: 1.0 - float(mask.double().mean()) for name, mask in frozen.items() if mask is not None
    }


def tokens_table(state: FreezeState) -> list[dict[str, Any]]:
    """One row for each embedding: how many rows each task was the first to read, how many nobody has, and were kept.

    Kept are the rows that a task has changed and that tasks before it hear as they were.
    """
    names = columns(list(state.tasks), {"embedding", "rows", "unread", "kept"})
    found = []
    for embedding in state.embeddings:
        seen, by_task, kept = None, {}, 0
        for name, record in zip(names, state.tasks.values(), strict=True):
            kept += len(record.old_rows[embedding].rows) if embedding in record.old_rows else 0
            mask = record.tokens.get(embedding)
            by_task[name] = 0 if mask is None else int((mask if seen is None else mask & ~seen).sum())
            seen = mask if seen is None else seen if mask is None else mask | seen
        if seen is not None:
            rest = {"unread": int((~seen).sum()), "kept": kept}
            found.append({"embedding": embedding.rpartition(".")[0], "rows": len(seen), **by_task, **rest})
    return found


def units_at(state: FreezeState, record: TaskRecord) -> int:
    """How many units the model had at a task's end."""
    return sum(layer.units for layer in layers_before(state.layers, state.later(record)))


def claims_table(state: FreezeState) -> list[dict[str, Any]]:
    """One row for each layer: how many units each task was the first to freeze, how many serve several, and are free.

    A task that has to share its column's name with "layer", "units", "shared" or "free" gets its number in front.
    """
    claimed = claims(state)
    names = columns(list(state.tasks), {"layer", "units", "shared", "free"})
    rows = []
    for layer in state.layers:
        users = torch.stack([record.relevant[layer.name] for record in state.tasks.values()]).sum(dim=0)
        of_tasks = {name: int((claimed[layer.name] == index).sum()) for index, name in enumerate(names)}
        shared, free = int((users > 1).sum()), int((users == 0).sum())
        rows.append({"layer": layer.name, "units": layer.units, **of_tasks, "shared": shared, "free": free})
    return rows


def tasks_table(state: FreezeState) -> list[dict[str, Any]]:
    """One row for each finished task: its relevant units, what they cost, and what the search did for it.

    Accuracies and the free capacity after the task are shares, in [0, 1]. Where a task's targets are numbers, another
    column says what its accuracies are.
    """
    frozen: dict[str, Any] = {}
    is_mixed = any(record.scored for record in state.tasks.values())
    rows = []
    for record in state.tasks.values():
        claimed = sum(int((mask & ~frozen.get(layer, ~mask)).sum()) for layer, mask in record.relevant.items())
        frozen = {layer: frozen.get(layer, mask) | mask for layer, mask in record.relevant.items()}
        free = 1.0 - sum(int(mask.sum()) for mask in frozen.values()) / max(units_at(state, record), 1)
        rows.append(
            {
                "task": record.name,
                "relevant units": sum(int(mask.sum()) for mask in record.relevant.values()),
                "of them new": claimed,
                "cutoff": record.cutoff,
                "accuracy": record.accuracy,
                "of the sub-network": record.subnetwork_accuracy,
                **({"scored by": record.scored or "accuracy"} if is_mixed else {}),
                "accepted": record.accepted,
                "samples": record.samples,
                "evaluations": len(record.evaluations) + len(record.recovery),
                "free after it": free,
            }
        )
    return rows


def layers_table(state: FreezeState, task: str | None = None) -> list[dict[str, Any]]:
    """One row for each layer: its units, how many are relevant to each task (or to one), and how many are free.

    Raises:
        KeyError: if there is no such task.
    """
    records = list(state.tasks.values()) if task is None else [state.task(task)]
    names = columns([record.name for record in records], {"layer", "units", "free"})
    frozen = state.frozen()
    return [
        {
            "layer": layer.name,
            "units": layer.units,
            **{name: int(one.relevant[layer.name].sum()) for name, one in zip(names, records, strict=True)},
            "free": int((~frozen[layer.name]).sum()),
        }
        for layer in state.layers
    ]


def columns(names: Sequence[str], own: AbstractSet[str]) -> list[str]:
    """Names of tasks as columns beside a table's own: one that is taken gets its number in front.

    >>> columns(["a", "free"], {"layer", "free"})
    ['a', '1 free']
    """
    found: list[str] = []
    for index, name in enumerate(names):
        while name in own or name in found:
            name = f"{index} {name}"
        found.append(name)
    return found


def difference(one: FreezeState, other: FreezeState, task: str | None = None) -> list[dict[str, Any]]:
    """One row for each task and layer in which two states do not keep the same units; none: they do.

    Raises:
        KeyError: if one of them lacks the task.
        ValueError: if a task is finished in one of them only, or they are of other networks.
    """
    if task is None and list(one.tasks) != list(other.tasks):
        raise ValueError(f"they have other finished tasks: {list(one.tasks)} and {list(other.tasks)}; name one of both")
    shapes = [[(layer.name, layer.units) for layer in state.layers] for state in (one, other)]
    if shapes[0] != shapes[1]:
        parts = [f"{name!r} with {units} units" for name, units in sorted(set(shapes[0]) ^ set(shapes[1]))]
        raise ValueError(f"they are of other networks: only one has {', '.join(parts[:3]) or 'its order of layers'}")
    names = list(one.tasks) if task is None else [task]
    return [row for name in names for row in _differing(one.task(name), other.task(name))]


def _differing(one: TaskRecord, other: TaskRecord) -> Iterable[dict[str, Any]]:
    for layer, mask in one.relevant.items():
        found = other.relevant[layer]
        if not bool((mask == found).all()):
            yield {
                "task": one.name,
                "layer": layer,
                "units": len(mask),
                "in both": int((mask & found).sum()),
                "only in the first": int((mask & ~found).sum()),
                "only in the second": int((~mask & found).sum()),
            }


def as_text(rows: Sequence[dict[str, Any]]) -> str:
    """Rows under their keys, in columns.

    >>> print(as_text([{"layer": "body.0", "free": 12}, {"layer": "body.10", "free": 3}]))
    layer    free
    body.0     12
    body.10     3
    """
    if not rows:
        return ""
    cells = [[printable(name) for name in rows[0]], *([shown(value) for value in row.values()] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    texts = [isinstance(value, str) for value in rows[0].values()]
    lines = [
        "  ".join(
            cell.ljust(width) if text else cell.rjust(width)
            for cell, width, text in zip(row, widths, texts, strict=True)
        )
        for row in cells
    ]
    return "\n".join(line.rstrip() for line in lines)


def shown(value: Any) -> str:
    """A cell as text, on one line."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4f}" if isinstance(value, float) else printable(str(value))


def printable(text: str) -> str:
    r"""Text on one line that nothing but shows it: line ends, control characters and lone surrogates are spelled out.

    >>> printable("a task's\nname")
    "a task's\\nname"
    """
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def shortened(names: Sequence[str], most: int) -> list[str]:
    """Names of at most about ``most`` characters: of longer ones the middle is left out; they stay different.

    >>> shortened(["body.stage.10.conv", "head"], most=10)
    ['body….conv', 'head']
    >>> shortened(["a-long-name-1-of-it", "a-long-name-2-of-it"], most=10)
    ['0 a-lo…of-it', '1 a-lo…of-it']
    """
    texts = [printable(name) for name in names]
    head = (most - 1) // 2
    cut = [text if len(text) <= most else f"{text[:head]}…{text[head + 1 - most :]}" for text in texts]
    return cut if len(set(cut)) == len(cut) else [f"{index} {name}" for index, name in enumerate(cut)]
