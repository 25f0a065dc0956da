"""Outputs of several tasks are put together or refused, rows of embeddings are heard and written, modules compared."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor, nn

from lightning_rnf.memory import OldRows
from lightning_rnf.recall.embeddings import heard, written
from lightning_rnf.recall.norms import _unsynchronised
from lightning_rnf.recall.switching import joined_outputs, part_of_batch
from lightning_rnf.recall.whole import _difference


@pytest.mark.parametrize("places", [[[0, 1, 2]], [[2, 0], [1]], [[1], [2], [0]]])
def test_what_each_task_gives_of_its_samples_is_in_the_order_of_the_batch(places):
    logits, labels = torch.arange(12.0).view(3, 4), torch.arange(3)
    outputs = [{"logits": logits[of_task], "labels": (labels[of_task], "a name")} for of_task in places]
    joined = joined_outputs(outputs, places, [nn.Linear(4, 4)] * len(places))
    assert torch.equal(joined["logits"], logits)
    assert torch.equal(joined["labels"][0], labels)
    assert joined["labels"][1] == "a name"


def test_heads_of_different_widths_are_padded_with_what_no_softmax_chooses():
    narrow, wide = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0, 5.0]])
    joined = joined_outputs([narrow, wide], [[1], [0]], [nn.Linear(4, 2), nn.Linear(4, 3)])
    assert torch.equal(joined[0], wide[0])
    assert torch.equal(joined[1, :2], narrow[0])
    assert joined[1].softmax(0)[2] == 0


@pytest.mark.parametrize("axis", [1, 3])
def test_classes_of_pixels_and_of_tokens_are_padded_where_they_are(axis):
    narrow, wide = (torch.rand(1, 4, 4, 4).narrow(axis, 0, width) for width in (2, 3))
    heads = [nn.Conv2d(4, width, 1) if axis == 1 else nn.Linear(4, width) for width in (2, 3)]
    joined = joined_outputs([narrow, wide], [[1], [0]], heads)
    assert torch.equal(joined[:1], wide)
    assert torch.equal(joined[1:].narrow(axis, 0, 2), narrow)
    assert bool((joined[1:].narrow(axis, 2, 1) == -math.inf).all())


@pytest.mark.parametrize(
    ("outputs", "said"),
    [
        ((torch.zeros(1, 2), {"logits": torch.zeros(2, 2)}), "the outputs of two tasks have another form"),
        ((torch.tensor(1.0), torch.tensor(1.0)), "an output of type Tensor is one for a whole batch"),
        ((1.5, 2.5), "an output of type float is one for a whole batch"),
        ((torch.zeros(1, 2), torch.zeros(3, 2)), "outputs of [1, 2] samples of several tasks have the shapes"),
        ((torch.zeros(1), torch.zeros(2, 2)), "only what has one entry for each sample"),
        ((torch.zeros(1, 3, 2), torch.zeros(2, 4, 5)), "one shape but for the dimension of the classes"),
        ((torch.zeros(1, 3, 2, 4), torch.zeros(2, 3, 5, 4)), "one shape but for the dimension of the classes"),
        ((torch.zeros(1, 2).long(), torch.zeros(2, 3).long()), "have the shapes [(1, 2), (2, 3)] and are no logits"),
    ],
)
def test_what_can_not_be_put_together_is_refused_by_what_it_is(outputs, said):
    for head in (nn.Linear(4, 4), nn.Conv1d(4, 4, 1)):
        with pytest.raises(ValueError, match=re.escape(said)):
            joined_outputs(list(outputs), [[0], [1, 2]], [head, head])


def test_texts_of_different_lengths_are_not_put_together():
    heads = [nn.Linear(4, 3), nn.Linear(4, 3)]
    with pytest.raises(
        ValueError, match=r"have the shapes \[\(1, 5, 3\), \(2, 7, 3\)\]: .* recall one task after the other"
    ):
        joined_outputs([torch.zeros(1, 5, 3), torch.zeros(2, 7, 3)], [[0], [1, 2]], heads)


def test_of_a_batch_what_has_an_entry_for_each_sample_is_dealt_out():
    weight = torch.arange(4.0)
    x, rest = part_of_batch((torch.arange(6).view(3, 2), {"weight": weight, "name": "x"}), [2, 0], 3)
    assert x.tolist() == [[4, 5], [0, 1]]
    assert rest["weight"] is weight
    assert rest["name"] == "x"


@pytest.mark.parametrize("recalled", [heard, written])
@pytest.mark.parametrize("by_name", [False, True])
def test_an_embedding_says_what_it_said_of_these_rows_and_comes_back(recalled, by_name):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.other = nn.Embedding(5, 2), nn.Embedding(5, 2)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.table(input=tokens) if by_name else self.table(tokens)

    model = Model()
    weight, before = model.table.weight, model.table.weight.detach().clone()
    old = OldRows(torch.tensor([1, 4]), torch.tensor([[9.0, 8.0], [7.0, 6.0]]))
    nothing = OldRows(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 2))
    tokens = torch.tensor([[0, 1], [4, 1]])
    with recalled(model, {"table.weight": old, "other.weight": nothing}):
        found = model(tokens)
        assert not model.other._forward_hooks
    assert torch.equal(found[0, 0], before[0])
    assert torch.equal(found[0, 1], old.values[0])
    assert torch.equal(found[1], old.values.flip(0))
    assert model.table.weight is weight
    assert torch.equal(weight, before)
    assert not model.table._forward_hooks
    assert torch.equal(model(tokens), before[tokens])


@pytest.mark.parametrize("own", [False, True])
def test_a_norm_that_would_wait_for_other_processes_does_not_and_has_its_forward_again(own):
    norm = nn.SyncBatchNorm(3).train()
    alone = nn.BatchNorm1d(3).train()
    if own:
        norm.forward = own = lambda x: x
    with _unsynchronised(norm):
        x = torch.randn(4, 3, 2)
        assert torch.equal(norm(x), alone(x))
        assert torch.equal(norm.running_var, alone.running_var)
    assert vars(norm).get("forward", False) is own


def test_what_a_small_module_gives_differs_by_shape_by_number_or_not():
    logits = torch.tensor([1.0, -100.0, float("nan")])
    assert _difference(logits.clone(), logits) == ""
    assert _difference(logits + 1e-4, logits) == ""  # a millionth of the largest
    assert _difference(logits[:2], logits) == "it returns (2,) where recall returns (3,)"
    assert (
        _difference(torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0]))
        == "it is off by 0.5 where the largest output is 2"
    )
    masked = torch.tensor([1.0, -math.inf])  # of a class that is never chosen
    assert _difference(masked.clone(), masked) == ""
    assert _difference(torch.tensor([1.5, -math.inf]), masked).endswith("where the largest output is 1")
    assert _difference(torch.tensor([1.0, 0.0]), masked) == "it is off by inf where the largest output is 1"
    assert _difference(torch.tensor([1, 2]), torch.tensor([1, 2])) == ""
    assert _difference(torch.tensor([1, 3]), torch.tensor([1, 2])) == "it returns other numbers than recall"
    assert _difference(torch.zeros(0), torch.zeros(0)) == ""
