from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from records import ConvNet, Mlp, every_second, make, record_of, state_of
from torch import nn

from lightning_rnf.anatomy.units import UnitLayer
from lightning_rnf.memory.state import VERSION, FreezeState

Plain = dict[str, Any]


def two_tasks() -> FreezeState:
    net = make(ConvNet)
    nothing = {name: torch.zeros_like(mask) for name, mask in every_second(net.layers).items()}
    return state_of(net, record_of(net), record_of(net, "second", relevant=nothing, evaluations=(), seconds={}))


def plain_state() -> Plain:
    return copy.deepcopy(two_tasks().to_plain())


def through_a_file(plain: Plain) -> Plain:
    file = io.BytesIO()
    torch.save(plain, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_equal_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


# -- there and back ---------------------------------------------------------------------------------------------------


def test_a_state_comes_back_from_a_checkpoint_as_it_was():
    state = two_tasks()
    found = FreezeState.from_plain(through_a_file(state.to_plain()))
    assert found.layers == state.layers
    assert found.shared == state.shared
    assert list(found.tasks) == ["first", "second"]
    for name, record in state.tasks.items():
        back = found.tasks[name]
        for tensors in ("relevant", "relevance", "norm_statistics"):
            assert_equal_tensors(getattr(back, tensors), getattr(record, tensors))
        nothing: dict[str, Any] = {"relevant": {}, "relevance": {}, "norm_statistics": {}}
        assert vars(replace(back, **nothing)) == vars(replace(record, **nothing))
    assert_equal_tensors(found.frozen(), state.frozen())


def test_shared_parameters_come_back():
    state = state_of(make(Mlp))
    assert FreezeState.from_plain(through_a_file(state.to_plain())).shared == ("norm.weight", "norm.bias")


def test_an_empty_state_comes_back_empty():
    found = FreezeState.from_plain(through_a_file(FreezeState().to_plain()))
    assert (found.layers, found.shared, found.tasks) == ((), (), {})


def test_the_plain_form_says_its_version():
    assert plain_state()["version"] == 1 < VERSION


def test_a_loaded_state_takes_the_next_task():
    net = make(ConvNet)
    state = FreezeState.from_plain(through_a_file(state_of(net).to_plain()))
    state.add(record_of(net, "second"), net.units("second"))
    assert list(state.tasks) == ["first", "second"]


# -- what is no such state --------------------------------------------------------------------------------------------


def refuse(plain: object) -> str:
    """The refusal of something that is no state; anything but a ValueError is a failure."""
    with pytest.raises(ValueError, match=r".") as refused:
        FreezeState.from_plain(plain)
    return str(refused.value)


def test_a_newer_version_is_refused_with_both_versions():
    assert str(VERSION + 1) in refuse(plain_state() | {"version": VERSION + 1})


@pytest.mark.parametrize("rubbish", [{}, [], None, "state", {"version": 1}, {"layers": []}])
def test_what_is_no_state_at_all_is_refused(rubbish):
    assert "not a state of lightning_rnf" in refuse(rubbish)


Path = tuple[str | int, ...]
FREE_FORM = {
    "norm_statistics",
    "seconds",
    "conservation",
}  # dicts whose keys are content: nothing else says which should be there


def places(plain: object, path: Path = ()) -> Iterator[Path]:
    """The path to every key of every dict, at any depth."""
    children = plain.items() if isinstance(plain, dict) else enumerate(plain) if isinstance(plain, list) else ()
    for key, value in children:
        if isinstance(plain, dict) and not FREE_FORM.intersection(path):
            yield (*path, key)
        yield from places(value, (*path, key))


def at(plain: Any, path: Path) -> Any:
    for key in path:
        plain = plain[key]
    return plain


every_place = pytest.mark.parametrize("place", list(places(plain_state())), ids=lambda p: ".".join(map(str, p)))


@every_place
def test_a_missing_field_is_refused_by_its_name(place):
    plain = plain_state()
    del at(plain, place[:-1])[place[-1]]
    assert str(place[-1]) in refuse(plain)


@every_place
def test_a_field_of_another_type_is_refused_by_its_name(place):
    plain = plain_state()
    at(plain, place[:-1])[place[-1]] = object()
    assert str(place[-1]) in refuse(plain)


@pytest.mark.parametrize(
    "place",
    [
        ("shared",),
        ("layers",),
        ("layers", 0, "parameters"),
        ("tasks",),
        ("tasks", 0, "head_parameters"),
        ("tasks", 0, "evaluations"),
        ("tasks", 0, "cuts"),
        ("tasks", 0, "notes"),
    ],
    ids=lambda p: ".".join(map(str, p)),
)
def test_a_list_with_an_entry_of_another_type_is_refused(place):
    plain = plain_state()
    at(plain, place[:-1])[place[-1]] = [*at(plain, place), 17]
    refuse(plain)


@pytest.mark.parametrize("rubbish", ["statistics", None, [0.0] * 4])
def test_statistics_that_are_no_tensors_are_refused_by_name(rubbish):
    plain = plain_state()
    plain["tasks"][0]["norm_statistics"]["bn1.running_mean"] = rubbish
    assert "bn1.running_mean" in refuse(plain)


@pytest.mark.parametrize("rubbish", [1, "1.0", None])
def test_conservation_that_is_no_number_is_refused_by_name(rubbish):
    plain = plain_state()
    plain["tasks"][0]["conservation"]["conv1"] = rubbish
    assert "conv1" in refuse(plain)


BROKEN_MASKS: dict[str, Callable[[torch.Tensor], object]] = {
    "short": lambda mask: mask[:-1],
    "long": lambda mask: torch.cat([mask, mask]),
    "matrix": lambda mask: mask[None],
    "scalar": lambda mask: mask[0],
    "list": lambda mask: mask.tolist(),
    "other-dtype": lambda mask: mask.to(torch.float32 if mask.dtype == torch.bool else torch.bool),
    "double": lambda mask: mask.double(),
    "integer": lambda mask: mask.long(),
}


@pytest.mark.parametrize("broken", BROKEN_MASKS)
@pytest.mark.parametrize("field", ["relevant", "relevance"])
def test_masks_of_another_shape_or_dtype_are_refused_with_task_and_layer(field, broken):
    plain = plain_state()
    plain["tasks"][1][field]["conv2"] = BROKEN_MASKS[broken](plain["tasks"][1][field]["conv2"])
    message = refuse(plain)
    assert "'second'" in message
    assert "'conv2'" in message


def test_layers_of_another_size_are_refused():
    plain = plain_state()
    plain["layers"][1]["units"] = 7
    assert "'conv2'" in refuse(plain)


TRANSPOSED = UnitLayer("up", 6, -3, ("up.weight", "up.bias", "slopes.weight"), slopes="slopes", transposed=(2, 2))


def test_a_transposed_layer_comes_back():
    plain = through_a_file(FreezeState(layers=(TRANSPOSED,)).to_plain())
    assert FreezeState.from_plain(plain).layers == (TRANSPOSED,)
    plain["layers"][0]["transposed"] = [2, 2]  # as JSON has it
    assert FreezeState.from_plain(plain).layers == (TRANSPOSED,)


@pytest.mark.parametrize("broken", [(2,), (2, 2, 2), (4, 1), (0, 2), (2, 2.0), (2, -2), (True, 2)])
def test_groups_that_make_no_transposed_layer_are_refused(broken):
    plain = FreezeState(layers=(TRANSPOSED,)).to_plain()
    plain["layers"][0]["transposed"] = broken
    assert "transposed" in refuse(plain)


def test_masks_of_a_layer_that_is_not_listed_are_refused():
    plain = plain_state()
    del plain["layers"][1]
    assert "'conv2'" in refuse(plain)


def test_two_records_of_one_task_are_refused():
    plain = plain_state()
    plain["tasks"][1]["name"] = "first"
    assert "'first'" in refuse(plain)


# -- frozen -----------------------------------------------------------------------------------------------------------


def test_frozen_units_are_those_that_any_task_needs():
    net = make(Mlp)
    masks = [
        {"fc1": torch.tensor([1, 0, 0, 0, 0, 1]) > 0, "fc2": torch.tensor([0, 0, 0, 0, 0]) > 0},
        {"fc1": torch.tensor([1, 1, 0, 0, 0, 0]) > 0, "fc2": torch.tensor([0, 1, 0, 0, 0]) > 0},
    ]
    records = [record_of(net, task, relevant=mask) for task, mask in zip(("first", "second"), masks, strict=True)]
    state = state_of(net, *records)
    found = {name: mask.int().tolist() for name, mask in state.frozen().items()}
    assert found == {"fc1": [1, 1, 0, 0, 0, 1], "fc2": [0, 1, 0, 0, 0]}
    assert torch.equal(masks[0]["fc1"], records[0].relevant["fc1"])
    assert records[0].relevant["fc1"].sum() == 2  # the union is a new tensor


def test_no_unit_is_frozen_before_the_first_task():
    assert FreezeState().frozen() == {}


# -- add --------------------------------------------------------------------------------------------------------------


def test_a_second_record_of_the_same_name_is_refused_and_not_kept():
    net = make(ConvNet)
    state = state_of(net)
    kept = state.tasks["first"]
    with pytest.raises(ValueError, match="'first' has ended already"):
        state.add(record_of(net, accuracy=0.1), net.units())
    assert state.tasks == {"first": kept}


def test_other_layers_than_before_are_refused_and_nothing_is_kept():
    net = make(ConvNet)
    conv1, conv2 = net.layers
    cases = {
        "conv2": (conv1, replace(conv2, units=6)),
        "bn2": (replace(conv1, norm="bn2"), conv2),
        "only while it runs once": (replace(conv1, norm=None), conv2),
        r"\['conv2'\]": (conv1,),
        r"\['conv3'\]": (conv1, conv2, replace(conv2, name="conv3")),
    }
    for named, layers in cases.items():
        state = state_of(net)
        with pytest.raises(ValueError, match=named):
            state.add(record_of(net, "second"), replace(net.units("second"), layers=layers))
        assert list(state.tasks) == ["first"]
        assert state.layers == net.layers


def test_layers_that_a_trace_has_in_another_order_or_not_at_all_keep_their_places():
    net = make(ConvNet)
    conv1, conv2 = net.layers
    state = state_of(net)
    swapped = replace(net.units("second"), layers=(conv2, conv1))
    assert state.completed(swapped).layers == net.layers
    at_rest = replace(net.units("second"), layers=(conv1,), idle=(*conv2.parameters, "another"))
    completed = state.completed(at_rest)
    assert completed.layers == net.layers
    assert completed.idle == ("another",)
    assert FreezeState().completed(at_rest) is at_rest  # no task has ended: the trace says what there is


def test_shared_parameters_of_all_tasks_are_kept_once():
    net = make(Mlp)
    state = state_of(net)
    state.add(record_of(net, "second"), replace(net.units("second"), shared=("norm.bias", "adapter.weight")))
    assert state.shared == ("norm.weight", "norm.bias", "adapter.weight")


def test_a_record_is_found_by_name_or_refused_with_the_names_there_are():
    state = two_tasks()
    assert state.task("second") is state.tasks["second"]
    with pytest.raises(KeyError, match=r"no finished task 'third'.*first.*second"):
        state.task("third")


# -- check_module -----------------------------------------------------------------------------------------------------


def test_the_model_itself_passes():
    for kind in (Mlp, ConvNet):
        net = make(kind)
        state_of(net).check_module(net)
    FreezeState().check_module(nn.Linear(1, 1))


def replaced(name: str, value: nn.Module) -> nn.Module:
    net = make(ConvNet)
    net.set_submodule(name, value)
    return net


def with_statistics_of_another_size() -> nn.Module:
    net = make(ConvNet)
    net.bn1.register_buffer("running_var", torch.ones(3))
    return net


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (replaced("conv2", nn.Conv2d(4, 6, 3)), r"'conv2' had 5 units.*'conv2\.weight' has shape \(6, 4, 3, 3\)"),
        (replaced("conv2", nn.Conv2d(4, 5, 3, bias=False)), r"'conv2'.*'conv2\.bias' is missing"),
        (replaced("bn1", nn.Identity()), r"'conv1'.*'bn1\.weight' is missing"),
        (replaced("bn1", nn.BatchNorm2d(4, track_running_stats=False)), r"'bn1\.running_mean'.*'first'"),
        (with_statistics_of_another_size(), r"'bn1\.running_var'.*'first'"),
        (replaced("heads.tasks.first", nn.Identity()), r"'heads\.tasks\.first\.weight'.*'first'"),
        (nn.Linear(3, 3), "'conv1'"),
        (make(Mlp), "'conv1'"),
    ],
    ids=["other-size", "no-bias", "no-norm", "no-statistics", "other-statistics", "no-head", "linear", "mlp"],
)
def test_another_model_is_refused_by_the_name_that_differs(model, named):
    with pytest.raises(ValueError, match=named):
        state_of(make(ConvNet)).check_module(model)


def test_a_model_without_a_shared_parameter_is_refused_by_its_name():
    net = make(Mlp)
    state = state_of(net)
    net.norm = nn.Identity()
    with pytest.raises(ValueError, match=r"'norm\.weight'.*'first'"):
        state.check_module(net)


def test_a_model_whose_parameter_is_a_scalar_is_refused_by_its_name():
    net = make(Mlp)
    state = state_of(net)
    net.fc1.bias = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"'fc1\.bias'"):
        state.check_module(net)


@pytest.mark.parametrize(
    ("up", "fits"),
    [
        (nn.ConvTranspose2d(4, 6, 3, groups=2), True),
        (nn.ConvTranspose2d(6, 6, 3, groups=2), False),
        (nn.ConvTranspose2d(4, 6, 3), False),
        (nn.ConvTranspose2d(4, 4, 3, groups=2), False),
    ],
)
def test_a_transposed_layer_has_to_have_as_many_units_in_as_many_groups(up, fits):
    model = nn.Module()
    model.up, model.slopes = up, nn.PReLU(6)
    with nullcontext() if fits else pytest.raises(ValueError, match="'up' had 6 units"):
        FreezeState(layers=(TRANSPOSED,)).check_module(model)


FORMS = {
    "fc1.weight": "float32 (6, 4)",
    "fc1.bias": "float32 (6,)",
    "fc2.weight": "float32 (5, 6)",
    "fc2.bias": "float32 (5,)",
    "norm.weight": "float32 (6,)",
    "norm.bias": "float32 (6,)",
    "heads.tasks.first.weight": "float32 (3, 5)",
    "heads.tasks.first.bias": "float32 (3,)",
}


def state_with(forms):
    state = state_of(make(Mlp))
    state.forms = dict(forms)
    return state


def test_forms_of_parameters_come_back_and_are_left_out_where_none_are_known():
    state = state_with(FORMS)
    assert FreezeState.from_plain(state.to_plain()).forms == FORMS
    state.check_whole(make(Mlp))
    state.forms = {}
    assert "forms" not in state.to_plain()
    assert FreezeState.from_plain(state.to_plain()).forms == {}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"fc1.weight": "float32 (7, 4)"}, "has no 'fc1.weight' of 6 units"),
        ({"fc1.weight": None}, "has no 'fc1.weight' of 6 units"),
        ({"norm.weight": None}, "lacks 'norm.weight'"),
        ({"heads.tasks.first.bias": None}, "lacks 'heads.tasks.first.bias'"),
        ({"more": "float32"}, "should be dtypes and shapes, one is 'float32'"),
        ({"more": "float32 (-1, 2)"}, "should be dtypes and shapes"),
        ({"more": f"float32 ({'9' * 17},)"}, "should be dtypes and shapes"),
        ({"more": 3}, "'forms' should be names"),
    ],
)
def test_forms_that_no_model_of_this_state_can_have_are_refused(changes, said):
    forms = {name: form for name, form in {**FORMS, **changes}.items() if form is not None}
    with pytest.raises(ValueError, match=re.escape(said)):
        FreezeState.from_plain(state_with({}).to_plain() | {"forms": forms})


def test_a_parameter_of_another_shape_than_the_forms_say_is_refused():
    with pytest.raises(
        ValueError, match=re.escape("'fc2.weight' of layer 'fc2' of the finished tasks had shape (5, 9)")
    ):
        state_with(FORMS | {"fc2.weight": "float32 (5, 9)"}).check_module(make(Mlp))
    state_with(FORMS | {"fc2.weight": "bfloat16 (5, 6)"}).check_module(make(Mlp))  # a conversion leaves the shape
