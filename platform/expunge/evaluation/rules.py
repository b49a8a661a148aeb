"""Make the rules of the gate: a figure that is not a finite number never passes."""

import math
from typing import Literal

from expunge.types import Rule

PROTOCOL_VERSION = 2
"""Counted up whenever the same pictures could get another verdict."""


def rule(
    name: str,
    value: float,
    bound: float,
    relation: Literal["at most", "at least"],
    threshold: float,
    *,
    why: str,
    base: float | None = None,
    condition: str = "",
) -> Rule:
    """Compare `bound` with `threshold`."""
    finite = math.isfinite(value) and math.isfinite(bound)
    holds = bound <= threshold if relation == "at most" else bound >= threshold
    return Rule(
        name=name,
        passed=finite and holds,
        value=value if math.isfinite(value) else None,
        bound=bound if math.isfinite(bound) else None,
        relation=relation,
        threshold=threshold,
        base=base if base is not None and math.isfinite(base) else None,
        condition=condition,
        why=why if finite else f"Not measured: {why}",
    )
