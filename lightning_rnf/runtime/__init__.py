"""The ground that everything stands on: processes and their shards, modules that are borrowed and given back.

Nothing here knows relevance, units or tasks. A reader of the method can pass this chapter by, and come back to it for
what a context manager promises to leave as it was, or how several processes come to one result.
"""

from lightning_rnf.runtime import arguments, extras, sharding
from lightning_rnf.runtime.guard import attention_by_its_parts, borrowed, evaluating, forget_gradient_hooks, recompiled
from lightning_rnf.runtime.no_trainer import alone, transferred
from lightning_rnf.runtime.progress import Show, silent
from lightning_rnf.runtime.ranks import ALONE, Ranks, joined
from lightning_rnf.runtime.stopping import steps

__all__ = [
    "ALONE",
    "Ranks",
    "Show",
    "alone",
    "arguments",
    "attention_by_its_parts",
    "borrowed",
    "evaluating",
    "extras",
    "forget_gradient_hooks",
    "joined",
    "recompiled",
    "sharding",
    "silent",
    "steps",
    "transferred",
]
