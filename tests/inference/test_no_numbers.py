"""Samples of which sub-networks make no numbers: they are of no task that can be told, and decide nothing."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from apart import held_out
from test_infer_task import batches, protected
from training import TASKS, Classifier

from lightning_rnf import MultiHead
from lightning_rnf.inference.naming import _entropy

pytestmark = pytest.mark.filterwarnings("ignore:no free units are left:UserWarning")

BROKEN = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@pytest.fixture(scope="module")
def two():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return protected(Classifier())


def with_broken(task: str, value: float, samples: int = 16) -> torch.Tensor:
    """Samples of a task, the first of which is broken in all its numbers, or in one."""
    x = held_out(task, samples=samples, by=6.0)[0]
    x[0] = value
    return x


@pytest.mark.parametrize("value", BROKEN.values(), ids=BROKEN)
def test_a_sample_of_no_numbers_is_unusual_for_every_task_and_as_likely_of_each(two, value):
    model, rnf = two
    x = with_broken("b", value)
    found, without = rnf.infer_task(x, model, unknown=True), rnf.infer_task(x, model)
    assert found.names[0] is None
    assert float(found.levels[0]) == 0
    assert without.names[0] in ("a", "b")
    assert found.scores[0].exp().tolist() == pytest.approx([0.5, 0.5])
    clean = rnf.infer_task(held_out("b", samples=16, by=6.0)[0], model, unknown=True)
    assert found.names[1:] == clean.names[1:]
    assert torch.equal(found.scores[1:], clean.scores[1:])
    assert torch.equal(found.levels[1:], clean.levels[1:])


def test_one_number_that_is_none_is_enough(two):
    model, rnf = two
    x = held_out("b", samples=4, by=6.0)[0]
    x[2, 3] = math.nan
    found = rnf.infer_task(x, model, unknown=True)
    assert found.names[2] is None
    assert [float(level) == 0 for level in found.levels] == [False, False, True, False]


@pytest.mark.parametrize("task", ["a", "b"])
@pytest.mark.parametrize("value", BROKEN.values(), ids=BROKEN)
def test_of_a_group_it_says_nothing(two, task, value):
    model, rnf = two
    x = with_broken(task, value)
    found, others = (rnf.infer_task(one, model, grouped=True, unknown=True) for one in (x, x[1:]))
    assert found.names == others.names == (task,)
    assert torch.allclose(found.scores.diff(), others.scores.diff(), atol=1e-4)
    all_broken = rnf.infer_task(torch.full_like(x, value), model, grouped=True, unknown=True)
    assert all_broken.names == (None,)
    assert not all_broken.scores.isnan().any()


def test_a_group_with_one_such_sample_is_judged_by_the_levels_of_the_others(two):
    model, rnf = two
    x = held_out("a", samples=2, by=6.0)[0]
    for some in x.split(1):
        known = rnf.infer_task(some, model, grouped=True, unknown=True)
        with_one = rnf.infer_task(torch.cat([some, some * math.nan]), model, grouped=True, unknown=True)
        assert with_one.names == known.names


@pytest.mark.parametrize("by", ["entropy", "energy"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_no_numbers_say_nothing_of_a_group(two, by, value):
    model, rnf = two
    x = held_out("b", samples=16, by=6.0)[0]
    clean = rnf.infer_task(x, model, by=by)
    x[0] = value
    found = rnf.infer_task(x, model, by=by)
    assert torch.equal(found.scores[1:], clean.scores[1:])
    assert found.scores[0].tolist() == ([-1.0, -1.0] if by == "entropy" else [0.0, 0.0])
    for some in (x, x[torch.arange(15, -1, -1)]):
        together, others = rnf.infer_task(some, model, by=by, grouped=True), clean.scores[1:].sum(0)
        assert together.names == (("a", "b")[int(others.argmax())],)
        assert torch.allclose(together.scores.diff(), others.diff(), atol=1e-4)


@pytest.mark.parametrize("by", ["entropy", "energy"])
def test_a_task_whose_logits_are_no_numbers_is_the_least_likely(by):
    model = Classifier()
    model.heads = MultiHead(40, {"a": 2, "b": 2, "c": 2})
    model, rnf = protected(model, "abc", portraits=False)
    x = held_out(*TASKS, samples=20)[0]
    clean = rnf.infer_task(x, model, by=by).scores
    model.get_submodule(rnf.state.tasks["b"].head).register_forward_hook(lambda part, args, output: output * math.nan)
    found = rnf.infer_task(x, model, by=by)
    assert torch.equal(found.scores[:, ::2], clean[:, ::2])
    assert (found.scores[:, 1] < found.scores[:, ::2].amin(1)).all()
    assert "b" not in found.names


def test_classes_that_are_masked_have_an_entropy():
    logits = torch.tensor([[1.0, 2.0, -math.inf], [0.0, 0.0, 0.0], [math.nan, 0, 0], [-math.inf] * 3])
    shares = torch.tensor([1.0, 2.0]).softmax(0)
    expected = float(-(shares * shares.log()).sum() / math.log(3))
    assert _entropy(logits).tolist() == pytest.approx([expected, 1.0, 1.0, 1.0])


class BrokenInA(Classifier):
    """Its recall of task a fails for some of what others see."""

    limit = 7.0

    def forward(self, x):
        if self.heads.active == "a":
            x = x.masked_fill(x[:, 2:3] > self.limit, math.nan)
        return super().forward(x)


def test_what_an_earlier_tasks_sub_network_makes_no_numbers_of_is_left_out_there():
    model, rnf = protected(BrokenInA())
    x = torch.cat([x for x, _ in batches("b")])
    broken = x[:, 2] > model.limit
    classes = rnf.state.tasks["b"].portrait.classes
    assert 0 < classes["a"].counts.sum() == int((~broken).sum())
    assert classes["b"].counts.sum() == len(x)
    found = rnf.infer_task(x[broken], model)
    assert (found.scores.exp() - 0.5).abs().max() < 1e-5


def test_where_that_are_all_data_there_is_no_portrait():
    with pytest.warns(UserWarning, match="b: its data can't be told .*: no sample is left .* without a portrait"):
        _, rnf = protected(BrokenInA(), of_task=lambda task: [(x + 9 * (task == "b"), y) for x, y in batches(task)])
    assert [record.portrait is None for record in rnf.state.tasks.values()] == [False, True]
