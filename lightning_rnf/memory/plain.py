"""Values of a stranger's plain data, each of the kind and in the range that it has to have.

All of these raise a ValueError that names the key if it is missing or holds something else.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor

COUNTS = range(2**53 + 1)  # what a float holds exactly: figures are drawn of them

T = TypeVar("T")


def readable(text: str) -> bool:
    r"""Whether a terminal, a page and a file take a text as it is: no control characters, line ends or surrogates.

    >>> readable("digits 0–1"), readable("\x1b[2J")
    (True, False)
    """
    return text.isprintable() or not any(unicodedata.category(one) in {"Cc", "Cs", "Zl", "Zp"} for one in text)


def get(plain: object, key: str, kind: type[T] | tuple[type, ...]) -> T:
    """The value under a key, of that kind and no other."""
    # A bool is an int to Python, but not to us.
    if (
        not isinstance(plain, Mapping)
        or key not in plain
        or not isinstance(plain[key], kind)
        or (kind is int and isinstance(plain[key], bool))
    ):
        expected = kind.__name__ if isinstance(kind, type) else " or ".join(k.__name__ for k in kind)
        raise ValueError(f"not a state of lightning_rnf: {key!r} should be there and be a {expected}")
    value: T = plain[key]
    return value


def get_names(plain: object, key: str) -> tuple[str, ...]:
    """A list of texts that are `readable`."""
    names: list[Any] = get(plain, key, (list, tuple))
    check_names(key, names)
    return tuple(names)


def check_names(key: str, names: list[Any]) -> None:
    """Check that all are texts, and `readable`."""
    if not all(isinstance(name, str) and readable(name) for name in names):
        raise ValueError(f"not a state of lightning_rnf: {key!r} should be names, it is {names!r:.80}")


def get_name(plain: object, key: str) -> str:
    """A text that is not empty, and `readable`."""
    name = get(plain, key, str)
    if not name or not readable(name):
        raise ValueError(f"not a state of lightning_rnf: {key!r} should be a name, it is {name!r:.80}")
    return name


def get_share(plain: object, key: str) -> float:
    """A number in [0, 1]."""
    share = get(plain, key, float)
    if not 0 <= share <= 1:  # NaN isn't, either
        raise ValueError(f"not a state of lightning_rnf: {key!r} should be a share in [0, 1], it is {share}")
    return share


def get_count(plain: object, key: str) -> int:
    """A number that counts something."""
    count = get(plain, key, int)
    if count not in COUNTS:
        raise ValueError(f"not a state of lightning_rnf: {key!r} should be a count, it is {count!s:.80}")
    return count


def get_tensors(plain: object, key: str) -> dict[str, Tensor]:
    """Tensors by name, on the CPU."""
    tensors: dict[Any, Any] = get(plain, key, dict)
    check_names(key, list(tensors))
    return {name: get(tensors, name, Tensor).cpu() for name in tensors}


def get_numbers(plain: object, key: str) -> dict[str, float]:
    """Numbers by name."""
    numbers: dict[Any, Any] = get(plain, key, dict)
    check_names(key, list(numbers))
    return {name: get(numbers, name, float) for name in numbers}


def get_texts(plain: object, key: str) -> dict[str, str]:
    """Texts by name."""
    texts: dict[Any, Any] = get(plain, key, dict)
    check_names(key, [*texts, *texts.values()])
    return texts
