"""README and the pages of docs/: their code."""

from __future__ import annotations

import re
from pathlib import Path

from launched import ROOT

README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").rglob("*.md"))
START = ROOT / "docs/start.md"


def blocks(language: str, *pages: Path) -> list[str]:
    """Code blocks of pages, of all if none is named, in order."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages or (README, *PAGES))
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
