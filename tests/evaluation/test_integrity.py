"""Unrelated outputs that changed fail, however good the average; unchanged ones and slight, even changes pass."""

from functools import cache

import pytest
import torch
from torch import Tensor

from expunge.evaluation.integrity import measure_integrity, nearest_neighbours
from expunge.evaluation.settings import GateSettings
from expunge.evaluation.space import Space
from expunge.types import IntegrityEvidence, Rule
from tests.evaluation.domains import (
    FixedMatcher,
    GreyThumbnails,
    Thumbnails,
    blurred,
    face_pictures,
    flag_pictures,
    noise_like,
)

N = 32


@cache
def samples() -> tuple[Tensor, Tensor, Tensor]:
    """Real flags stand for the base model's samples, for those at other seeds, and for other pictures; 32 of each."""
    before, other, more = flag_pictures()[: 3 * N].split(N)
    return before, other, more


@cache
def space() -> Space:
    encoders = (Thumbnails(), GreyThumbnails())
    return Space(encoders, tuple(encoder(samples()[0]).mean(0) for encoder in encoders))


def judged(after: Tensor, nearest: Tensor | None = None, gate: GateSettings | None = None) -> IntegrityEvidence:
    before, other, _ = samples()
    return measure_integrity(
        before, after, other, space(), FixedMatcher(), gate or GateSettings(), 0.95, nearest=nearest
    )


def failed(evidence: IntegrityEvidence) -> set[str]:
    return {each.name for each in evidence.rules if not each.passed}


def named(evidence: IntegrityEvidence, name: str) -> Rule:
    return next(each for each in evidence.rules if each.name == name)


def partly(ruined: Tensor, every: int) -> Tensor:
    after = samples()[0].clone()
    after[::every] = ruined[::every]
    return after


def test_an_unchanged_model_passes() -> None:
    evidence = judged(samples()[0])
    assert evidence.passed
    assert failed(evidence) == set()
    assert evidence.psnr == evidence.figures["psnr_worst"] == 100
    assert evidence.figures["changed"] == 0


def test_a_slight_even_change_passes() -> None:
    assert judged(samples()[0] * 0.96 + 0.01).passed


def test_another_picture_every_time_fails_by_every_figure_of_single_samples() -> None:
    assert failed(judged(samples()[2])) >= {"median PSNR", "median SSIM", "changed samples", "5 % quantile of PSNR"}


@pytest.mark.parametrize("ruin", ["other pictures", "noise", "grey", "blur"])
def test_a_fifth_of_the_samples_ruined_fails_though_the_middle_is_untouched(ruin: str) -> None:
    before, _, more = samples()
    ruined = {
        "other pictures": more,
        "noise": noise_like(before),
        "grey": torch.zeros_like(before),
        "blur": blurred(before, 6),
    }[ruin]
    evidence = judged(partly(ruined, every=5))
    assert not evidence.passed
    assert evidence.psnr == 100
    assert named(evidence, "median PSNR").passed
    assert "changed samples" in failed(evidence)


def test_the_tail_of_a_model_that_gives_other_pictures_now_and_then_fails_too() -> None:
    assert "5 % quantile of PSNR" in failed(judged(partly(samples()[2], every=5)))


def test_another_colour_is_a_change_though_a_colour_blind_encoder_sees_none() -> None:
    """Channels swapped: the same grey thumbnail, but another picture."""
    assert "changed samples" in failed(judged(samples()[0][:, [1, 2, 0]]))


def test_what_every_encoder_recognises_is_unchanged_though_pixels_moved() -> None:
    evidence = judged(samples()[0].roll(2, -1))
    assert evidence.figures["changed"] < 0.1
    assert evidence.psnr < 20


def test_other_pictures_of_the_domain_are_no_change_of_the_distribution() -> None:
    """The other rules are there to find them."""
    assert named(judged(samples()[2]), "distribution").passed


def test_a_model_that_gives_one_picture_fails_by_its_distribution() -> None:
    before = samples()[0]
    assert not named(judged(before[:1].expand_as(before).contiguous()), "distribution").passed


def test_a_change_that_is_certain_but_tiny_is_no_change_of_the_distribution() -> None:
    """A model that gives nearly the same picture for a prompt whatever the seed shows the slightest change."""
    before = samples()[0]
    other = (before + 0.002 * noise_like(before)).clamp(-1, 1)
    after = (before * 0.97).contiguous()

    evidence = measure_integrity(before, after, other, space(), FixedMatcher(), GateSettings(), 0.95)

    distribution = named(evidence, "distribution")
    assert evidence.figures["kid_p"] < GateSettings().min_kid_p
    assert distribution.passed


def test_the_distribution_says_how_many_foreign_pictures_would_change_it_as_much() -> None:
    """Half of the samples rearranged: it says about a half, and fails."""
    before, other = face_pictures()[:100].split(50)
    after = before.clone()
    after[::2] = before[::2].roll((before.shape[-2] // 2, before.shape[-1] // 2), (-2, -1))
    encoder = Thumbnails()
    faces = Space((encoder,), (encoder(before).mean(0),))

    distribution = named(
        measure_integrity(before, after, other, faces, FixedMatcher(), GateSettings(), 0.95), "distribution"
    )

    assert distribution.value == pytest.approx(0.5, abs=0.15)
    assert not distribution.passed


def test_a_change_beyond_that_of_rearranged_pictures_counts_as_all_of_them() -> None:
    """Noise looks the same rearranged, so that nothing is farther away than the change: a figure all the same."""
    noise = [torch.randn(N, 3, 16, 16, generator=torch.Generator().manual_seed(i)).clamp(-1, 1) for i in (0, 1)]
    evidence = measure_integrity(
        noise[0], torch.ones_like(noise[0]), noise[1], space(), FixedMatcher(), GateSettings(), 0.95
    )
    distribution = named(evidence, "distribution")
    assert distribution.value == 1
    assert not distribution.passed


def test_only_rows_that_were_chosen_alike_are_compared_as_a_distribution() -> None:
    """`before` has lost every showing of one picture; `other` has not, which is no change of the hotfix."""
    before, other, _ = samples()
    crowded = other.clone()
    crowded[::2] = before[0]
    comparable = torch.arange(N) % 2 == 1

    def share(rows: Tensor | None) -> Rule:
        given = (space(), FixedMatcher(), GateSettings(), 0.95)
        return named(measure_integrity(before, before, crowded, *given, comparable=rows), "distribution")

    assert not share(None).passed
    assert share(comparable).passed


def test_the_power_of_the_distribution_test_is_stated_and_grows_with_the_number_of_samples() -> None:
    """At least: 50 samples find a smaller share of rearranged faces than 20 do."""

    def stated(n: int) -> float:
        before, other = face_pictures()[: 2 * n].split(n)
        encoder = Thumbnails()
        evidence = measure_integrity(
            before, before, other, Space((encoder,), (encoder(before).mean(0),)), FixedMatcher(), GateSettings(), 0.95
        )
        share = evidence.figures["kid_power"]
        assert f"finds {share:.0%} of rearranged pictures" in named(evidence, "distribution").why
        return share

    assert stated(50) < stated(20) <= 1


def test_a_distribution_test_that_can_find_nothing_does_not_pass() -> None:
    """No p-value of 999 permutations is below 0.0005, so such a test could never fail."""
    rule = named(judged(samples()[0], gate=GateSettings(min_kid_p=0.0005)), "distribution")
    assert not rule.passed
    assert rule.why.startswith("Not measured")
    assert named(judged(samples()[0], gate=GateSettings(min_kid_p=0)), "distribution").passed


def test_a_frechet_distance_is_left_out_where_samples_do_not_suffice() -> None:
    evidence = judged(samples()[0])
    assert "frechet" not in evidence.figures
    assert "Frechet distance would need 80 samples" in named(evidence, "distribution").why


def test_collateral_at_the_neighbours_of_one_target_fails() -> None:
    """Two of a target's ten neighbours ruined are 6 % of all samples: the rule finds what the quantile does not."""
    before, _, more = samples()
    targets = space().features(before[[3, 20]])
    nearest = nearest_neighbours(space(), space().features(before), targets)
    assert nearest.shape == (2, 10)
    assert nearest[:, 0].tolist() == [3, 20]
    apart = next(i for i in nearest[1].tolist() if i not in nearest[0].tolist() and i != 20)
    after = before.clone()
    after[[20, apart]] = more[[20, apart]]
    rule = named(judged(after, nearest), "collateral")
    assert not rule.passed
    assert rule.condition == "neighbours of target 2"
    assert named(judged(before * 0.96, nearest), "collateral").passed


def test_without_neighbours_there_is_no_rule_on_them() -> None:
    assert "collateral" not in {each.name for each in judged(samples()[0]).rules}


def test_pictures_of_no_numbers_fail_and_can_be_stored() -> None:
    after = samples()[0].clone()
    after[:2, 0, 0, 0] = float("nan")
    evidence = judged(after)
    assert "changed samples" in failed(evidence)
    assert IntegrityEvidence.model_validate_json(evidence.model_dump_json()) == evidence


def test_one_changed_sample_of_32_cannot_be_told_from_a_tenth() -> None:
    """The bound decides, not the share: 0 of 32 leave 9 %, 1 of 32 leaves 14 %."""
    rule = named(judged(partly(samples()[2], every=N)), "changed samples")
    assert not rule.passed
    assert rule.value == pytest.approx(1 / 32)
    assert rule.bound == pytest.approx(0.14, abs=0.005)
    assert "of 32 samples, 0 may have changed" in rule.why


def test_sets_of_different_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="three sets of one shape"):
        judged(samples()[0][:8])
