"""Which task a sample is of, when nobody says: what each task's sub-network makes of it, and what it made of its own.

Sub-networks are recalled bit by bit for ever, so the statistics of their outputs at a task's end hold for ever, too:
`Portrait`, of the memory. Whoever wants to be known by them asks for it before a task ends.
"""

from lightning_rnf.inference.densities import Judge, Sums, quantiles
from lightning_rnf.inference.naming import By, TaskInference, inferring
from lightning_rnf.inference.reading import readable_layers, reading, space_of

__all__ = [
    "By",
    "Judge",
    "Sums",
    "TaskInference",
    "inferring",
    "quantiles",
    "readable_layers",
    "reading",
    "space_of",
]
