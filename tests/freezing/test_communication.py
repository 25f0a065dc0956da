"""The communication hook in two gloo processes; what they run is in communicating.py."""

from __future__ import annotations

import pytest
import torch
from communicating import CONNECTIONS, FROZEN, OPTIONS, SOME, Layouts
from launched import launched


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each process found."""
    folder = tmp_path_factory.mktemp("communication")
    found = launched("communicating.py", 2, folder)
    assert found.codes == [0, 0], found.stderr[-5000:]
    return found.ranks


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("options", [*OPTIONS, *CONNECTIONS])
def test_two_tasks_with_recovery_are_bit_equal_with_and_without_the_hook(ranks, options):
    for rank in ranks:
        plain, hooked = rank["sequences"][options]
        for task, relevant in plain["relevant"].items():
            assert_equal(hooked["relevant"][task], relevant)
        assert_equal(hooked["weights"], plain["weights"])
        assert_equal(hooked["weights"], ranks[0]["sequences"][options][1]["weights"])


@pytest.mark.parametrize("options", OPTIONS)
def test_what_travels_is_free_rows_and_the_head_from_the_moment_that_masks_change(ranks, options):
    for rank in ranks:
        hooked = rank["sequences"][options][1]
        for sent, expected in zip(hooked["sent"], hooked["expected"], strict=True):
            assert len(sent) == 10
            steps = [2, 4, 7, 9] if options == "accumulated" else range(10)  # two epochs of five batches
            assert sent == [size if step in steps else 0 for step, size in enumerate(expected)]
            assert sent[-1] < 0.8 * sent[4]  # the recovery, inside the sub-network
        first, second = hooked["sent"]
        whole = sum(4 * value.numel() for name, value in hooked["weights"].items() if "heads" not in name)
        assert first[4] == whole + 4 * 82  # of the first task everything travels
        assert second[4] < 0.8 * first[4]


def test_bytes_are_in_proportion_to_free_rows(ranks):
    for rank in ranks:
        found = rank["second"]["free rows"]
        expected = (1 - FROZEN) * found["body"] + found["head"]
        assert found["sent"] == [expected] * 10
        assert rank["second"]["half"]["sent"] == [expected / 2] * 10
        assert rank["second"]["all in half"]["sent"] == [(found["body"] + found["head"]) / 2] * 10


def test_nan_in_frozen_rows_on_their_arrival_makes_no_difference(ranks):
    for rank in ranks:
        assert rank["second"]["plain"]["held"]
        assert_equal(rank["second"]["free rows"]["weights"], rank["second"]["plain"]["weights"])
        assert_equal(rank["second"]["spoiled"]["weights"], rank["second"]["plain"]["weights"])


def test_in_half_precision_it_is_what_torch_makes_of_all_rows_and_frozen_rows_stay(ranks):
    for rank in ranks:
        half = rank["second"]["half"]
        assert half["held"]
        assert_equal(half["weights"], rank["second"]["all in half"]["weights"])
        torch.testing.assert_close(half["weights"], rank["second"]["plain"]["weights"], rtol=1e-2, atol=1e-3)
        assert any(
            not torch.equal(value, rank["second"]["plain"]["weights"][name]) for name, value in half["weights"].items()
        )


@pytest.mark.parametrize("options", ["one bucket", "views", "many buckets", "half"])
def test_gradients_of_any_order_in_memory_are_those_of_torchs_own_hook(ranks, options):
    for rank in ranks:
        whole, some = rank["layouts"][options]
        assert_equal(some["gradients"], whole["gradients"])
        assert all(gradient.any() for gradient in some["gradients"].values())
        shapes = {name: parameter.shape for name, parameter in Layouts().named_parameters()}
        free = sum(
            len(SOME[name]) * shape[len(SOME[name][0]) :].numel() if name in SOME else shape.numel()
            for name, shape in shapes.items()
        )
        assert sum(some["sent"]) == 3 * free * (2 if options == "half" else 4)
    if options != "half":
        assert_equal(ranks[0]["layouts"][options][1]["gradients"], ranks[1]["layouts"][options][1]["gradients"])


def test_where_nothing_is_free_nothing_travels(ranks):
    for rank in ranks:
        assert rank["nothing"]["sent"] == []
        assert not any(gradient.any() for gradient in rank["nothing"]["gradients"].values())


def test_a_state_that_knows_no_free_rows_is_refused_with_what_to_use(ranks):
    for rank in ranks:
        kind, message = rank["wrong"]
        assert kind in ("TypeError", "RuntimeError")
        assert "given a NoneType that knows no free rows: use DDPStrategy(ddp_comm_state=rnf" in message


def test_gradients_and_optimizer_states_of_what_is_frozen_whole_are_never_allocated_under_ddp(ranks):
    for rank in ranks:
        for memory in rank["memory"]:
            assert len(memory["gradients"]) == len(memory["states"]) == 15
            assert all(names == memory["learning"] for names in (*memory["gradients"], *memory["states"]))
