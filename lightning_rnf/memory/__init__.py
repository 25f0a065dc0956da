"""What is remembered of a finished task: its record, all records as the state, and the files that hold them.

Values only: nothing here runs a model. What comes from a file is checked before it is believed, and a fingerprint tells
whether what was frozen is still what it was.
"""

from lightning_rnf.memory import hub, maskfiles, masks
from lightning_rnf.memory.embeddings import OldRows
from lightning_rnf.memory.fingerprints import Audit, Heard, changed, fingerprints, moved
from lightning_rnf.memory.giving_up import without
from lightning_rnf.memory.growing import wider
from lightning_rnf.memory.masks import free_capacity_over_tasks, shortened
from lightning_rnf.memory.model import unheld_modules, unknown_modules
from lightning_rnf.memory.plain import readable
from lightning_rnf.memory.portraits import LEVELS, Gaussians, Portrait, Space
from lightning_rnf.memory.record import TaskRecord
from lightning_rnf.memory.state import FreezeState
from lightning_rnf.memory.widening import grown, index_before, layers_before, record_before, sliced

__all__ = [
    "LEVELS",
    "Audit",
    "FreezeState",
    "Gaussians",
    "Heard",
    "OldRows",
    "Portrait",
    "Space",
    "TaskRecord",
    "changed",
    "fingerprints",
    "free_capacity_over_tasks",
    "grown",
    "hub",
    "index_before",
    "layers_before",
    "maskfiles",
    "masks",
    "moved",
    "readable",
    "record_before",
    "shortened",
    "sliced",
    "unheld_modules",
    "unknown_modules",
    "wider",
    "without",
]
