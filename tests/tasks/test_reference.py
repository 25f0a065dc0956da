from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SubsetRandomSampler, TensorDataset
from training import Classifier, loader, task_data, trainer

from lightning_rnf import RelevanceFreezing
from lightning_rnf.streams import fit_stream
from lightning_rnf.tasks.reference import Reference


class Numbered(pl.LightningDataModule):
    """Counts its life cycle; sample i is the number i."""

    def __init__(self, samples=50, **options):
        super().__init__()
        self.samples, self.options, self.events = samples, options, []

    def prepare_data(self):
        self.events.append("prepare")

    def setup(self, stage):
        self.events.append(f"setup {stage}")

    def teardown(self, stage):
        self.events.append(f"teardown {stage}")

    def val_dataloader(self):
        self.events.append("load")
        return numbered(self.samples, **self.options)


class Stream(IterableDataset):
    def __iter__(self):
        return iter((torch.tensor([float(i)]), i) for i in range(100))


def numbered(samples, batch_size=8, **options):
    numbers = torch.arange(samples)
    return DataLoader(TensorDataset(numbers.float().view(-1, 1), numbers), batch_size, **options)


def one_target_each(module, batch):
    return torch.zeros(len(batch[1]), 2), batch[1] % 2


@pytest.fixture
def fit():
    made = trainer()
    made.strategy.connect(Classifier())
    return made


def numbers(batches):
    return torch.cat([y for _, y in batches]).tolist()


def test_a_draw_is_random_without_repeats_and_the_same_for_a_seed(fit):
    first, same, other = (Reference(numbered(50), samples=30, seed=seed).draw(fit) for seed in (1, 1, 2))
    drawn = numbers(first.batches)
    assert len(set(drawn)) == 30 == len(drawn)
    assert drawn == numbers(same.batches) != numbers(other.batches)
    assert drawn != sorted(drawn)


def test_a_draw_leaves_the_order_of_the_user_s_loader_out(fit):
    shuffled = numbered(50, shuffle=True)
    assert numbers(Reference(shuffled).draw(fit).batches) == numbers(Reference(numbered(50)).draw(fit).batches)


def test_attribution_gets_exactly_the_first_samples_and_accuracy_all(fit):
    drawn = Reference(numbered(50), samples=40, attribution_samples=13).draw(fit)
    assert len(numbers(drawn.for_attribution)) == 13
    assert numbers(drawn.for_attribution) == numbers(drawn.batches)[:13]
    assert len(numbers(drawn.batches)) == 40
    everything = Reference(numbered(50), samples=None, attribution_samples=None).draw(fit)
    assert sorted(numbers(everything.for_attribution)) == list(range(50))


def test_a_sampler_of_the_user_s_own_is_respected(fit):
    mine = numbered(50, sampler=SubsetRandomSampler(range(10, 20)))
    drawn = Reference(mine).draw(fit)
    assert sorted(numbers(drawn.batches)) == list(range(10, 20))
    assert Reference(mine).size(fit) == (10, 8)


def test_streams_and_lists_are_walked_from_their_start(fit):
    for source in (DataLoader(Stream(), 8), list(numbered(100))):
        drawn = Reference(source, samples=20, attribution_samples=10, predict=one_target_each).draw(fit)
        assert numbers(drawn.batches) == list(range(24))  # whole batches
        assert numbers(drawn.for_attribution) == list(range(16))


def test_a_function_gives_each_task_its_own(fit):
    asked = []

    def of_task(trainer, module):
        asked.append((trainer, module))
        return numbered(20)

    assert sorted(numbers(Reference(of_task).draw(fit).batches)) == list(range(20))
    assert asked == [(fit, fit.lightning_module)]


@pytest.mark.parametrize("source", [iter(numbered(20)), (batch for batch in numbered(20)), 5])
def test_what_can_be_walked_only_once_or_not_at_all_is_refused(fit, source):
    with pytest.raises(TypeError, match="expected a data module or a loader that can be walked twice"):
        Reference(source).draw(fit)


def test_a_data_module_goes_through_its_life_cycle(fit):
    module = Numbered()
    Reference(module).draw(fit)
    assert module.events == ["prepare", "setup validate", "load", "teardown validate"]
    assert module.trainer is None  # as before


def test_size_is_known_before_drawing(fit):
    assert Reference(numbered(50)).size(fit) == (50, 8)
    assert Reference(numbered(50), samples=20).size(fit) == (20, 8)
    assert Reference(numbered(5)).size(fit) == (5, 5)


def test_size_of_loaders_that_are_walked_counts_whole_batches_or_is_not_known(fit):
    mine = numbered(50, batch_size=16, sampler=SubsetRandomSampler(range(40)))
    assert Reference(mine, samples=20).size(fit) == (32, 16)
    assert len(numbers(Reference(mine, samples=20).draw(fit).batches)) == 32
    batches = DataLoader(numbered(50).dataset, batch_sampler=BatchSampler(SubsetRandomSampler(range(10)), 5, False))
    assert Reference(batches).size(fit) == (2, 1)  # batches
    assert len(numbers(Reference(batches).draw(fit).batches)) == 10
    assert Reference(DataLoader(Stream(), 8)).size(fit) is None


def test_transfer_hooks_see_a_validating_trainer_and_the_stage_comes_back():
    stages = []

    class Augmenting(Classifier):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            stages.append((self.trainer.validating, self.training))
            return batch

    class Draw(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            stages.clear()
            Reference(loader("a", 64)).draw(trainer)
            assert trainer.training
            assert pl_module.training

    trainer(Draw(), max_epochs=1).fit(Augmenting(), loader("a", 64), loader("a", 64))
    assert stages == [(True, False)] * 2


@pytest.mark.filterwarnings("ignore:.*overridden `on_before_batch_transfer` in `LightningModule`:UserWarning")
def test_reference_data_and_test_data_go_through_the_same_transfer_hooks_as_training_data():
    class Shifted(Classifier):
        """Learns what is 5 away from what the loader gives."""

        def on_before_batch_transfer(self, batch, dataloader_idx):
            return batch[0] - 5, batch[1]

        def forward(self, x):
            assert abs(x.mean()) < 1
            return super().forward(x)

    data = task_data("a", 64)
    for part in (data.train, data.validation, data.test):
        part.tensors = (part.tensors[0] + 5, part.tensors[1])
    rnf = RelevanceFreezing(criterion=0.2)
    fit_stream(Shifted(), [data], rnf, lambda callbacks: trainer(*callbacks, max_epochs=1))
    assert list(rnf.state.tasks) == ["a"]
