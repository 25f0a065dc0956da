"""Docstrings as the reference shows them: examples and doctests of our docstrings become code blocks of Markdown."""

from __future__ import annotations

import re
from textwrap import dedent
from typing import Any

from griffe import Docstring, Extension, Object

_EXAMPLE = re.compile(r"^Example::\n\n((?:[ \t]+.*\n?|\n)+)", flags=re.MULTILINE)
_DOCTEST = re.compile(r"^>>> .*\n?(?:^.+\n?)*", flags=re.MULTILINE)


def as_markdown(text: str) -> str:
    """The docstring with fenced code."""
    text = _EXAMPLE.sub(lambda found: f"```python\n{dedent(found[1]).strip()}\n```\n\n", text)
    return _DOCTEST.sub(lambda found: f"```pycon\n{found[0].rstrip()}\n```\n", text)


class FencedExamples(Extension):
    """Does so with all docstrings of the package."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Called for each object that is found."""
        if obj.docstring is not None:
            found: Docstring = obj.docstring
            found.value = as_markdown(found.value)
