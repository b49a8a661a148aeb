"""What must stay: unrelated outputs of the same seeds, what a model generates as a whole, and a target's neighbours."""

import math

import torch
from torch import Tensor

from expunge.evaluation.generation import Matcher
from expunge.evaluation.metrics import (
    FRECHET_SAMPLES,
    SMALLEST_P,
    centred_cosine,
    foreign_share_found,
    frechet,
    kid,
    kid_test,
    psnr,
    quantile_bound,
    share_bounds,
    ssim,
)
from expunge.evaluation.rules import rule
from expunge.evaluation.settings import GateSettings
from expunge.evaluation.space import Features, Space
from expunge.types import IntegrityEvidence, Rule

NEIGHBOURS = 10
"""Per target: with ten of them, the worst decile is not the word of a single sample."""
TAIL, DECILE = 0.05, 0.1


def nearest_neighbours(space: Space, samples: Features, targets: Features, count: int = NEIGHBOURS) -> Tensor:
    """Return the rows of the samples nearest to each target, int64 [T, k], nearest first; k is at most `count`.

    samples, targets: features of n unrelated samples of the base model and of T targets. Nearness is the mean
    similarity over the encoders.
    """
    tables = torch.stack(space.table(targets, samples)).mean(0)
    return tables.topk(min(count, tables.shape[1]), dim=1).indices


def measure_integrity(
    before: Tensor,
    after: Tensor,
    other: Tensor,
    space: Space,
    calibration: Matcher,
    gate: GateSettings,
    confidence: float,
    *,
    nearest: Tensor | None = None,
    comparable: Tensor | None = None,
    seed: int = 0,
) -> IntegrityEvidence:
    """Compare n unrelated outputs of the base model and of the hotfix, on prompts and seeds that training did not hold.

    before, after: float32 [n, 3, h, w] in [-1, 1], the same prompts and seeds. other: [n, 3, h, w], the base model's
    with the same prompts row by row, and other seeds. nearest: int64 [T, k], see `nearest_neighbours`; None leaves
    collateral out. comparable: bool [n], the rows whose `other` was chosen as `before` was; None: all. Where only
    `before` has lost the samples that show a target, the two are not from one distribution. seed: of the permutations.
    Raises ValueError where the shapes differ, or n < 2.
    """
    if not before.shape == after.shape == other.shape or len(before) < 2:
        raise ValueError(
            f"integrity needs three sets of one shape with at least 2 pictures, not {tuple(before.shape)}, "
            f"{tuple(after.shape)} and {tuple(other.shape)}"
        )
    broken = ~after.isfinite().flatten(1).all(1)
    # Evidence has to be stored, so a picture with a value that is no number is measured as grey, and counts as ruined.
    after = torch.where(broken.view(-1, 1, 1, 1), torch.zeros_like(after), after)
    unrelated = other.roll(1, 0)  # the next prompt as well as another seed
    z_before, z_after, z_other = (space.features(pictures) for pictures in (before, after, other))

    pixels, structure = psnr(before, after), ssim(before, after)
    pixels[broken], structure[broken] = 0.0, -1.0
    floor, floor_ssim = psnr(before, unrelated), ssim(before, unrelated)
    kept = (pixels >= gate.min_psnr) & (structure >= gate.min_ssim)
    changed = ~(kept | (_recognised(z_after, z_before, space, calibration) & ~broken))
    # As near as unrelated pictures come: one in ten of them comes nearer.
    ruined = floor.quantile(1 - DECILE).item()

    rules = [
        _median("PSNR", " dB", pixels, floor, gate.min_psnr, confidence),
        _median("SSIM", "", structure, floor_ssim, gate.min_ssim, confidence),
        _changed(changed, gate, confidence),
        _tail(pixels, ruined),
    ]
    rows = torch.ones(len(before), dtype=torch.bool) if comparable is None or comparable.sum() < 2 else comparable
    mine, fixed, others = (tuple(z[rows] for z in features) for features in (z_before, z_after, z_other))
    distribution, figures = _distribution(before[rows], mine, fixed, others, space, gate, seed)
    rules.append(distribution)
    if nearest is not None and nearest.numel():
        rules.append(_collateral(pixels, nearest, ruined))
    figures |= {
        "psnr_p05": pixels.quantile(TAIL).item(),
        "psnr_worst": pixels.min().item(),
        "ssim_p05": structure.quantile(TAIL).item(),
        "ssim_worst": structure.min().item(),
        "changed": changed.double().mean().item(),
    }
    for name, ours, theirs, centre in zip(space.names, z_after, z_before, space.centre, strict=True):
        figures[f"distance_median {name}"] = (1 - centred_cosine(ours, theirs, centre)).median().item()
    kid_, kid_floor = figures.pop("kid"), figures.pop("kid_floor")
    missed = [each.why for each in rules if not each.passed]
    return IntegrityEvidence(
        psnr=pixels.quantile(0.5).item(),
        psnr_unrelated=floor.quantile(0.5).item(),
        ssim=structure.quantile(0.5).item(),
        ssim_unrelated=floor_ssim.quantile(0.5).item(),
        kid=kid_,
        kid_floor=kid_floor,
        passed=not missed,
        why=" ".join(missed or ["Unrelated outputs are intact.", *(each.why for each in rules)]),
        rules=tuple(rules),
        figures=figures,
    )


def _median(name: str, unit: str, values: Tensor, floor: Tensor, minimum: float, confidence: float) -> Rule:
    middle, unrelated = values.quantile(0.5).item(), floor.quantile(0.5).item()
    bound = quantile_bound(values, 0.5, confidence)
    return rule(
        f"median {name}",
        middle,
        bound,
        "at least",
        max(minimum, unrelated),
        base=unrelated,
        why=(
            f"Unrelated outputs have a median {name} of {middle:.3g}{unit} (at least {bound:.3g}{unit} at the stated "
            f"confidence); different pictures have {unrelated:.3g}{unit}."
        ),
    )


def _changed(changed: Tensor, gate: GateSettings, confidence: float) -> Rule:
    count, hits = len(changed), int(changed.sum())
    upper = share_bounds(hits, count, confidence)[1]
    allowed = max(
        (k for k in range(count + 1) if share_bounds(k, count, confidence)[1] <= gate.max_changed), default=None
    )
    return rule(
        "changed samples",
        hits / count,
        upper,
        "at most",
        gate.max_changed,
        why=(
            f"{hits} of {count} unrelated samples no longer show what they did: pixels too far off, and not recognised "
            f"by every encoder. That may be {upper:.0%} of all; "
            + ("so few samples cannot pass." if allowed is None else f"of {count} samples, {allowed} may have changed.")
        ),
    )


def _tail(pixels: Tensor, ruined: float) -> Rule:
    worst = pixels.quantile(TAIL).item()
    return rule(
        "5 % quantile of PSNR",
        worst,
        worst,
        "at least",
        ruined,
        base=ruined,
        why=(
            f"One unrelated output in twenty has a PSNR under {worst:.1f} dB; what has nothing to do with the original "
            f"reaches {ruined:.1f} dB. The figure is that of the samples, without a confidence bound."
        ),
    )


def _collateral(pixels: Tensor, nearest: Tensor, ruined: float) -> Rule:
    deciles = pixels[nearest].quantile(DECILE, dim=1)
    worst = int(deciles.argmin())
    value, changed = deciles[worst].item(), pixels[nearest].quantile(0.5).item()
    return rule(
        "collateral",
        value,
        value,
        "at least",
        ruined,
        base=ruined,
        condition=f"neighbours of target {worst + 1}",
        why=(
            f"Of the {nearest.shape[1]} unrelated outputs most like a target, the worst tenth has a PSNR under "
            f"{value:.1f} dB (median over all targets {changed:.1f} dB); what has nothing to do with the original "
            f"reaches {ruined:.1f} dB. The figure is that of the samples, without a confidence bound."
        ),
    )


def _distribution(
    before: Tensor,
    z_before: Features,
    z_after: Features,
    z_other: Features,
    space: Space,
    gate: GateSettings,
    seed: int,
) -> tuple[Rule, dict[str, float]]:
    """Test the hotfix's samples against the base model's at other seeds: those of the same seeds depend on them."""
    test = kid_test(z_after, z_other, seed=seed)
    # Rearranged: with their quarters exchanged, of the same colours and sharpness, but no pictures of the domain.
    foreign = space.features(before.roll((before.shape[-2] // 2, before.shape[-1] // 2), (-2, -1)))
    level, worst = gate.min_kid_p, test.worst
    found = foreign_share_found(z_before, z_other, foreign, level=level, seed=seed)
    # Mixing a share f of foreign samples in makes the kernel distance f^2 times that of the foreign ones.
    share = math.sqrt(_ratio(test.distances[worst], kid(foreign[worst], z_other[worst])))
    n, outside = len(before), test.p < level
    # With a level below the smallest p-value the test could never find a change, and proves nothing; 0 switches it off.
    bound = share if outside else 0.0 if level > SMALLEST_P or level == 0 else math.nan
    figures = {
        "kid": test.distances[worst],
        "kid_floor": kid(z_before[worst], z_other[worst]),
        "kid_p": test.p,
    }
    if found is not None:
        figures["kid_power"] = found
    if n >= FRECHET_SAMPLES:
        figures["frechet"] = frechet(z_after[worst], z_other[worst])
        figures["frechet_floor"] = frechet(z_before[worst], z_other[worst])
    return (
        rule(
            "distribution",
            share,
            bound,
            "at most",
            gate.max_changed,
            why=(
                f"Samples of the hotfix differ from the base model's as if {share:.0%} of them were rearranged "
                f"pictures (KID, most in {space.names[worst]}), which "
                + ("is no chance" if outside else "may be chance")
                + f" (permutation test, p = {test.p:.3f}). "
                + (
                    f"With {n} samples the test finds {found:.0%} of rearranged pictures with a probability of 80%."
                    if found is not None
                    else f"With {n} samples the test would miss it even if all of them were rearranged pictures."
                )
                + ("" if n >= FRECHET_SAMPLES else f" A Frechet distance would need {FRECHET_SAMPLES} samples.")
            ),
        ),
        figures,
    )


def _ratio(change: float, whole: float) -> float:
    """Return change / whole, at most 1, of distances whose estimates may be below 0; NaN stays NaN."""
    if math.isnan(change):
        return math.nan
    if change <= 0:
        return 0.0
    return min(change / whole, 1.0) if whole > 0 else 1.0


def _recognised(ours: Features, theirs: Features, space: Space, calibration: Matcher) -> Tensor:
    """Return which outputs [n] every encoder still takes for what they were: one that ignores colour is not enough."""
    parts = [
        calibration.matches(centred_cosine(a, b, centre)[:, None], (name,))
        for a, b, centre, name in zip(ours, theirs, space.centre, space.names, strict=True)
    ]
    return torch.stack(parts).all(0)
