"""A PyTorch Lightning callback that stops catastrophic forgetting: Relevance-based Neural Freezing."""

from lightning_rnf.callback import RelevanceFreezing
from lightning_rnf.criteria import (
    AccuracyDrop,
    ComputeBudget,
    Criterion,
    FreeCapacity,
    MetricDrop,
    SubnetworkScore,
)
from lightning_rnf.heads import MultiHead
from lightning_rnf.report import RetentionReport
from lightning_rnf.state import FreezeState, TaskRecord
from lightning_rnf.summary import RichUnitSummary, UnitSummary
from lightning_rnf.units import UnitLayer, UnitMap

__version__ = "0.1.0.dev0"

__all__ = [
    "AccuracyDrop",
    "ComputeBudget",
    "Criterion",
    "FreeCapacity",
    "FreezeState",
    "MetricDrop",
    "MultiHead",
    "RelevanceFreezing",
    "RetentionReport",
    "RichUnitSummary",
    "SubnetworkScore",
    "TaskRecord",
    "UnitLayer",
    "UnitMap",
    "UnitSummary",
]
