"""The site: built from nothing but what is here, without a warning; no link of it is broken, no name is missing.

Needs the extra ``docs``.
"""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from documents import PAGES
from launched import ROOT

import lightning_rnf
from lightning_rnf import metrics, pytorch_lightning, streams

pytest.importorskip("mkdocs")


class Parsed(HTMLParser):
    """A page's anchors, and what it links to or loads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.anchors |= {given[name] for name in ("id", "name") if given.get(name)}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        elif tag == "link" and given.get("rel") != "canonical":
            self.loaded.append(given["href"])
        elif given.get("src"):
            self.loaded.append(given["src"])


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # it advertises its successor
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, Parsed]:
    """All of our own: a report is a page of an example's."""
    return {path: Parsed(path) for path in site.rglob("*.html") if "repository" not in path.parts}


def test_every_page_is_there(site, pages):
    for page in PAGES:
        assert site / page.relative_to(ROOT / "docs").with_suffix(".html") in pages, page
    assert len(pages) > len(PAGES)


def test_links_lead_somewhere(pages):
    checked = 0
    for path, page in pages.items():
        if path.name == "404.html":  # its links are from the root of a server
            continue
        for link in (*page.links, *page.loaded):
            parts = urlsplit(link)
            if parts.scheme in {"http", "https", "data"}:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            assert target.exists(), (path, link)
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].anchors | {"__skip"}, (path, link)
            checked += 1
    assert checked > 1000


@pytest.mark.parametrize(
    ("repository", "expected"),
    [
        (None, "[a](guide/later.md#x) [b](ddp.py) `[c](limits.md)` [d](https://x.org/y.md)"),
        (
            "https://x.org/r/",
            "[a](guide/later.md#x) [b](https://x.org/r/blob/main/examples/ddp.py) `[c](limits.md)` [d]"
            "(https://x.org/y.md)",
        ),
    ],
)
def test_links_out_of_the_pages_lead_to_the_repository_where_it_is_known(repository, expected):
    rewritten = runpy.run_path(str(ROOT / "docs/hooks.py"))["rewritten"]
    text = "[a](../docs/guide/later.md#x) [b](ddp.py) `[c](limits.md)` [d](https://x.org/y.md)"
    places = {ROOT / "docs/guide/later.md": "guide/later.md"}
    found = rewritten(text, ROOT / "examples/README.md", "results.md", places, repository)
    assert found == expected


def test_nothing_is_loaded_from_elsewhere(site, pages):
    for path, page in pages.items():
        assert not [one for one in page.loaded if one.startswith(("http", "//"))], path
    for style in site.rglob("*.css"):
        assert not re.findall(r"(?:url\(|@import )['\"]?(?:https?:)?//", style.read_text(encoding="utf-8")), style


def test_every_public_name_is_in_the_reference(pages):
    anchors = set().union(*(page.anchors for page in pages.values()))
    public = {f"lightning_rnf.{name}" for name in lightning_rnf.__all__}
    public |= {f"lightning_rnf.pytorch_lightning.{name}" for name in pytorch_lightning.__all__}
    public -= {f"lightning_rnf.pytorch_lightning.{name}" for name in ("permute_pixels", "split_by_class")}  # of streams
    for module in (streams, metrics):  # of heads there is MultiHead, which is above
        own = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
        public |= {f"{module.__name__}.{name}" for name in own if not name.startswith("_")}
    lacking = {name for name in public if name not in anchors}
    assert not lacking


def test_lists_and_tables_are_lists_and_tables(pages):
    """Python-Markdown wants an empty line before them where GitHub wants none."""
    for path, page in pages.items():
        if "reference" not in path.parts and path.name != "404.html":
            text = re.sub(r"<(pre|code|script|style).*?</\1>", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
            assert not re.findall(r"<p>[^<]*\n(?:- |\d+\. |\| )", text), (path, page)
