"""One LoRA for three tasks, or one for each: a small BERT that knows other languages learns in which one a name is.

    python examples/adapters_on_names.py                # the names come with Babel: Unicode's CLDR

The network of `languages_of_names.py` is first pretrained here, on names in eight languages that are in none of the
tasks, and stays as it is from then on. The three tasks (Romance, Germanic, Slavic) train adapters of low rank beside
its linear layers, and a head each: one adapter for all tasks, or one for each task (PEFT's way), which forgets nothing
and costs parameters for each. What is tested in the tasks is not named in the pretraining either.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from experiment import Experiment
from images import Data
from languages_of_names import LANGUAGES, SmallBert, drawn, names, stream, tokens
from low_rank import LowRank, adapt, adapter
from torch import Tensor, nn

from lightning_rnf import RelevanceFreezing
from lightning_rnf.streams import Scenario, TaskDataModule, TrainerFactory, fit_stream

KNOWN = ("et", "eu", "fi", "hu", "id", "lt", "sq", "tr")
"""Languages of the pretraining, in the same letters."""

FOR_ALL = "all"
"""Name of an adapter that all tasks have."""


class Adapted(SmallBert):
    """A small BERT that stays as it is, with adapters.

    Args:
        rank: of an adapter.
        per_task: whether each task has one of its own.
        pretraining_epochs: of the network, before the first task.
        letters, length, width, learning_rate: as `SmallBert` has them.
    """

    def __init__(
        self,
        *,
        letters: int,
        length: int,
        width: int,
        rank: int,
        pretraining_epochs: int,
        learning_rate: float,
        per_task: bool = False,
    ) -> None:
        super().__init__(letters=letters, length=length, width=width, learning_rate=learning_rate, rank=rank)
        self.per_task, self.pretraining_epochs = per_task, pretraining_epochs
        self.letters_read, self.length = letters, length

    def own_adapter(self) -> str:
        """The one that speaks."""
        return self.heads.active if self.per_task else FOR_ALL

    def add_adapters(self) -> None:
        """Of the network nothing learns any more but these."""
        for part in (self.letters, self.positions, self.norm, self.layers):
            part.requires_grad_(False)
        adapt(self.layers, self.rank, self.heads.tasks if self.per_task else [FOR_ALL], self.own_adapter)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        own = [*adapter(self, self.own_adapter()), *self.heads.tasks[self.heads.active].parameters()]
        return torch.optim.AdamW(own, self.learning_rate)


def pretrain(model: Adapted, data: Data) -> None:
    """Train the network to tell `KNOWN` apart, and give it adapters then. The run's seed draws what is tested."""
    generator = torch.Generator().manual_seed(seed := torch.initial_seed())
    of_tasks = [entry for family in LANGUAGES.values() for entry in names(family)]
    tested, alphabet = drawn(of_tasks, seed, model.letters_read)
    known = [entry for entry in names(KNOWN) if entry[0] not in tested]
    read = tokens([name for _, _, name in known], alphabet, model.length)
    labels = torch.tensor([KNOWN.index(language) for _, language, _ in known])
    head = nn.Linear(model.heads.in_features, len(KNOWN))
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], 0.002)
    model.train()
    for _ in range(model.pretraining_epochs):
        for batch in torch.randperm(len(read), generator=generator)[: data.samples].split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(head(model.features(read[batch])), labels[batch]).backward()
            optimizer.step()
    optimizer.zero_grad()
    model.add_adapters()


def fit(
    model: Adapted,
    stream: list[TaskDataModule],
    callback: RelevanceFreezing | None,
    trainer_factory: TrainerFactory,
    *,
    folder: Path,
    scenario: Scenario = "task",
) -> tuple[Tensor, dict[str, Any]]:
    """`fit_stream`, and how many weights of adapters each task needs that no task before it does."""
    matrix = fit_stream(model, stream, callback, trainer_factory, folder=folder, scenario=scenario)
    parts = [part for part in model.modules() if isinstance(part, LowRank)]
    every = sum(weight.numel() for part in parts for weight in part.parameters() if weight.requires_grad)
    if callback is None:
        new = [every // len(stream)] * len(stream) if model.per_task else [every] + [0] * (len(stream) - 1)
    else:
        sizes = {layer.name: model.get_parameter(layer.weight).numel() for layer in callback.state.layers}
        taken = [
            sum(size * (1 - record.free_weights[name]) for name, size in sizes.items())
            for record in callback.state.tasks.values()
        ]
        new = [round(now - before) for before, now in zip([0, *taken], taken, strict=False)]
    return matrix, {"adapter weights": every, "new adapter weights": new}


EXPERIMENT = Experiment(stream, Adapted, fit=fit, pretrained=pretrain, is_packaged=True)


def main(arguments: Sequence[str] | None = None) -> dict:
    return EXPERIMENT.main(__file__, __doc__, arguments)


if __name__ == "__main__":
    main()
