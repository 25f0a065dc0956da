"""Portraits in checkpoints and in files: the same bits come back, and what is none is refused with a sentence."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from records import Mlp, make, record_of, state_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_rnf import RelevanceFreezing
from lightning_rnf.memory import LEVELS, Gaussians, Portrait, Space, maskfiles
from lightning_rnf.memory.state import FreezeState

CLASSES = 3


def gaussians(size: int, seed: int) -> Gaussians:
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(CLASSES, size, size, generator=generator)
    rows, columns = torch.tril_indices(size, size)
    covariances = (factors @ factors.mT)[:, rows, columns]
    return Gaussians(torch.arange(5, 5 + CLASSES), torch.randn(CLASSES, size, generator=generator), covariances)


def space(relevant: dict[str, Tensor], projected: int) -> Space:
    features = sum(int(units.sum()) for units in relevant.values())
    generator = torch.Generator().manual_seed(1)
    projection = torch.randn(features, projected, generator=generator)
    return Space(tuple(relevant), torch.randn(features, generator=generator), torch.full((features,), 0.7), projection)


def two_tasks(net: nn.Module) -> FreezeState:
    """The first is read in all its relevant features, the second in two that are made of them."""
    first, second = record_of(net), record_of(net, "second")
    own, projected = space(first.relevant, 0), space(second.relevant, 2)
    first = replace(
        first, portrait=Portrait(own, {"first": gaussians(own.dimensions, 0)}, torch.linspace(-9, 4, LEVELS))
    )
    classes = {"first": gaussians(own.dimensions, 1), "second": gaussians(2, 2)}
    return state_of(net, first, replace(second, portrait=Portrait(projected, classes, torch.linspace(-9, 4, LEVELS))))


def with_state() -> tuple[Mlp, RelevanceFreezing]:
    net, rnf = make(Mlp), RelevanceFreezing()
    rnf.state = two_tasks(net)
    return net, rnf


def through_a_checkpoint(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    found: dict[str, Any] = torch.load(file, weights_only=True)
    return found


def assert_same(found: FreezeState, expected: FreezeState) -> None:
    for name, record in expected.tasks.items():
        portrait, mine = record.portrait, found.tasks[name].portrait
        assert mine.space.layers == portrait.space.layers
        assert list(mine.classes) == list(portrait.classes)
        assert list(mine.tensors()) == list(portrait.tensors())
        for key, value in portrait.tensors().items():
            assert mine.tensors()[key].dtype == value.dtype
            assert torch.equal(mine.tensors()[key], value), key
        assert mine.nbytes == portrait.nbytes == sum(value.nbytes for value in portrait.tensors().values())


@pytest.mark.parametrize("by", ["checkpoint", "file"])
def test_portraits_come_back_and_scores_are_the_same_to_the_bit(by, tmp_path):
    net, rnf = with_state()
    x = torch.randn(9, *net.shape)
    expected = rnf.infer_task(x, net)
    other = RelevanceFreezing()
    if by == "file":
        rnf.save(tmp_path / "masks.safetensors")
        other.load(tmp_path / "masks.safetensors", net)
    else:
        other.load_state_dict(through_a_checkpoint(rnf.state_dict()))
    assert_same(other.state, rnf.state)
    found = other.infer_task(x, net)
    assert found.names == expected.names
    assert torch.equal(found.scores, expected.scores)
    assert torch.equal(found.levels, expected.levels)
    assert torch.equal(found.logits, expected.logits)


def test_a_state_without_portraits_is_written_as_before_there_were_any():
    state = two_tasks(make(Mlp))
    records = [replace(record, portrait=None) for record in state.tasks.values()]
    plain = state_of(make(Mlp), *records).to_plain()
    assert not any("portrait" in record for record in plain["tasks"])
    assert all(record.portrait is None for record in FreezeState.from_plain(plain).tasks.values())


def test_covariances_are_what_was_packed():
    factors = torch.randn(CLASSES, 4, 4)
    full = factors @ factors.mT
    rows, columns = torch.tril_indices(4, 4)
    found = Gaussians(torch.ones(CLASSES).long(), torch.zeros(CLASSES, 4), full[:, rows, columns]).full()
    assert torch.allclose(found, full.double(), atol=1e-6)


# -- what is none -----------------------------------------------------------------------------------------------------


def set_at(tensor: Tensor, value: float) -> Tensor:
    changed = tensor.clone()
    changed.view(-1)[-1] = value
    return changed


def expanded(classes: int, size: int) -> dict[str, Tensor]:
    """Of a few bytes in a file, and of terabytes where they are read."""
    of_pairs = torch.zeros(1).expand(classes, size * (size + 1) // 2)
    return {"0.counts": torch.ones(classes).long(), "0.means": torch.zeros(classes, size), "0.covariances": of_pairs}


BROKEN: dict[str, Any] = {
    **{
        f"{key} {how}": {key: change}
        for key in ("center", "scale", "usual", "0.means", "0.covariances", "0.counts", "projection")
        for how, change in {
            "missing": None,
            "a list": lambda tensor: tensor.tolist(),
            "double": lambda tensor: tensor.double(),
            "longer": lambda tensor: torch.cat([tensor, tensor]),
            "flat": lambda tensor: tensor.reshape(-1) if tensor.ndim > 1 else tensor.reshape(1, -1),
        }.items()
    },
    **{
        f"{key} with {value}": {key: lambda tensor, value=value: set_at(tensor, value)}
        for key in ("center", "scale", "usual", "0.means", "0.covariances", "projection")
        for value in (torch.nan, torch.inf)
    },
    "a scale of zero": {"scale": lambda tensor: tensor * 0},
    "a negative scale": {"scale": lambda tensor: -tensor},
    "falling quantiles": {"usual": lambda tensor: tensor.flip(0)},
    "negative counts": {"0.counts": lambda tensor: -tensor},
    "a count of zero": {"0.counts": lambda tensor: tensor * 0},
    "no class": {key: lambda tensor: tensor[:0] for key in ("0.counts", "0.means", "0.covariances")},
    "no dimension": {"0.means": lambda tensor: tensor[:, :0], "0.covariances": lambda tensor: tensor[:, :0]},
    "a larger space": {
        "0.means": lambda tensor: torch.zeros(CLASSES, 9),
        "0.covariances": lambda tensor: torch.zeros(CLASSES, 45),
    },
    "a projection to more": {"projection": lambda tensor: torch.zeros(len(tensor), len(tensor) + 1)},
    "a projection of what is never drawn": {"projection": lambda tensor: set_at(tensor, 10.1)},
    **{
        f"{key} beyond the space, {value:g}": {key: lambda tensor, value=value: set_at(tensor, value)}
        for key, bound in (("0.means", 30.0), ("0.covariances", 900.0))
        for value in (3e38, -3e38, bound * 1.01)
    },
    "sparse": {"0.means": lambda tensor: tensor.to_sparse()},
    "huge": {key: lambda tensor, value=value: value for key, value in expanded(1, 2_000_000).items()},
    "huge in counts": {key: lambda tensor, value=value: value for key, value in expanded(1000, 10_000).items()},
}


@pytest.mark.parametrize("broken", BROKEN)
def test_tensors_that_are_no_portrait_are_refused(broken):
    plain = through_a_checkpoint(two_tasks(make(Mlp)).to_plain())
    tensors = plain["tasks"][1]["portrait"]["tensors"]
    for key, change in BROKEN[broken].items():
        if change is None:
            del tensors[key]
        else:
            tensors[key] = change(tensors[key])
    with pytest.raises(ValueError, match="not a state of lightning_rnf"):
        FreezeState.from_plain(plain)


@pytest.mark.parametrize("key", ["2.means", "center ", "1"])
def test_tensors_that_nobody_reads_are_refused(key):
    plain = through_a_checkpoint(two_tasks(make(Mlp)).to_plain())
    plain["tasks"][1]["portrait"]["tensors"][key] = torch.zeros(3)
    with pytest.raises(ValueError, match=f"a portrait has .'{key}'., which nobody reads"):
        FreezeState.from_plain(plain)


PLAIN: dict[str, Any] = {
    "none": lambda portrait: None,
    "a text": lambda portrait: "portrait",
    "nothing": lambda portrait: {},
    "no layers": lambda portrait: {key: value for key, value in portrait.items() if key != "layers"},
    "no spaces": lambda portrait: {key: value for key, value in portrait.items() if key != "spaces"},
    "no tensors": lambda portrait: {key: value for key, value in portrait.items() if key != "tensors"},
    "tensors in a list": lambda portrait: portrait | {"tensors": list(portrait["tensors"])},
    "a layer that is not there": lambda portrait: portrait | {"layers": ["fc1", "zzz"]},
    "a layer twice": lambda portrait: portrait | {"layers": ["fc1", "fc1"]},
    "fewer layers": lambda portrait: portrait | {"layers": ["fc1"]},
    "no layer": lambda portrait: portrait | {"layers": []},
    "in no space": lambda portrait: portrait | {"spaces": []},
    "in an unknown space": lambda portrait: portrait | {"spaces": ["zzz", "second"]},
    "in a space twice": lambda portrait: portrait | {"spaces": ["first", "first"]},
    "not in its own space": lambda portrait: portrait | {"spaces": ["first"]},
    "not in an earlier space": lambda portrait: (
        portrait
        | {
            "spaces": ["second"],
            "tensors": portrait["tensors"]
            | {f"0.{key}": portrait["tensors"][f"1.{key}"] for key in ("counts", "means", "covariances")},
        }
    ),
    "in spaces that are swapped": lambda portrait: portrait | {"spaces": ["second", "first"]},
}


@pytest.mark.parametrize("broken", PLAIN)
def test_what_is_no_portrait_is_refused(broken):
    plain = through_a_checkpoint(two_tasks(make(Mlp)).to_plain())
    second = plain["tasks"][1]
    second["portrait"] = PLAIN[broken](second["portrait"])
    with pytest.raises(ValueError, match="not a state of lightning_rnf"):
        FreezeState.from_plain(plain)


def test_a_portrait_in_the_space_of_a_later_task_is_refused():
    plain = through_a_checkpoint(two_tasks(make(Mlp)).to_plain())
    first, second = (task["portrait"] for task in plain["tasks"])
    first["spaces"] = ["first", "second"]
    first["tensors"] |= {key: value for key, value in second["tensors"].items() if key.startswith("1.")}
    with pytest.raises(ValueError, match=r"'first' is in the spaces of \['first', 'second'\], expected \['first'\]"):
        FreezeState.from_plain(plain)


def test_a_portrait_in_the_space_of_a_task_without_one_is_refused():
    plain = through_a_checkpoint(two_tasks(make(Mlp)).to_plain())
    del plain["tasks"][0]["portrait"]
    with pytest.raises(ValueError, match=r"'second' is in the spaces of \['first', 'second'\], expected \['second'\]"):
        FreezeState.from_plain(plain)


def test_covariances_that_are_none_are_refused_where_they_are_used():
    net, rnf = with_state()
    plain = through_a_checkpoint(rnf.state_dict())
    of_first = plain["tasks"][0]["portrait"]["tensors"]
    of_first["0.covariances"] = -of_first["0.covariances"]
    rnf.load_state_dict(plain)
    x = torch.randn(3, *net.shape)
    with pytest.raises(ValueError, match="are no covariances: the file or checkpoint"):
        rnf.infer_task(x, net)
    with rnf.recall("first", net), torch.no_grad():  # a task is recalled all the same
        net(x)


def test_what_is_beyond_its_space_is_named():
    plain = through_a_checkpoint(two_tasks(make(Mlp)).to_plain())
    tensors = plain["tasks"][0]["portrait"]["tensors"]
    tensors["0.means"] = set_at(tensors["0.means"], 3e38)
    said = r"the portrait of '.*' has a mean of 3e\+38 in the space of '.*', where none is beyond 30"
    with pytest.raises(ValueError, match=said):
        FreezeState.from_plain(plain)


def test_what_is_at_the_edge_of_its_space_is_taken_and_scored():
    net, rnf = with_state()
    plain = through_a_checkpoint(rnf.state_dict())
    for task in plain["tasks"]:
        tensors = task["portrait"]["tensors"]  # the first space is not projected
        tensors["0.means"] = torch.full_like(tensors["0.means"], -30.0)
        tensors["0.covariances"] = torch.zeros_like(tensors["0.covariances"])
    rnf.load_state_dict(plain)
    found = rnf.infer_task(torch.randn(3, *net.shape) * 1e30, net)
    assert not found.scores.isnan().any()


# -- files ------------------------------------------------------------------------------------------------------------


def metadata(path: Any) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        found: dict[str, Any] = json.loads(file.metadata()["lightning_rnf"])
    return found


def rewrite(path: Any, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
    text = json.dumps(plain)
    save_file(tensors, path, {"lightning_rnf": text, "sha256": maskfiles.checksum(text, tensors)})


@pytest.mark.parametrize("how", ["missing", "a stranger", "unlisted", "listed twice", "no list", "no portrait", "NaN"])
def test_files_that_hold_another_portrait_than_they_list_are_refused(how, tmp_path):
    _, rnf = with_state()
    path = tmp_path / "masks.safetensors"
    rnf.save(path)
    tensors, plain = load_file(path), metadata(path)
    portrait, key = plain["tasks"][1]["portrait"], "portrait.1.1.means"
    assert key in tensors
    if how == "missing":
        del tensors[key]
    if how == "a stranger":
        tensors["portrait.1.7.means"] = torch.zeros(2)
    if how == "unlisted":
        portrait["tensors"].remove("1.means")
    if how == "listed twice":
        portrait["tensors"] = [name for name in portrait["tensors"] if name != "usual"] + ["1.means"]
    if how == "no list":
        portrait["tensors"] = [["1.means"]]
    if how == "no portrait":
        plain["tasks"][1]["portrait"] = [1]
    if how == "NaN":
        tensors[key] = tensors[key] * torch.nan
    rewrite(path, tensors, plain)
    other = RelevanceFreezing()
    with pytest.raises(ValueError, match="holds no masks that can be read"):
        other.load(path)
    assert not other.state.tasks
