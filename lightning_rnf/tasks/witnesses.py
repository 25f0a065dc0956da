"""What the process keeps of each task's end, to compare with at the end of later ones: samples, logits, heatmaps."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn
from zennit.core import Composite

from lightning_rnf.anatomy import UnitMap
from lightning_rnf.memory import FreezeState, TaskRecord
from lightning_rnf.recall import subnetwork
from lightning_rnf.relevance import Gallery, heatmaps, images_of
from lightning_rnf.tasks.probes import Probe, drifts
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
        units: UnitMap,
        reference: ReferenceData,
        state: FreezeState,
        *,
        masked: bool,
        images: int = 0,
        composite: Composite | None = None,
    ) -> dict[str, float]:
        """See again what earlier tasks left, and keep some of a task that ends now.

        Args:
            record: of the task that ends.
            module: whole, where the reference data are.
            units: of the module.
            reference: the task's data; of several ranks, that of the first.
            state: the earlier tasks.
            masked: as for `subnetwork.recall`.
            images: of so many samples of each task heatmaps are made.
            composite: Zennit's rules for them; None: as for units.

        Returns:
            The drift of earlier tasks' logits, as `probes.drifts`.
        """
        drift = drifts(module, state, self.probes, masked=masked)
        self.probes[record.name] = Probe.of(module, units.layers, record, reference, masked=masked)
        known = {**state.tasks, record.name: record}
        for name, probe in self.probes.items() if images else ():
            if name in known:
                batch = probe.on_device(module)
                with subnetwork.recall(module, units.layers, known[name], masked=masked):
                    maps = heatmaps(module, units.layers, batch, reference.predict, composite)
                self.gallery.add(name, record.name, images_of(batch)[:images], maps[:images])
        return drift

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
