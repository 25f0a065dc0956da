"""What test_portraying runs in several processes, and in one: ``portraying.py folder``, started by ``launched``."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
from apart import shifted
from processes import RANK, WORLD, trained
from training import Classifier, plain, trainer

from lightning_rnf.streams import TaskDataModule
from lightning_rnf.tasks import portraying


def portraits(*tasks, **options):
    """Of tasks, by processes that see a share of the data each; nothing is learned."""
    model = trained(Classifier)
    rnf = plain(criterion=lambda score: score.cutoff <= 20, portraits=True, **options)
    strategy = {"strategy": "ddp", "devices": WORLD} if WORLD > 1 else {}
    for task in tasks:
        model.heads.activate(task)
        data = TaskDataModule(task, 2, *(shifted(task, 77, seed) for seed in range(3)), batch_size=8)
        trainer(rnf, max_epochs=1, **strategy).fit(model, datamodule=data)
    found = [record.portrait for record in rnf.state.tasks.values()]
    return [None if one is None else one.to_plain() for one in found]


def of_few_samples():
    """Of fewer samples than there are, each compared with the other folds."""
    all_of_them, portraying.SAMPLES = portraying.SAMPLES, 50
    try:
        return portraits("a", "b")
    finally:
        portraying.SAMPLES = all_of_them


def twice_for_one(module, batch):
    """Calls the forward once more for the last batch, which is smaller: one process of several has it."""
    x, y = batch
    if len(x) == 5:
        module(x)
    return module(x), y


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found = {"portraits": portraits("a", "b", fit_head="auto"), "unread": portraits("a", predict=twice_for_one)}
    found["of_few"] = of_few_samples()
    torch.save(found, Path(sys.argv[1]) / f"{RANK}.pt")
