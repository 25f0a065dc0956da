"""Rows of embeddings: which of them tasks have read, and what those were that a later fit has changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_rnf.memory.model import sizes_of
from lightning_rnf.memory.plain import check_names, get, get_tensors


@dataclass(frozen=True, eq=False)
class OldRows:
    """Some rows of an embedding as they were.

    Attributes:
        rows: which, int64 ``(n,)``, ascending.
        values: ``(n, width)``.
    """

    rows: Tensor
    values: Tensor

    @classmethod
    def of(cls, weight: Tensor, chosen: Tensor) -> OldRows:
        """Copies on the CPU of a weight's chosen rows: bool ``(rows,)``."""
        rows = chosen.cpu().nonzero().view(-1)
        return cls(rows, weight.detach().index_select(0, rows.to(weight.device)).cpu())

    def first_of(self, later: OldRows) -> OldRows:
        """These, and those of a later moment that are not among them."""
        own = torch.zeros(max([0, *(int(rows[-1]) + 1 for rows in (self.rows, later.rows) if len(rows))])).bool()
        new = ~own.index_fill_(0, self.rows, True)[later.rows]  # many times as fast as `torch.isin`
        if not new.any():
            return self
        rows = torch.cat([self.rows, later.rows[new]])
        values = torch.cat([self.values, later.values[new].to(self.values)])
        order = rows.argsort()
        return OldRows(rows[order], values[order])

    def written(self, weight: Tensor) -> Tensor:
        """A copy of a weight with these rows."""
        rows = self.rows.to(weight.device)
        return weight.detach().clone().index_copy_(0, rows, self.values.to(weight))

    def to_plain(self) -> dict[str, Tensor]:
        """Two tensors."""
        return {"rows": self.rows, "values": self.values}


def joined(earlier: Mapping[str, OldRows], later: Mapping[str, OldRows]) -> dict[str, OldRows]:
    """By embedding; where both have a row, that of the earlier moment counts."""
    found = dict(earlier)
    for name, rows in later.items():
        found[name] = found[name].first_of(rows) if name in found else rows
    return found


def read_by(embedding: str, tokens: Iterable[Mapping[str, Tensor]]) -> Tensor | None:
    """Rows of an embedding that one of several tasks has read: bool ``(rows,)``; None: it is none of theirs."""
    masks = [of_task[embedding] for of_task in tokens if embedding in of_task]
    return torch.stack(masks).any(dim=0) if masks else None


def tokens_from_plain(plain: object, key: str) -> dict[str, Tensor]:
    """Bool ``(rows,)`` by embedding.

    Raises:
        ValueError: if it is something else.
    """
    found = get_tensors(plain, key)
    wrong = next((name for name, mask in found.items() if mask.dtype != torch.bool or mask.ndim != 1), None)
    if wrong is not None:
        raise ValueError(f"not a state of lightning_rnf: {key!r} of {wrong!r:.80} should say of each row whether it is")
    return found


def old_rows_from_plain(plain: object, key: str) -> dict[str, OldRows]:
    """The opposite of `OldRows.to_plain`, by embedding.

    Raises:
        ValueError: if it is something else.
    """
    by_name: dict[Any, Any] = get(plain, key, dict)
    check_names(key, list(by_name))
    found = {}
    for name, both in by_name.items():
        rows, values = (get(both, one, Tensor).cpu() for one in ("rows", "values"))
        if not (
            rows.dtype == torch.int64
            and rows.ndim == 1
            and values.ndim == 2
            and values.is_floating_point()
            and len(rows) == len(values)
            and (len(rows) == 0 or (int(rows[0]) >= 0 and bool((rows.diff() > 0).all())))
        ):
            raise ValueError(f"not a state of lightning_rnf: {key!r} of {name!r:.80} should be rows with their values")
        found[name] = OldRows(rows, values)
    return found


def check(
    embeddings: Iterable[str], forms: Mapping[str, str], records: Iterable[Any], learned: Mapping[str, Tensor]
) -> None:
    """Check that what a state says of rows is of its embeddings, and of rows that they have.

    Args:
        embeddings: names of their weights.
        forms: of the model's parameters.
        records: of the finished tasks.
        learned: of the fit that is under way; before a task has ended, nothing else is known of what it is of.

    Raises:
        ValueError: naming one of which it isn't.
    """
    sizes = {name: sizes_of(forms.get(name, "")) for name in embeddings}
    for name, size in sizes.items():
        if len(size) != 2:
            raise ValueError(f"not a state of lightning_rnf: 'forms' has no embedding {name!r:.80}")
    records = list(records)
    read = [pair for record in records for pair in record.tokens.items()]
    read += [(name, mask) for name, mask in learned.items() if name in forms]
    if strangers := {name for record in records for name in record.read_whole} - set(sizes):
        raise ValueError(f"not a state of lightning_rnf: 'read_whole' has {sorted(strangers)!r:.80}, no embedding's")
    for name, mask in read:
        if [len(mask)] != sizes.get(name, sizes_of(forms.get(name, "")))[:1]:
            raise ValueError(f"not a state of lightning_rnf: it knows other rows of {name!r:.80} than that has")
    for name, old in (pair for record in records for pair in record.old_rows.items()):
        size = sizes.get(name, [0, 0])
        if old.values.shape[1] != size[1] or (len(old.rows) and int(old.rows[-1]) >= size[0]):
            raise ValueError(f"not a state of lightning_rnf: it has old rows of {name!r:.80}, which has no such")
