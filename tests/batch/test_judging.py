"""Judging surrogates on the shipped faces, by the encoders and the calibration of the verdict."""

import numpy as np
import pytest

from expunge.batch.judging import SampleJudging
from expunge.pixels import to_pictures
from expunge.settings import load_settings
from expunge.testbed import faces

PICTURES = to_pictures(faces.images().expand(-1, 3, -1, -1))
TARGET, OTHERS, SAMPLES = PICTURES[:1], PICTURES[1:40], PICTURES[40:]


@pytest.fixture(scope="module")
def judging() -> SampleJudging:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("EXPUNGE_CONFIG", raising=False)
        return SampleJudging.of(load_settings(), "faces", SAMPLES)


def test_the_target_and_its_mirror_image_are_the_target(judging: SampleJudging) -> None:
    judge = judging.against(TARGET)
    for still in (TARGET[0], TARGET[0][:, ::-1].copy()):
        verdict = judge(still)
        assert verdict.matches
        assert verdict.likeness > 0
        assert not verdict.good


def test_other_faces_are_good_surrogates(judging: SampleJudging) -> None:
    judge = judging.against(TARGET)
    verdicts = [judge(other) for other in OTHERS]
    assert not any(verdict.matches for verdict in verdicts)
    assert sum(verdict.good for verdict in verdicts) >= 0.75 * len(verdicts)


def test_a_surrogate_of_one_picture_must_not_be_another_picture_of_the_request(judging: SampleJudging) -> None:
    assert judging.against(TARGET)(OTHERS[0]).likeness < judging.against(PICTURES[:2])(OTHERS[0]).likeness
    assert judging.against(PICTURES[:2])(OTHERS[0]).matches


def test_grey_and_noise_are_not_plausible(judging: SampleJudging) -> None:
    judge = judging.against(TARGET)
    noise = np.random.default_rng(0).integers(0, 256, TARGET[0].shape, np.uint8)
    assert not judge(np.full_like(TARGET[0], 128)).plausible
    assert not judge(noise).plausible


def test_few_samples_still_tell_the_target_from_others() -> None:
    judge = SampleJudging.of(load_settings(), "faces", SAMPLES[:5]).against(TARGET)
    assert judge(TARGET[0]).matches
    assert judge(np.full_like(TARGET[0], 128)).plausible, "too few samples say nothing about that"
    assert not judge(OTHERS[0]).matches


def test_a_model_without_a_calibration_is_judged_by_its_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPUNGE_MODELS", '{"own": {"source": "/somewhere/else"}}')
    judge = SampleJudging.of(load_settings(), "own", SAMPLES).against(TARGET)
    assert judge(TARGET[0]).likeness > 0
    assert not judge(TARGET[0]).matches
