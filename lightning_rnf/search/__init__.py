"""Which units may go: rank them by relevance, and search how many can be silenced before a criterion says stop.

Pure functions of tensors and callables: no model, no data, no Lightning. Algorithm 1 of the paper, from "sort units" to
"while t not reached"; what a cutoff costs is measured by whoever calls.
"""

from lightning_rnf.search.criteria import (
    EXPLAINED,
    AccuracyDrop,
    ComputeBudget,
    Criterion,
    FreeCapacity,
    Measured,
    MetricDrop,
    SubnetworkScore,
    as_criterion,
)
from lightning_rnf.search.cutoff import Evaluation, Method, SearchResult, about, search_cutoff
from lightning_rnf.search.ranking import Candidates, Normalize, Ranking, rank

__all__ = [
    "EXPLAINED",
    "AccuracyDrop",
    "Candidates",
    "ComputeBudget",
    "Criterion",
    "Evaluation",
    "FreeCapacity",
    "Measured",
    "Method",
    "MetricDrop",
    "Normalize",
    "Ranking",
    "SearchResult",
    "SubnetworkScore",
    "about",
    "as_criterion",
    "rank",
    "search_cutoff",
]
