"""How relevance is propagated from the true class to every unit, and other importances to compare it with.

Rules for layers (those of Zennit's EpsilonPlus) and for functions between them, and an account of where it was lost.
Equations are those of the paper's section 3.1.
"""

from lightning_rnf.relevance.attribution import Attribution, OverSamples, attribute
from lightning_rnf.relevance.conservation import Conservation
from lightning_rnf.relevance.heatmaps import Drift, Gallery, compare_heatmaps, heatmaps, images_of
from lightning_rnf.relevance.importance import IMPORTANCES, Importance, ImportanceName, Summed, check_scores, random

__all__ = [
    "IMPORTANCES",
    "Attribution",
    "Conservation",
    "Drift",
    "Gallery",
    "Importance",
    "ImportanceName",
    "OverSamples",
    "Summed",
    "attribute",
    "check_scores",
    "compare_heatmaps",
    "heatmaps",
    "images_of",
    "random",
]
