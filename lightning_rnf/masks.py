"""What finished tasks keep, as tables of plain text: of one state, and of two side by side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lightning_rnf.state import FreezeState, TaskRecord


def tasks_table(state: FreezeState) -> list[dict[str, Any]]:
    """One row for each finished task: its relevant units, what they cost, and what the search did for it.

    Accuracies and the free capacity after the task are shares, in [0, 1].
    """
    frozen: dict[str, Any] = {}
    rows = []
    for record in state.tasks.values():
        claimed = sum(int((mask & ~frozen.get(layer, ~mask)).sum()) for layer, mask in record.relevant.items())
        frozen = {layer: frozen.get(layer, mask) | mask for layer, mask in record.relevant.items()}
        units = sum(len(mask) for mask in frozen.values())
        rows.append(
            {
                "task": record.name,
                "relevant units": sum(int(mask.sum()) for mask in record.relevant.values()),
                "of them new": claimed,
                "cutoff": record.cutoff,
                "accuracy": record.accuracy,
                "of the sub-network": record.subnetwork_accuracy,
                "accepted": record.accepted,
                "samples": record.samples,
                "evaluations": len(record.evaluations) + len(record.recovery),
                "free after it": 1.0 - sum(int(mask.sum()) for mask in frozen.values()) / max(units, 1),
            }
        )
    return rows


def layers_table(state: FreezeState, task: str | None = None) -> list[dict[str, Any]]:
    """One row for each layer: its units, how many are relevant to each task (or to one), and how many are free.

    Raises:
        KeyError: if there is no such task.
    """
    records = list(state.tasks.values()) if task is None else [state.task(task)]
    frozen = state.frozen()
    return [
        {
            "layer": layer.name,
            "units": layer.units,
            **{record.name: int(record.relevant[layer.name].sum()) for record in records},
            "free": int((~frozen[layer.name]).sum()),
        }
        for layer in state.layers
    ]


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
    cells = [list(rows[0]), *([_shown(value) for value in row.values()] for row in rows)]
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


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
