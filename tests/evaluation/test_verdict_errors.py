"""The verdict itself, on a few faces: each fake fails by the rule that was made for it, and removals pass.

`python -m tests.benchmarks.verdict_errors` does the same with the product's settings, and often enough for rates.
"""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from expunge.settings import load_settings
from tests.benchmarks.verdict_errors import (
    ORACLE,
    RELEARNED,
    REMOVAL,
    SMALL,
    Court,
    Row,
    Trial,
    faces_testbed,
    subjects,
    table,
    tasks,
)
from tests.evaluation.fakes import FAKES, FREE, REPRODUCTION

TARGETS = (3, 41)
FACES = faces_testbed()
MUST_FAIL = [name for name in subjects(FACES) if name != REMOVAL]


@pytest.fixture(scope="module")
def court(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Court]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EXPUNGE_HOME", str(tmp_path_factory.mktemp("home")))
        yield Court(FACES, SMALL, load_settings())


@pytest.mark.parametrize("name", MUST_FAIL)
def test_a_fake_fails_and_for_the_right_reason(name: str, court: Court) -> None:
    trials = [trial for trial in court.judge_fake(name, TARGETS, 0) if trial.verdict != "not_reproduced"]
    assert trials, "the base model reproduces a target at least"
    allowed = REPRODUCTION | FREE if name == RELEARNED else FAKES[name].caught_by
    for trial in trials:
        assert not trial.passed
        assert allowed & set(trial.failed), f"face {trial.target}: {trial.failed}"


def test_a_simulated_removal_passes(court: Court) -> None:
    trials = [trial for trial in court.judge_fake(REMOVAL, TARGETS, 0) if trial.verdict != "not_reproduced"]
    assert trials
    assert all(trial.passed for trial in trials), trials


def test_a_model_that_never_saw_the_target_passes(court: Court) -> None:
    """One in four may fail: with so few draws, and u an average, some pictures come back too well by themselves."""
    trials = [trial for place in range(4) for trial in court.judge_unseen(place, 0)]
    assert sum(trial.passed for trial in trials) >= 3, trials


def test_every_subject_has_as_many_trials_as_were_asked_for_each_with_two_seeds(court: Court) -> None:
    planned = list(tasks(court, 20))
    for name in {task.subject for task in planned}:
        keys = [key for task in planned if task.subject == name for key in task.keys]
        assert len(keys) == len(set(keys)) >= 20
        assert {salt for *_, salt in keys} >= {0, 1}


PASSED = Trial(subject=REMOVAL, target=0, salt=0, verdict="passed", passed=True, failed=())
FAILED = replace(PASSED, verdict="failed", passed=False, failed=("reproduction",))


def test_a_rate_has_the_exact_upper_bound_and_leaves_out_what_the_base_does_not_reproduce() -> None:
    absent = replace(FAILED, verdict="not_reproduced", failed=())
    row = Row.of([*[replace(PASSED, target=i) for i in range(200)], replace(absent, target=300)])
    assert (row.wrong, row.judged, row.not_reproduced) == (0, 200, 1)
    assert row.at_most == pytest.approx(1 - 0.05 ** (1 / 200))
    assert Row.of([absent]).at_most == 1, "nothing was judged, so nothing is known"


def test_a_pass_is_wrong_for_a_fake_and_a_failure_for_a_removal() -> None:
    assert Row.of([PASSED, replace(FAILED, target=1)]).wrong == 1
    fake = "the target mirrored"
    row = Row.of([replace(PASSED, subject=fake), replace(FAILED, subject=fake, target=1)])
    assert (row.wrong, row.caught) == (1, {"reproduction": 1})


def test_verdicts_agree_where_two_evaluation_seeds_give_the_same_one() -> None:
    row = Row.of([PASSED, replace(PASSED, salt=1), replace(PASSED, target=1), replace(FAILED, target=1, salt=1)])
    assert (row.agreeing, row.pairs) == (1, 2)


def test_the_table_says_that_no_real_oracle_was_judged() -> None:
    assert f"| {ORACLE} | pass | not judged" in table([PASSED])
    assert "not judged" not in table([replace(PASSED, subject=ORACLE)])
