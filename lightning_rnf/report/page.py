"""A report as one HTML file that needs nothing else: tables, figures, every unit, every search; light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_rnf.memory import FreezeState, masks
from lightning_rnf.report import figures
from lightning_rnf.report.figures import StreamResult
from lightning_rnf.report.tables import Rows, shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def page(
    state: FreezeState,
    matrix: Tensor | None,
    sections: Mapping[str, Rows],
    numbers: Mapping[str, float],
    is_sound: bool | None,
    said: Sequence[str],
) -> str:
    """The file's text. No script is in it, and nothing that is fetched from elsewhere.

    Args:
        state: the finished tasks, whose capacity, units and searches are drawn.
        matrix: accuracy ``(tasks, tasks)``, which is drawn, too; None: nothing was tested.
        sections: the tables by title.
        numbers: all in [-1, 1], by name.
        is_sound: whether nothing has changed; None: not all of it is known.
        said: sentences below the numbers.

    Raises:
        ImportError: if matplotlib is not installed (extra ``plots``).
    """
    whose = "1 finished task keeps" if len(state.tasks) == 1 else f"{len(state.tasks)} finished tasks keep"
    parts = [f"<h1>What {whose}</h1>", _numbers(numbers, is_sound, said)]
    if state.tasks:
        first, *others = (_table(title, rows) for title, rows in sections.items())
        parts += [first, *_figures(state, matrix), *others]
    return _FRAME.format(style=_STYLE, body="\n".join(parts))


def _numbers(numbers: Mapping[str, float], is_sound: bool | None, said: Sequence[str]) -> str:
    verdict = {True: "bit-equal", False: "changed", None: "not all known"}[is_sound]
    cards = {"frozen rows and logits": verdict, **{name: f"{value:.4f}" for name, value in numbers.items()}}
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in cards.items())
    return f"<dl>{items}</dl>{''.join(f'<p>{escape(line)}.</p>' for line in said)}"


def _figures(state: FreezeState, matrix: Tensor | None) -> list[str]:
    drawn: list[tuple[str, Any]] = []
    if matrix is not None:
        free = masks.free_capacity_over_tasks(state)
        result = StreamResult("relevance freezing", list(state.tasks), matrix, free)
        drawn.append(("Accuracy and free capacity over the stream", figures.retention([result])))
    drawn.append(("Share of each layer by the task that froze it first", figures.capacity(state)))
    drawn.append(("Every unit, by the task that froze it first", figures.unit_map(state)))
    if len(state.tasks) > 1:
        drawn.append(("Units that are relevant to two tasks", figures.overlap(state)))
    searched = [record for record in state.tasks.values() if record.evaluations]
    searches = [_figure(f"Search of {record.name}", figures.search(record)) for record in searched]
    return [*(_figure(*one) for one in drawn), f'<div class="grid">{"".join(searches)}</div>']


def _figure(name: str, figure: Figure) -> str:
    name = escape(masks.printable(name))
    drawn = f'<div class="wide">{_svg(figure)}</div>'
    return f'<figure role="img" aria-label="{name}">{drawn}<figcaption>{name}</figcaption></figure>'


def _svg(figure: Figure) -> str:
    """The figure as part of the page: what is black takes the page's own colour, text stays text."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "lightning_rnf"}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    drawn = text.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn, flags=re.DOTALL)
    drawn = re.sub(r' id="[a-zA-Z]+\w*_\d+"', "", drawn)  # figure_1, axes_1, …: nothing refers to them
    opening, rest = drawn.split(">", 1)
    opening = re.sub(r' (width|height)="[^"]*"', "", opening)
    width = 96 * figure.get_figwidth()
    # Narrower, its letters of 8 points would have less than 9 pixels: on a small screen it is scrolled.
    drawn = f'{opening} style="width: min(100%, {width:.0f}px); min-width: {0.85 * width:.0f}px">{rest}'
    return re.sub(r"(fill|stroke): #(000000|262626)", r"\1: currentColor", drawn)


def _table(title: str, rows: list[dict[str, Any]]) -> str:
    head = "".join(f"<th>{escape(masks.printable(name))}</th>" for name in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td{_aligned(value)}>{escape(shown(value))}</td>" for value in row.values()) + "</tr>"
        for row in rows
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<h2>{escape(title.capitalize())}</h2><div class="wide">{table}</div>'


def _aligned(value: object) -> str:
    return ' class="text"' if isinstance(value, str) else ""


_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --line: #d0d7de; --soft: #57606a; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --paper: #0d1117; --line: #30363d; --soft: #9198a1; }
}
body { margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: var(--ink); background: var(--paper);
  font: 16px/1.5 system-ui, sans-serif; }
dl { display: flex; flex-wrap: wrap; gap: 1rem; margin: 0; }
dl div { border: 1px solid var(--line); border-radius: 6px; padding: .5rem 1rem; }
dt { color: var(--soft); font-size: .85rem; }
dd { margin: 0; font-size: 1.4rem; font-variant-numeric: tabular-nums; }
figure { margin: 1.5rem 0; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 0 1rem; }
figcaption { color: var(--soft); font-size: .85rem; }
svg { height: auto; }
svg text { fill: currentColor; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .75rem; text-align: right; }
th:first-child, td.text { text-align: left; }
td.text { min-width: 7rem; overflow-wrap: anywhere; }
"""

_FRAME = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>Retention report</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
