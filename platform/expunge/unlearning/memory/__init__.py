"""The memory plan: what a job needs of each GPU, counted before one is rented.

`footprint` counts the network's architecture on fake tensors, `estimate` gives the bytes at each ZeRO stage, and
`choice` picks among the estimates.
"""

from expunge.unlearning.memory.choice import choose, objectives_that_fit
from expunge.unlearning.memory.estimate import Estimate, estimate, estimates
from expunge.unlearning.memory.footprint import Footprint, footprint, footprint_of

__all__ = [
    "Estimate",
    "Footprint",
    "choose",
    "estimate",
    "estimates",
    "footprint",
    "footprint_of",
    "objectives_that_fit",
]
