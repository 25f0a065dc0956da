"""One forward for each finished task, and which of them knows the samples."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_rnf.anatomy import Inputs, UnitLayer
from lightning_rnf.inference.densities import Judge, judges, levels, posterior
from lightning_rnf.inference.reading import reading
from lightning_rnf.memory import TaskRecord
from lightning_rnf.recall import (
    Recalls,
    Switch,
    dimension_of_classes,
    joined_outputs,
    own_forward,
    part_of_batch,
    switched,
)

By = Literal["auto", "gaussians", "energy", "entropy"]
"""``"gaussians"``: what sub-networks make of a sample beside the Gaussians of their tasks' classes. ``"energy"``, the
logsumexp of a task's logits, and ``"entropy"`` of their softmax, relative to the largest, need nothing remembered.
``"auto"``: Gaussians if all tasks have portraits, else entropy: what found most tasks in ``docs/inference.md``."""

FALSE_ALARMS = 0.05
"""A sample of a task is said to be of none so often, if that is asked for."""


LARGEST_DOUBT = 20.0
"""Of samples judged together none says more against a task than this, in nats: one odd sample decides nothing."""


@dataclass(frozen=True, eq=False)
class TaskInference:
    """Which finished task samples are of.

    Attributes:
        names: of each sample's task; None: it is of none of them. One name for all if they were judged together.
        scores: ``(N, tasks)``, or ``(1, tasks)`` of all together, the larger the likelier: log probabilities, summed
            over samples that are judged together, each from ``-LARGEST_DOUBT`` up; or energies, or negative entropies,
            in [-1, 0] for a sample. Never NaN: where a sub-network makes no finite numbers of a sample it tells no
            tasks apart.
        tasks: whose scores they are, in the order of their ends.
        logits: what the model returns for each sample in the recall of its task, those of the likeliest where its name
            is None. Logits are as wide as those of the task with the most classes, with ``-inf`` where one has fewer.
        levels: ``(N,)`` in [0, 1]: share of the likeliest task's reference data that is less usual than the sample is.
            None: scores are of logits.
    """

    names: tuple[str | None, ...]
    scores: Tensor
    tasks: tuple[str, ...]
    logits: Any
    levels: Tensor | None = None


class _Inferring:
    """In the place of a model's forward."""

    def __init__(
        self,
        switch: Switch,
        layers: Mapping[str, UnitLayer],
        records: Mapping[str, TaskRecord],
        by: By,
        *,
        grouped: bool,
        unknown: bool,
    ) -> None:
        self.switch, self.layers, self.records = switch, layers, records
        self.portraits = {name: one.portrait for name, one in records.items() if one.portrait is not None}
        self.by = ("gaussians" if len(self.portraits) == len(records) else "entropy") if by == "auto" else by
        self.grouped, self.unknown = grouped, unknown
        self._last: TaskInference | None = None
        self.judges: Sequence[tuple[Judge, Judge]] = ()
        lacking = [name for name in records if name not in self.portraits]
        if self.by == "gaussians":
            if lacking:
                raise ValueError(
                    f"what data of {', '.join(map(repr, lacking))} look like is not remembered: end tasks with "
                    "RelevanceFreezing(portraits=True), or infer by='entropy'"
                )
            self.judges = judges(tuple(self.portraits.items()))
        elif unknown:
            raise ValueError("unknown=True needs what RelevanceFreezing(portraits=True) remembers of all tasks")
        if by == "auto" and lacking and self.portraits:
            rank_zero_warn(
                f"what data of {', '.join(map(repr, lacking))} look like is not remembered, so all tasks are judged by "
                "the entropy of their logits, which is right less often (docs/inference.md)"
            )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns, of each sample in the recall of the task that it is found to be of."""
        self._last = self._infer(Inputs(args, kwargs))
        return self._last.logits

    @property
    def last(self) -> TaskInference:
        """Of the last forward.

        Raises:
            AttributeError: if there was none.
        """
        if self._last is None:
            raise AttributeError(
                "no sample has been told apart yet: call the model, model(x), inside of recall('auto') first"
            )
        return self._last

    @torch.no_grad()
    def infer(self, inputs: Inputs) -> TaskInference:
        """By a call of the model: its own hooks see what goes in, and change what comes out, as in the recall."""
        logits = self.switch.module(*inputs.args, **inputs.kwargs)
        return replace(self.last, logits=logits)

    def _infer(self, inputs: Inputs) -> TaskInference:
        """With gradients the tasks that were found run once more: those that were not need no memory for a graph."""
        with torch.no_grad():
            found, outputs, places = self._named(inputs)
        used = [index for index, some in enumerate(places) if some]
        if torch.is_grad_enabled():
            with own_forward(self.switch.module, self.switch.before):
                for index in used:
                    with self.switch.to(found.tasks[index]):
                        outputs[index] = self.switch.module(*inputs.args, **inputs.kwargs)
        # Of the whole batch, of which some are taken: the bits of a part are those of another size of batch.
        parts = [part_of_batch(outputs[index], places[index], inputs.samples) for index in used]
        heads = [self.switch.module.get_submodule(self.records[found.tasks[index]].head) for index in used]
        return replace(found, logits=joined_outputs(parts, [places[index] for index in used], heads))

    def _named(self, inputs: Inputs) -> tuple[TaskInference, list[Any], list[list[int]]]:
        """All but the logits, what each task's recall returns for the whole batch, and the places of its samples."""
        sized = inputs.samples
        if not sized:
            raise ValueError(f"the input has no samples: {[tuple(tensor.shape) for tensor in inputs.tensors()]}")
        outputs, points, logits = self._run(inputs, sized)
        scores, densities = self._scores(points, logits)
        floor = -LARGEST_DOUBT if self.judges else -torch.inf
        shown = scores.clamp(min=floor).sum(0, keepdim=True) if self.grouped else scores
        chosen = shown.argmax(1)
        tasks = tuple(self.records)
        of_samples = chosen.expand(sized) if self.grouped else chosen
        usual = None
        if densities is not None:
            usual = levels([one.usual for one in self.portraits.values()], of_samples, densities)
        names: list[str | None] = [tasks[index] for index in chosen.tolist()]
        if self.unknown and usual is not None and densities is not None:
            own = densities.gather(1, of_samples.unsqueeze(1)).view(-1)
            judged = [_are_unusual(usual[~own.isnan().cpu()])] if self.grouped else (usual < FALSE_ALARMS).tolist()
            names = [None if is_none else name for name, is_none in zip(names, judged, strict=True)]
        places = [(of_samples == index).nonzero().view(-1).tolist() for index in range(len(tasks))]
        return TaskInference(tuple(names), shown, tasks, None, usual), outputs, places

    def _run(self, inputs: Inputs, samples: int) -> tuple[list[Any], list[Tensor], list[Tensor]]:
        """What each task's recall returns for the whole batch, its features in the task's space, and its logits."""
        module, outputs, points, logits = self.switch.module, [], [], []
        with own_forward(module, self.switch.before):
            for name, record in self.records.items():
                portrait = self.portraits.get(name) if self.judges else None
                layers = [self.layers[layer] for layer in portrait.space.layers] if portrait else []
                with self.switch.to(name), reading(module, layers, record.relevant, record.head) as read:
                    outputs.append(module(*inputs.args, **inputs.kwargs))
                if read.head is None:
                    raise ValueError(
                        f"the head of task {name!r}, {record.head!r}, did not run: tasks can be inferred only where "
                        "the heads are a MultiHead, which is switched"
                    )
                if portrait:
                    points.append(portrait.space(read.features(samples)))
                elif read.head.ndim < 2 or len(read.head) != samples:
                    raise ValueError(
                        f"the head of task {name!r} says {tuple(read.head.shape)} for {samples} samples: tasks are "
                        "inferred by logits (N, classes), or by what portraits=True remembers"
                    )
                else:
                    of_task = _of_samples(read.head, module.get_submodule(record.head))
                    if of_task.shape[1] < 2:
                        raise ValueError(
                            f"the head of task {name!r} says one number for a sample, and how sure of it the task is "
                            f"can't be told by {self.by}, which compares classes: end tasks with "
                            "RelevanceFreezing(portraits=True), which remembers what their data look like"
                        )
                    logits.append(of_task)
        return outputs, points, logits

    def _scores(self, points: list[Tensor], logits: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Scores ``(N, tasks)``, and each task's largest log density in its own space."""
        if self.judges:
            pairs = list(zip(self.judges, points, strict=True))
            densities = [judge(some) for (judge, _), some in pairs]
            largest = [own.of_classes(some).amax(1) for (_, own), some in pairs]
            return posterior(self.portraits, densities), torch.stack(largest, dim=1)
        if self.by == "energy":
            return _energies(torch.stack([of_task.float().logsumexp(1) for of_task in logits], dim=1)), None
        return torch.stack([-_entropy(of_task.float()) for of_task in logits], dim=1), None


def _are_unusual(levels: Tensor) -> bool:
    """Whether samples of one task would be so unusual together in `FALSE_ALARMS` of all cases at most.

    Their levels are uniform in [0, 1] then, so the mean of several is nearly normal. No sample has none: it is unusual
    that all are left out.
    """
    if not len(levels):
        return True
    if len(levels) == 1:
        return bool(levels < FALSE_ALARMS)
    quantile = float(torch.special.ndtri(torch.tensor(FALSE_ALARMS, dtype=torch.float64)))
    return bool(levels.mean() < 0.5 + quantile / math.sqrt(12 * len(levels)))


def _of_samples(logits: Tensor, head: nn.Module) -> Tensor:
    """Logits ``(N, classes)``, their means over positions."""
    if logits.ndim == 2:
        return logits
    return logits.movedim(dimension_of_classes(head), 1).flatten(2).mean(2)


def _entropy(logits: Tensor) -> Tensor:
    """Of the softmax, as a share of the largest that so many classes have: in [0, 1]; 1 where it is no number."""
    shares = logits.log_softmax(1)
    most = torch.tensor(float(max(logits.shape[1], 2))).log()
    informed = shares.exp() * shares.clamp(min=torch.finfo(shares.dtype).min)  # of a masked class: 0, not 0 · inf
    return (-informed.sum(1) / most.to(logits.device)).nan_to_num(nan=1.0)


def _energies(found: Tensor) -> Tensor:
    """Energies ``(N, tasks)`` without NaN or infinity: such a task is by a nat less likely than all others are.

    So it is named for no sample that another task knows, and one such sample says little in a group: nothing, if no
    task knows it.
    """
    known = found.isfinite()
    least = found.masked_fill(~known, torch.inf).amin(1, keepdim=True)
    return torch.where(known, found, torch.where(least.isfinite(), least - 1, torch.zeros_like(least)))


@contextmanager
def inferring(
    module: nn.Module,
    recalls: Recalls,
    layers: Mapping[str, UnitLayer],
    records: Mapping[str, TaskRecord],
    *,
    by: By = "auto",
    grouped: bool = False,
    unknown: bool = False,
) -> Iterator[_Inferring]:
    """Inside the context the model itself, called with samples, infers; so does what comes back, and says more.

    Args:
        module: the model.
        recalls: by task.
        layers: unit layers by name.
        records: of the finished tasks, in the order of their ends.
        by: what is compared.
        grouped: all samples are known to be of one task.
        unknown: they may be of none.

    Raises:
        ValueError: if a task lacks what is to be compared.
    """
    with switched(module, recalls) as switch:
        infers = _Inferring(switch, layers, records, by, grouped=grouped, unknown=unknown)
        with own_forward(module, infers):
            yield infers
