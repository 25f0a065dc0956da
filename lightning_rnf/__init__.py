"""A PyTorch Lightning callback that stops catastrophic forgetting: Relevance-based Neural Freezing."""

from lightning_rnf.anatomy import UnitLayer, UnitMap, register_layer
from lightning_rnf.callback import RelevanceFreezing
from lightning_rnf.freezing import reduce_free_rows
from lightning_rnf.heads import MultiHead
from lightning_rnf.inference import TaskInference
from lightning_rnf.memory import FreezeState, TaskRecord
from lightning_rnf.recall import Size, size_of
from lightning_rnf.relevance import Drift, compare_heatmaps, heatmaps
from lightning_rnf.report import RetentionReport, StreamResult, plot_retention
from lightning_rnf.search import AccuracyDrop, ComputeBudget, Criterion, FreeCapacity, MetricDrop, SubnetworkScore
from lightning_rnf.tasks import RichUnitSummary, UnitSummary

__version__ = "0.1.0"

__all__ = [
    "AccuracyDrop",
    "ComputeBudget",
    "Criterion",
    "Drift",
    "FreeCapacity",
    "FreezeState",
    "MetricDrop",
    "MultiHead",
    "RelevanceFreezing",
    "RetentionReport",
    "RichUnitSummary",
    "Size",
    "StreamResult",
    "SubnetworkScore",
    "TaskInference",
    "TaskRecord",
    "UnitLayer",
    "UnitMap",
    "UnitSummary",
    "compare_heatmaps",
    "heatmaps",
    "plot_retention",
    "reduce_free_rows",
    "register_layer",
    "size_of",
]
