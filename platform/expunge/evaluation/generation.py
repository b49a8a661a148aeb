"""Free generation: how often samples from pure noise still show a target."""

import math
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from expunge.evaluation.metrics import share_bounds
from expunge.evaluation.rules import rule
from expunge.evaluation.settings import GateSettings
from expunge.types import Rule

POWER = 0.8


class Matcher(Protocol):
    """Says which similarities mean that two pictures show the same, as calibrated for a model."""

    @property
    def chance(self) -> float:
        """Share of free samples that match a picture which the model never saw."""
        ...

    def matches(self, similarity: Tensor, names: Sequence[str]) -> Tensor:
        """Return bool [N]: some encoder says match. similarity: float64 [N, E]; names: the encoders'."""
        ...


def generation_rules(
    after: Tensor,
    base: Tensor,
    names: Sequence[str],
    calibration: Matcher,
    gate: GateSettings,
    confidence: float,
    label: str,
) -> tuple[Rule, ...]:
    """Judge n free samples of the hotfix for one prompt and one target, beside the base model's at the same seeds.

    after, base: float64 [n, E], similarities to the nearest view of the target. label: the condition, in words.
    "free generation" fails where the share of matching samples is above chance for certain. "free generation falls" is
    there only where the base model matches so often that n samples can show the fall to chance.
    """
    n = len(after)
    hits, seen = (_matching(part, names, calibration) for part in (after, base))
    allowed = calibration.chance if gate.max_matches is None else gate.max_matches
    meaning = "what unseen pictures give by chance" if gate.max_matches is None else "the setting"
    share, lower, upper = _share(hits, n, confidence)
    before, surely, _ = _share(seen, len(base), confidence)
    rules = [
        rule(
            "free generation",
            share,
            lower,
            "at most",
            allowed,
            base=before,
            condition=label,
            why=(
                f"{_count(hits)} of {n} free samples match the target (base model: {_count(seen)} of {len(base)}). It "
                f"fails if the true share is above {allowed:.1%}, {meaning}, at the stated confidence. "
                f"{_power(n, allowed, confidence)}"
            ),
        )
    ]
    # NaN, where the base was not measured, compares as false: the first rule stands alone then.
    if share_bounds(_most_by_chance(n, calibration.chance, confidence), n, confidence)[1] <= surely:
        rules.append(
            rule(
                "free generation falls",
                share,
                upper,
                "at most",
                surely,
                base=before,
                condition=label,
                why=(
                    f"The base model's free samples match the target in {before:.0%} (at least {surely:.0%}), the "
                    f"hotfix's in {share:.0%} (at most {upper:.0%}): it must lie below the base model for certain."
                ),
            )
        )
    return tuple(rules)


def _matching(similarity: Tensor, names: Sequence[str], calibration: Matcher) -> int | None:
    """Count the samples that match; None where a similarity is not a number, since that is no evidence of absence."""
    if not bool(similarity.isfinite().all()):
        return None
    return int(calibration.matches(similarity, names).sum())


def _share(hits: int | None, count: int, confidence: float) -> tuple[float, float, float]:
    if hits is None or count == 0:
        return math.nan, math.nan, math.nan
    return hits / count, *share_bounds(hits, count, confidence)


def _most_by_chance(n: int, chance: float, confidence: float) -> int:
    """Return how many of n samples match at most, with `confidence`, if only chance is at work."""
    from scipy.stats import binom

    return int(binom.ppf(confidence, n, chance))


def _power(n: int, allowed: float, confidence: float) -> str:
    """Say, in a sentence, how small a share the samples would have found."""
    from scipy.stats import binom

    fails = next((k for k in range(n + 1) if share_bounds(k, n, confidence)[0] > allowed), None)
    shares = [percent / 100 for percent in range(1, 101)]
    found = next((share for share in shares if fails is not None and binom.sf(fails - 1, n, share) >= POWER), None)
    if found is None:
        return f"{n} samples cannot find any share above that."
    return f"A share of {found:.0%} would have been found with a probability of {POWER:.0%}."


def _count(hits: int | None) -> str:
    return "an unknown number" if hits is None else str(hits)
