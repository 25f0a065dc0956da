"""What a finished task has come to: said in a line, and sent to whatever loggers the Trainer has."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lightning_rnf.memory import FreezeState, TaskRecord, masks
from lightning_rnf.packages import Logger, Trainer, rank_zero_info, rank_zero_warn
from lightning_rnf.report import figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def announce(state: FreezeState, record: TaskRecord, *, trained: bool = True, chosen: str = "") -> None:
    """Say what the task that has ended last needs and has left; warn if it falls short, or has filled a layer.

    Args:
        state: the finished tasks.
        record: of the last one.
        trained: whether a fit has ended it, which could have gone on with a recovery.
        chosen: ``"ration"`` or ``"recovery"``: what the user has set that falls short; else it has set itself.
    """
    units = sum(layer.units for layer in state.layers)
    scored = f"{record.scored or 'accuracy'} {record.accuracy:.4f}"
    epochs = f", recovered for {record.recovery_epochs} epochs" if record.recovery else ""
    rank_zero_info(
        f"{record.name}: {sum(int(mask.sum()) for mask in record.relevant.values())} of {units} units are relevant "
        f"({scored}, of the sub-network {record.subnetwork_accuracy:.4f}{epochs}, "
        f"{len(record.evaluations) + len(record.recovery)} evaluations on {record.samples} samples); "
        f"{masks.free_capacity_over_tasks(state)[-1]:.1%} free, "
        f"{masks.free_weights(state, masks.free_weights_of_layers(state)):.1%} of the weights"
    )
    if not record.accepted:
        if chosen == "ration":
            cause = f"the ration of {record.ration}"
            way_out = "give it a larger ration" + ", or recovery_epochs" * trained
        elif chosen == "recovery":
            cause = "its recovery"
            way_out = "give it more recovery_epochs, a milder recovery_criterion or ration, or recovery_search=True"
        else:
            share = 1.0 if record.ration is None else record.ration
            cause = f"a claim on {share:.0%} of each layer's free units" + ", recovered," * bool(record.recovery)
            way_out = (
                "train it for more epochs, tolerate a larger drop (criterion=), let it claim more (ration=1.0), or "
                "give the network more units: build it wider, or rnf.widen(model, 0.5) before a fit"
            )
        rank_zero_warn(
            f"{record.name}: {cause} falls short of the criterion: {scored} of the whole network, "
            f"{record.subnetwork_accuracy:.4f} of the sub-network; {way_out}"
        )
    before = replace(state, tasks={name: one for name, one in state.tasks.items() if name != record.name}).frozen()
    full = [name for name, frozen in state.frozen().items() if frozen.all() and not before[name].all()]
    if full:
        rank_zero_warn(
            f"no free units are left in {', '.join(sorted(full))}: later tasks can only reuse them; claim less of "
            "each layer, with ration= or recovery_epochs=, or give these layers more units before the next fit: "
            "rnf.widen(model, 0.5)"
        )


def scalars(state: FreezeState, record: TaskRecord) -> dict[str, float]:
    """Numbers of the task that has ended last, by name: free capacity in all and per layer, accuracies, seconds.

    Of a regression there is no ``accuracy``, but ``r_squared``.
    """
    scored = "r_squared" if record.scored else "accuracy"
    frozen, of_weights = state.frozen(), masks.free_weights_of_layers(state)
    found = {
        "free_capacity": masks.free_capacity_over_tasks(state)[-1],
        "free_weights": masks.free_weights(state, of_weights),
        "relevant_units": float(sum(int(mask.sum()) for mask in record.relevant.values())),
        "cutoff": float(record.cutoff),
        scored: record.accuracy,
        f"subnetwork_{scored}": record.subnetwork_accuracy,
        "accepted": float(record.accepted),
        "evaluations": float(len(record.evaluations) + len(record.recovery)),
    }
    found |= {f"seconds/{what}": seconds for what, seconds in record.seconds.items()}
    found |= {f"free_capacity/{layer}": float((~units).double().mean()) for layer, units in frozen.items()}
    found |= {f"free_weights/{layer}": share for layer, share in of_weights.items()}
    if record.drift:
        found["largest_drift"] = max(record.drift.values())
    return {f"rnf/{name}": value for name, value in found.items()}


def log(trainer: Trainer, state: FreezeState, record: TaskRecord) -> None:
    """Send the numbers to every logger, and figures to those that take some; the step is the number of finished tasks.

    Figures need matplotlib (extra ``plots``); without it there are none. What a logger doesn't take, or can't be drawn,
    is a warning.
    """
    step, numbers = len(state.tasks), scalars(state, record)
    log_scalars(trainer, numbers, step)
    drawn = {"rnf/capacity": lambda: figures.capacity(state), "rnf/search": lambda: figures.search(record)}
    if len(state.tasks) > 1:
        drawn["rnf/overlap"] = lambda: figures.overlap(state)
    log_figures(trainer, drawn, step)


def log_scalars(trainer: Trainer, numbers: dict[str, float], step: int) -> None:
    """Send numbers, by name, to every logger."""
    for logger in trainer.loggers if trainer.is_global_zero else ():
        with _forgiven(f"{type(logger).__name__} did not take the numbers of the task"):
            logger.log_metrics(numbers, step=step)


def log_figures(trainer: Trainer, draw: Mapping[str, Callable[[], Figure]], step: int) -> None:
    """Draw figures, by name, and send them to every logger that takes some; if there is one, and matplotlib."""
    takers = []
    for logger in trainer.loggers if trainer.is_global_zero else ():
        with _forgiven(f"{type(logger).__name__} did not say whether it takes figures"):
            takers += [logger] if takes_figures(logger) else []
    if not takers or importlib.util.find_spec("matplotlib") is None:
        return
    for name, drawn in draw.items():
        figure = None
        with _forgiven(f"{name} can't be drawn"):
            figure = drawn()
        for logger in takers if figure is not None else ():
            with _forgiven(f"{type(logger).__name__} did not take {name}"):
                _log_figure(logger, name, figure, step)


def takes_figures(logger: Logger) -> bool:
    """Whether a logger has one of the methods by which the known ones take figures."""
    experiment: object = getattr(logger, "experiment", None)
    return _has(experiment, "add_figure") or _has(logger, "log_image") or _has(experiment, "log_figure")


@contextmanager
def _forgiven(what: str) -> Iterator[None]:
    """Hours of training don't end for a picture, or for a network that is down: a failure is a warning."""
    try:
        yield
    except Exception as error:  # loggers raise whatever their services do
        said = " ".join(str(error).split())
        rank_zero_warn(f"{what}: {type(error).__name__}: {said:.200}; the task is kept all the same")


def _log_figure(logger: Any, name: str, figure: Any, step: int) -> None:
    experiment = logger.experiment
    if _has(experiment, "add_figure"):  # TensorBoard
        experiment.add_figure(name, figure, global_step=step, close=False)
    elif _has(logger, "log_image"):  # Weights & Biases
        import numpy

        figure.canvas.draw()
        logger.log_image(key=name, images=[numpy.asarray(figure.canvas.buffer_rgba())], step=step)
    elif _has(experiment, "log_figure"):
        if getattr(logger, "run_id", None) is not None:  # MLflow
            experiment.log_figure(logger.run_id, figure, artifact_file=f"{name}-{step}.png")
        else:  # Comet
            experiment.log_figure(name, figure, step=step)


def _has(thing: object, method: str) -> bool:
    return callable(getattr(thing, method, None))
