"""What is remembered of rows of embeddings: as it was, by task, and never what a stranger's file can't have."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from records import TASKS, Mlp, head_parameters, make, record_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_rnf import RelevanceFreezing
from lightning_rnf.anatomy import form
from lightning_rnf.freezing import elasticities
from lightning_rnf.memory import OldRows, maskfiles, masks
from lightning_rnf.memory.giving_up import without
from lightning_rnf.memory.state import FreezeState

ROWS, WIDTH, NAME = 12, 3, "words.weight"


class Worded(Mlp):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(ROWS, WIDTH)

    def units(self, task="first"):
        forms = {name: form(value) for name, value in self.named_parameters()}
        return replace(super().units(task), embeddings=(NAME,), forms=forms)


def of(*rows):
    return torch.zeros(ROWS, dtype=torch.bool).index_fill_(0, torch.tensor(rows), True)


def old(*rows, value=0.0):
    return OldRows(torch.tensor(rows), torch.full((len(rows), WIDTH), float(value)))


def state(net=None):
    """Three tasks that read rows 0 to 2, 2 to 5 and 5 to 7; the second changed 3 to 5, the third 6 and 7."""
    net = net or make(Worded)
    found = FreezeState()
    for name, read in (("first", (0, 1, 2)), ("second", (2, 3, 4, 5)), ("third", (5, 6, 7))):
        if name != "first":
            new = [row for row in read if not found.frozen_rows(NAME)[row]]
            found.keep_rows({NAME: of(*new)}, {NAME: old(*new, value=len(found.tasks))})
        head = {"head": f"heads.tasks.{name}", "head_parameters": head_parameters(name) if name in TASKS else ()}
        record = record_of(net, tokens={NAME: of(*read)}, **{"name": name, **head})
        found.add(record, net.units())
    return found


def heard(state, name):
    rows = state.recalled(name).old_rows.get(NAME)
    return {} if rows is None else dict(zip(rows.rows.tolist(), rows.values[:, 0].tolist(), strict=True))


def test_each_task_hears_what_was_changed_after_it_as_it_was():
    found = state()
    assert heard(found, "first") == {3: 1, 4: 1, 5: 1, 6: 2, 7: 2}
    assert heard(found, "second") == {6: 2, 7: 2}
    assert heard(found, "third") == {}
    assert found.frozen_rows(NAME).nonzero().view(-1).tolist() == list(range(8))
    assert found.learned == {}


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("first", {"second": {6: 2, 7: 2}, "third": {}}),
        ("second", {"first": {3: 1, 4: 1, 5: 1, 6: 2, 7: 2}, "third": {}}),
        ("third", {"first": {3: 1, 4: 1, 5: 1, 6: 2, 7: 2}, "second": {6: 2, 7: 2}}),
    ],
)
def test_without_a_task_others_hear_the_same_and_what_is_kept_twice_is_the_older(task, expected):
    found = without(state(), task)
    assert {name: heard(found, name) for name in found.tasks} == expected
    last = list(found.tasks)[-1]
    found.keep_rows({NAME: of(4, 7)}, {NAME: old(4, 7, value=9)})
    for name, rows in expected.items():
        assert heard(found, name) == {4: 9, 7: 9} | rows
    assert heard(without(found, last), next(iter(expected)))[4] == {4: 9, **expected[next(iter(expected))]}[4]


def test_what_only_a_task_that_is_given_up_had_is_free_and_others_hear_it_as_it_was():
    net, found = make(Worded), FreezeState()
    found.add(record_of(net), replace(net.units(), embeddings=()))
    found.keep_rows({NAME: of(3)}, {NAME: old(3, value=1)})
    found.add(record_of(net, "second", tokens={NAME: of(3)}), net.units("second"))
    left = without(found, "second")
    assert not left.frozen_rows(NAME).any()
    assert heard(left, "first") == {3: 1}
    again = FreezeState.from_plain(left.to_plain())
    assert elasticities(again)[NAME].tolist() == [1.0] * ROWS
    assert masks.free_rows(again) == {"words": 1.0}


def test_an_older_row_counts_and_rows_are_in_order():
    both = old(2, 7, value=1).first_of(old(1, 7, 9, value=2))
    assert both.rows.tolist() == [1, 2, 7, 9]
    assert both.values[:, 0].tolist() == [2, 1, 1, 2]
    weight = torch.full((ROWS, WIDTH), 5.0)
    assert both.written(weight)[:, 0].tolist() == [5, 2, 1, 5, 5, 5, 5, 1, 5, 2, 5, 5]
    assert (weight == 5).all()


def test_it_goes_through_a_checkpoint_and_a_file(tmp_path):
    found = state()
    found.keep_rows({NAME: of(9)}, {NAME: old(9, value=3)})
    again = FreezeState.from_plain(found.to_plain())
    assert torch.equal(again.learned[NAME], of(9))
    rnf, other = RelevanceFreezing(), RelevanceFreezing()
    rnf.state = found
    rnf.save(tmp_path / "masks.safetensors")
    other.load(tmp_path / "masks.safetensors")
    for one in (again, other.state):
        assert one.embeddings == (NAME,)
        for name, record in found.tasks.items():
            assert torch.equal(record.tokens[NAME], one.tasks[name].tokens[NAME])
            assert heard(one, name) == heard(found, name)
    assert other.state.learned == {}
    assert masks.tokens_table(found) == masks.tokens_table(other.state)


def test_the_table_says_who_read_what_first():
    assert masks.tokens_table(state()) == [
        {"embedding": "words", "rows": ROWS, "first": 3, "second": 3, "third": 2, "unread": 4, "kept": 5}
    ]
    assert masks.free_rows(state()) == {"words": pytest.approx(1 / 3)}


BAD = {
    "tokens of another size": lambda plain: plain["tasks"][0]["tokens"].update({NAME: torch.ones(5) > 0}),
    "tokens that are numbers": lambda plain: plain["tasks"][0]["tokens"].update({NAME: torch.ones(ROWS)}),
    "tokens of a stranger": lambda plain: plain["tasks"][0]["tokens"].update({"fc1.weight": of(1)}),
    "rows out of range": lambda plain: plain["tasks"][0]["old_rows"].update({NAME: old(3, ROWS).to_plain()}),
    "rows below 0": lambda plain: plain["tasks"][0]["old_rows"].update({NAME: old(-1, 3).to_plain()}),
    "rows twice": lambda plain: plain["tasks"][0]["old_rows"].update({NAME: old(3, 3).to_plain()}),
    "rows without values": lambda plain: plain["tasks"][0]["old_rows"][NAME].update(values=torch.ones(1, WIDTH)),
    "values of another width": lambda plain: plain["tasks"][0]["old_rows"][NAME].update(values=torch.ones(5, 9)),
    "values that are words": lambda plain: plain["tasks"][0]["old_rows"].update({NAME: {"rows": 1, "values": "x"}}),
    "rows of a stranger": lambda plain: plain["tasks"][0]["old_rows"].update({"fc2.weight": old(1).to_plain()}),
    "no form": lambda plain: plain["forms"].pop(NAME),
    "another's form": lambda plain: plain["forms"].update({NAME: "float32 (12,)"}),
    "a layer's weight": lambda plain: plain["embeddings"].append("fc1.weight"),
    "no list": lambda plain: plain.update(embeddings=3),
    "learned of another size": lambda plain: plain.update(learned={NAME: of(1)[:4]}),
}


@pytest.mark.parametrize("spoil", BAD.values(), ids=list(BAD))
def test_what_no_task_can_have_left_is_refused(spoil):
    found = state()
    found.keep_rows({NAME: of(9)}, {NAME: old(9, value=3)})
    plain = found.to_plain()
    spoil(plain)
    with pytest.raises(ValueError, match="not a state of lightning_rnf: "):
        FreezeState.from_plain(plain)


def rewritten(path, change):
    with safe_open(path, "pt") as file:
        text = file.metadata()["lightning_rnf"]
    plain, tensors = json.loads(text), load_file(path)
    change(plain, tensors)
    text = json.dumps(plain)
    save_file(tensors, path, {"lightning_rnf": text, "sha256": maskfiles.checksum(text, tensors)})


BAD_FILES = {
    "another size": lambda plain, tensors: plain["tasks"][0]["tokens"].update({NAME: 10**9}),
    "no size": lambda plain, tensors: plain["tasks"][0]["tokens"].update({NAME: -3}),
    "a list": lambda plain, tensors: plain["tasks"][0].update(tokens=[NAME]),
    "no bits": lambda plain, tensors: tensors.pop(f"tokens.0.{NAME}"),
    "no values": lambda plain, tensors: tensors.pop(f"old_values.0.{NAME}"),
    "no names": lambda plain, tensors: plain["tasks"][0].update(old_rows={NAME: 1}),
    "names twice": lambda plain, tensors: plain["tasks"][0].update(old_rows=[NAME, NAME]),
    "names of no text": lambda plain, tensors: plain["tasks"][0].update(old_rows=[[NAME]]),
    "not listed": lambda plain, tensors: plain["tasks"][0].pop("old_rows"),
}


@pytest.mark.parametrize("change", BAD_FILES.values(), ids=list(BAD_FILES))
def test_a_file_that_lacks_what_it_lists_is_refused(change, tmp_path):
    rnf = RelevanceFreezing()
    rnf.state = state()
    rnf.save(tmp_path / "masks.safetensors")
    rewritten(tmp_path / "masks.safetensors", change)
    with pytest.raises(ValueError, match="holds no masks that can be read"):
        RelevanceFreezing().load(tmp_path / "masks.safetensors")


def test_a_model_in_which_it_is_no_plain_embedding_is_refused():
    net, found = make(Worded), FreezeState()
    found.add(record_of(net, tokens={NAME: of(1)}), net.units())
    found.check_module(net)
    net.words.forward = lambda ids: ids
    with pytest.raises(ValueError, match=r"'words\.weight' was the weight of an embedding .* not that of a plain"):
        found.check_module(net)


def test_what_a_task_has_read_whole_is_in_a_file_and_of_an_embedding():
    found = state()
    assert "read_whole" not in found.to_plain()["tasks"][0]  # as files were before
    found.tasks["second"] = replace(found.tasks["second"], read_whole=(NAME,))
    plain = found.to_plain()
    assert [record.read_whole for record in FreezeState.from_plain(plain).tasks.values()] == [(), (NAME,), ()]
    plain["tasks"][0]["read_whole"] = ["heads.weight"]
    with pytest.raises(ValueError, match="'read_whole' has"):
        FreezeState.from_plain(plain)
