"""How a task begins and ends, and what a finished one can do.

Reference data are drawn, units are selected, a record is made and witnessed; after that the task can be recalled,
reported, saved, exported. The Trainer's events that call all this are in `lightning_rnf.callback`.
"""

from lightning_rnf.tasks import auto, checkpoints, foresight, runs
from lightning_rnf.tasks.between_fits import BetweenFits
from lightning_rnf.tasks.ending import Ending, Freeze
from lightning_rnf.tasks.fitting import FitHead, HeadFit
from lightning_rnf.tasks.holding import Holding
from lightning_rnf.tasks.recalling import Retention
from lightning_rnf.tasks.recovery import CriterionOption, Recovery
from lightning_rnf.tasks.reference import Reference, ReferenceSource
from lightning_rnf.tasks.runs import TaskOption
from lightning_rnf.tasks.selection import Selection
from lightning_rnf.tasks.summary import RichUnitSummary, UnitSummary
from lightning_rnf.tasks.testing import tested
from lightning_rnf.tasks.tracing import Tracing

__all__ = [
    "BetweenFits",
    "CriterionOption",
    "Ending",
    "FitHead",
    "Freeze",
    "HeadFit",
    "Holding",
    "Recovery",
    "Reference",
    "ReferenceSource",
    "Retention",
    "RichUnitSummary",
    "Selection",
    "TaskOption",
    "Tracing",
    "UnitSummary",
    "auto",
    "checkpoints",
    "foresight",
    "runs",
    "tested",
]
