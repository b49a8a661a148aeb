"""Outputs that are no pictures of the domain, or all one picture, fail; real pictures never seen before pass."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from scipy.stats import binom
from torch import Tensor

from expunge.evaluation.plausibility import Domain, alike_pairs, alike_rule, diversity_rule, plausibility_rule
from expunge.evaluation.settings import GateSettings
from expunge.evaluation.space import Features, Space
from expunge.types import Rule
from tests.evaluation.domains import FixedMatcher, blurred, face_pictures, flag_pictures, noise_like

GATE = GateSettings()
MATCHER = FixedMatcher()
KNOWN = 64
NEW = 24
pictures_of = {"faces": face_pictures, "flags": flag_pictures}


@cache
def domain(name: str) -> Domain:
    """What 64 of the pictures teach; the others stand for what comes out of a model."""
    known = pictures_of[name]()[:KNOWN]
    return Domain.of(Space.around(("efficientnet-lite0",), known)[0], known)


@cache
def new(name: str) -> Tensor:
    return pictures_of[name]()[KNOWN : KNOWN + NEW]


def judged(name: str, outputs: Tensor) -> Rule:
    return plausibility_rule(outputs, domain(name), GATE)


@pytest.mark.parametrize("name", pictures_of)
def test_real_pictures_that_were_never_seen_pass(name: str) -> None:
    rule = judged(name, new(name))
    assert rule.passed
    assert rule.bound is not None
    assert rule.bound <= rule.threshold == GATE.max_implausible


RUINS: dict[str, Callable[[Tensor], Tensor]] = {
    "grey": lambda x: torch.full_like(x, 0.1),
    "nearly grey": lambda x: 0.01 * noise_like(x),
    "noise": noise_like,
    "slightly blurred": lambda x: blurred(x, 1),
    "blurred": lambda x: blurred(x, 3),
    "the mean picture": lambda x: x.mean(0, keepdim=True).expand_as(x),
    "not a number": lambda x: x * float("nan"),
}


@pytest.mark.parametrize("name", pictures_of)
@pytest.mark.parametrize("ruin", RUINS)
def test_what_is_no_picture_fails(name: str, ruin: str) -> None:
    assert not judged(name, RUINS[ruin](new(name))).passed


def test_pictures_of_another_domain_fail() -> None:
    flags_as_faces = torch.nn.functional.interpolate(new("flags"), size=(24, 24), mode="area")
    assert not judged("faces", flags_as_faces).passed


def test_a_third_of_noise_fails_though_most_outputs_are_fine() -> None:
    outputs = new("faces").clone()
    outputs[::3] = noise_like(outputs[::3])
    rule = judged("faces", outputs)
    assert not rule.passed
    assert rule.value == pytest.approx(1 / 3, abs=0.1)


@pytest.mark.parametrize("name", pictures_of)
def test_the_false_alarm_rate_is_what_is_stated(name: str) -> None:
    """New pictures are called implausible no more often than chance at that rate allows in 99 of 100 cases."""
    stated = domain(name).false_alarms
    assert 0 < stated < GATE.max_implausible / 3
    assert int(domain(name).implausible(new(name)).sum()) <= binom.ppf(0.99, NEW, stated)


def test_few_outputs_prove_nothing() -> None:
    assert judged("faces", new("faces")[:8]).passed
    assert not judged("faces", new("faces")[:7]).passed


@pytest.mark.parametrize("count", [8, 9, 14, 15, 18, 24])
def test_pictures_of_the_domain_fail_in_at_most_one_of_a_hundred_cases_and_ruins_always(count: int) -> None:
    """However few the outputs; each is called implausible by chance as often as the domain states."""
    faces = domain("faces")
    good, bad = new("faces")[~faces.implausible(new("faces"))][:1], noise_like(new("faces")[:1])

    def passes(implausible: int) -> bool:
        return judged("faces", torch.cat([bad] * implausible + [good] * (count - implausible))).passed

    most = max(hits for hits in range(count + 1) if passes(hits))
    assert binom.sf(most, count, faces.false_alarms) <= 0.01
    assert most < count / 2


def test_a_domain_needs_samples() -> None:
    with pytest.raises(ValueError, match="at least 32"):
        Domain.of(domain("faces").space, new("faces")[:8])


@cache
def all_outputs() -> Features:
    return domain("faces").space.features(new("faces"))


def outputs(rows: list[int]) -> Features:
    """Return the features of outputs that show these of the new faces."""
    return tuple(part[rows] for part in all_outputs())


def repeated(picture: int, count: int = 16) -> Features:
    return outputs([picture] * count)


EACH_ITS_OWN = list(range(NEW))


def alike(own: Features, others: list[Features], surrogates_match: list[bool] | None = None) -> Rule:
    match = surrogates_match or [False] * len(others)
    return alike_rule(own, others, domain("faces").space, MATCHER, GATE, 0.95, match)


def test_requests_with_outputs_of_their_own_are_not_alike() -> None:
    own, *others = (outputs(EACH_ITS_OWN[8 * i : 8 * i + 8]) for i in range(3))
    assert alike(own, others).passed


def test_all_requests_with_one_picture_are_alike() -> None:
    rule = alike(repeated(0), [outputs(EACH_ITS_OWN), repeated(0)])
    assert not rule.passed
    assert rule.value == 1.0


def test_one_of_many_requests_that_collapses_into_this_one_is_not_averaged_away() -> None:
    others = [outputs(EACH_ITS_OWN), *(repeated(i) for i in range(1, 6))]
    assert alike(repeated(0), others).passed
    assert not alike(repeated(0), [*others, repeated(0)]).passed


def test_requests_that_were_given_one_surrogate_may_come_out_alike() -> None:
    rule = alike(repeated(0), [repeated(0), repeated(2)], [True, False])
    assert rule.passed
    assert "1 request left out" in rule.why


def test_a_single_request_has_nobody_to_be_alike_with() -> None:
    assert alike(repeated(0), []).passed


def test_outputs_that_are_no_numbers_are_not_called_different() -> None:
    broken = tuple(part * float("nan") for part in repeated(1))
    assert not alike(repeated(0), [repeated(2), broken]).passed


def diversity(after: Features, base: Features) -> Rule:
    return diversity_rule(after, base, domain("faces").space, MATCHER, GATE, 0.95, "empty prompt")


def test_free_samples_that_all_give_one_picture_fail() -> None:
    various = outputs(EACH_ITS_OWN)
    assert diversity(various, various).passed
    assert not diversity(repeated(0, NEW), various).passed


def test_a_quarter_of_the_free_samples_in_one_picture_passes_and_three_quarters_fail() -> None:
    various = outputs(EACH_ITS_OWN)
    quarter, most = ([0] * count + EACH_ITS_OWN[count:] for count in (6, 18))
    assert diversity(outputs(quarter), various).passed
    assert not diversity(outputs(most), various).passed


def test_a_memorised_prompt_has_no_diversity_to_lose() -> None:
    rule = diversity(repeated(1), repeated(0))
    assert rule.passed
    assert rule.base == 1.0


def test_pairs_are_found_between_the_pictures_that_show_the_same() -> None:
    found = alike_pairs(domain("faces").space, MATCHER, outputs([0, 1, 2]), outputs([2, 1, 0]))
    assert found.tolist() == torch.eye(3, dtype=torch.bool).flip(0).tolist()
