"""The verdicts: each condition on its own, at its threshold, and with numbers that are none."""

import math

import pytest

from expunge.evaluation.gate import judge_integrity, judge_request
from expunge.settings import GateSettings
from expunge.types import Measured

GATE = GateSettings(min_shift=0.5, min_psnr=20, min_ssim=0.7, max_kid_ratio=3)
GOOD = {
    "shift": Measured(after=0.7, base=0.1, floor=0.03),
    "target": Measured(after=0.4, base=0.8, floor=0.05),
    "surrogate": Measured(after=0.8, base=0.5, floor=0.05),
    "nearest": Measured(after=0.5, base=0.7, floor=0.05),
}
INTACT = {"psnr": 28.0, "psnr_unrelated": 12.0, "ssim": 0.9, "ssim_unrelated": 0.2, "kid": 0.004, "kid_floor": 0.003}


def judge(**changes: dict[str, float]) -> tuple[str, str]:
    return judge_request(
        **{name: figure.model_copy(update=changes.get(name, {})) for name, figure in GOOD.items()}, gate=GATE
    )


def test_a_removed_request_passes_and_says_why() -> None:
    verdict, why = judge()
    assert verdict == "passed"
    assert "0.80 to 0.40" in why
    assert why.endswith(".")


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"shift": {"after": 0.49}}, "Shift 0.49 is below 0.50"),
        ({"target": {"after": 0.76}}, "did not fall by more than the noise floor 0.05"),
        ({"target": {"after": 0.9}}, "went from 0.80 to 0.90"),
        ({"nearest": {"after": 0.76}}, "free generation came closer"),
        ({"shift": {"base": 0.6}, "target": {"after": 0.8}}, "the base model hardly reproduced it either"),
    ],
)
def test_each_condition_fails_alone(changes: dict[str, dict[str, float]], part: str) -> None:
    verdict, why = judge(**changes)
    assert verdict == "failed"
    assert part in why


def test_the_thresholds_themselves() -> None:
    assert judge(shift={"after": 0.5})[0] == "passed"
    assert judge(target={"base": 0.75, "floor": 0.25, "after": 0.5})[0] == "failed"  # exactly the floor is no fall
    assert judge(nearest={"base": 0.5, "floor": 0.25, "after": 0.75})[0] == "passed"


def test_all_that_was_missed_is_named() -> None:
    _, why = judge(shift={"after": 0.1}, target={"after": 0.8}, nearest={"after": 0.99})
    assert all(part in why for part in ("Shift 0.10", "from 0.80 to 0.80", "similarity 0.99"))


@pytest.mark.parametrize("figure", list(GOOD))
@pytest.mark.parametrize("part", ["after", "base", "floor"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_a_number_never_passes(figure: str, part: str, value: float) -> None:
    verdict, why = judge(**{figure: {part: value}})
    assert verdict == "failed"
    assert figure in why


def test_an_intact_model_passes() -> None:
    passed, why = judge_integrity(**INTACT, gate=GATE)
    assert passed
    assert "28.0 dB" in why


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"psnr": 19.99}, "PSNR 19.99 dB is below 20.00 dB, the gate's minimum"),
        ({"psnr_unrelated": 29.0}, "the value for two different seeds"),
        ({"ssim": 0.6}, "SSIM 0.60 is below 0.70"),
        ({"ssim_unrelated": 0.95}, "SSIM 0.90 is below 0.95"),
        ({"kid": 0.01}, "he distribution moved by 0.01, above 0.009"),
        ({"kid": math.nan}, "not a finite number"),
        ({"kid_floor": math.inf}, "not a finite number"),
    ],
)
def test_each_integrity_figure_fails_alone(changes: dict[str, float], part: str) -> None:
    passed, why = judge_integrity(**{**INTACT, **changes}, gate=GATE)
    assert not passed
    assert part in why


@pytest.mark.parametrize(
    ("kid", "floor", "passes"), [(-0.002, 0.001, True), (0.0, 0.0, True), (0.002, -0.001, True), (0.004, -0.001, False)]
)
def test_an_unbiased_distance_may_be_negative(kid: float, floor: float, passes: bool) -> None:
    assert judge_integrity(**{**INTACT, "kid": kid, "kid_floor": floor}, gate=GATE)[0] is passes
