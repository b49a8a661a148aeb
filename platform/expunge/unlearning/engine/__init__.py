"""The sharded engine: several gradients per step under DeepSpeed's ZeRO stages 0 to 3, combined without gathering any.

This is the only package that touches DeepSpeed. It relies on more than the public interface: on where a rank keeps its
part of a reduced gradient (`stages.py`). That is why pyproject.toml pins a range of versions and a test compares every
stage with plain torch.
"""

from expunge.unlearning.engine.sharded import ShardedEngine
from expunge.unlearning.engine.surgery import StepStatistics

__all__ = ["ShardedEngine", "StepStatistics"]
