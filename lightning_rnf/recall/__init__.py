"""How a sub-network runs: alone in its network, with the norms' statistics of its task, or cut out of it.

Silencing is filling with zeros, so that recall is exact whatever the other units have become. The same plan of what is
dead counts operations and cuts the small module that `export` returns.
"""

from lightning_rnf.recall import norms, subnetwork
from lightning_rnf.recall.export import export
from lightning_rnf.recall.norms import NormParameters, NormStatistics
from lightning_rnf.recall.prefix import Prefix
from lightning_rnf.recall.sizes import Size, SubnetworkFlops, size_of
from lightning_rnf.recall.switching import (
    Recalls,
    Switch,
    dimension_of_classes,
    joined_outputs,
    mixed,
    own_forward,
    part_of_batch,
    switched,
    unswitched,
)
from lightning_rnf.recall.widened import as_it_was

__all__ = [
    "NormParameters",
    "NormStatistics",
    "Prefix",
    "Recalls",
    "Size",
    "SubnetworkFlops",
    "Switch",
    "as_it_was",
    "dimension_of_classes",
    "export",
    "joined_outputs",
    "mixed",
    "norms",
    "own_forward",
    "part_of_batch",
    "size_of",
    "subnetwork",
    "switched",
    "unswitched",
]
