"""The share of re-generations in which a target is still recognised."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from expunge.evaluation.calibration import Calibration, MatchThreshold
from expunge.evaluation.recognition import Drawn, recognition_rule
from expunge.evaluation.reproduction import Condition, Unseen
from expunge.settings import GateSettings
from expunge.types import Rule

NAMES = ("colours", "shapes")
LEVELS = (0.3, 0.5, 0.7)
VIEWS = ("as submitted", "mirrored")
SEEN, GONE = 0.9, 0.1


def calibration(limit: float = 0.6) -> Calibration:
    threshold = MatchThreshold(
        threshold=limit, false_match=0.001, missed=0.0, matching=10, non_matching=10, how="counted"
    )
    return Calibration(
        protocol_version=2,
        source="made up",
        base=None,
        thresholds=dict.fromkeys(NAMES, threshold),
        chance=0.01,
        missed=0.0,
    )


def conditions(label: str = "empty prompt", picture: int = 0) -> list[Condition]:
    return [Condition(picture, False, view, 0, label) for view in VIEWS]


def draws(hits: int, *, encoders: tuple[int, ...] = (0, 1)) -> Tensor:
    """18 re-generations per condition; the first `hits` are recognised by `encoders`."""
    values = torch.full((len(VIEWS), 18, len(NAMES)), GONE, dtype=torch.float64)
    for encoder in encoders:
        values[:, :hits, encoder] = SEEN
    return values


def judge(
    after: Mapping[str, Tensor], *, unseen: float = GONE, gate: GateSettings | None = None, confidence: float = 0.95
) -> Rule:
    rounds = [Drawn(conditions(label), draws(18), values) for label, values in after.items()]
    strangers = Unseen(torch.full((24, 9, len(NAMES)), unseen, dtype=torch.float64), LEVELS)
    return recognition_rule(rounds, strangers, NAMES, calibration(), gate or GateSettings(), confidence)


def test_a_target_that_comes_back_two_times_in_five_fails() -> None:
    found = judge({"empty prompt": draws(7)})
    assert not found.passed
    assert found.value == pytest.approx(7 / 18)
    assert found.base == 1.0
    assert "14 of 36" in found.why


def test_a_target_that_is_gone_passes() -> None:
    assert judge({"empty prompt": draws(0)}).passed


def test_a_single_lucky_draw_passes() -> None:
    assert judge({"empty prompt": draws(1)}).passed


def test_one_encoder_alone_recognises_nothing() -> None:
    assert judge({"empty prompt": draws(18, encoders=(0,))}).passed


def test_the_worst_prompt_decides_and_is_named() -> None:
    found = judge({"own prompt": draws(0), "empty prompt": draws(9)})
    assert not found.passed
    assert "empty prompt" in found.condition


def test_what_unseen_pictures_give_is_allowed() -> None:
    assert judge({"empty prompt": draws(18)}, unseen=SEEN).passed


def test_what_is_no_number_is_not_recognised_but_base_and_hotfix_are_counted_alike() -> None:
    found = judge({"empty prompt": torch.full_like(draws(0), float("nan"))})
    assert found.value == 0, "the rule of reproduction fails what is no number"


def test_rounds_of_draws_add_up() -> None:
    rounds = [Drawn(conditions(), draws(18), draws(hits)) for hits in (0, 18)]
    strangers = Unseen(torch.full((24, 9, len(NAMES)), GONE, dtype=torch.float64), LEVELS)
    found = recognition_rule(rounds, strangers, NAMES, calibration(), GateSettings(), 0.95)
    assert found.value == 0.5


def test_no_draws_prove_nothing() -> None:
    with pytest.raises(ValueError, match="nothing was drawn"):
        judge({})
