"""An experiment's settings: read from YAML, changed from the command line, and checked before anything runs.

A file may stand on another (``base``), and ``fast`` changes it for a quick look. Either is a JSON merge patch (RFC
7386): mappings are merged, null removes a key, everything else replaces what was there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt, ValidationError

from lightning_rnf import RelevanceFreezing


class MethodSettings(BaseModel, strict=True, extra="forbid"):
    """What a method changes; neither ``freezing`` nor ``paper``: naive fine-tuning.

    Attributes:
        freezing: arguments of `RelevanceFreezing`.
        paper: arguments of `RelevanceFreezing.paper`.
        network: what it changes in the network.
        training: and in the training.
        separate: a network for each task, from the same initial weights: nothing is frozen, and nothing shared.
    """

    freezing: dict[str, Any] | None = None
    paper: dict[str, Any] | None = None
    network: dict[str, Any] | None = None
    training: dict[str, Any] | None = None
    separate: bool = False


class Settings(BaseModel, strict=True, extra="forbid"):
    """What a file of settings may hold.

    Attributes:
        title: as in tables and figures.
        stand_in: what stands in for what; null: the data are the paper's.
        reduced: what is smaller than in the paper; null: nothing.
        tuning: which seeds settings were chosen with, and on what data.
        goal: the average accuracy, in %, that `tuned` is to reach; null: none is set.
        published: the best published figures, and whose they are.
        seeds: how many; null: 1.
        first_seed: the first of them; null: 0.
        precision: of the Trainer; null: 32-true.
        tasks: only the first so many; null: all.
        samples: only so many training and test samples; null: all.
        stream: what the stream of tasks needs.
        network: what the network needs.
        training: epochs, batch_size, and what else the network's training needs.
        methods: by name.
    """

    title: str
    stand_in: str | None = None
    reduced: str | None = None
    tuning: str | None = None
    goal: float | None = None
    published: str | None = None
    seeds: PositiveInt | None = None
    first_seed: NonNegativeInt | None = None
    precision: str | None = None
    tasks: PositiveInt | None = None
    samples: PositiveInt | None = None
    stream: dict[str, Any] | None = None
    network: dict[str, Any] | None = None
    training: dict[str, Any]
    methods: dict[str, MethodSettings | None] = Field(min_length=1)


def read(path: Path, *, fast: bool = False, changes: Sequence[str] = ()) -> dict[str, Any]:
    """The settings in a file, as one mapping.

    Args:
        path: the YAML file.
        fast: with the changes that its key ``fast`` names.
        changes: more of them, each ``key.key=value`` with a value in YAML.

    Raises:
        ValueError: if it is no YAML, a key is not known, or a value is not of its kind.
    """
    settings = _with_base(path)
    fast_changes = settings.pop("fast", None) or {}
    if not isinstance(fast_changes, dict):
        raise ValueError(f"{path.name}: fast is {fast_changes!r}, expected a mapping")
    _only(Settings.model_fields, fast_changes, f"{path.name}: fast")
    if fast and not fast_changes:
        raise ValueError(f"{path.name} does not say what --fast changes: it has no 'fast'")
    if fast:
        settings = merge(settings, fast_changes)
    for change in changes:
        keys, separator, value = change.partition("=")
        if not separator:
            raise ValueError(f"{change!r} is no change of a setting: write key.key=value, as in training.epochs=2")
        if keys.split(".")[0] == "fast":
            raise ValueError(f"{change!r}: changes are made after those of fast: name what it changes itself")
        patch = _yaml(value, change)
        place, *inside = keys.split(".")
        methods = settings.get("methods")
        if place == "methods" and len(inside) > 1 and isinstance(methods, Mapping) and inside[0] not in methods:
            raise ValueError(
                f"{change!r}: {path.name} has the methods {', '.join(map(str, methods))}; a new one is set as a whole: "
                f"methods.{inside[0]}={{...}}"
            )
        for key in reversed(keys.split(".")):
            patch = {key: patch}
        settings = merge(settings, patch)
    try:
        Settings.model_validate(settings)
    except ValidationError as error:
        raise ValueError(f"{path.name}{_said(error)}") from error
    for key in ("stream", "network", "training", "methods"):
        _refuse_numbers_as_text(settings.get(key), f"{path.name}: {key}")
    return settings


def merge(settings: Any, patch: Any) -> Any:
    """The settings with a JSON merge patch put on them; neither is changed.

    >>> merge({"a": {"b": 1, "c": 2}}, {"a": {"b": None, "d": 3}})
    {'a': {'c': 2, 'd': 3}}
    """
    if not isinstance(patch, Mapping):
        return patch
    merged = dict(settings) if isinstance(settings, Mapping) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = merge(merged.get(key), value)
    return merged


def of_method(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What a run of one method is made with: the settings with the method's own changes in them."""
    method = settings["methods"][name] or {}
    common = {key: settings.get(key) for key in ("tasks", "samples")}
    parts = {key: settings.get(key) or {} for key in ("stream", "network", "training")}
    own = {key: merge(parts[key], method.get(key) or {}) for key in ("network", "training")}
    callback = {key: method[key] or {} for key in ("freezing", "paper") if key in method}
    return {**common, **parts, **own, **callback, **({"separate": True} if method.get("separate") else {})}


def freezing(made_with: Mapping[str, Any], **more: Any) -> RelevanceFreezing | None:
    """The callback of a method; None: naive fine-tuning.

    Args:
        made_with: as `of_method` gives it.
        more: further arguments of the callback, which YAML can't hold.

    Raises:
        TypeError, ValueError: if the callback refuses an argument.
    """
    if "paper" in made_with and "freezing" in made_with:
        raise ValueError("a method has freezing or paper, not both")
    if made_with.get("separate") and {"paper", "freezing"} & made_with.keys():
        raise ValueError("separate: networks of their own have nothing to freeze: leave freezing and paper out")
    if "paper" in made_with:
        return RelevanceFreezing.paper(**more, **made_with["paper"])
    return RelevanceFreezing(**more, **made_with["freezing"]) if "freezing" in made_with else None


def check_arguments(function: Callable[..., Any], given: Mapping[str, Any], where: str) -> None:
    """Check that a function takes these keyword arguments, and has all that it needs.

    Only what it takes by keyword is looked at: what stands before is the caller's.

    Raises:
        ValueError: if not, naming what it takes.
    """
    keyword = {
        name: parameter
        for name, parameter in signature(function).parameters.items()
        if parameter.kind is Parameter.KEYWORD_ONLY
    }
    _only(keyword, given, where)
    missing = [name for name, one in keyword.items() if one.default is Parameter.empty and name not in given]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}")


def _with_base(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    if path.resolve() in above:
        raise ValueError(f"{path.name} stands on itself: {' on '.join(one.name for one in (*above, path))}")
    settings = _yaml(path.read_text(encoding="utf-8"), path.name)
    if not isinstance(settings, dict):
        raise ValueError(f"{path.name} holds {type(settings).__name__}, expected a mapping of settings")
    base = settings.pop("base", None)
    if base is None:
        return settings
    if not isinstance(base, str):
        raise ValueError(f"{path.name}: base is {base!r}, expected the name of a file")
    merged: dict[str, Any] = merge(_with_base(path.parent / base, (*above, path.resolve())), settings)
    return merged


def _yaml(text: str, where: str) -> Any:
    try:
        found = yaml.safe_load(text)
        json.dumps(found)  # as results keep it
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise ValueError(f"{where} is no YAML that JSON can hold: {error}") from error
    return found


def _said(error: ValidationError) -> str:
    """What is wrong first, to stand behind a file's name: ``: seeds is 'x': …``, `` has titel; known are: …``."""
    first = error.errors()[0]
    *above, last = map(str, first["loc"])
    if first["type"] == "extra_forbidden":
        known = MethodSettings if above else Settings
        return f"{': ' * bool(above)}{'.'.join(above)} has {last}; known are: {', '.join(known.model_fields)}"
    where = ".".join([*above, last])
    if first["type"] == "missing":
        return f": there is no {where!r}"
    return f": {where} is {first['input']!r}: {first['msg']}"


def _only(known: Iterable[str], given: Mapping[str, Any], where: str) -> None:
    unknown = [str(key) for key in given if key not in known]
    if unknown:
        raise ValueError(f"{where} has {', '.join(unknown)}; known are: {', '.join(known) or 'none'}")


def _refuse_numbers_as_text(value: Any, where: str) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            _refuse_numbers_as_text(item, f"{where}.{key}")
    elif isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            return
        raise ValueError(f"{where} is the text {value!r}: YAML takes {number!r} for a number, with a dot before the e")
