"""Rows under their keys as tables: for a screen, as wide as it is, and for Markdown."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_rnf.memory import masks

if TYPE_CHECKING:
    from rich.table import Table

Rows = list[dict[str, Any]]

_HEADING = 24
"""Characters of a column's name that a table on a screen has room for."""

_GAP = 3
"""Between two columns of rich's table."""


def rich_table(title: str, rows: Sequence[Mapping[str, Any]], widths: Mapping[str, int] | None = None) -> Table:
    """Rows under their keys, as a table for rich to print; ``widths``: of the columns by name, in characters.

    Raises:
        ImportError: if rich is not installed (extra ``demo``).
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD)
    first = next(iter(rows[0]))
    for name, value in rows[0].items():
        table.add_column(
            Text(masks.printable(name)),
            justify="left" if isinstance(value, str) else "right",
            width=None if widths is None else widths[name],
            no_wrap=widths is None and name == first,
            overflow="fold",
        )
    for row in rows:
        table.add_row(*(Text(shown(value)) for value in row.values()))  # as strings, ":a:" and "[b]" would be markup
    return table


def rich_tables(rows: Rows, width: int) -> Iterator[Table]:
    """The same in as many tables as it takes, one under the other, for no number to be cut.

    The first column is in each of them, names in it that need more than two lines are cut in their middle. Headings are
    wrapped if that is enough to go without a second table.

    Raises:
        ImportError: as `rich_table`.
    """
    from rich.cells import cell_len

    names = masks.shortened(list(rows[0]), most=_HEADING)
    of_rows = masks.shortened([shown(next(iter(row.values()))) for row in rows], most=2 * max(width // 3, 8))
    cells = [
        dict(zip(names, [name, *list(row.values())[1:]], strict=True)) for name, row in zip(of_rows, rows, strict=True)
    ]
    whole, widths = {}, {}
    for name, value in cells[0].items():
        values = max(cell_len(shown(row[name])) for row in cells)
        longest_word = max(map(cell_len, name.split()), default=0)
        whole[name] = max(values, cell_len(name))
        widths[name] = max(min(values, width // 3) if isinstance(value, str) else values, longest_word)
    spare = width - 1 - sum(widths.values()) - _GAP * len(widths)
    for name in widths:
        more = min(max(spare, 0), whole[name] - widths[name])
        widths[name] += more
        spare -= more
    for part in side_by_side(cells, widths, _GAP, width - 1):
        yield rich_table("", part, widths)


def side_by_side(rows: Rows, widths: Mapping[str, int], gap: int, most: int) -> list[Rows]:
    """Tables of the columns that fit side by side, each with the first column of all."""
    first, *names = rows[0]
    parts: list[list[str]] = []
    left = 0
    for name in names:
        if not parts or left < widths[name] + gap:
            parts.append([first])
            left = most - widths[first] - gap
        parts[-1].append(name)
        left -= widths[name] + gap
    return [[{name: row[name] for name in part} for row in rows] for part in parts or [[first]]]


def markdown(text: str) -> str:
    """Text that Markdown shows letter by letter, in a cell of a table."""
    return re.sub(r"[\\`*\[\]<>|~&$]|(?<!\w)_|_(?!\w)|:(?=[\w+-]+:)", r"\\\g<0>", text)


def shown(value: Any) -> str:
    """A cell as text; what is not known is empty."""
    if value is None:
        return ""
    if isinstance(value, float):
        return (
            "not known"
            if math.isnan(value)
            else "0"
            if value == 0
            else f"{value:.4g}"
            if value < 1e-3
            else f"{value:.4f}"
        )
    return masks.shown(value)


def aligned(rows: Rows) -> Rows:
    """Numbers and gaps as text: so that a column's first row says what the others are, too."""
    return [{name: shown(value) for name, value in row.items()} for row in rows]
