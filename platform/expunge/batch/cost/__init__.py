"""What a night costs before it begins: passes by stage, operations, hours and money."""

from expunge.batch.cost.hardware import Hardware
from expunge.batch.cost.load import Load
from expunge.batch.cost.passes import STAGES, Calls, Stage, night_calls

__all__ = ["STAGES", "Calls", "Hardware", "Load", "Stage", "night_calls"]
