"""What the process keeps of each task's end, to compare with at the end of later ones: logits, and heatmaps."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import nn
from zennit.core import Composite

from lightning_rnf import audit, subnetwork
from lightning_rnf.heatmaps import Gallery, heatmaps, images_of
from lightning_rnf.reference import ReferenceData
from lightning_rnf.state import FreezeState, TaskRecord
from lightning_rnf.units import UnitMap


@dataclass
class Witnesses:
    """Samples of each task with what the model made of them. They never leave the process.

    Attributes:
        probes: by task.
        gallery: heatmaps of the probes' samples, as they were after each later task.
    """

    probes: dict[str, audit.Probe] = field(default_factory=dict)
    gallery: Gallery = field(default_factory=Gallery)

    def see(
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
    ) -> TaskRecord:
        """Look at a task that ends now, and again at those before.

        Args:
            record: of the task.
            module: whole, on the reference data's device.
            units: of the module.
            reference: the task's data; of several ranks' no samples are kept.
            state: of the earlier tasks.
            masked: as for `subnetwork.recall`.
            images: of so many samples heatmaps are made.
            composite: Zennit's rules for them; None: as for units.

        Returns:
            The record with what a later audit needs: fingerprints of what is frozen, the drift of earlier logits.
        """
        rows = audit.fingerprints(module, units, record, state)
        drift = {
            name: probe.drift(module, state.layers, state.tasks[name], masked=masked)
            for name, probe in self.probes.items()
            if name in state.tasks
        }
        if reference.ranks.size == 1:
            self.probes[record.name] = audit.Probe.of(module, units.layers, record, reference, masked=masked)
            known = {**state.tasks, record.name: record}
            for name, probe in self.probes.items() if images else ():
                if name in known:
                    batch = probe.on_device(module)
                    with subnetwork.recall(module, units.layers, known[name], masked=masked):
                        maps = heatmaps(module, units.layers, batch, reference.predict, composite)
                    self.gallery.add(name, record.name, images_of(batch)[:images], maps[:images])
        return replace(record, rows=rows, drift=drift)
