"""Links of README and of the pages lead somewhere, every option is in its table, and tests that are named exist."""

from __future__ import annotations

import re

import pytest
from documents import PAGES
from launched import ROOT

from lightning_rnf import RelevanceFreezing

DOCUMENTS = [
    *ROOT.glob("*.md"),
    *PAGES,
    ROOT / "examples/README.md",
    ROOT / "tests/benchmarks/README.md",
]


def test_every_parameter_of_the_callback_is_in_the_table():
    from inspect import signature

    text = (ROOT / "docs/options.md").read_text(encoding="utf-8")
    table = text[text.index("| parameter |") :]
    for name in signature(RelevanceFreezing).parameters:
        assert f"`{name}`" in table.split("\n\n")[0], name


def anchors(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    text = document.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("page", ["README.md", "docs/trainer.md"])
def test_tests_that_are_named_are_there(page):
    named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", (ROOT / page).read_text(encoding="utf-8"))
    assert len(named) > 5
    for path, name in named:
        assert f"def {name}(" in (ROOT / "tests" / path).read_text(encoding="utf-8"), (path, name)
