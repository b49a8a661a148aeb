"""Checks everything that a night needs, one row each.

Nothing is changed: a home that does not exist is not made, and what is made to try a store is deleted again: one sealed
blob, and a new folder beside checkpoints that lie elsewhere.
"""

from expunge.doctor.check import Check
from expunge.doctor.examination import INSTALLATION, LOOKS, examine, examine_deeply

__all__ = ["INSTALLATION", "LOOKS", "Check", "examine", "examine_deeply"]
