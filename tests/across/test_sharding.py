"""FSDP2: two and three gloo processes with rows of the model each, against one; what they run is in sharded.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from launched import assert_same_records, launched, one_thread
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.deepspeed import DeepSpeedStrategy
from processes import records
from sharded import NAMES, Conv
from torch import nn
from training import Classifier, inputs

from lightning_rnf import RelevanceFreezing
from lightning_rnf.runtime import sharding
from lightning_rnf.tasks.runs import refuse_strategies


@pytest.fixture(scope="module")
def alone():
    with one_thread():
        return records([name for names in NAMES.values() for name in names])


@pytest.fixture(scope="module", params=[2, 3])
def run(request, tmp_path_factory):
    """What each process found."""
    folder = tmp_path_factory.mktemp("sharding")
    found = launched("sharded.py", request.param, folder)
    assert found.codes == [0] * request.param, found.stderr[-5000:]
    return found


def test_masks_and_what_led_to_them_are_those_of_one_process_with_the_whole_model(run, alone):
    for rank in run.ranks:
        assert set(rank["records"]) == set(NAMES[len(run.ranks)])
        assert_same_records(rank["records"], alone)


@pytest.mark.parametrize(("kind", "entries"), [("sequence", ["body.3.weight", "body.7.weight"]), ("rows", [])])
def test_what_is_frozen_is_bit_equal_and_recall_is_exact_through_recovery_and_pinned_norms(run, kind, entries):
    first = run.ranks[0][kind]
    for rank in run.ranks:
        sequence = rank[kind]
        assert sequence["by entries"] == entries
        assert sequence["held"]
        assert sequence["exact"]
        assert [task["recovery_epochs"] for task in sequence["state"]["tasks"]] == [1, 1]
        assert all(torch.equal(value, sequence["weights"][name]) for name, value in first["weights"].items())
        for mine, task in zip(sequence["state"]["tasks"], first["state"]["tasks"], strict=True):
            assert all(torch.equal(mine["relevant"][layer], mask) for layer, mask in task["relevant"].items())


def test_what_is_free_learns_and_so_does_the_head_that_was_activated_while_it_was_whole(run):
    layers = {f"body.{name}" for name in ("1.weight", "1.bias", "3.weight", "4.weight", "4.bias", "7.weight", "7.bias")}
    head = {"heads.tasks.b.weight", "heads.tasks.b.bias"}
    for rank in run.ranks:
        moved = {name for name in rank["sequence"]["moved"] if name in rank["sequence"]["weights"]}
        assert moved == layers | head
        assert {name for name, flag in rank["sequence"]["flags"].items() if flag} == layers | head


def test_free_units_go_back_to_where_they_started(run):
    assert all(rank["reset"] for rank in run.ranks)


def test_a_test_run_recalls_the_task(run):
    for rank in run.ranks:
        tested, by_hand = rank["sequence"]["tested"]
        assert tested == pytest.approx(by_hand, abs=1e-6)


@pytest.mark.parametrize("form", ["False", "True"])
def test_a_fit_that_is_resumed_from_a_checkpoint_of_either_form_ends_as_the_one_that_went_on(run, form):
    for rank in run.ranks:
        resumed = rank["resumed"][form]
        assert {key: resumed[key] for key in ("held", "exact", "weights", "masks")} == dict.fromkeys(
            ("held", "exact", "weights", "masks"), True
        )


def test_a_checkpoint_in_one_file_is_recalled_in_one_process(run):
    checkpoint = torch.load(run.folder / "finished.ckpt", weights_only=True)
    model, rnf = Conv(), RelevanceFreezing(criterion=0.1)
    model.load_state_dict(checkpoint["state_dict"])
    rnf.load_state_dict(checkpoint["callbacks"]["RelevanceFreezing"])
    with rnf.recall("a", model), torch.no_grad():
        torch.testing.assert_close(model(inputs()), run.ranks[0]["resumed"]["True"]["logits"])


def test_a_failure_in_one_process_is_raised_in_all_and_leaves_the_model_spread(run):
    for number, rank in enumerate(run.ranks):
        message, spread = rank["failure"]
        assert spread
        assert message.startswith("process 1 of ") == (number != 1)
        assert "labels range from 0 to 5, but the head has 2 outputs" in message


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "rmsprop"])
def test_rows_of_any_process_are_held_and_slowed_as_those_of_a_whole_model(run, optimizer):
    for rank in run.ranks:
        for held in rank["held"][optimizer]:
            share = held.pop("smallest share")
            assert held == {"bit-equal": True, "moved": True, "as whole": True, "flags": True}
            assert share == 0 or rank is run.ranks[0]  # some have nothing of a parameter of one row


def test_a_model_is_ordinary_while_it_is_whole_and_then_as_it_was_but_for_what_was_written(run):
    for rank in run.ranks:
        borrowed = rank["borrowed"]
        flags = borrowed.pop("flag")
        assert all(borrowed.values()), borrowed
        assert flags == [True] * 6  # one was set while the parameter was whole


def test_layouts_that_are_no_rows_over_all_processes_are_refused_by_name(run):
    causes = {
        "Unspread": "parameter 'body.0.weight' is not sharded",
        "HalfSpread": "parameter 'heads.tasks.a.weight' is not sharded",
        "Listed": "fully_shard was called on a list of modules, and the Linear in it",
        "ByColumns": "parameter 'body.0.weight' is spread as (Shard(dim=1),)",
        "InHalf": "fully_shard was given MixedPrecisionPolicy(param_dtype=torch.bfloat16",
        "tensor parallel": f"spreads each layer over {len(run.ranks)} processes (tensor_parallel_size)",
    }
    for rank in run.ranks:
        assert set(rank["refused"]) == set(causes)
        for name, cause in causes.items():
            assert cause in rank["refused"][name]
            assert rank["refused"][name].endswith("Trainer(strategy='ddp')")
        assert "a sharded model can't be cut" in rank["export"]


def strategy(kind):
    """One of these strategies, without what its constructor asks the machine for."""
    return kind.__new__(kind)


@pytest.mark.parametrize(
    ("kind", "cause"), [(FSDPStrategy, "flattens the parameters"), (DeepSpeedStrategy, "updates them in an engine")]
)
def test_strategies_whose_pieces_are_no_rows_are_refused_with_what_to_use(kind, cause):
    with pytest.raises(ValueError, match=rf"{kind.__name__}: .*{cause}.*use Trainer\(strategy='ddp'\)"):
        refuse_strategies(SimpleNamespace(strategy=strategy(kind), world_size=2))


def test_a_data_parallel_module_is_refused():
    model = Classifier()
    model.body = nn.DataParallel(model.body)
    spread = SimpleNamespace(strategy=SingleDeviceStrategy(), world_size=1, lightning_module=model)
    with pytest.raises(ValueError, match=r"module 'body' is a DataParallel.*Trainer\(strategy='ddp'\)"):
        refuse_strategies(spread)


def test_a_model_that_is_not_sharded_is_left_alone():
    model = Classifier()
    parameters = list(model.parameters())
    with sharding.whole(model):
        assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert not sharding.is_sharded(model)
    assert sharding.local_rows(parameters[0], torch.arange(3)).tolist() == [0, 1, 2]
    assert sharding.local(parameters[0]).data_ptr() == parameters[0].data_ptr()


def test_model_parallel_is_not_refused_before_the_model_is_spread():
    one = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    refuse_strategies(SimpleNamespace(strategy=one, world_size=2, lightning_module=Classifier()))
