"""Two and three gloo processes against one; what they run is in processes.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from launched import assert_same_records, launched, one_thread
from lightning.pytorch.strategies import SingleDeviceStrategy
from processes import IN_THREE, IN_TWO, gone_on, records, recovered, saved
from training import clusters

from lightning_rnf.runtime.ranks import ALONE, Ranks, joined
from lightning_rnf.tasks.runs import refuse_strategies

STREAMS = {"stream", "sampler"}


@pytest.fixture(scope="module")
def alone():
    with one_thread():
        return records()


@pytest.fixture(scope="module", params=[2, 3])
def run(request, tmp_path_factory):
    """What each process found, and how the last fit, in which one of them fails, ended for all."""
    folder = tmp_path_factory.mktemp("ddp")
    alone = saved(folder / "alone")
    return SimpleNamespace(**vars(launched("processes.py", request.param, folder)), alone=alone)


def test_masks_and_what_led_to_them_are_those_of_one_process(run, alone):
    for rank in run.ranks:
        assert set(rank["records"]) == set(IN_TWO if len(run.ranks) == 2 else IN_THREE)
        assert_same_records(rank["records"], alone)


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided:UserWarning")
@pytest.mark.filterwarnings("ignore:no free units are left:UserWarning")
@pytest.mark.parametrize("name", ["a-ended.ckpt", "last.ckpt"])
def test_a_checkpoint_goes_on_in_another_number_of_processes(run, name):
    tasks, logits = gone_on(run.folder / "many" / name)
    assert tasks == ["a", "b"]
    assert torch.equal(logits, run.ranks[0]["saved"])
    for rank in run.ranks:
        tasks, logits = rank["gone_on"]
        assert tasks == ["a", "b"]
        assert torch.equal(logits, run.alone)


def test_rows_and_heads_that_are_fitted_are_those_of_one_process(run):
    with one_thread():
        alone = recovered()
    assert alone["moved"]
    for rank in run.ranks:
        found = rank["recovered"]
        assert found["evaluations"] == alone["evaluations"]
        for name, value in alone["weights"].items():
            assert torch.equal(found["weights"][name], value), name


def test_a_task_ended_by_hand_is_refused_in_all_of_several_processes(run):
    for rank in run.ranks:
        assert rank["by_hand"].startswith(f"end_task can't work in {len(run.ranks)} processes: DDP has wrapped")


def test_all_ranks_keep_the_record_of_the_first(run):
    for rank in run.ranks[1:]:
        for name, record in rank["records"].items():
            first = run.ranks[0]["records"][name]
            assert record["seconds"] == first["seconds"]
            assert all(
                torch.equal(value, first["norm_statistics"][key]) for key, value in record["norm_statistics"].items()
            )
        assert torch.equal(rank["sequence"]["logits"], run.ranks[0]["sequence"]["logits"])
        for first_task, task in zip(
            run.ranks[0]["sequence"]["state"]["tasks"], rank["sequence"]["state"]["tasks"], strict=True
        ):
            assert all(torch.equal(mask, first_task["relevant"][layer]) for layer, mask in task["relevant"].items())
            assert {key: task[key] for key in ("cutoff", "seconds", "recovery")} == {
                key: first_task[key] for key in ("cutoff", "seconds", "recovery")
            }


def test_what_can_not_be_indexed_is_walked_by_all_with_a_warning(run):
    for name, record in run.ranks[0]["records"].items():
        assert bool(record["warned"]) == (name in STREAMS), name
    (stream,) = STREAMS & run.ranks[0]["records"].keys()
    assert "walks through all of it and keeps every" in run.ranks[0]["records"][stream]["warned"][0]


def test_a_stream_that_deals_itself_out_is_taken_as_shares(run):
    kept = len(run.ranks) - 1  # the last process sees nothing
    assert [rank["shares"] for rank in run.ranks] == [kept * 96 // (kept + 1)] * len(run.ranks)


def test_loaders_that_fit_is_given_are_reference_data_without_a_validation_and_no_sample_is_repeated(run):
    assert [rank["unvalidated"] for rank in run.ranks] == [77] * len(run.ranks)


def test_targets_and_not_samples_are_counted_by_all_processes_together(alone):
    x = clusters("a", 77).tensors[0]
    record = alone["targets"]
    assert record["samples"] == int((3 * x[:, 0].abs()).long().sum()) != 77
    assert any(one["score"]["samples"] < record["samples"] for one in record["evaluations"])


KINDS = ["block.linear2.weight", "block.self_attn.out_proj.weight", "body.0.weight"]


@pytest.mark.parametrize(
    ("kind", "entries"), [("sequence", ["body.3.weight", "body.7.weight"]), ("rows", []), ("kinds", KINDS)]
)
def test_what_is_frozen_is_bit_equal_on_all_ranks_through_recovery_and_pinned_norms(run, kind, entries):
    for rank in run.ranks:
        found = rank[kind]
        assert found["by entries"] == entries
        assert found["held"]
        assert found["exact"]
        assert [task["recovery_epochs"] for task in found["state"]["tasks"]] == [1, 1]
        for name, value in run.ranks[0][kind]["weights"].items():
            assert torch.equal(found["weights"][name], value)


def test_a_task_that_each_process_has_protected_by_itself_is_the_first_ones_for_all(run):
    first = run.ranks[0]["protected"]
    for rank in run.ranks[1:]:
        found = rank["protected"]
        assert any(not torch.equal(mask, first["own"][layer]) for layer, mask in found["own"].items())
        assert all(torch.equal(mask, first["own"][layer]) for layer, mask in found["relevant"].items())
    assert all(rank["protected"]["held"] and rank["protected"]["moved"] for rank in run.ranks)


def test_logits_and_heatmaps_are_compared_by_the_first_process(run):
    for number, rank in enumerate(run.ranks):
        found = rank["pictured"]
        assert found["drift"] == [{}, {"a": 0.0}]
        assert found["maps"] == ({"a": ["a", "b"], "b": ["b"]} if number == 0 else {})
        assert found["cosine"] == pytest.approx([1, 1] if number == 0 else [])
        assert found["report"] == {"a": 0.0, "b": 0.0}  # every rank's report says what the first one's says


def test_a_failure_in_one_process_is_raised_in_all_of_them_with_its_message(run):
    size = len(run.ranks)
    labels, folder = "labels range from 0 to 5, but the head has 2 outputs", "no such folder: data"
    for number, rank in enumerate(run.ranks):
        kind, message, tasks = rank["failure"]
        assert (kind, tasks) == ("ValueError", [])
        assert message.startswith(labels if number == 1 else f"process 1 of {size} has failed: ValueError: {labels}")
        assert rank["unreadable"][0] == "FileNotFoundError"
        assert rank["unreadable"][1].endswith(folder)
        assert rank["unreadable"][1].startswith(f"process {size - 1} of {size}") == (number != size - 1)


def test_a_failure_that_nobody_catches_ends_the_run(run):
    assert run.codes == [1] * len(run.ranks)
    assert "labels range from 0 to 5, but the head has 2 outputs" in run.stderr


def test_a_data_set_that_is_not_whole_in_every_process_is_refused_before_training(run):
    lengths = ", ".join(str(80 + number) for number in range(len(run.ranks)))
    assert all(f"has {lengths} samples, by process: give all of them the whole" in rank["dealt"] for rank in run.ranks)


def test_synchronised_norms_do_not_wait_for_processes_with_fewer_batches(run):
    assert all(rank["synchronised"] for rank in run.ranks)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_shares_leave_no_item_out_and_repeat_none(size):
    ranks = [Ranks(rank, size) for rank in range(size)]
    for items in range(8):
        assert joined(one.share(range(items)) for one in ranks) == list(range(items))
        # what follows is dealt on from where the dealing stopped, so that the whole is in order, too
        both = [one.share(range(3)) + one.share(range(3, items + 3), before=3) for one in ranks]
        assert joined(both) == list(range(items + 3))


def test_alone_nothing_is_asked_of_other_processes():
    assert ALONE.gather("a") == ["a"]
    assert ALONE.decided(lambda: 1) == ALONE.agreed(lambda: 1) == 1
    with pytest.raises(ZeroDivisionError):
        ALONE.each(lambda: 1 / 0)


def test_other_ways_to_spread_a_model_are_refused():
    spread = SimpleNamespace(strategy=SingleDeviceStrategy(), world_size=2)
    with pytest.raises(
        ValueError,
        match=r"does not know how SingleDeviceStrategy spreads a model over 2 processes: use Trainer.strategy='ddp'",
    ):
        refuse_strategies(spread)
