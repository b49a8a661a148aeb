"""The sharded engine: several gradients a step under DeepSpeed's ZeRO stages 0 to 3, combined without gathering any.

The only package that touches DeepSpeed. Beyond its public interface this relies on where a rank keeps its part of a
reduced gradient (`shards.py`), hence the pinned range in pyproject.toml, and the test that compares every stage to
plain torch.
"""

from expunge.unlearning.engine.sharded import ShardedEngine
from expunge.unlearning.engine.surgery import StepStatistics

__all__ = ["ShardedEngine", "StepStatistics"]
