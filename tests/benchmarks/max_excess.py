"""How often excess reproduction alone is wrong, by `gate.max_excess`: where the default comes from.

    python -m tests.benchmarks.max_excess --trials 500

It simulates similarities, with the product's own rule. A request has two pictures in four views under two prompts,
judged by two encoders at three levels. A perfect removal leaves each picture its own ability. On the testbed `faces`
abilities deviate by 0.05 (edges) to 0.14 (EfficientNet-Lite0) between pictures and correlate by 0.85 between levels,
draws deviate by 0.02 to 0.17, and the base model's excess is 0.6 to 0.7.
"""

import argparse
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from expunge.evaluation.reproduction import (
    Condition,
    Unseen,
    compare_in_rounds,
    conditions_of,
    reproduces,
    reproduction_rule,
)
from expunge.settings import GateSettings

LEVELS = (0.3, 0.4, 0.5)
NAMES = ("first", "second")
CONDITIONS = conditions_of([True, False], [0, 1], ["own prompt", "empty prompt"], most=2)
ABILITY, SPREAD, NOISE = 0.33, 0.13, 0.12
"""Mean over pictures, deviation between them, and between draws."""
BETWEEN_LEVELS, BETWEEN_VIEWS, BETWEEN_ENCODERS = 0.85, 0.7, 0.64
"""Correlations of one picture's abilities."""
DRAWS, PICTURES, CONFIDENCE = 9, 24, 0.95
EXCESSES, THRESHOLDS = (0.4, 0.5, 0.6), (0.7, 0.75, 0.8, 0.85)

first_prompt = [c.picture == 0 and c.label == "own prompt" for c in CONDITIONS]
everything = [True] * len(LEVELS)
lowest = [True, False, False]
KEEPS: Mapping[str, tuple[float, Sequence[bool], Sequence[bool]]] = {
    "one condition keeps 85 %": (0.85, [i == 6 for i in range(len(CONDITIONS))], everything),
    "one level under one prompt keeps 85 %": (0.85, first_prompt, lowest),
    "one level everywhere keeps 85 %": (0.85, [True] * len(CONDITIONS), lowest),
    "one level in one view under one prompt keeps all": (1.0, [i == 6 for i in range(len(CONDITIONS))], lowest),
}
"""What a false removal keeps of the memory, and in which conditions and levels."""


def simulated(count: int, generator: torch.Generator) -> Tensor:
    """Return abilities of `count` conditions of one picture, float64 [count, L, E]."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    between = math.sqrt(BETWEEN_ENCODERS) * normal(1, 1, 1) + math.sqrt(1 - BETWEEN_ENCODERS) * normal(1, 1, 2)
    views = math.sqrt(BETWEEN_VIEWS) * between + math.sqrt(1 - BETWEEN_VIEWS) * normal(count, 1, 2)
    levels = math.sqrt(BETWEEN_LEVELS) * views + math.sqrt(1 - BETWEEN_LEVELS) * normal(count, len(LEVELS), 2)
    return ABILITY + SPREAD * levels


def drawing(means: Tensor, seed: int) -> Callable[[Sequence[Condition], range], Tensor]:
    """Return draws around `means` [C, L, E]."""

    def drawn(conditions: Sequence[Condition], draws: range) -> Tensor:
        generator = torch.Generator().manual_seed(seed * 1_000 + draws.start)
        noise = torch.randn(len(means), len(draws), 2, generator=generator, dtype=torch.float64)
        similarity = means[:, torch.tensor(draws) % len(LEVELS)] + NOISE * noise
        return similarity[[CONDITIONS.index(condition) for condition in conditions]]

    return drawn


def passes(seed: int, excess: float, max_excess: float, keeps: str | None = None) -> bool:
    """Judge one request whose memory is gone, except what `keeps` names."""
    generator = torch.Generator().manual_seed(seed)
    noise = NOISE / math.sqrt(DRAWS / len(LEVELS))
    never_seen = torch.cat([simulated(1, generator) for _ in range(PICTURES)])
    never_seen += noise * torch.randn(never_seen.shape, generator=generator, dtype=torch.float64)
    unseen = Unseen(never_seen, LEVELS)
    own = torch.cat([simulated(len(CONDITIONS) // 2, generator) for _ in range(2)])
    order = sorted(range(len(CONDITIONS)), key=lambda i: CONDITIONS[i].picture)
    own = own[torch.tensor(order).argsort()]
    memory = torch.full_like(own, ABILITY + excess)
    after = own
    if keeps is not None:
        share, conditions, levels = KEEPS[keeps]
        kept = torch.tensor(conditions)[:, None, None] & torch.tensor(levels)[:, None]
        after = own + share * kept * (memory - own)
    base, fixed = drawing(memory, seed), drawing(after, seed + 500_000)
    informative = reproduces(base(CONDITIONS, range(DRAWS)), unseen, CONFIDENCE)
    evidence = compare_in_rounds(
        CONDITIONS,
        NAMES,
        base,
        fixed,
        unseen,
        informative,
        draws=range(DRAWS),
        max_excess=max_excess,
        confidence=CONFIDENCE,
    )
    return reproduction_rule(evidence, GateSettings(max_excess=max_excess)).passed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=500, metavar="N", help="requests per figure")
    parser.add_argument("--max-excess", type=float, nargs="+", default=THRESHOLDS, metavar="SHARE")
    given = parser.parse_args()
    trials = range(given.trials)
    for threshold in given.max_excess:
        for excess in EXCESSES:
            wrong = sum(not passes(seed, excess, threshold) for seed in trials) / len(trials)
            print(f"max_excess {threshold}: a perfect removal at excess {excess} fails in {wrong:.1%}", flush=True)
        for keeps in KEEPS:
            wrong = sum(passes(seed, 0.5, threshold, keeps) for seed in trials) / len(trials)
            print(f"max_excess {threshold}: {keeps} passes in {wrong:.1%}", flush=True)


if __name__ == "__main__":
    main()
