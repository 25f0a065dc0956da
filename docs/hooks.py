"""What mkdocs asks of us: pages from outside of docs/, and links that leave docs/.

Pages are written for the place where the repository is shown: their links are paths in it. On the site, a link to a
page that is on it leads there; one to any other file leads to the repository, if ``repo_url`` says where that is, and
else to a copy of the file, which the site has under ``repository/``.
"""

from __future__ import annotations

import re
import unicodedata
from os.path import relpath
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent

BROUGHT_IN = {
    "README.md": "index.md",
    "examples/README.md": "results.md",
    "tests/benchmarks/README.md": "benchmarks.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changes.md",
}
"""Pages of the site that stand elsewhere in the repository."""

_CODE = re.compile(r"(^```.*?^```|`[^`\n]*`)", flags=re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)#\s]+)")


def anchor(title: str, separator: str) -> str:
    """A heading's anchor as GitHub makes it, so that one link serves both."""
    kept = re.sub(r"[^\w\- ]", "", unicodedata.normalize("NFC", re.sub(r"<[^>]+>", "", title)).strip().lower())
    return kept.replace(" ", separator)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Anchors are made by `anchor`."""
    config.mdx_configs["toc"]["slugify"] = anchor
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Bring in pages from outside, and what pages link to."""
    for path, place in BROUGHT_IN.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / path)))
    for file in files.documentation_pages():
        source = Path(str(file.abs_src_path))
        for target in linked(source, source.read_text(encoding="utf-8")):
            place = f"repository/{target.relative_to(ROOT).as_posix()}"
            if target not in _places(files) and (_is_shown(target) or not config.repo_url):
                files.append(File.generated(config, place, abs_src_path=str(target)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn paths in the repository into links on the site."""
    return rewritten(markdown, Path(str(page.file.abs_src_path)), page.file.src_uri, _places(files), config.repo_url)


def linked(source: Path, text: str) -> set[Path]:
    """Files of the repository that a page's text links to."""
    prose = "".join(_CODE.split(text)[::2])
    return {target for link in _LINK.findall(prose) if (target := (source.parent / link).resolve()).is_file()}


def rewritten(text: str, source: Path, place: str, places: dict[Path, str], repository: str | None) -> str:
    """A page's text with links for its place on the site.

    Args:
        text: Markdown; its code is left alone.
        source: where the page stands in the repository.
        place: where it stands on the site.
        places: of all files on the site, by where they stand in the repository.
        repository: address of the repository; None: not known.
    """

    def there(link: re.Match[str]) -> str:
        target = (source.parent / link[1]).resolve()
        if target in places:
            return PurePosixPath(relpath(places[target], Path(place).parent)).as_posix()
        if repository and target.exists():
            return f"{repository.rstrip('/')}/blob/main/{target.relative_to(ROOT).as_posix()}"
        return link[1]

    parts = _CODE.split(text)
    parts[::2] = [_LINK.sub(there, part) for part in parts[::2]]
    return "".join(parts)


def _places(files: Files) -> dict[Path, str]:
    return {Path(file.abs_src_path).resolve(): file.src_uri for file in files if file.abs_src_path}


def _is_shown(path: Path) -> bool:
    return path.suffix in {".png", ".svg"}
