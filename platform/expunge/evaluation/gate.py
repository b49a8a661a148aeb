"""Turn numbers into a verdict, and a sentence that names the figures, their thresholds and what they mean.

A number that is not finite never passes. Every condition is checked; the sentence names all that failed.
"""

import math
from typing import Literal

from expunge.settings import GateSettings
from expunge.types import Measured

Verdict = Literal["passed", "failed"]


def judge_request(
    shift: Measured, target: Measured, surrogate: Measured, nearest: Measured, gate: GateSettings
) -> tuple[Verdict, str]:
    """Judge one request. It passes if all three conditions hold:

    1. `shift.after >= gate.min_shift`: re-generated from the noised target, the output lands nearer to the surrogate;
    2. `target.after < target.base - target.floor`: similarity to the target fell by more than the base model varies
       between seeds, so the base model did not already meet condition 1;
    3. `nearest.after <= nearest.base + nearest.floor`: free generation comes no closer to the target than the base
       model's. It need not move away, because a base model may never have generated the target on its own.

    The similarity to the surrogate decides nothing, because the shift already includes it, but it must be finite.
    """
    figures = {"shift": shift, "target": target, "surrogate": surrogate, "nearest": nearest}
    broken = [name for name, figure in figures.items() if not _finite(figure.after, figure.base, figure.floor)]
    if broken:
        return "failed", f"Not a finite number: {', '.join(broken)}. A figure that was not measured does not pass."
    missed = []
    if shift.after < gate.min_shift:
        missed.append(
            f"shift {shift.after:.2f} is below {gate.min_shift:.2f}: re-generation still lands too near the target"
        )
    if target.after >= target.base - target.floor:
        already = ", and the base model hardly reproduced it either" if shift.base >= gate.min_shift else ""
        missed.append(
            f"similarity to the target went from {target.base:.2f} to {target.after:.2f}: "
            f"it did not fall by more than the noise floor {target.floor:.2f}, "
            f"so nothing shows that the target was removed{already}"
        )
    if nearest.after > nearest.base + nearest.floor:
        missed.append(
            f"the nearest generated sample has similarity {nearest.after:.2f}, "
            f"above the base model's {nearest.base:.2f} plus the noise floor {nearest.floor:.2f}: "
            "free generation came closer to the target"
        )
    if missed:
        return "failed", _sentence(missed)
    return "passed", (
        f"Shift {shift.after:.2f} reaches {gate.min_shift:.2f} "
        f"(0 is the target, 1 the surrogate; base {shift.base:.2f}); "
        f"similarity to the target fell from {target.base:.2f} to {target.after:.2f}, "
        f"beyond the noise floor {target.floor:.2f}; the nearest generated sample is no closer than the base model's "
        f"({nearest.after:.2f}, base {nearest.base:.2f})."
    )


def judge_integrity(
    psnr: float,
    psnr_unrelated: float,
    ssim: float,
    ssim_unrelated: float,
    kid: float,
    kid_floor: float,
    gate: GateSettings,
) -> tuple[bool, str]:
    """Judge whether a hotfix leaves the model intact: unrelated outputs of the same seeds must stay as they were.

    1. `psnr >= gate.min_psnr` (dB), and above `psnr_unrelated`, the value for outputs of two different seeds;
    2. the same for `ssim`;
    3. `kid <= gate.max_kid_ratio * |kid_floor|`. The unbiased estimate is centred on 0 for halves of one distribution,
       so `|kid_floor|` measures its noise. A kid of 0 or less always passes.
    """
    if not _finite(psnr, psnr_unrelated, ssim, ssim_unrelated, kid, kid_floor):
        return False, "An integrity figure is not a finite number. A figure that was not measured does not pass."
    limit = gate.max_kid_ratio * abs(kid_floor)
    missed = []
    if psnr < gate.min_psnr or psnr <= psnr_unrelated:
        missed.append(_too_low("PSNR", psnr, gate.min_psnr, psnr_unrelated, " dB"))
    if ssim < gate.min_ssim or ssim <= ssim_unrelated:
        missed.append(_too_low("SSIM", ssim, gate.min_ssim, ssim_unrelated, ""))
    if kid > max(limit, 0.0):
        missed.append(
            f"the distribution moved by {kid:.2g}, above {limit:.2g} ({gate.max_kid_ratio:g} times base against base): "
            "what the model generates has changed as a whole"
        )
    if missed:
        return False, _sentence(missed)
    return True, (
        f"Unrelated outputs are intact: PSNR {psnr:.1f} dB (at least {gate.min_psnr:.1f}; two different seeds: "
        f"{psnr_unrelated:.1f}), SSIM {ssim:.2f} (at least {gate.min_ssim:.2f}; two different seeds: "
        f"{ssim_unrelated:.2f}), distribution distance {kid:.2g} (at most {limit:.2g})."
    )


def _too_low(name: str, value: float, minimum: float, unrelated: float, unit: str) -> str:
    bar = max(minimum, unrelated)
    what = "the gate's minimum" if minimum >= unrelated else "the value for two different seeds"
    return f"{name} {value:.2f}{unit} is below {bar:.2f}{unit}, {what}: unrelated outputs changed too much"


def _finite(*values: float) -> bool:
    return all(math.isfinite(value) for value in values)


def _sentence(clauses: list[str]) -> str:
    text = "; ".join(clauses)
    return f"{text[0].upper()}{text[1:]}."
