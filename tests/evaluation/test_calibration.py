"""A threshold keeps its promise on pictures that it was not made of, and a calibration is used only where it holds."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from structlog.testing import capture_logs
from torch import Tensor

from expunge.evaluation.calibration import (
    FALSE_MATCH,
    Calibration,
    MatchThreshold,
    calibrate,
    calibration_file,
    copies_of,
    find_calibration,
)
from expunge.evaluation.rules import PROTOCOL_VERSION
from expunge.evaluation.space import Space
from expunge.evaluation.views import all_views
from expunge.families import source_digest
from expunge.files import write_atomically
from expunge.settings import EvaluationSettings, Settings, load_settings
from tests.evaluation.domains import Pixels

EXACT = MatchThreshold(threshold=0.8, false_match=0.001, missed=0.1, matching=700, non_matching=9900, how="counted")


def pictures(count: int, seed: int, common: float = 0.0) -> Tensor:
    """Smooth random pictures, float32 [count, 3, 16, 16] in [-1, 1]. common: how much of one picture is in them all."""
    coarse = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    shared = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(99))
    mixed = (1 - common) * coarse + common * shared
    return torch.nn.functional.interpolate(mixed, size=(16, 16), mode="bicubic").tanh()


@pytest.fixture(scope="module")
def space() -> Space:
    return Space((Pixels(),), (torch.zeros(3 * 16 * 16),))


def test_a_counted_threshold_lets_few_other_pictures_through(space: Space) -> None:
    found = calibrate(space, pictures(60, 0), pictures(40, 1), pictures(60, 2))
    limit = found.thresholds["pixels"]
    assert limit.how == "counted"
    assert limit.non_matching == 60 * 59 + 40 * 60 + 60 * 40
    assert limit.matching == 60 * len(copies_of(pictures(1, 0)[0]))
    assert 0 < limit.false_match <= FALSE_MATCH
    others = torch.cat([space.similarity(space.features(pictures(60, 3)), views) for views in _views(space, 60, 4)])
    assert found.matches(others, ["pixels"]).double().mean() < 5 * FALSE_MATCH
    own = torch.cat(
        [
            space.similarity(space.features(copies_of(picture)), space.features(all_views(picture)))
            for picture in pictures(20, 5)
        ]
    )
    assert found.matches(own, ["pixels"]).double().mean() == pytest.approx(1 - limit.missed, abs=0.1)
    assert limit.missed == found.missed < 0.5


def test_of_few_pairs_none_may_match_and_the_tail_is_estimated(space: Space) -> None:
    few = calibrate(space, pictures(10, 0), pictures(9, 1), pictures(10, 2)).thresholds["pixels"]
    assert few.how == "normal tail"
    assert few.non_matching == 10 * 9 + 2 * 9 * 10 < 1 / FALSE_MATCH
    many = calibrate(space, pictures(60, 0), pictures(40, 1), pictures(60, 2)).thresholds["pixels"]
    assert few.threshold > many.threshold - 0.1
    assert 0 < few.false_match <= FALSE_MATCH


def test_samples_that_repeat_a_memorised_picture_do_not_move_the_threshold(space: Space) -> None:
    """2 % of the pairs are one picture twice, which counting would take for a false match."""
    samples = pictures(50, 0)
    clean = calibrate(space, None, None, samples).thresholds["pixels"]
    repeated = torch.cat([samples, samples[:25] + 0.05 * pictures(25, 7)]).clamp(-1, 1)
    again = calibrate(space, None, None, repeated).thresholds["pixels"]
    assert clean.how == again.how == "robust normal tail"
    assert again.threshold == pytest.approx(clean.threshold, abs=0.05)
    assert again.missed < 0.5


def test_one_picture_given_twice_is_no_pair_of_different_ones(space: Space) -> None:
    once = calibrate(space, pictures(40, 0), None, pictures(20, 1))
    twice = calibrate(space, torch.cat([pictures(40, 0), pictures(1, 0)]), None, pictures(20, 1))
    assert once.thresholds["pixels"].non_matching == 40 * 39
    assert twice.thresholds["pixels"].non_matching == 41 * 40 - 2
    assert twice.thresholds["pixels"].threshold == pytest.approx(once.thresholds["pixels"].threshold, abs=0.1)


def test_chance_is_an_upper_bound_that_does_not_judge_its_own_thresholds(space: Space) -> None:
    apart = calibrate(space, pictures(40, 0), pictures(30, 1), pictures(40, 2))
    assert 0 < apart.chance < 0.02
    # The model knows one of the pictures that its owner thought it had never seen, and shows it in half of its samples.
    unseen, samples = pictures(30, 1), pictures(40, 2)
    samples[:20] = 0.95 * unseen[:1]
    known = calibrate(space, pictures(40, 0), unseen, samples)
    assert known.chance > 20 / (30 * 40)


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_too_few_pictures_are_refused(space: Space, kind: int) -> None:
    given = [pictures(10, i)[: 7 if i == kind else 10] for i in range(3)]
    with pytest.raises(ValueError, match="needs 8 pictures of each kind, not 7"):
        calibrate(space, *given)


def test_copies_are_altered_and_in_range() -> None:
    picture = pictures(1, 0)[0]
    copies = copies_of(picture)
    views = all_views(picture)
    assert copies.abs().max() <= 1
    assert len(copies) > len(views)
    assert torch.cdist(copies.flatten(1), views.flatten(1)).min() > 0.1
    assert torch.equal(copies, copies_of(picture))


def test_any_encoder_says_match() -> None:
    calibration = Calibration(
        protocol_version=PROTOCOL_VERSION,
        source="a test",
        base=None,
        thresholds={"a": EXACT, "b": EXACT.model_copy(update={"threshold": 0.5})},
        chance=0.01,
        missed=0.0,
    )
    similarity = torch.tensor([[0.9, 0.1], [0.1, 0.5], [0.79, 0.49]])
    assert calibration.matches(similarity, ["a", "b"]).tolist() == [True, True, False]
    assert calibration.matches(similarity[:, :1], ["b"]).tolist() == [True, False, True]
    with pytest.raises(KeyError, match="c"):
        calibration.matches(similarity, ["a", "c"])


Write = Callable[..., Calibration]


@pytest.fixture
def settings() -> Settings:
    return load_settings()


@pytest.fixture
def write(settings: Settings) -> Write:
    def call(**changed: object) -> Calibration:
        fields = {
            "protocol_version": PROTOCOL_VERSION,
            "source": "a test",
            "base": source_digest(settings.model("faces")),
            "thresholds": {name: EXACT for name in settings.evaluation.encoders},
            "chance": 0.01,
            "missed": 0.0,
            **changed,
        }
        made = Calibration.model_validate(fields)
        write_atomically(calibration_file(settings, "faces"), made.model_dump_json())
        return made

    return call


def test_one_of_this_machine_comes_before_the_shipped_one(settings: Settings, write: Write) -> None:
    made = write()
    assert find_calibration(settings, "faces") == made


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"protocol_version": PROTOCOL_VERSION + 1}, "it is of protocol"),
        ({"base": "0" * 64}, "it was made for other files of the base model"),
        ({"thresholds": {"edges": EXACT}}, "it has no threshold for efficientnet-lite0"),
    ],
)
def test_one_that_does_not_hold_is_ignored_and_said(
    settings: Settings, write: Write, changed: dict[str, object], why: str
) -> None:
    made = write(**changed)
    with capture_logs() as logged:
        assert find_calibration(settings, "faces") != made
    assert logged[0]["why"].startswith(why)


def test_a_damaged_file_is_ignored_and_said(settings: Settings) -> None:
    write_atomically(calibration_file(settings, "faces"), "{")
    with capture_logs() as logged:
        find_calibration(settings, "faces")
    assert logged[0]["why"] == "it is damaged, or of another protocol"


def test_a_model_of_ones_own_has_none_until_it_is_made(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("EXPUNGE_MODELS__MINE__SOURCE", str(tmp_path))
    assert find_calibration(load_settings(), "mine") is None


@pytest.mark.parametrize("model", ["faces", "flags"])
def test_a_testbed_comes_with_one_that_holds(settings: Settings, model: str) -> None:
    """It was made for these weights and this protocol, and says how."""
    with capture_logs() as logged:
        found = find_calibration(settings, model)
    assert logged == []
    assert found is not None
    assert f"expunge calibrate {model} --pictures" in found.source
    assert set(found.thresholds) >= set(EvaluationSettings().encoders)
    for limit in found.thresholds.values():
        assert limit.how == "counted"
        assert limit.false_match <= FALSE_MATCH
        assert limit.missed < 1


def _views(space: Space, count: int, seed: int) -> list[tuple[Tensor, ...]]:
    return [space.features(all_views(picture)) for picture in pictures(count, seed)]
