"""What the process keeps of each task's end, to compare with at the end of later ones: samples, logits, heatmaps."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn
from zennit.core import Composite

from lightning_rnf.anatomy import UnitLayer
from lightning_rnf.memory import FreezeState, TaskRecord
from lightning_rnf.recall import subnetwork
from lightning_rnf.relevance import Gallery, heatmaps, images_of
from lightning_rnf.tasks.foresight import Sight, tried
from lightning_rnf.tasks.probes import Probe, drifts, taken
from lightning_rnf.tasks.reference import ReferenceData


@dataclass
class Witnesses:
    """A few samples of each task with what the model made of them. They are in no checkpoint.

    Attributes:
        probes: by task.
        gallery: heatmaps of the same samples.
    """

    probes: dict[str, Probe] = field(default_factory=dict)
    gallery: Gallery = field(default_factory=Gallery)

    def look(
        self,
        record: TaskRecord,
        module: nn.Module,
        layers: Sequence[UnitLayer],
        reference: ReferenceData,
        state: FreezeState,
        *,
        masked: bool,
        images: int = 0,
        composite: Composite | None = None,
    ) -> Sight:
        """See again what earlier tasks left, and keep some of a task that has ended.

        Of several ranks the first one looks, and all keep the same samples.

        Args:
            record: of the task.
            module: whole, where the reference data are.
            layers: its unit layers.
            reference: the task's data.
            state: the finished tasks, this one among them.
            masked: as for `subnetwork.recall`.
            images: of so many samples of each task heatmaps are made.
            composite: Zennit's rules for them; None: as for units.
        """
        ranks, name = reference.ranks, record.name
        recall = partial(subnetwork.recall, module, layers, record, state.widenings, masked=masked)
        drift = ranks.decided(lambda: drifts(module, state, self.probes, masked=masked))
        # One that fails is told of there, and is not too large.
        found = ranks.decided(lambda: tried(lambda: [taken(module, reference, recall)], name))
        kept = found[0] if found else None
        if kept is not None and kept[2] == 0:
            self.probes[name] = Probe.of(module, kept[0], kept[1], reference)
        if images:
            given = (record, module, layers, state, drift, masked, images, composite)
            ranks.decided(lambda: tried(lambda: self._draw(*given), name))
        return Sight(drift, kept[2] if kept is not None else None if found else 0.0)

    def _draw(
        self,
        record: TaskRecord,
        module: nn.Module,
        layers: Sequence[UnitLayer],
        state: FreezeState,
        drift: Mapping[str, float],
        masked: bool,
        images: int,
        composite: Composite | None,
    ) -> None:
        for name, probe in self.probes.items():
            if name == record.name or name in drift:  # of the others another head would run
                batch = probe.on_device(module)
                of_task = (layers, state.recalled(name), state.widenings)
                with subnetwork.recall(module, *of_task, masked=masked):
                    maps = heatmaps(module, layers, batch, probe.reference.predict, composite)
                self.gallery.add(name, record.name, images_of(batch)[:images], maps[:images])

    def warn_of_lost(self, tasks: Iterable[str]) -> None:
        """Warn that there will be no heatmaps of tasks that ended in another program."""
        lost = [name for name in tasks if name not in self.probes]
        if lost:
            rank_zero_warn(
                f"no heatmaps of {', '.join(map(repr, lost))}: samples of a task are kept until the program ends, and "
                "are in no checkpoint; make them yourself with lightning_rnf.heatmaps inside rnf.recall(task)"
            )

    def of(self, tasks: Collection[str]) -> Witnesses:
        """What there is of these tasks."""
        probes = {name: probe for name, probe in self.probes.items() if name in tasks}
        return Witnesses(probes, self.gallery.of(probes))
