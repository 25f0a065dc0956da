"""Draws the pictures of how.md: Algorithm 1, exact recall, connections.

python docs/pictures.py
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from pathlib import Path

FOLDER = Path(__file__).parent
WIDTH = 640
INK, GREY, PALE, FIRST, SECOND = "#212121", "#9e9e9e", "#e0e0e0", "#3949ab", "#ef6c00"

SIZES = (3, 5, 4, 2)  # inputs, two hidden layers, classes
RELEVANCE = {(1, 0): 0.9, (1, 1): 0.15, (1, 2): 0.6, (1, 3): 0.1, (1, 4): 0.25}
RELEVANCE |= {(2, 0): 0.7, (2, 1): 0.05, (2, 2): 0.45, (2, 3): 0.2}
OF_FIRST = {(1, 0), (1, 2), (2, 0), (2, 2)}  # the units that the search keeps
OF_SECOND = {(1, 3), (2, 3)}

KEPT, LEFT_OUT = f'fill="{FIRST}" stroke="{INK}"', f'fill="white" stroke="{GREY}" stroke-dasharray="3 3"'

Unit = tuple[int, int]


def text(x: float, y: float, words: str, size: int = 16, anchor: str = "start", **style: str) -> str:
    """Words at a place."""
    more = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in style.items())
    fill = "" if "fill" in style else f' fill="{INK}"'
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}"{fill}{more}>{words}</text>'


def lines(x: float, y: float, *words: str, size: int = 16) -> list[str]:
    """Lines of words, one below the other."""
    return [text(x, y + number * (size + 5), line, size) for number, line in enumerate(words)]


def line(start: tuple[float, float], end: tuple[float, float], color: str, width: float = 1.5, more: str = "") -> str:
    """A line between two places."""
    (a, b), (c, d) = start, end
    return f'<line x1="{a:g}" y1="{b:g}" x2="{c:g}" y2="{d:g}" stroke="{color}" stroke-width="{width}"{more}/>'


def place(unit: Unit, x: float, y: float, step: float, rise: float) -> tuple[float, float]:
    """Of a unit's centre; layers are columns, each centred."""
    layer, number = unit
    return x + layer * step, y + (number - (SIZES[layer] - 1) / 2) * rise


def network(
    x: float,
    y: float,
    colors: dict[Unit, str],
    *,
    step: float = 66,
    rise: float = 36,
    silent: Iterable[Unit] = (),
    sizes: dict[Unit, float] | None = None,
    plain: str = PALE,
) -> list[str]:
    """A network; a connection has the colour of the task that has learned it, those of silent units are dashed."""
    silent, drawn = set(silent), []
    units = [(layer, number) for layer, size in enumerate(SIZES) for number in range(size)]
    edges = [(a, b) for a, b in product(units, units) if b[0] == a[0] + 1]
    for strong in (False, True):
        for a, b in edges:
            ends = {colors.get(one, "") for one in (a, b) if one[0] in (1, 2)}
            color = "" if "" in ends else SECOND if SECOND in ends else FIRST
            color = SECOND if color and b[0] == 3 and SECOND in colors.values() else color  # a head of its own
            if bool(color) == strong:
                dashed = ' stroke-dasharray="3 4"' if {a, b} & silent else ""
                args = (place(a, x, y, step, rise), place(b, x, y, step, rise))
                drawn.append(line(*args, color or plain, 2 if color else 1, dashed))
    for unit in units:
        (cx, cy), is_hidden = place(unit, x, y, step, rise), unit[0] in (1, 2)
        radius = (sizes or {}).get(unit, 12 if is_hidden else 8)
        color = "white" if unit in silent else colors.get(unit, "white" if is_hidden else GREY)
        color = "#7986cb" if unit in (sizes or {}) else color
        dashed = ' stroke-dasharray="3 3"' if unit in silent else ""
        drawn.append(
            f'<circle cx="{cx:g}" cy="{cy:g}" r="{radius:g}" fill="{color}" stroke="{GREY if unit in silent else INK}" '
            f'stroke-width="1.5"{dashed}/>'
        )
        if unit in silent:
            drawn.append(text(cx, cy + 5, "0", 14, "middle", fill=GREY))
    return drawn


def algorithm() -> tuple[int, list[str]]:
    """Algorithm 1: train, attribute, search, freeze."""
    drawn = [text(20, 34, "1  Train on the task", 18, font_weight="bold")]
    drawn += network(50, 140, {}, plain=GREY)
    drawn += lines(20, 262, "All free units learn, as ever.")

    drawn += [text(340, 34, "2  Score every unit", 18, font_weight="bold")]
    sizes = {unit: 4 + 13 * share for unit, share in RELEVANCE.items()}
    drawn += network(370, 140, {}, sizes=sizes)
    drawn += [line((575, 234), (365, 234), FIRST, 2.5, ' marker-end="url(#head)"')]
    drawn += lines(340, 262, "Relevance flows from the true", "class back, on held-out data.")

    drawn += [text(20, 340, "3  Search", 18, font_weight="bold")]
    ranked = sorted(RELEVANCE.items(), key=lambda item: item[1])
    cutoff = sum(unit not in OF_FIRST for unit, _ in ranked)
    for number, (unit, share) in enumerate(ranked):
        x, height = 30 + number * 27, 10 + 95 * share
        kept = unit in OF_FIRST
        drawn.append(
            f'<rect x="{x}" y="{486 - height:g}" width="19" height="{height:g}" stroke-width="1.5" '
            f"{KEPT if kept else LEFT_OUT}/>"
        )
    cut = 30 + cutoff * 27 - 4
    drawn += [line((cut, 361), (cut, 498), SECOND, 2.5), text(cut + 6, 374, "cutoff", 15, fill=SECOND)]
    words = ("Silence the least relevant, as", "many as accuracy allows: it may", "fall by the tolerance, 2 %.")
    drawn += lines(20, 524, *words)

    drawn += [text(340, 340, "4  Freeze", 18, font_weight="bold")]
    drawn += network(370, 446, dict.fromkeys(OF_FIRST, FIRST))
    drawn += lines(340, 562, "What remains never moves again.", "The others are free: next task.")
    return 604, drawn


def recall() -> tuple[int, list[str]]:
    """What one network is at three moments."""
    first = dict.fromkeys(OF_FIRST, FIRST)
    both = first | dict.fromkeys(OF_SECOND, SECOND)
    size = {"step": 46, "rise": 32}
    drawn = []
    moments = (
        (("Task 1 has ended", "and is recalled"), first, set(RELEVANCE) - OF_FIRST),
        (("Task 2 has trained", "free units have moved"), both, set()),
        (("Task 1 is recalled", "after task 2"), first, set(RELEVANCE) - OF_FIRST),
    )
    for number, ((title, what), colors, silent) in enumerate(moments):
        x = 20 + number * 210
        drawn += [text(x, 34, title, 18, font_weight="bold"), *lines(x, 57, what)]
        drawn += network(x + 10, 160, colors, silent=silent, **size)
        if silent:
            drawn.append(text(x + 10, 270, "logits: the same bits", fill=FIRST))
        else:
            drawn.append(text(x + 10, 270, "task 2's logits", fill=SECOND))
    legend = (
        (FIRST, "frozen for task 1"),
        (SECOND, "learned by task 2, which hears task 1's units, too"),
        ("white", "silent: says 0, whatever its weights have become"),
    )
    for number, (color, words) in enumerate(legend):
        y = 308 + number * 26
        dashed = ' stroke-dasharray="3 3"' if color == "white" else ""
        drawn.append(f'<circle cx="30" cy="{y - 5}" r="8" fill="{color}" stroke="{INK}"{dashed}/>')
        drawn.append(text(48, y, words))
    return 380, drawn


def grid(x: float, y: float, frozen: dict[tuple[int, int], str], size: int = 8, cell: int = 24) -> list[str]:
    """A weight: a row for each unit, a column for each input."""
    return [
        f'<rect x="{x + i * cell:g}" y="{y + j * cell:g}" width="{cell - 2}" height="{cell - 2}" rx="2" '
        f'fill="{frozen.get((j, i), "white")}" stroke="{GREY}"/>'
        for j, i in product(range(size), range(size))
    ]


def connections() -> tuple[int, list[str]]:
    """One layer's weight after one task and after two, frozen by rows and by connections."""
    size = 8
    needs = ((range(3), range(4), FIRST), (range(5), range(6), SECOND))  # units and inputs of each task
    drawn = []
    for column, (title, by_rows) in enumerate((("Frozen by rows", True), ("Frozen by connections", False))):
        x = 90 + column * 300
        drawn.append(text(x, 34, title, 18, font_weight="bold"))
        for after in (1, 2):
            frozen: dict[tuple[int, int], str] = {}
            for units, inputs, color in needs[:after]:
                for entry in product(units, range(size) if by_rows else inputs):
                    frozen.setdefault(entry, color)
            y = 80 + (after - 1) * 270
            drawn += grid(x, y, frozen)
            drawn.append(text(x, y + 215, f"{size**2 - len(frozen)} of {size**2} weights may still move", 15))
            if not column:
                drawn.append(text(x - 12, y + 45, "units", 15, "end"))
            drawn.append(text(x, y - 10, f"after task {after}: inputs →", 15))
    return 590, drawn


def page(height: int, drawn: list[str], title: str) -> str:
    """The file: a white card, so that it can be seen on a dark page, too."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
            'font-family="system-ui, -apple-system, Segoe UI, Roboto, Helvetica, Arial, sans-serif">',
            f"<title>{title}</title>",
            '<defs><marker id="head" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="6" markerHeight="6" '
            'orient="auto">'
            f'<path d="M0 0 10 5 0 10z" fill="{FIRST}"/></marker></defs>',
            f'<rect x="1" y="1" width="{WIDTH - 2}" height="{height - 2}" rx="10" fill="white" stroke="{PALE}"/>',
            *drawn,
            "</svg>\n",
        ]
    )


PICTURES = {
    "algorithm.svg": (algorithm, "Algorithm 1: train, score every unit, search, freeze"),
    "recall.svg": (recall, "Recall: the units of a task speak, the others say 0"),
    "connections.svg": (connections, "A weight, frozen by rows and by connections"),
}

if __name__ == "__main__":
    for name, (draw, title) in PICTURES.items():
        (FOLDER / name).write_text(page(*draw(), title), encoding="utf-8")
