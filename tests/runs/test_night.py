"""A night's folder: what is put together from it, what is made again where a file is damaged, how far it has got."""

from pathlib import Path

import pytest

from expunge.errors import NotFoundError
from expunge.requests.store import open_store
from expunge.runs.document import LostError
from expunge.runs.night import NightFolder
from expunge.runs.outcomes import JobEnd, JobOutcome, NightOutcome, NightPlan
from expunge.settings import load_settings
from tests.cli.conftest import Command
from tests.runs.conftest import Evaluated, content, make_job


def ended(night: NightFolder, planned: NightPlan, go_through: Evaluated) -> NightOutcome:
    """One job is promoted, the other has failed."""
    faces, flags = planned.jobs
    go_through(night.job(faces.id), True)
    night.job(flags.id).end.write(JobEnd(error="no weights"))
    outcomes = [night.job(job.id).outcome for job in planned.jobs]
    return night.finish(planned, [outcome for outcome in outcomes if outcome])


def test_the_outcome_is_put_together_from_what_each_stage_left(
    night: NightFolder, planned: NightPlan, go_through: Evaluated
) -> None:
    assert night.outcome is None
    outcome = ended(night, planned, go_through)
    assert night.outcome == outcome
    first, second = outcome.outcomes
    assert (first.promoted, first.steps, first.run_id, first.passed) == (True, 7, "run-1", {"req-faces"})
    assert (second.error, second.evidence, second.promoted) == ("no weights", None, False)
    assert outcome.refused == {"req-bird": "not configured"}


def test_each_fact_has_one_home(night: NightFolder, planned: NightPlan, go_through: Evaluated) -> None:
    ended(night, planned, go_through)
    assert not [path for path in night.path.rglob("*.json") if b"ticket-faces" in path.read_bytes()], "it is sealed"
    files = [path for path in night.path.rglob("*.json") if b"gone" in content(path)]
    assert [path.name for path in files] == ["evidence.json"]
    files = [path for path in night.path.rglob("*.json") if b"ticket-faces" in content(path)]
    assert {path.name for path in files} == {"plan.json", "job.json"}, "the second is the copy that stages read"


def test_a_promotion_that_was_undone_is_kept_by_the_night_alone(
    night: NightFolder, planned: NightPlan, go_through: Evaluated
) -> None:
    first, second = ended(night, planned, go_through).outcomes
    night.finish(planned, [first.with_promotion(False), second])
    assert night.outcome is not None
    assert [outcome.promoted for outcome in night.outcome.outcomes] == [False, False]
    assert night.outcome.outcomes[0].version is not None


def test_a_job_that_the_platform_failed_to_the_last_is_in_the_outcome(
    night: NightFolder, planned: NightPlan, go_through: Evaluated
) -> None:
    faces, flags = planned.jobs
    go_through(night.job(faces.id), True)
    left = night.job(faces.id).outcome
    assert left is not None
    lost = JobOutcome(job=flags, error="the node is gone", platform=True)
    assert night.finish(planned, [left, lost]) == night.outcome


def test_the_end_of_a_night_is_restored_from_its_jobs(
    night: NightFolder, planned: NightPlan, go_through: Evaluated
) -> None:
    outcome = ended(night, planned, go_through)
    (night.path / "night.json").unlink()
    assert night.outcome is None
    assert night.restore() == outcome == night.outcome


@pytest.mark.parametrize("name", ["evidence.json", "version.json", "outcome.json"])
@pytest.mark.parametrize("text", [None, "", '{"x": '])
def test_an_outcome_of_which_a_part_is_lost_is_none_and_the_part_is_named(
    night: NightFolder, planned: NightPlan, go_through: Evaluated, name: str, text: str | None
) -> None:
    ended(night, planned, go_through)
    path = night.job(planned.jobs[0].id).path / name
    path.unlink() if text is None else path.write_text(text)
    assert night.job(planned.jobs[0].id).outcome is None
    assert night.outcome is None
    with pytest.raises(LostError, match=f"{path} is missing or damaged"):
        night.verdicts()
    (night.path / "night.json").unlink()
    with pytest.raises(LostError, match=f"{path} is missing or damaged"):
        night.restore()
    assert not night.has_ended


def test_an_outcome_needs_no_copy_of_a_job(night: NightFolder, planned: NightPlan, go_through: Evaluated) -> None:
    outcome = ended(night, planned, go_through)
    night.job(planned.jobs[0].id).job.path.unlink()
    assert night.outcome == outcome


@pytest.mark.parametrize("text", [None, "", '{"x": 1}'])
def test_a_job_that_has_ended_needs_no_second_training_for_its_hotfix(
    night: NightFolder, planned: NightPlan, go_through: Evaluated, text: str | None
) -> None:
    before = ended(night, planned, go_through).outcomes[0]
    path = night.job(planned.jobs[0].id).path / "hotfix.json"
    path.unlink() if text is None else path.write_text(text)
    assert night.job(planned.jobs[0].id).outcome == before.model_copy(update={"steps": None})
    assert night.outcome is not None


@pytest.mark.parametrize("name", ["plan.json", "evidence.json", "version.json", "outcome.json"])
def test_verdicts_of_an_ended_night_name_the_file_that_is_lost(
    command: Command, planned: NightPlan, go_through: Evaluated, name: str
) -> None:
    settings = load_settings()
    store = open_store(settings)
    store.add(planned.jobs[0].requests[0])
    store.drain("night-1")
    night = NightFolder(settings.runs / "night-1")
    night.plan_once(lambda: planned)
    ended(night, planned, go_through)
    assert "req-faces" in command("verdicts", "night-1").out
    path = next(night.path.glob(name), night.job(planned.jobs[0].id).path / name)
    path.unlink()
    done = command("verdicts", "night-1")
    assert done.code == NotFoundError.exit_code
    assert f"batch night-1 has ended, but {path} is missing" in done.err
    assert "expunge report night-1" in done.err


def test_a_plan_is_made_once(night: NightFolder, planned: NightPlan) -> None:
    assert night.plan_once(again) == planned == night.plan


def again() -> NightPlan:
    pytest.fail("it is there")


@pytest.mark.parametrize("text", ["", '{"batch": "night-1"', "[]"])
def test_a_plan_that_was_cut_short_is_kept_aside_and_made_again(
    night: NightFolder, planned: NightPlan, text: str
) -> None:
    path = night.path / "plan.json"
    path.write_text(text)
    assert night.plan is None
    assert night.has_plan
    assert night.plan_once(lambda: planned) == planned == night.plan
    assert path.with_name("plan.json.unreadable").read_text() == text


@pytest.mark.parametrize("text", [None, "", '{"batch": "night-1"', "[]"])
def test_a_job_that_is_lost_is_copied_from_the_plan_again(
    night: NightFolder, planned: NightPlan, text: str | None
) -> None:
    lost = night.job(planned.jobs[0].id).job
    lost.path.unlink() if text is None else lost.path.write_text(text)
    assert night.plan_once(again) == planned == night.plan
    assert lost.expect() == planned.jobs[0]
    if text is not None:
        assert lost.path.with_name("job.json.unreadable").read_text() == text


def test_a_driver_that_is_killed_while_it_plans_leaves_no_plan(
    tmp_path: Path, planned: NightPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    night, replace = NightFolder(tmp_path), Path.replace

    def killed(self: Path, target: Path) -> Path:
        if target.name == "plan.json":
            raise KeyboardInterrupt("killed")
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt, match="killed"):
            night.plan_once(lambda: planned)
    assert night.plan is None
    other = NightPlan(batch="night-1", jobs=(make_job("faces"),), refused={})
    assert night.plan_once(lambda: other) == other == night.plan


def test_how_far_a_batch_has_got_only_grows(tmp_path: Path, planned: NightPlan) -> None:
    night = NightFolder(tmp_path)
    got = [night.advance()]
    night.plan_once(lambda: planned)
    got.append(night.advance())
    first, second = (night.job(job.id).progress for job in planned.jobs)
    for step in (
        lambda: first("prepare"),
        lambda: second("prepare"),
        lambda: first("train", 0, 9_000_000),
        lambda: first("train", 50, 9_000_000),
        lambda: second("train", 9_000_000, 9_000_000),
        lambda: first("evaluate", 0, 3),
        lambda: second("done"),
    ):
        step()
        got.append(night.advance())
    assert got == sorted(set(got))


def test_progress(night: NightFolder) -> None:
    progress = night.job("job").progress
    assert progress.read() == ("wait", 0, 0)
    progress("train", 5, 150)
    assert night.job("job").progress.read() == ("train", 5, 150)
    progress("done")
    assert progress.read() == ("done", 0, 0)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"stage": "train"}', "null"])
def test_progress_that_was_cut_short_is_no_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "progress.json").write_text(text)
    assert NightFolder(tmp_path.parent).job(tmp_path.name).progress.read() == ("wait", 0, 0)
