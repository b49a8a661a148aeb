"""What free samples prove about a target: shares with exact bounds, against chance and against the base model."""

import pytest
import torch
from scipy.stats import binom
from torch import Tensor

from expunge.evaluation.generation import generation_rules
from expunge.evaluation.settings import GateSettings
from expunge.types import Rule
from tests.evaluation.domains import FixedMatcher

NAMES = ("one", "colour-blind")


def samples(matching: int, count: int = 32, encoder: int = 0) -> Tensor:
    """Similarities [count, 2] to a target that `matching` samples show, as one of the encoders sees it."""
    similarity = torch.full((count, 2), 0.1, dtype=torch.float64)
    similarity[:matching, encoder] = 0.9
    return similarity


def judged(after: Tensor, base: Tensor, chance: float = 0.02, gate: GateSettings | None = None) -> dict[str, Rule]:
    rules = generation_rules(
        after, base, NAMES, FixedMatcher(chance=chance), gate or GateSettings(), 0.95, label="own prompt"
    )
    return {each.name: each for each in rules}


def test_a_prompt_that_still_gives_the_target_fails() -> None:
    rules = judged(samples(30), samples(32))
    assert not rules["free generation"].passed
    assert rules["free generation"].condition == "own prompt"
    assert rules["free generation falls"].base == 1.0


def test_an_unchanged_model_fails_both_rules() -> None:
    assert not any(each.passed for each in judged(samples(32), samples(32)).values())


@pytest.mark.parametrize("encoder", [0, 1])
def test_one_encoder_that_still_sees_the_target_is_enough(encoder: int) -> None:
    assert not judged(samples(20, encoder=encoder), samples(32))["free generation"].passed


def test_a_share_at_chance_passes_and_falls() -> None:
    rules = judged(samples(0), samples(32))
    assert len(rules) == 2
    assert all(each.passed for each in rules.values())


def test_a_base_model_that_hardly_ever_gives_the_target_has_nothing_that_must_fall() -> None:
    """Of 32 samples at chance one or two match: from 3 they cannot be told to have fallen."""
    assert list(judged(samples(1), samples(3))) == ["free generation"]


def test_the_fall_is_decided_where_chance_is_high() -> None:
    """A target like many others: half of the samples match it by chance, so only the fall is left to see."""
    falls = [judged(samples(hits), samples(32), chance=0.5)["free generation falls"].passed for hits in (16, 30)]
    assert falls == [True, False]


def test_a_model_at_chance_is_hardly_ever_failed() -> None:
    fails = next(k for k in range(33) if not judged(samples(k), samples(0))["free generation"].passed)
    assert binom.sf(fails - 1, 32, 0.02) < 0.05
    assert fails == 3


def test_the_sentence_says_what_share_would_have_been_found() -> None:
    """Failing takes 3 of 32: with a true share of 13 % that happens four times in five, with 12 % it does not."""
    assert binom.sf(2, 32, 0.13) >= 0.8 > binom.sf(2, 32, 0.12)
    assert "A share of 13% would have been found" in judged(samples(0), samples(0))["free generation"].why


def test_the_setting_replaces_chance() -> None:
    loose = GateSettings(max_matches=0.5)
    assert judged(samples(10), samples(12), gate=loose)["free generation"].passed
    assert judged(samples(10), samples(12), gate=loose)["free generation"].threshold == 0.5


def test_a_similarity_that_is_no_number_never_passes() -> None:
    broken = samples(0)
    broken[5, 1] = float("nan")
    rules = judged(broken, samples(32))
    assert not any(each.passed for each in rules.values())
    assert rules["free generation"].value is None
