"""What will disappoint is said before it does: parameters that no later task can use, criteria that say nothing."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_rnf.anatomy import UnitMap
from lightning_rnf.memory import FreezeState, TaskRecord
from lightning_rnf.search import Criterion

T = TypeVar("T")

MOST_SHARED = 0.5
"""Share of the parameters, heads left out, that may be frozen whole without a word."""


@dataclass(frozen=True)
class Sight:
    """What was seen at a task's end.

    Attributes:
        drift: of earlier tasks' logits, as `probes.drifts`.
        noise: how far the task's own logits are from those of a second run; None: it has no samples that can be kept.
    """

    drift: dict[str, float]
    noise: float | None


def of_units(units: UnitMap, module: nn.Module) -> None:
    """Warn of layers that can't be made of units, and if less than half of the parameters will be left to learn with.

    Before the first task ends.
    """
    if units.whole:
        by_reason: dict[str, list[str]] = defaultdict(list)
        for name, found in units.whole.items():
            by_reason[found].append(name)
        described = "; ".join(f"{', '.join(names)} {found}" for found, names in by_reason.items())
        rank_zero_warn(
            f"{len(units.whole)} layer{'s' * (len(units.whole) > 1)} can't be made of units and will be frozen whole "
            f"when this task has ended, so later tasks can only reuse what they know: {described}. If that is as it "
            "should be, leave them out without a word (units='!name', or globs of the others); else build a layer for "
            "each run, give each a weight of its own, or bake parametrizations in "
            "(torch.nn.utils.parametrize.remove_parametrizations) before the first fit"
        )
    parameters = dict(module.named_parameters(remove_duplicate=False))
    learning = [name for name in units.shared if name not in units.kept]
    shared = sum(parameters[name].numel() for name in learning)
    in_units = (name for layer in units.layers for name in layer.parameters)
    of_units = sum(parameters[name].numel() for name in in_units if name not in units.kept)
    if not shared or shared <= MOST_SHARED * (shared + of_units):
        return
    sizes: Counter[str] = Counter()
    for name in learning:
        sizes[name.rpartition(".")[0]] += parameters[name].numel()
    largest = ", ".join(
        f"{where or 'the model itself'} ({size:,}, {_reason(units, where)})" for where, size in sizes.most_common(3)
    )
    rank_zero_warn(
        f"{shared / (shared + of_units):.0%} of the parameters outside of heads belong to no unit and will be frozen "
        f"whole when this task has ended, so later tasks can only reuse them: {largest}. print(UnitMap.of(module, "
        "batch)) has the rest. A later task then learns with the units of the other layers and its head: give those "
        "layers more units, or use layers that are made of units (Linear, convolutions, LSTM, GRU, RNN) in these places"
    )


def of_let_go(module: nn.Module, state: FreezeState) -> None:
    """Warn of what the user trains now and kept from training when a finished task ended, which uses all of it.

    Before parameters that are frozen whole are taken out of training.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    let_go = [name for name in state.kept if name in parameters and parameters[name].requires_grad]
    if let_go:
        names = dict.fromkeys(name.rpartition(".")[0] or "the model itself" for name in let_go)
        rank_zero_warn(
            f"{_listed(names)}: kept from training (requires_grad was False) when {next(iter(state.tasks))!r} ended, "
            "which uses all of it, so it stays frozen whole though it has requires_grad now. To train it in later "
            "tasks, let it learn from the first task on, or name these layers in units= then: tasks are made of their "
            "units, and free ones learn"
        )


def of_record(
    record: TaskRecord, criterion: Criterion, constant: float, frozen_before: Mapping[str, Tensor], *, rationed: bool
) -> None:
    """Warn if the criterion says nothing of this task: whatever is kept meets it, or nothing may go.

    Args:
        record: of the task that has ended.
        criterion: what its sub-network was held to.
        constant: accuracy of the best answer that is always the same, in [0, 1].
        frozen_before: bool ``(units,)`` by layer: what earlier tasks need.
        rationed: whether a ration took units away, whatever the criterion says.
    """
    limit = criterion.accuracy_limit(record.accuracy)
    kept = sum(int(mask.sum()) for mask in record.relevant.values())
    units = sum(len(mask) for mask in record.relevant.values())
    free = units - sum(int(frozen.sum()) for frozen in frozen_before.values())
    found = None
    judged = (
        "Where classes are unequal or a task was hardly learned, accuracy says little: judge it by MetricDrop with a "
        "metric that weighs classes equally, MetricDrop(MulticlassAccuracy(num_classes=..., average='macro')) for "
        "balanced accuracy; train longer, or choose another tolerance"
    )
    if record.scored:
        judged = "Train longer, choose another tolerance, or judge it by MetricDrop(MeanSquaredError(), tolerance=...)"
    if record.scored and limit is not None and limit <= 0:
        found = (
            f"the whole network explains {record.accuracy:.1%} of the variance of the targets, and the criterion lets "
            "all of that go: it is met by a sub-network that knows nothing"
        )
    elif limit is not None and 0 < limit <= constant:  # below, the criterion is meant to say nothing
        chance = ", so the task is at chance" if record.accuracy <= constant else ""
        found = (
            f"an answer that is always the same has an accuracy of {constant:.4f}, and the criterion asks for "
            f"{limit:.4f} (the whole network has {record.accuracy:.4f}{chance}): it is met by a sub-network that knows "
            "nothing"
        )
    elif kept == 0:
        found = "no unit is relevant, so the criterion is met by a network that says nothing"
    elif record.cutoff == 0 and free > 0 and not rationed and not record.recovery:
        found = (
            f"not one of {free} free units can go without falling short of the criterion, so the task claims all "
            "of them"
        )
    if found is not None:
        rank_zero_warn(f"{record.name}: {found}. {judged}")


def of_drift(name: str, seen: Sight, changed: Mapping[str, Sequence[str]]) -> None:
    """Warn of whatever is not bit-identical at a task's end, and of logits that two runs do not agree about."""
    if seen.noise is None:
        rank_zero_warn(
            f"{name}: its reference data can't be cut into samples and are too large to be kept whole, so drift of its "
            "logits will not be known"
        )
    elif seen.noise > 0:
        rank_zero_warn(
            f"{name}: two runs of its sub-network on the same samples differ by up to {seen.noise:.3g}, so its recall "
            "can't be bit-identical: dropout or another random part is on in eval mode (a function called with "
            "training=True, say), or the forward has a state of its own that is no buffer. Its drift will not be known"
        )
    for task in sorted({*seen.drift, *changed}):
        parts = [f"a logit by {seen.drift[task]:.3g}"] if seen.drift.get(task) else []
        parts += [f"weights that it froze in {', '.join(changed[task])}"] if changed.get(task) else []
        if parts:
            rank_zero_warn(
                f"{name}: recall of {task!r} is not what it was when that task ended: {' and '.join(parts)} changed. "
                "Likely causes: a head or an adapter of your own was switched by hand (activate the task's before you "
                "compare), frozen rows were written past the optimizer or before the fit (other weights were loaded), "
                "a forward has a state of its own that is no buffer, or rows of a layer are not independent"
            )


def of_writes(name: str, written: Sequence[str]) -> None:
    """Warn that weights were written after the record of a task was made."""
    if written:
        rank_zero_warn(
            f"{name}: weights were written after the task's record was made ({', '.join(written)}), by the module's "
            "own on_train_end or a callback behind RelevanceFreezing (averages, schedule-free optimizers that swap "
            "their weights), so the record is of weights that no longer exist: let a callback that stands before "
            "RelevanceFreezing write them in its on_train_end"
        )


def tried(work: Callable[[], T], name: str = "") -> T | None:
    """What work gives that no task may be lost for; a failure is a warning, and None."""
    try:
        return work()
    except Exception as error:  # whatever a forward of the user's makes of a few samples
        said = " ".join(str(error).split())
        rank_zero_warn(
            f"{name or 'rehearsal of the task'}: a few samples could not be kept, run again or drawn "
            f"({type(error).__name__}: {said:.200}); the task is kept all the same, but drift is not known"
        )
        return None


def of_options(norm_statistics: str, elasticity: object, *, is_elastic: bool) -> None:
    """Warn of options by which recall is not exact."""
    if norm_statistics == "shared":
        rank_zero_warn("norm_statistics='shared': later tasks move the running statistics, so recall is not exact")
    if is_elastic:
        rank_zero_warn(f"elasticity={elasticity}: relevant units go on learning, so recall will not be exact")


def of_runs(name: str, left: Sequence[str]) -> None:
    """Warn of modules that are frozen whole, since only some of the task's batches run them."""
    if left:
        named = _listed(where or "the model itself" for where in left)
        rank_zero_warn(
            f"{name}: {named} ran on some batches of the reference data only, and can't be made of units (something "
            "else uses its weight there, batches disagree about it, or earlier tasks know no such layer): frozen whole "
            "with the task"
        )


def _reason(units: UnitMap, module: str) -> str:
    return next(
        (units.reasons[name] for name in units.shared if name.rpartition(".")[0] == module and name in units.reasons),
        "shared",
    )


def _listed(names: Iterable[str], most: int = 6) -> str:
    every = list(names)
    return ", ".join(every[:most]) + (f" and {len(every) - most} more" if len(every) > most else "")
