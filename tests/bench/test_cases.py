"""Requests come from what nobody tuned on, at random, and are the same every time."""

from collections.abc import Callable

import pytest
import torch

from expunge.bench.cases import Pool, draw_groups, pool_of_faces, pool_of_flags, pool_of_people
from expunge.errors import InputError
from expunge.testbed import flags
from expunge.testbed.settings import MODELS

POOL = Pool({number: torch.zeros(1, 1, 2, 2) for number in range(10, 20)}, {})


def test_people_were_not_tuned_on() -> None:
    pool = pool_of_people()
    assert list(pool.pictures) == list(range(20, 36))
    assert {len(pictures) for pictures in pool.pictures.values()} == {8}


def test_no_face_is_the_demo_s() -> None:
    assert set(range(100)) - set(pool_of_faces().pictures) == {3, 41, 76, 90}


def test_no_flag_is_the_demo_s_or_looks_like_one_that_must_stay() -> None:
    pool, (pictures, names) = pool_of_flags(), flags.images()
    settings = MODELS["flags"]
    kept = {str(prompt) for name in ("retain_prompts", "evaluation_prompts") for prompt in settings[name]}  # pyright: ignore[reportGeneralTypeIssues]
    assert not kept & set(pool.prompts.values())
    assert not {"the flag of Canada", "the flag of Greece"} & set(pool.prompts.values())
    norway = pictures[names.index("Norway")]
    assert not any(torch.equal(picture[0], norway) for picture in pool.pictures.values())
    assert len(pool.pictures) > 200


@pytest.mark.parametrize("make", [pool_of_faces, pool_of_flags])
def test_at_least_twenty_requests_can_be_drawn(make: Callable[[], Pool]) -> None:
    drawn = [target for group in draw_groups(make(), 5, 4) for target in group]
    assert len(set(drawn)) == 20


def test_more_runs_keep_the_groups_there_are_and_repeat_only_when_all_have_come() -> None:
    three, seven = draw_groups(POOL, 3, 3), draw_groups(POOL, 7, 3)
    assert seven[:3] == three
    assert len({target for group in three for target in group}) == 9
    assert seven[3:6] == three
    assert three != [(10, 11, 12), (13, 14, 15), (16, 17, 18)]


def test_with_an_oracle_only_what_it_never_saw_is_drawn() -> None:
    groups = draw_groups(POOL, 4, 2, only=[3, 12, 13, 14, 15])
    assert {target for group in groups for target in group} == {12, 13, 14, 15}


@pytest.mark.parametrize("only", [(), (10, 11)])
def test_too_many_requests_are_refused(only: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="--requests: 11"):
        draw_groups(POOL, 1, 11, only)
