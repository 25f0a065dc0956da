"""Finished tasks as a file to hand on: safetensors for what is tensors, JSON for the rest, a checksum over both.

A file of a stranger's can be read or refused, and nothing in it can run. What is allocated goes by how long the file
is, not by what it says: a bit of a mask becomes a byte, and its text is parsed if it is no longer than `LONGEST_TEXT`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_rnf.memory.state import FreezeState

SUFFIX = ".safetensors"

LONGEST_TEXT = 2**25
"""Characters of JSON: ten tasks of a VGG-16 have 60,000."""

_STATE, _CHECKSUM = "lightning_rnf", "sha256"  # keys of the file's metadata
_MASKS, _RELEVANCE, _STATISTICS = "masks", "relevance", "statistics"
_TOKENS, _OLD_ROWS, _OLD_VALUES = "tokens", "old_rows", "old_values"
_PORTRAIT = "portrait"


def save(state: FreezeState, path: str | os.PathLike[str], *, relevance: bool = False) -> None:
    """Write the finished tasks: which units each needs, what it cost, and the norm statistics that recall brings back.

    A mask takes a bit a unit. Weights are not in it, nor the initial values that ``reset_free`` goes back to: to go on
    training, keep the checkpoint.

    Args:
        state: with at least one finished task.
        path: of the file, which is replaced as a whole or not at all.
        relevance: of every unit, too: four bytes for each unit and task.

    Raises:
        ValueError: if no task has ended, or there is more to say of the tasks than `LONGEST_TEXT`.
    """
    if not state.tasks:
        raise ValueError("no task has ended yet: there are no masks to save")
    plain = state.to_plain() | {"training": None, "recovering": None, "initial": {}, "resets": 0}
    plain.pop("learned", None)
    tensors = {_MASKS: torch.stack([_packed(_flat(record["relevant"])) for record in plain["tasks"]])}
    if relevance:
        tensors[_RELEVANCE] = torch.stack([_flat(record["relevance"]) for record in plain["tasks"]])
    for index, record in enumerate(plain["tasks"]):
        del record["relevant"], record["relevance"]
        for name, value in record["norm_statistics"].items():
            tensors[f"{_STATISTICS}.{index}.{name}"] = value.detach().cpu().contiguous()
        record["norm_statistics"] = list(record["norm_statistics"])
        for name, mask in record.get("tokens", {}).items():
            tensors[f"{_TOKENS}.{index}.{name}"] = _packed(mask)
            record["tokens"][name] = len(mask)
        for name, old in record.get("old_rows", {}).items():
            tensors[f"{_OLD_ROWS}.{index}.{name}"] = old["rows"].contiguous()
            tensors[f"{_OLD_VALUES}.{index}.{name}"] = old["values"].contiguous()
        if "old_rows" in record:
            record["old_rows"] = list(record["old_rows"])
        if _PORTRAIT in record:
            of_portrait = record[_PORTRAIT]["tensors"]
            tensors |= {f"{_PORTRAIT}.{index}.{name}": value.contiguous() for name, value in of_portrait.items()}
            record[_PORTRAIT]["tensors"] = list(of_portrait)
    text = json.dumps(plain, separators=(",", ":"))
    _check_length(text)
    unfinished = f"{os.fspath(path)}.part"
    save_file(tensors, unfinished, {_STATE: text, _CHECKSUM: checksum(text, tensors)})
    os.replace(unfinished, path)


def load(path: str | os.PathLike[str]) -> FreezeState:
    """The finished tasks in a file of `save`; relevance is 0 if it was left out.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no such file, of a newer version, cut off, changed, or doesn't hold what it lists.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no file of masks at {os.fspath(path)!r}")
    try:
        return _read(path)
    except (SafetensorError, ValueError, RecursionError, OverflowError) as error:
        # The file's own words, maybe: no terminal is to take orders from them.
        said = "".join(one if one.isprintable() else repr(one)[1:-1] for one in " ".join(str(error).split()))
        raise ValueError(f"{os.fspath(path)!r} holds no masks that can be read: {said:.300}") from error


def _read(path: str | os.PathLike[str]) -> FreezeState:
    with safe_open(path, "pt") as file:  # checks that what the header lists is what the file is long enough for
        metadata: Mapping[str, str] = file.metadata() or {}
        text = metadata.get(_STATE)
        if text is None:
            raise ValueError(f"its metadata has no {_STATE!r}: it was not written by lightning_rnf")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it can't be iterated
    if metadata.get(_CHECKSUM) != checksum(text, tensors):
        raise ValueError("its content has another checksum than it says: it is damaged")
    _check_length(text)
    plain = json.loads(text)
    layers, records = _listed(plain, "layers"), _listed(plain, "tasks")
    sizes: dict[str, int] = {}
    for layer in layers:
        name, size = layer.get("name"), layer.get("units")
        if not isinstance(name, str) or name in sizes or type(size) is not int or size < 1:
            raise ValueError(f"a layer has no name of its own, or no number of units: {name!r:.80}, {size!r:.80}")
        sizes[name] = size
    units = sum(sizes.values())
    masks = _taken(tensors, _MASKS, (len(records), -(-units // 8)), torch.uint8)
    relevance = None
    if _RELEVANCE in tensors:
        relevance = _taken(tensors, _RELEVANCE, (len(records), units), torch.float32)
    for index, record in enumerate(records):
        record["relevant"] = _by_layer(_unpacked(masks[index], units), sizes)
        record["relevance"] = (
            {name: torch.zeros(1).expand(size) for name, size in sizes.items()}  # one number, seen so many times
            if relevance is None
            else _by_layer(relevance[index], sizes)
        )
        names = record.get("norm_statistics")
        if not isinstance(names, list) or not all(f"{_STATISTICS}.{index}.{name}" in tensors for name in names):
            raise ValueError(f"it lacks norm statistics of its task {index}")
        record["norm_statistics"] = {
            name: tensors.pop(f"{_STATISTICS}.{index}.{name}") for name in dict.fromkeys(names)
        }
        _take_rows(tensors, index, record)
        if _PORTRAIT in record:
            _take_portrait(tensors, index, record[_PORTRAIT])
    strangers = sorted(set(tensors) - {_MASKS, _RELEVANCE})
    if strangers:
        raise ValueError(f"it holds what it does not list: {strangers[:3]}")
    return FreezeState.from_plain(plain)


def _take_rows(tensors: dict[str, Tensor], index: int, record: dict[str, Any]) -> None:
    """Put what a file says of a task's rows of embeddings where a state has it."""
    if "tokens" in record:
        sizes = record["tokens"]
        if not isinstance(sizes, dict) or not all(type(size) is int and size > 0 for size in sizes.values()):
            raise ValueError(f"its task {index} has embeddings of no size")
        for name, size in sizes.items():
            key = f"{_TOKENS}.{index}.{name}"
            sizes[name] = _unpacked(_taken(tensors, key, (-(-size // 8),), torch.uint8), size)
            del tensors[key]
    if "old_rows" in record:
        names = record["old_rows"]
        if not isinstance(names, list):
            raise ValueError(f"its task {index} has no list of embeddings with old rows")
        keys = [f"{kind}.{index}.{name}" for name in names for kind in (_OLD_ROWS, _OLD_VALUES)]
        if len(set(keys)) < 2 * len(names) or not set(keys) <= set(tensors):
            raise ValueError(f"it lacks old rows of embeddings of its task {index}")
        of_names = ([tensors.pop(f"{kind}.{index}.{name}") for kind in (_OLD_ROWS, _OLD_VALUES)] for name in names)
        record["old_rows"] = {
            name: {"rows": rows, "values": values} for name, (rows, values) in zip(names, of_names, strict=True)
        }


def _take_portrait(tensors: dict[str, Tensor], index: int, portrait: Any) -> None:
    """Put the tensors of a task's portrait where a state has them."""
    names = portrait.get("tensors") if isinstance(portrait, dict) else None
    if not isinstance(names, list) or not all(f"{_PORTRAIT}.{index}.{name}" in tensors for name in names):
        raise ValueError(f"it lacks what the portrait of its task {index} lists")
    portrait["tensors"] = {name: tensors.pop(f"{_PORTRAIT}.{index}.{name}") for name in dict.fromkeys(names)}


def _listed(plain: Any, key: str) -> list[dict[str, Any]]:
    found = plain.get(key) if isinstance(plain, dict) else None
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise ValueError(f"it has no list of {key}")
    return found


def _taken(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    found = tensors.get(name)
    if found is None or found.shape != shape or found.dtype != dtype:
        described = "nothing" if found is None else f"a {found.dtype} tensor of shape {tuple(found.shape)}"
        raise ValueError(f"for {name} it holds {described}, expected {dtype} of shape {shape}")
    return found


def _check_length(text: str) -> None:
    if len(text) > LONGEST_TEXT:
        raise ValueError(f"what is to be said of the tasks is longer than {LONGEST_TEXT} characters: {len(text)}")


def checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the state as text, and of each tensor by name, dtype, shape and bytes."""
    found = hashlib.sha256(text.encode())
    for name, value in sorted(tensors.items()):
        found.update(f"\n{name} {value.dtype} {tuple(value.shape)}\n".encode())
        found.update(value.contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _flat(by_layer: Mapping[str, Tensor]) -> Tensor:
    return torch.cat(list(by_layer.values()))


def _by_layer(flat: Tensor, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    return dict(zip(sizes, (part.clone() for part in flat.split(list(sizes.values()))), strict=True))


def _packed(mask: Tensor) -> Tensor:
    """Eight units a byte, the first in the highest bit; the last byte is filled up with zeros."""
    return torch.from_numpy(np.packbits(mask.numpy()))


def _unpacked(packed: Tensor, units: int) -> Tensor:
    return torch.from_numpy(np.unpackbits(packed.numpy(), count=units)).view(torch.bool)
