"""`LightningCLI` with the callback in place, for one task (`rnf fit`) and for a stream of them (`rnf stream`)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from torch import nn

from lightning_rnf.callback import RelevanceFreezing
from lightning_rnf.heads import MultiHead
from lightning_rnf.metrics import average_accuracy, forgetting
from lightning_rnf.streams import fit_stream
from lightning_rnf.tasks import checkpoints

SUBCOMMANDS = ("fit", "validate", "test", "predict")


class CommandLine(LightningCLI):
    """`LightningCLI`, whose key ``rnf`` holds the parameters of `RelevanceFreezing`.

    The head of ``data``'s task is activated, if the model has a `MultiHead` with one. A checkpoint is checked before
    anything is done with it.

    Args:
        arguments: the subcommand first; None: those of the process.

    Raises:
        argparse.ArgumentError: if they name what isn't there, or have a wrong type.
        ValueError: if the checkpoint can't be read, or is of another model or a newer version.
    """

    def __init__(self, arguments: Sequence[str] | None) -> None:
        raising: dict[str, Any] = {"exit_on_error": False}
        for_all = {**raising, **dict.fromkeys(SUBCOMMANDS, raising)}
        given = None if arguments is None else list(arguments)
        super().__init__(
            args=given,
            parser_kwargs=for_all,
            seed_everything_default=0,
            # Not config.yaml: where there is no logger it might be the user's own.
            save_config_kwargs={"config_filename": "rnf-config.yaml", "overwrite": True},
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the callback's parameters."""
        parser.add_lightning_class_args(RelevanceFreezing, "rnf")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and read the checkpoint before Lightning does."""
        super().parse_arguments(parser, args)
        path = self._checkpoint_path()
        self._checkpoint = checkpoints.read(path) if path is not None else None

    def before_fit(self) -> None:
        """Activate the task's head, and check the checkpoint against the model."""
        activate_known(self.model, self.datamodule)
        if self._checkpoint is not None:
            checkpoints.widen_to(self._checkpoint, self.model)
            checkpoints.check(self._checkpoint, self.model)
            if checkpoints.has_finished_tasks(self._checkpoint):
                checkpoints.finished_tasks(self._checkpoint).check_module(self.model)
        self._checkpoint = None

    before_validate = before_test = before_predict = before_fit

    def _checkpoint_path(self) -> Path | None:
        # "best", "last" and the like are Lightning's own to find.
        path = self.config[self.config.subcommand].get("ckpt_path")
        known = {"best", "last", "hpc", "registry"}
        return None if path is None or str(path).partition(":")[0] in known else Path(path)


def activate_known(model: nn.Module, data: LightningDataModule | None) -> None:
    """Activate the head of the data's task in a model that has a `MultiHead` with one."""
    task = getattr(data, "task", None)
    for heads in _multi_heads(model):
        if isinstance(task, str) and task in heads.tasks:
            heads.activate(task)


def activate_head(model: nn.Module, name: str) -> None:
    """Activate the head that is the submodule of this name, if it is one of a `MultiHead`."""
    head = model.get_submodule(name)
    for heads in _multi_heads(model):
        for task, candidate in heads.tasks.items():
            if candidate is head:
                heads.activate(task)


def _multi_heads(model: nn.Module) -> list[MultiHead]:
    return [*MultiHead.in_use(model).values()]


def built_model(config: str | Path) -> LightningModule:
    """The model that a YAML file names under its key ``model``; other keys are left alone.

    Raises:
        argparse.ArgumentError: if it can't be built from what is there.
        ValueError: if the file is no YAML, or there is no such key.
    """
    import yaml  # comes with jsonargparse

    try:
        content = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(config)!r} is no YAML: {error}") from error
    if not isinstance(content, dict) or "model" not in content:
        raise ValueError(f"{str(config)!r} has no key 'model' that says which model to build")
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True)
    model: LightningModule = _instantiated(parser, {"model": content["model"]}).model
    return model


def run_stream(arguments: Sequence[str]) -> None:
    """Train a stream of tasks, as ``rnf stream --config stream.yaml`` says.

    Each task gets a Trainer of its own and keeps its checkpoints in ``output/<task>``; the same command goes on where
    it was stopped. ``output/accuracies.json`` gets the accuracy of every task after every task.

    Raises:
        argparse.ArgumentError: if they name what isn't there, or have a wrong type.
        ValueError: if a task has no name, or none of its own.
    """
    parser = _stream_parser()
    config = parser.parse_args(list(arguments))
    seed_everything(config.seed_everything, verbose=False)
    made = _instantiated(parser, config)
    tasks: list[Any] = made.tasks
    names = [getattr(task, "task", None) for task in tasks]
    if not all(isinstance(name, str) and name for name in names) or len(set(names)) < len(names):
        raise ValueError(f"each data module of a stream needs a task attribute, a name of its own; they have {names}")
    output = Path(config.output)

    def trainer(*, callbacks: list[Any]) -> Trainer:
        # A new one for each task, its callbacks and loggers included.
        options = dict(vars(_instantiated(_trainer_parser(), {"trainer": config.trainer.as_dict()}).trainer))
        own = options.pop("callbacks") or []
        options["default_root_dir"] = options["default_root_dir"] or output
        return Trainer(callbacks=[*(own if isinstance(own, list) else [own]), *callbacks], **options)

    matrix = fit_stream(made.model, tasks, made.rnf, trainer, folder=output)
    accuracies = [[float(value) for value in row[: trained + 1]] for trained, row in enumerate(matrix)]
    output.mkdir(parents=True, exist_ok=True)
    summary = {
        "tasks": names,
        "accuracies": accuracies,  # row: after which task; column: of which
        "average_accuracy": float(average_accuracy(matrix)[-1]),
        "forgetting": float(forgetting(matrix)),
        "free_capacity": made.rnf.free_capacity,
    }
    (output / "accuracies.json").write_text(json.dumps(summary, indent=1) + "\n")
    for name, row in zip(names, accuracies, strict=True):
        print(f"after {name}: " + ", ".join(f"{100 * value:.2f}" for value in row))
    print(
        f"average accuracy {100 * summary['average_accuracy']:.2f} %, forgetting {100 * summary['forgetting']:.2f} "
        f"points, {100 * made.rnf.free_capacity:.0f} % of the units are free"
    )


def _stream_parser() -> LightningArgumentParser:
    parser = _trainer_parser(prog="rnf stream", description="Train task after task, and keep what each needs.")
    parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True)
    parser.add_lightning_class_args(RelevanceFreezing, "rnf")
    parser.add_argument(
        "--tasks", type=list[LightningDataModule], required=True, help="a data module for each task, with a name: task"
    )
    parser.add_argument("--seed_everything", type=int, default=0, help="of weights and batches")
    parser.add_argument("--output", type=str, default="stream", help="folder for checkpoints and accuracies.json")
    return parser


def _trainer_parser(**options: Any) -> LightningArgumentParser:
    parser = LightningArgumentParser(exit_on_error=False, **options)
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="a YAML file with any of these")
    parser.add_class_arguments(Trainer, "trainer", instantiate=False)
    return parser


def _instantiated(parser: LightningArgumentParser, config: Any) -> Any:
    parsed = parser.parse_object(config) if isinstance(config, dict) else config
    # jsonargparse 4.49 has a new name for it.
    return getattr(parser, "instantiate", parser.instantiate_classes)(parsed)
