"""Verdicts out of rules, and the settings that make a verdict easier to pass than the defaults do."""

from typing import Any

import pytest

from expunge.evaluation.gate import decisive, loosened, verdict_of
from expunge.evaluation.rules import rule
from expunge.settings import EvaluationSettings, GateSettings
from expunge.types import Rule


def reproduction(bound: float = 0.42) -> Rule:
    why = "the base model's excess is compared with what is left of it"
    condition = "mirrored, empty prompt"
    return rule("reproduction", bound - 0.1, bound, "at most", 0.6, base=1.0, condition=condition, why=why)


def psnr(bound: float = 28.0) -> Rule:
    return rule("median PSNR", bound, bound, "at least", 20.0, why="Unrelated outputs are compared.")


def test_a_request_passes_if_every_rule_does_and_its_sentence_has_the_figures() -> None:
    verdict, why = verdict_of([reproduction(), psnr()])
    assert verdict == "passed"
    assert why == "Every rule holds: reproduction 0.42 (at most 0.6), median PSNR 28 (at least 20)."


@pytest.mark.parametrize(("rules", "name"), [([reproduction(0.61), psnr()], "Reproduction"), ([psnr(19)], "Median")])
def test_one_rule_that_fails_is_enough(rules: list[Rule], name: str) -> None:
    verdict, why = verdict_of(rules)
    assert verdict == "failed"
    assert why.startswith(name)


def test_the_sentence_names_figure_threshold_and_worst_condition() -> None:
    _, why = verdict_of([reproduction(0.92)])
    assert why == (
        "Reproduction is 0.92 in the worst condition (mirrored, empty prompt); at most 0.6 is allowed. "
        "The base model's excess is compared with what is left of it."
    )


def test_all_that_failed_is_named_the_worst_first() -> None:
    slightly, badly = psnr(19), reproduction(1.2)
    _, why = verdict_of([slightly, psnr(), badly])
    assert why.index("Reproduction is 1.2") < why.index("Median PSNR is 19")
    assert "28" not in why


@pytest.mark.parametrize("bound", [float("nan"), float("inf"), float("-inf")])
def test_what_was_not_measured_never_passes_and_comes_first(bound: float) -> None:
    verdict, why = verdict_of([reproduction(5.0), rule("alike", 0.1, bound, "at most", 0.5, why="Outputs differ.")])
    assert verdict == "failed"
    assert why.startswith("Alike was not measured; at most 0.5 is allowed.")


def test_of_rules_of_one_name_the_sentence_has_the_nearest_miss() -> None:
    _, why = verdict_of([reproduction(0.1), psnr(), reproduction(0.5), reproduction(0.3)])
    assert why == "Every rule holds: reproduction 0.5 (at most 0.6), median PSNR 28 (at least 20)."


def test_what_decided_is_the_worst_failure_or_else_what_is_left_of_the_target() -> None:
    assert decisive([reproduction(0.1), psnr(19), psnr(12)]).bound == 12
    assert decisive([psnr(20), reproduction(0.1), reproduction(0.2)]).bound == 0.2
    assert decisive([psnr(28), psnr(20)]).bound == 20


def test_no_rules_prove_nothing() -> None:
    assert verdict_of([])[0] == "failed"


def test_the_defaults_are_not_loosened() -> None:
    assert loosened(GateSettings(), EvaluationSettings()) == ()


ENCODERS = EvaluationSettings.model_fields["encoders"].default

WEAKER_AND_STRICTER: dict[str, tuple[Any, Any]] = {
    "max_excess": (1000.0, 0.3),
    "max_matches": (0.1, 0.0),
    "max_recognised": (0.2, 0.05),
    "max_implausible": (1.0, 0.1),
    "max_alike": (0.9, 0.2),
    "max_changed": (0.5, 0.0),
    "min_psnr": (0.0, 24.0),
    "min_ssim": (-1.0, 0.9),
    "min_kid_p": (0.0, 0.05),
    "max_attempts": (None, 50),
    "encoders": (ENCODERS[1:], (*ENCODERS, "another")),
    "levels": ((0.9,), None),
    "level_grid": ((0.8,), (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)),
    "seeds": (8, 24),
    "confidence": (0.8, None),
    "unseen_folder": (None, "/pictures"),
    "unseen_pictures": (16, 100),
    "pictures": (1, 8),
    "held_out": (0.0, 0.5),
    "generation_samples": (16, 100),
    "integrity_samples": (16, 100),
    "sampling_steps": (2, 50),
    "robustness": ("off", "full"),
    "ledger_share": (0.01, 1.0),
}
"""A weaker value than the default, and one that is not; None where there is none."""


def with_setting(name: str, value: object) -> tuple[str, ...]:
    gate, evaluation = GateSettings(), EvaluationSettings()
    # Without validation: an encoder need not exist to be compared.
    if name in GateSettings.model_fields:
        return loosened(gate.model_copy(update={name: value}), evaluation)
    return loosened(gate, evaluation.model_copy(update={name: value}))


@pytest.mark.parametrize("name", [*GateSettings.model_fields, *EvaluationSettings.model_fields])
def test_every_setting_is_named_where_it_is_weaker_and_only_there(name: str) -> None:
    weaker, stricter = WEAKER_AND_STRICTER[name]  # a new setting is given its row here, and its rule in the gate
    if weaker is not None:
        (named,) = with_setting(name, weaker)
        assert named.startswith(f"{name} ")
    if stricter is not None:
        assert with_setting(name, stricter) == ()


def test_a_loosened_setting_is_named_with_both_values() -> None:
    named = loosened(GateSettings(max_excess=1000, min_psnr=0), EvaluationSettings(levels=(0.9,), seeds=8))
    assert named == (
        "max_excess 1000 instead of 0.8",
        "min_psnr 0 instead of 20",
        "levels 0.9 instead of a measured value",
        "seeds 8 instead of 9",
    )


def test_more_confidence_is_named_too_because_it_weakens_the_bound_of_free_generation() -> None:
    assert loosened(GateSettings(), EvaluationSettings(confidence=0.999)) == ("confidence 0.999 instead of 0.95",)
