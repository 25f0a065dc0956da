"""What a constructor is given is taken or refused in one sentence, which says what was found."""

from __future__ import annotations

import math
import re
from typing import Literal

import pytest

from lightning_rnf.runtime import arguments, extras


@pytest.mark.parametrize(("given", "taken"), [(None, None), (1, (1.0,)), (0.25, (0.25,)), ([0.25, 1], (0.25, 1.0))])
def test_shares_are_none_or_numbers_up_to_one(given, taken):
    assert arguments.shares("ration", given) == taken


@pytest.mark.parametrize("given", [0, -0.5, 1.01, True, "0.5", [], [0.5, 0], [0.5, None], math.nan])
def test_what_is_no_share_is_refused(given):
    said = f"ration is {given!r}, expected a share above 0 and up to 1, or a list of them"
    with pytest.raises(ValueError, match=re.escape(said)):
        arguments.shares("ration", given)


@pytest.mark.parametrize(
    ("given", "taken"), [(None, None), ("heads.*", "heads.*"), (["a", "b.*"], ("a", "b.*")), ([], ())]
)
def test_globs_are_one_or_several(given, taken):
    assert arguments.globs("heads", given) == taken


@pytest.mark.parametrize("given", [3, [3], ["a", None], {"a": 1}.keys()])
def test_what_is_no_glob_is_refused(given):
    with pytest.raises(TypeError, match=re.escape(f"heads is {given!r}, expected a glob of module names, or several")):
        arguments.globs("heads", given)


def test_a_whole_number_of_at_least_the_least_is_taken():
    assert arguments.at_least("batches", 2, 2) == 2
    assert arguments.at_least("batches", None, 2, or_none=True) is None
    for given in (1, 2.0, True, "2", None):
        with pytest.raises(ValueError, match=f"batches is {given!r}, expected a whole number of at least 2"):
            arguments.at_least("batches", given, 2)


def test_one_of_a_few_words_or_of_a_kind_is_taken():
    assert arguments.one_of("freeze", "units", Literal["units", "connections"]) == "units"
    with pytest.raises(ValueError, match="freeze is 'all', expected one of 'units', 'connections'"):
        arguments.one_of("freeze", "all", Literal["units", "connections"])
    assert arguments.of_type("seed", None, int, "a number") is None
    assert arguments.of_type("seed", 3, int, "a number") == 3
    with pytest.raises(TypeError, match=r"seed is '3', expected a number"):
        arguments.of_type("seed", "3", int, "a number")


def test_a_missing_package_of_an_extra_is_named_with_it_and_any_other_is_the_code_s():
    with pytest.raises(ModuleNotFoundError, match=r"rich is missing: pip install 'lightning-rnf\[demo\]'") as refused:  # noqa: SIM117
        with extras.needed():
            raise ModuleNotFoundError("No module named 'rich.table'", name="rich.table")
    assert refused.value.name == "rich.table"
    other = ModuleNotFoundError("No module named 'tables'", name="tables")
    with pytest.raises(ModuleNotFoundError) as kept, extras.needed():
        raise other
    assert kept.value is other
    assert extras.sentence(ImportError("cannot import name 'Table' from 'rich'", name="rich")) is None
