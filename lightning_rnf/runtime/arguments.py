"""Checks of constructor arguments: each says in one sentence what was found and what was expected."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any


def one_of(name: str, value: Any, choices: Any) -> Any:
    """Return ``value`` if it is one of a ``Literal``'s.

    Raises:
        ValueError: if it is not.
    """
    if value not in choices.__args__:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, choices.__args__))}")
    return value


def at_least(name: str, value: Any, least: int, *, or_none: bool = False) -> Any:
    """Return ``value`` if it is a whole number of at least ``least``, or None where that may be.

    Raises:
        ValueError: if it is not.
    """
    if or_none and value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is {value!r}, expected a whole number of at least {least}")
    return value


def shares(name: str, value: Any) -> tuple[float, ...] | None:
    """Return None if ``value`` is that, else the number in (0, 1] or the list of them, as a tuple.

    Raises:
        ValueError: if it is not.
    """
    if value is None:
        return None
    several = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if not several or not all(_is_share(one) for one in several):
        raise ValueError(f"{name} is {value!r}, expected a share above 0 and up to 1, or a list of them")
    return tuple(float(one) for one in several)


def globs(name: str, value: Any) -> Any:
    """Return ``value`` if it is None, a glob of module names, or several, then as a tuple.

    Raises:
        TypeError: if it is not.
    """
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, Sequence) or not all(isinstance(glob, str) for glob in value):
        raise TypeError(f"{name} is {value!r}, expected a glob of module names, or several")
    return tuple(value)


def of_type(name: str, value: Any, kind: Any, expected: str) -> Any:
    """Return ``value`` if it is None or of this kind.

    Raises:
        TypeError: if it is not, saying what is ``expected``.
    """
    if value is not None and not isinstance(value, kind):
        raise TypeError(f"{name} is {value!r}, expected {expected}")
    return value


def _is_share(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 < float(value) <= 1
