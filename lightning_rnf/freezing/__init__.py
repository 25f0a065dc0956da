"""How weights are kept from moving: gradients masked, rows put back after each step, elasticity as a share of it.

The units that a task needs are rows of parameters here. Beside it stand what makes freezing cheap (layers that learn
some of their rows, gradients that need not travel) and what free units start from.
"""

from lightning_rnf.freezing import initial, rows
from lightning_rnf.freezing.communication import reduce_free_rows
from lightning_rnf.freezing.connections import (
    Listening,
    free_weights,
    frozen_connections,
    harmless,
    heard,
)
from lightning_rnf.freezing.embeddings import EmbeddingRows, Unread, check_rows, has_own_rows
from lightning_rnf.freezing.freezer import (
    ElasticityOption,
    Freezer,
    check_elasticity,
    check_globs,
    elasticities,
    factor_of,
    hold_in_copy,
)
from lightning_rnf.freezing.rows import can_choose_rows

__all__ = [
    "ElasticityOption",
    "EmbeddingRows",
    "Freezer",
    "Listening",
    "Unread",
    "can_choose_rows",
    "check_elasticity",
    "check_globs",
    "check_rows",
    "elasticities",
    "factor_of",
    "free_weights",
    "frozen_connections",
    "harmless",
    "has_own_rows",
    "heard",
    "hold_in_copy",
    "initial",
    "reduce_free_rows",
    "rows",
]
