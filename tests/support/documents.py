"""README and the pages behind it, as one text: their code goes on from page to page."""

from __future__ import annotations

import re

from launched import ROOT

PAGES = ("README.md", "docs/options.md", "docs/guide.md", "docs/networks.md", "docs/processes.md")
TEXT = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)


def blocks(language: str) -> list[str]:
    """Code blocks of these pages, in order."""
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)
