"""Packages that only an extra brings, and what to say where one is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_BROUGHT_BY = {
    "matplotlib": "'lightning-rnf[plots]'",
    "rich": "'lightning-rnf[demo]'",
    "sklearn": "'lightning-rnf[demo]'",
    "jsonargparse": "'lightning-rnf[cli]'",
    "huggingface_hub": "'lightning-rnf[hub]'",
    "pandas": "pandas",
    "lightning": "lightning",  # for its command line, beside `pytorch_lightning`
}


def sentence(error: BaseException) -> str | None:
    """How to install what could not be imported; None: it is none of these packages.

    >>> sentence(ModuleNotFoundError("", name="matplotlib.figure"))
    "matplotlib is missing: pip install 'lightning-rnf[plots]'"
    """
    package = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    return f"{package} is missing: pip install {_BROUGHT_BY[package]}" if package in _BROUGHT_BY else None


@contextmanager
def needed() -> Iterator[None]:
    """Inside the context a missing package is an error that says how to install it.

    Raises:
        ModuleNotFoundError: in the place of the one without a way out.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        said = sentence(error)
        if said is None:
            raise
        raise ModuleNotFoundError(said, name=error.name) from error
