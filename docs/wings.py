"""Draws the wings of the package into architecture.md, from the contract in pyproject.toml and the wings' own words.

python docs/wings.py  # of Python 3.11 or later: it has tomllib
"""

from __future__ import annotations

import ast
from pathlib import Path

import tomllib

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "architecture.md"
START, END = "<!-- drawn by docs/wings.py -->\n", "<!-- end -->\n"


def floors() -> list[list[str]]:
    """The layers of the contract, the uppermost first."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (house,) = [contract for contract in contracts if contract["id"] == "house"]
    return [[name.strip() for name in layer.split("|")] for layer in house["layers"]]


def said(name: str) -> str:
    """The first line of what a wing says of itself."""
    package = ROOT / "lightning_rnf" / name
    path = package / "__init__.py" if package.is_dir() else package.with_suffix(".py")
    return (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()[0]


def picture() -> str:
    """One line for each wing, floors divided."""
    lines = []
    drawn = floors()
    width = max(len(name) for names in drawn for name in names)
    for floor, names in zip(range(len(drawn), 0, -1), drawn, strict=True):
        for name in names:
            lines.append(f"{floor if name == names[0] else '':>2} │ {name:<{width}} │ {said(name)}")
        lines.append(f"───┼─{'─' * width}─┼" + "─" * 100)
    return "```text\n" + "\n".join(lines[:-1]) + "\n```\n"


def filled(page: str) -> str:
    """The page with the picture as it is now."""
    before, _, rest = page.partition(START)
    return before + START + picture() + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
