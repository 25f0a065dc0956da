"""A project as YAML files name it: a model, its tasks, functions for the callback."""

from __future__ import annotations

from training import Classifier, clusters

from lightning_rnf.anatomy.predict import supervised
from lightning_rnf.relevance.importance import magnitude
from lightning_rnf.streams import TaskDataModule


class Model(Classifier):
    def __init__(self, lr: float = 1e-2) -> None:
        super().__init__(lr=lr)


class Broken(Model):
    def training_step(self, batch):
        raise ValueError("a bug of the user's own")


class Clusters(TaskDataModule):
    def __init__(self, task: str = "a", samples: int = 320) -> None:
        super().__init__(task, 2, *(clusters(task, samples, seed) for seed in range(3)), batch_size=32)


def name_of_task(trainer, module) -> str:
    return "named-" + module.heads.active


def predict(module, batch):
    return supervised(module, batch)


def score(module, layers, batches, predict):
    return magnitude(module, layers, batches, predict)
