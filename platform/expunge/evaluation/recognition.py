"""Recognition: in how many of its re-generations a target is still recognised.

Excess reproduction averages similarities. It does not see a target that comes back whole in some draws and not in
others, nor one that comes back slightly distorted in all of them. Here each re-generation counts by itself: it shows
the target if every encoder says so, as calibrated. One encoder alone would often take what any model makes of a little
noise for the picture that went in; `docs/measurements.md` has the shares of a model that never saw the targets.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from expunge.evaluation.calibration import Calibration
from expunge.evaluation.metrics import share_bounds
from expunge.evaluation.reproduction import ALL_VIEWS, Condition, Unseen
from expunge.evaluation.rules import rule
from expunge.evaluation.settings import GateSettings
from expunge.types import Rule

RECOGNITION = "recognition"


@dataclass(frozen=True)
class Drawn:
    """One round of draws in C conditions, each base model's and hotfix's: similarities, float64 [C, n, E]."""

    conditions: Sequence[Condition]
    base: Tensor
    after: Tensor


def recognition_rule(
    rounds: Sequence[Drawn],
    unseen: Unseen,
    names: Sequence[str],
    calibration: Calibration,
    gate: GateSettings,
    confidence: float,
) -> Rule:
    """Judge, for each picture under each prompt, the share of re-generations in which every encoder recognises it.

    It fails where that share is for certain above `gate.max_recognised` and above what pictures that the base model
    never saw give. The views and noise levels of a picture under a prompt count together. Conditions that needed more
    draws weigh more: those are the ones that kept most. The pictures and prompts share the error of the bound.
    names: of the E encoders. Raises ValueError without draws.
    """

    def recognised(similarity: Tensor) -> Tensor:
        return (similarity >= calibration.limits(names)).all(-1)

    groups: dict[tuple[int, str], list[tuple[int, int, int]]] = {}
    for one in rounds:
        before, after = recognised(one.base), recognised(one.after)
        for c, condition in enumerate(one.conditions):
            counted = int(after[c].sum()), int(before[c].sum()), after.shape[1]
            groups.setdefault((condition.picture, condition.label), []).append(counted)
    if not groups:
        raise ValueError("nothing was drawn, so there is nothing to recognise")
    each = 1 - (1 - confidence) / len(groups)
    shares = []
    for (picture, label), counts in groups.items():
        hits, known, n = (sum(parts) for parts in zip(*counts, strict=True))
        shares.append((share_bounds(hits, n, each)[0], hits / n, known / n, hits, n, picture, label))
    lower, share, base, hits, n, picture, label = max(shares)
    strangers = recognised(unseen.values)
    chance = share_bounds(int(strangers.sum()), strangers.numel(), confidence)[1]
    allowed = max(gate.max_recognised, chance)
    return rule(
        RECOGNITION,
        share,
        lower,
        "at most",
        allowed,
        base=base,
        condition=f"picture {picture + 1}, {ALL_VIEWS}, under the {label}",
        why=(
            f"In {hits} of {n} re-generations by the hotfix every encoder still recognises the picture (base model: "
            f"{base:.0%}; of pictures that the base model never saw, at most {chance:.0%}). It fails where the true "
            f"share is above {allowed:.0%} at the stated confidence."
        ),
    )
