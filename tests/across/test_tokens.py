"""Rows of embeddings belong to their tokens: new words learn, and finished tasks hear all of them as they were."""

from __future__ import annotations

import contextlib
import copy
import io
import warnings

import lightning.pytorch as pl
import pytest
import torch
from launched import launched, one_thread
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from reading import stream
from texts import LENGTH, VOCABULARY, WORDS, Attending, Reader, anything, text_data, texts
from torch import nn
from training import frozen_entries, trainer

from lightning_rnf import RelevanceFreezing
from lightning_rnf.freezing import embeddings as rows_of

A, B, C = (set(VOCABULARY[task]) for task in "abc")
NOBODY = set(range(49, WORDS))
QUICK = {"recovery_epochs": 0, "ration": None, "fit_head": False}
FROZEN = QUICK | {"embeddings": "frozen"}

pytestmark = pytest.mark.filterwarnings("ignore:no free units are left:UserWarning")


def fit(model, rnf, task, *callbacks, **options):
    model.heads.activate(task)
    trainer(*callbacks, rnf, **{"max_epochs": 2, **options}).fit(model, datamodule=text_data(task))


def recalled(rnf, model, x, task="a"):
    with rnf.recall(task, model), torch.no_grad():
        return model(x)


def rows(model, words):
    name = "words" if hasattr(model, "words") else "embedding"
    return getattr(model, name).weight.detach()[sorted(words)].clone()


def differ(one, other):
    """Whether each row has a bit that differs."""
    return (one.view(torch.int32) != other.view(torch.int32)).any(dim=1)


def trained(task="a", model_type=Reader, seed=0, rnf=None, **options):
    torch.manual_seed(seed)
    model, rnf = model_type(**options), rnf or RelevanceFreezing(**QUICK)
    fit(model, rnf, task)
    return model, rnf


@pytest.fixture(scope="module", params=["per_task", "frozen"])
def _first(request):
    return trained(rnf=RelevanceFreezing(**QUICK | {"embeddings": request.param}))


@pytest.fixture
def first(_first):
    return copy.deepcopy(_first[0]), copy.deepcopy(_first[1])


@pytest.fixture(scope="module")
def _frozen():
    return trained(rnf=RelevanceFreezing(**FROZEN))


@pytest.fixture
def first_frozen(_frozen):
    return copy.deepcopy(_frozen[0]), copy.deepcopy(_frozen[1])


@pytest.mark.parametrize("model_type", [Reader, Attending])
def test_new_words_learn_old_ones_stay_and_words_of_nobody_stay_though_weights_decay(model_type):
    torch.manual_seed(0)
    begun = model_type()
    start = {words: rows(begun, of) for words, of in (("b", B - A), ("nobody", NOBODY | C - B - A))}
    model, rnf = begun, RelevanceFreezing(**FROZEN)
    fit(model, rnf, "a")
    of_a, new, nobodys = rows(model, A), rows(model, B - A), rows(model, NOBODY | C - B - A)
    assert not differ(new, start["b"]).any()
    assert not differ(nobodys, start["nobody"]).any()
    fit(model, rnf, "b")
    assert not differ(rows(model, A), of_a).any()
    assert differ(rows(model, B - A), new).all()
    assert not differ(rows(model, NOBODY | C - B - A), nobodys).any()
    name = rnf.state.embeddings[0]
    read = rnf.state.frozen_rows(name).nonzero().view(-1).tolist()
    assert set(read) - {0} == A | B
    assert rnf.weights_left()[name.rpartition(".")[0]] == pytest.approx(1 - len(read) / WORDS)
    assert not any(rnf.report(model).changed.values())


@pytest.mark.filterwarnings("ignore:.*frozen rows were moved without a write that torch counts:UserWarning")
@pytest.mark.parametrize("embeddings", ["per_task", "frozen"])
@pytest.mark.parametrize("model_type", [Reader, Attending])
def test_recall_is_exact_for_any_words_after_all_that_may_move_has_become_nan(model_type, embeddings):
    model, rnf = trained(model_type=model_type, rnf=RelevanceFreezing(**QUICK | {"embeddings": embeddings}))
    x, long = anything(), anything(length=LENGTH + 2)
    expected = {"a": [recalled(rnf, model, one) for one in (x, long)[: 1 + (model_type is Attending)]]}
    fit(model, rnf, "b")
    expected["b"] = [recalled(rnf, model, one, "b") for one in (x, long)[: len(expected["a"])]]
    # The next fit reads every word and place, and diverges at once.
    model.heads.activate("c")
    ruined = {name: mask.clone() for name, mask in frozen_entries(rnf, model).items()}
    with contextlib.suppress(KeyboardInterrupt, SystemExit):
        trainer(Ruin(), rnf, max_epochs=1).fit(model, datamodule=everything())
    table = model.get_parameter(rnf.state.embeddings[0])
    assert table[~ruined[rnf.state.embeddings[0]]].isnan().all()
    for task, logits in expected.items():
        for one, then in zip((x, long), logits, strict=False):
            assert torch.equal(recalled(rnf, model, one, task), then), task
            assert then.isfinite().all()


class Ruin(pl.Callback):
    """The first step makes NaN of all that it may move; the fit is given up."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        for parameter in pl_module.parameters():
            if parameter.grad is not None:
                parameter.grad.fill_(float("nan"))
        for parameter in pl_module.body.parameters():
            parameter.data.fill_(float("nan"))

    def on_train_batch_end(self, trainer, *args):
        raise SystemExit


def everything():
    data = text_data("a")
    data.task = "c"
    data.train = torch.utils.data.TensorDataset(anything(320, length=LENGTH), torch.arange(320) % 2)
    return data


def test_after_two_tasks_no_entry_that_is_free_is_heard_of_the_words_of_both(first_frozen):
    model, rnf = first_frozen
    x, of_a = anything(words=A | B), anything(words=A)
    seen, unseen = recalled(rnf, model, of_a), recalled(rnf, model, x)
    fit(model, rnf, "b")
    held = frozen_entries(rnf, model)
    with torch.no_grad():
        for name, frozen in held.items():
            model.get_parameter(name)[~frozen] = float("nan")
        new = sorted(B - A)
        model.embedding.weight[new] = float("nan")  # what the second task has of its own, the first hears as it was
    assert torch.equal(recalled(rnf, model, of_a), seen)
    assert torch.equal(recalled(rnf, model, x), unseen)


def test_a_fit_that_is_given_up_takes_nothing_from_finished_tasks(first):
    model, rnf = first
    x = anything()
    expected = recalled(rnf, model, x)

    class GiveUp(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            raise SystemExit

    before = rows(model, B - A)
    with contextlib.suppress(SystemExit):
        fit(model, rnf, "b", GiveUp())
    assert differ(rows(model, B - A), before).all()
    assert torch.equal(recalled(rnf, model, x), expected)
    fit(model, rnf, "c")  # and begins anew on what was left
    fit(model, rnf, "b")
    assert torch.equal(recalled(rnf, model, x), expected)
    assert not any(rnf.report(model).changed.values())
    own = set() if rnf.state.own_rows else A
    assert rnf.state.tasks["a"].old_rows["embedding.weight"].rows.tolist() == sorted((B | C) - own)


def test_what_a_fit_has_changed_so_far_is_not_heard_in_it(first):
    model, rnf = first
    x, steps = anything(), []
    expected = recalled(rnf, model, x)

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if not steps:
                small = rnf.export(pl_module, "a")
                with torch.no_grad():
                    torch.testing.assert_close(small(x), expected)
            steps.append(torch.equal(recalled(rnf, pl_module, x), expected))
            pl_module.train()

        def on_train_epoch_end(self, trainer, pl_module):
            assert rnf.report(pl_module).changed == {"a": ()}

    fit(model, rnf, "b", Look())
    assert len(steps) > 10
    assert all(steps)


def in_order(task):
    data = text_data(task)
    data.train_dataloader = data.val_dataloader
    return data


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided:UserWarning")
@pytest.mark.parametrize("task", ["a", "b"])
def test_resumed_in_the_middle_it_ends_as_if_it_had_not_been_stopped(first, task, tmp_path):
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.current_epoch == 1 and batch_idx == 3:
                raise SystemExit

    def begun():
        if task == "b":
            return copy.deepcopy(first)
        torch.manual_seed(1)
        return Reader(), RelevanceFreezing(**options)

    def run(model, rnf, *callbacks, **options):
        model.heads.activate(task)
        with contextlib.suppress(SystemExit):
            trainer(*callbacks, rnf, max_epochs=3, **options).fit(model, datamodule=in_order(task), ckpt_path=path)

    path, options = None, QUICK | {"embeddings": first[1].embeddings}
    whole, rnf = begun()
    x = anything()
    expected = recalled(rnf, whole, x) if task == "b" else None
    run(whole, rnf)
    stopped, given_up = begun()
    run(stopped, given_up, Stop(), ModelCheckpoint(tmp_path, save_last=True), enable_checkpointing=True)
    path = tmp_path / "last.ckpt"
    assert torch.load(path, weights_only=True)["callbacks"]["RelevanceFreezing"]["learned"]["embedding.weight"].any()
    torch.manual_seed(5)
    resumed, other = Reader(), RelevanceFreezing(**options)
    run(resumed, other)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    for name, record in rnf.state.tasks.items():
        found = other.state.tasks[name]
        assert torch.equal(record.tokens["embedding.weight"], found.tokens["embedding.weight"])
        assert record.rows == found.rows
        for table, old in record.old_rows.items():
            assert torch.equal(old.rows, found.old_rows[table].rows)
            assert torch.equal(old.values, found.old_rows[table].values)
    if expected is not None:
        assert torch.equal(recalled(other, resumed, x), expected)


def test_a_task_is_added_in_a_new_process_from_its_checkpoint(first, tmp_path):
    model, rnf = first
    saver = ModelCheckpoint(tmp_path, save_last=True)
    fit(model, rnf, "b", saver, enable_checkpointing=True)
    x = anything()
    expected = {task: recalled(rnf, model, x, task) for task in "ab"}
    other, again = Reader(), RelevanceFreezing(**QUICK)
    again.restore(tmp_path / "b-ended.ckpt", other)
    for task, logits in expected.items():
        assert torch.equal(recalled(again, other, x, task), logits)
    fit(other, again, "c")
    for task, logits in expected.items():
        assert torch.equal(recalled(again, other, x, task), logits)
    assert differ(rows(other, C - B - A), rows(model, C - B - A)).all()


def test_a_pad_stays_though_weights_decay():
    torch.manual_seed(0)
    model, rnf = Reader(), RelevanceFreezing(**QUICK)
    with torch.no_grad():
        model.embedding.weight[0] = 1.0  # as pretrained ones may be; its gradient is zero, and torch lets it decay
    for task in "ab":
        fit(model, rnf, task)
        assert (model.embedding.weight[0] == 1).all()
    other = Reader()
    with torch.no_grad():
        other.embedding.weight[0] = 1.0
    other.heads.activate("a")
    trainer(max_epochs=1).fit(other, datamodule=text_data("a"))
    assert (other.embedding.weight[0] < 1).all()


def test_each_task_has_rows_of_its_own_and_all_hear_theirs():
    model, rnf = trained()
    x = anything()
    expected = {"a": recalled(rnf, model, x)}
    for task, words in (("b", B), ("c", C)):
        before, others = rows(model, words), rows(model, set(range(WORDS)) - words)
        fit(model, rnf, task)
        assert differ(rows(model, words), before).all()  # of those that earlier tasks have read, too
        assert not differ(rows(model, set(range(WORDS)) - words), others).any()
        expected[task] = recalled(rnf, model, x, task)
    for task, logits in expected.items():
        assert torch.equal(recalled(rnf, model, x, task), logits)
    assert rnf.weights_left()["embedding"] == 1
    assert not any(rnf.report(model).changed.values())
    (row,) = rnf.report(model).to_dict()["embeddings"]
    assert row["kept"] == len(B) + len(C)


def test_a_second_task_in_which_words_mean_something_else_learns_as_a_fresh_model_does():
    longer = {"max_epochs": 12}
    model, rnf = trained()
    fit(model, rnf, "b", **longer)
    torch.manual_seed(0)
    fresh, alone = Reader(), text_data("b").test.tensors
    fresh.heads.activate("b")
    trainer(**longer).fit(fresh, datamodule=text_data("b"))
    with torch.no_grad():
        said = recalled(rnf, model, alone[0], "b"), fresh(alone[0])
    found, of_fresh = (float((one.argmax(1) == alone[1]).float().mean()) for one in said)
    assert of_fresh > 0.8
    assert found > of_fresh - 0.03


@pytest.mark.parametrize("order", [("frozen", "per_task", "frozen"), ("per_task", "frozen", "per_task")])
def test_what_was_asked_for_of_earlier_tasks_does_not_bind_later_ones(order):
    x, expected, model, state = anything(), {}, None, None
    for task, asked in zip("abc", order, strict=True):
        rnf = RelevanceFreezing(**QUICK | {"embeddings": asked})
        if model is None:
            torch.manual_seed(0)
            model = Reader()
        else:
            rnf.load_state_dict(state)
        earlier = {"a": set(), "b": A, "c": A | B}[task]
        before = rows(model, earlier)
        fit(model, rnf, task)
        moved = {word for word, has in zip(sorted(earlier), differ(rows(model, earlier), before), strict=True) if has}
        assert moved == (earlier & set(VOCABULARY[task]) if asked == "per_task" else set())
        expected[task], state = recalled(rnf, model, x, task), rnf.state_dict()
        for one, logits in expected.items():
            assert torch.equal(recalled(rnf, model, x, one), logits)


def test_a_table_whose_rows_were_all_read_and_frozen_learns_when_each_task_is_to_have_its_own():
    torch.manual_seed(0)
    model, frozen, x = Attending(), RelevanceFreezing(**FROZEN), anything()
    model.places = nn.Embedding(LENGTH, model.places.embedding_dim)
    fit(model, frozen, "a")
    assert frozen.state.frozen_rows("places.weight").all()
    rnf = RelevanceFreezing(**QUICK)
    rnf.load_state_dict(frozen.state_dict())
    expected, before = recalled(rnf, model, x), model.places.weight.detach().clone()
    fit(model, rnf, "b")
    assert differ(model.places.weight.detach(), before).all()
    assert torch.equal(recalled(rnf, model, x), expected)


def test_what_a_protected_task_has_read_is_free_where_the_next_one_is_to_have_its_own():
    torch.manual_seed(0)
    model = Reader()
    for options, free in ((QUICK, 1.0), (FROZEN, 1 - (len(A) + 1) / WORDS)):
        rnf = RelevanceFreezing(**options)
        rnf.protect(model, text_data("a").val_dataloader(), name="a")
        assert rnf.weights_left()["embedding"] == pytest.approx(free)


@pytest.mark.filterwarnings("ignore:elasticity=:UserWarning")
def test_unasked_rows_of_large_tables_are_frozen_and_elastic_ones_are_elastic(monkeypatch):
    model, rnf = trained(rnf=RelevanceFreezing(elasticity={"embedding": 0.1}, **QUICK))
    assert rnf.state.embeddings == ("embedding.weight",)
    assert not rnf.state.own_rows
    monkeypatch.setattr(rows_of, "MOST", model.embedding.weight.numel())
    assert trained()[1].state.own_rows == ("embedding.weight",)
    monkeypatch.setattr(rows_of, "MOST", model.embedding.weight.numel() - 1)
    assert not trained()[1].state.own_rows
    asked = trained(rnf=RelevanceFreezing(embeddings="per_task", **QUICK))[1]
    assert asked.state.own_rows == ("embedding.weight",)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"embeddings": "kept"}, "embeddings is 'kept', expected one of 'per_task', 'frozen'"),
        ({"embeddings": "per_task", "retention": "paper"}, "it goes with retention='exact'"),
    ],
)
def test_what_embeddings_can_not_do_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        RelevanceFreezing(**options)


def test_weights_in_which_a_word_of_nobody_has_another_meaning_are_refused_and_reported(first):
    model, rnf = first
    with torch.no_grad():
        model.embedding.weight[max(NOBODY)] += 1
    assert rnf.report(model).changed == {"a": ("embedding.weight",)}
    with pytest.raises(ValueError, match=r"of 'a' embedding\.weight differ"):
        fit(model, rnf, "b")


def test_a_file_of_masks_has_what_old_tasks_hear(first, tmp_path):
    model, rnf = first
    x = anything()
    expected = recalled(rnf, model, x)
    fit(model, rnf, "b")
    rnf.save(tmp_path / "masks.safetensors")
    other = RelevanceFreezing()
    other.load(tmp_path / "masks.safetensors", model)
    assert torch.equal(recalled(other, model, x), expected)
    assert other.report(model).audit.changed == {"a": (), "b": ()}
    assert other.free_weights == rnf.free_weights
    buffer = io.BytesIO()
    torch.save(rnf.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(recalled(other, model, x), expected)


def test_an_exported_network_has_the_old_rows(first):
    model, rnf = first
    x = anything()
    expected = recalled(rnf, model, x)
    fit(model, rnf, "b")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weight = model.embedding.weight
    small = rnf.export(model, "a")
    with torch.no_grad():
        torch.testing.assert_close(small(x), expected)
    assert model.embedding.weight is weight
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Looking(Attending):
    """Its forward asks for a size, which no symbolic tracing follows."""

    def forward(self, x):
        return super().forward(x if x.shape[1] <= LENGTH else x[:, :LENGTH])


@pytest.mark.filterwarnings("ignore:.*of the parameters of its silent units are still there:UserWarning")
def test_one_that_torch_export_follows_has_them_too():
    model, rnf = trained(model_type=Looking)
    fit(model, rnf, "b")
    x = anything(8)
    expected = recalled(rnf, model, x)
    small = rnf.export(model, "a", example=x)
    with torch.no_grad():
        torch.testing.assert_close(small(x), expected)


def test_what_is_given_up_is_free_again_and_others_hear_what_they_heard(first_frozen):
    model, rnf = first_frozen
    x = anything()
    expected = {"a": recalled(rnf, model, x)}
    for task in "bc":
        fit(model, rnf, task)
        expected[task] = recalled(rnf, model, x, task)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rnf.forget("b")
    read = set(rnf.state.frozen_rows("embedding.weight").nonzero().view(-1).tolist())
    assert read - {0} == A | C
    for task in "ac":
        assert torch.equal(recalled(rnf, model, x, task), expected[task])
    own = rows(model, B - A - C)
    fit(model, rnf, "b")
    assert differ(rows(model, B - A - C), own).all()
    for task in "ac":
        assert torch.equal(recalled(rnf, model, x, task), expected[task])
    assert not any(rnf.report(model).changed.values())


@pytest.mark.parametrize("embeddings", ["per_task", "frozen"])
def test_tasks_that_are_ended_by_hand_in_one_fit(embeddings):
    torch.manual_seed(0)
    options = QUICK | {"embeddings": embeddings}
    model, rnf = Reader(), RelevanceFreezing(task=lambda trainer, module: module.heads.active, **options)
    seen = {}

    class InTurn(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                rnf.end_task("a")
                seen["a"], seen["rows"] = recalled(rnf, pl_module, anything()), rows(pl_module, A)
                pl_module.heads.activate("b")

    model.heads.activate("a")
    data = torch.utils.data.ConcatDataset([texts("a", 160), texts("b", 160)])
    of_both = [torch.utils.data.DataLoader(data, 32, shuffle=shuffle) for shuffle in (True, False)]
    trainer(InTurn(), rnf, max_epochs=4).fit(model, *of_both)
    assert list(rnf.state.tasks) == ["a", "b"]
    assert bool(differ(rows(model, A), seen["rows"]).any()) is (embeddings == "per_task")
    assert torch.equal(recalled(rnf, model, anything()), seen["a"])


def test_with_averaged_weights_words_of_nobody_stay(first, tmp_path):
    model, rnf = first
    x = anything()
    expected, nobodys = recalled(rnf, model, x), rows(model, NOBODY)
    saver = ModelCheckpoint(tmp_path, save_last=True)
    fit(model, rnf, "b", WeightAveraging(), saver, enable_checkpointing=True)
    assert not differ(rows(model, NOBODY), nobodys).any()
    assert torch.equal(recalled(rnf, model, x), expected)
    saved = torch.load(tmp_path / "b-ended.ckpt", weights_only=True)["state_dict"]["embedding.weight"]
    assert not differ(saved[sorted(NOBODY)], nobodys).any()


def test_what_was_never_trained_here_keeps_the_meaning_of_all_its_words():
    torch.manual_seed(0)
    model, rnf = Reader(), RelevanceFreezing(**FROZEN)
    plain = {"max_epochs": 2}
    model.heads.activate("a")
    trainer(**plain).fit(model, datamodule=text_data("a"))
    rnf.protect(model, text_data("a").val_dataloader(), name="a")
    x, before = anything(), rows(model, range(WORDS))
    expected = recalled(rnf, model, x)
    fit(model, rnf, "b")
    assert differ(rows(model, range(WORDS)), before).nonzero().view(-1).tolist() == sorted(B - A)
    assert torch.equal(recalled(rnf, model, x), expected)


def test_rows_learn_in_a_recovery_too_and_recall_is_exact():
    model, rnf = trained(rnf=RelevanceFreezing())
    assert rnf.state.tasks["a"].recovery_epochs
    x, before = anything(), rows(model, B - A)
    expected = recalled(rnf, model, x)
    fit(model, rnf, "b", max_epochs=4)
    assert rnf.state.tasks["b"].recovery_epochs
    assert differ(rows(model, B - A), before).all()
    assert torch.equal(recalled(rnf, model, x), expected)


@pytest.mark.parametrize("how", ["paper", "left out"])
def test_whole_as_before(how):
    rnf = RelevanceFreezing.paper() if how == "paper" else RelevanceFreezing(units="!embedding", **QUICK)
    model, rnf = trained(rnf=rnf)
    before = model.embedding.weight.detach().clone()
    assert (rnf.state.embeddings, rnf.state.shared) == ((), ("embedding.weight",))
    fit(model, rnf, "b")
    assert torch.equal(model.embedding.weight, before)


def test_one_that_a_file_from_before_has_frozen_whole_stays_whole():
    model, before = trained(rnf=RelevanceFreezing(units="!embedding", **QUICK))
    assert not {"embeddings", "learned"} & set(before.state_dict())
    assert not {"tokens", "old_rows"} & set(before.state_dict()["tasks"][0])
    rnf, x, table = RelevanceFreezing(**QUICK), anything(), model.embedding.weight.detach().clone()
    rnf.load_state_dict(before.state_dict())
    expected = recalled(rnf, model, x)
    fit(model, rnf, "b")
    assert (rnf.state.embeddings, rnf.state.shared) == ((), ("embedding.weight",))
    assert torch.equal(model.embedding.weight, table)
    assert torch.equal(recalled(rnf, model, x), expected)


@pytest.mark.filterwarnings("ignore:elasticity=:UserWarning")
def test_elasticity_is_of_rows_that_a_task_has_read():
    model, rnf = trained(rnf=RelevanceFreezing(elasticity={"embedding": 0.1}, **QUICK))
    of_a, nobodys, new = rows(model, A), rows(model, NOBODY), rows(model, B - A)
    fit(model, rnf, "b")
    moved = (rows(model, A) - of_a).abs().sum(1)
    assert (moved[[word in B for word in sorted(A)]] > 0).all()
    assert not differ(rows(model, NOBODY), nobodys).any()
    assert moved.mean() < 0.5 * (rows(model, B - A) - new).abs().sum(1).mean()
    fit(model, rnf, "c")


def test_the_report_has_a_table(first_frozen):
    model, rnf = first_frozen
    fit(model, rnf, "b")
    (row,) = rnf.report(model).to_dict()["embeddings"]
    assert (row["embedding"], row["rows"], row["kept"]) == ("embedding", WORDS, len(B - A))
    assert row["a"] + row["b"] + row["unread"] == WORDS
    assert "kept for earlier ones as they were" in str(rnf.report(model))


def test_a_task_that_uses_it_otherwise_has_it_whole_and_earlier_ones_stay(first):
    model, rnf = first
    x, before = anything(), model.embedding.weight.detach().clone()
    expected = recalled(rnf, model, x)
    forward = type(model).forward

    def functional(model, x):
        return model.heads(model.body(nn.functional.embedding(x, model.embedding.weight).mean(1)))

    type(model).forward = functional
    try:
        fit(model, rnf, "b")
    finally:
        type(model).forward = forward
    assert torch.equal(model.embedding.weight, before)
    assert rnf.state.tasks["b"].tokens["embedding.weight"].all()
    assert torch.equal(recalled(rnf, model, x), expected)


class Partly(Reader):
    """The second task reads the table past its module."""

    def forward(self, x):
        found = nn.functional.embedding(x, self.embedding.weight) if self.heads.active == "b" else self.embedding(x)
        return self.heads(self.body(found.mean(1)))


@pytest.mark.parametrize("embeddings", ["per_task", "frozen"])
def test_later_tasks_leave_a_table_as_it_is_that_one_has_read_otherwise_until_that_is_given_up(embeddings, tmp_path):
    model, rnf = trained(model_type=Partly, rnf=RelevanceFreezing(**QUICK | {"embeddings": embeddings}))
    x, longer = anything(), {"max_epochs": 4}
    fit(model, rnf, "b", **longer)
    expected = {task: recalled(rnf, model, x, task) for task in "ab"}
    rnf.save(tmp_path / "masks.safetensors")
    rnf = RelevanceFreezing(**QUICK | {"embeddings": embeddings})
    rnf.load(tmp_path / "masks.safetensors", model)
    table = model.embedding.weight.detach().clone()
    for _ in range(2):
        fit(model, rnf, "c", **longer)
        assert rnf.weights_left()["embedding"] == 0
        assert torch.equal(model.embedding.weight, table)
        for task, logits in expected.items():
            assert torch.equal(recalled(rnf, model, x, task), logits)
        rnf.forget("c")
    rnf.forget("b")
    fit(model, rnf, "c")
    assert differ(rows(model, C - A), table[sorted(C - A)]).all()
    assert torch.equal(recalled(rnf, model, x), expected["a"])


def test_a_compiled_module_holds_its_rows(first):
    model, rnf = first
    x, nobodys, new = anything(), rows(model, NOBODY), rows(model, B - A)
    expected = recalled(rnf, model, x)
    model.heads.activate("b")
    trainer(rnf, max_epochs=1).fit(torch.compile(model, backend="eager"), datamodule=text_data("b"))
    assert not differ(rows(model, NOBODY), nobodys).any()
    assert differ(rows(model, B - A), new).all()
    assert torch.equal(recalled(rnf, model, x), expected)


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    found = launched("reading.py", 2, tmp_path_factory.mktemp("reading"))
    assert found.codes == [0, 0], found.stderr[-5000:]
    return found.ranks


def test_two_processes_read_and_learn_what_one_does(processes):
    with one_thread():
        alone = stream()
    for rank in processes:
        found = rank["stream"]
        assert found["exact"]
        assert found["changed"] == {"a": (), "b": ()}
        for record, other in zip(found["state"]["tasks"], alone["state"]["tasks"], strict=True):
            for key in ("tokens", "relevant"):
                assert record[key].keys() == other[key].keys()
                assert all(torch.equal(mask, record[key][name]) for name, mask in other[key].items()), key
        kept, of_one = (one["state"]["tasks"][0]["old_rows"]["embedding.weight"] for one in (found, alone))
        assert torch.equal(kept["rows"], of_one["rows"])
        torch.testing.assert_close(kept["values"], of_one["values"])
        for name, value in alone["weights"].items():
            torch.testing.assert_close(found["weights"][name], value)
            assert torch.equal(found["weights"][name], processes[0]["stream"]["weights"][name])


def test_a_sharded_one_is_frozen_whole_whether_it_was_before_or_not(processes):
    for rank in processes:
        found = rank["spread"]
        assert found["embeddings"] == ("embedding.weight",)
        assert found["held"]
        assert found["exact"]
        assert found["whole"] == ((), ("embedding.weight",), False)
