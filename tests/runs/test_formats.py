"""What earlier releases have left on disk is read and continued, never repeated; what a newer one left is refused."""

import json
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from expunge.batch import driver, job
from expunge.errors import StorageError
from expunge.registry.tracking import JOB_TAG, Tracker
from expunge.requests.home import remember
from expunge.requests.store import open_store
from expunge.runs import formats
from expunge.runs.job import JobFolder
from expunge.runs.night import NightFolder
from expunge.settings import Settings, load_settings
from expunge.types import RequestState
from tests.cli.conftest import Command
from tests.runs.conftest import content

RELEASED = Path(__file__).parents[1] / "data" / "format-1" / "home"
FINISHED, OPEN = "finished", "open"


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """A home of release 0.1.0, moved to where this test may write; its owner has replaced the old gate's settings."""
    home = tmp_path / "moved"
    shutil.copytree(RELEASED, home)
    config = home / "config.toml"
    old = config.read_text()
    models = old[old.index("[models.") :]
    config.write_text(old[: old.index("[evaluation]")] + models)
    monkeypatch.setenv("EXPUNGE_HOME", str(home))
    return load_settings()


def folder_of(settings: Settings, batch: str) -> NightFolder:
    return NightFolder(settings.runs / batch)


@pytest.mark.parametrize("batch", [FINISHED, OPEN])
def test_a_job_keeps_the_id_that_its_release_gave_it(settings: Settings, batch: str) -> None:
    plan = folder_of(settings, batch).plan
    assert plan is not None
    folders = [path.name for path in folder_of(settings, batch).path.iterdir() if path.is_dir()]
    assert [job.id for job in plan.jobs] == folders
    assert folder_of(settings, batch).job(folders[0]).job.read() == plan.jobs[0]


def test_a_finished_night_is_shown(settings: Settings, command: Command, tmp_path: Path) -> None:
    shown = command("verdicts", FINISHED)
    assert shown.code == 3, "a request was refused"
    written = json.loads(content(folder_of(settings, FINISHED).path / "night.json"))
    said, _ = json.JSONDecoder().raw_decode(command("verdicts", FINISHED, "--json").out)  # the error follows
    [outcome] = said["outcomes"]
    assert outcome["job"].pop("id") in shown.out + outcome["evidence"]["job"]
    training = written["outcomes"][0]["job"]["training"]
    training |= {"objectives": training.pop("tasks"), "objectives_per_step": training.pop("tasks_per_step")}
    assert _as_written(outcome, written["outcomes"][0]) == written["outcomes"][0]
    assert "req-flag" in shown.out
    assert "req-bird" in shown.out
    report = tmp_path / "report.html"
    assert command("report", FINISHED, "--output", report).code == 0
    assert "req-flag" in report.read_text()
    assert "removed" in command("show", "req-flag").out


def _as_written(shown: Any, written: Any) -> Any:
    """Leave out what later releases have added."""
    if isinstance(written, dict):
        return {name: _as_written(shown[name], value) for name, value in written.items() if name in shown}
    if isinstance(written, list):
        return [_as_written(*pair) for pair in zip(shown, written, strict=True)]
    return shown


def test_a_finished_night_needs_no_file_but_its_own(settings: Settings) -> None:
    """Who has deleted the folders of its jobs, as they hold the weights, can still see it."""
    before = folder_of(settings, FINISHED).outcome
    for path in folder_of(settings, FINISHED).path.glob("*/"):
        shutil.rmtree(path)
    assert before is not None
    assert folder_of(settings, FINISHED).outcome == before


def test_the_end_of_a_job_is_read_from_what_its_release_left(settings: Settings) -> None:
    outcome = folder_of(settings, FINISHED).outcome
    assert outcome is not None
    [ended] = outcome.outcomes
    assert folder_of(settings, FINISHED).job(ended.job.id).outcome == ended


@pytest.mark.parametrize("lost", [None, "job.json"])
@pytest.mark.usefixtures("without_ray")
def test_an_open_batch_goes_on_where_its_release_left_it(settings: Settings, lost: str | None) -> None:
    [folder] = [JobFolder(path) for path in folder_of(settings, OPEN).path.glob("*/")]
    evidence = folder.evidence.read()
    if lost:
        (folder.path / lost).unlink()
    store = open_store(settings)
    ended = driver.run_night(settings, OPEN)
    assert ended is not None
    [outcome] = ended.outcomes
    assert (outcome.job.id, outcome.evidence, outcome.error) == (folder.id, evidence, None)
    assert outcome.promoted
    assert outcome.version is not None
    registered = Tracker(settings.tracking).client.get_model_version("banners", outcome.version.version)
    assert registered.tags[JOB_TAG] == folder.id
    assert store.get("req-banner").state is RequestState.REMOVED
    assert store.batch(OPEN).closed
    assert folder_of(settings, OPEN).outcome == ended
    assert json.loads((folder_of(settings, OPEN).path / "format.json").read_bytes()) == {"format": formats.FORMAT}


@pytest.mark.usefixtures("without_ray")
def test_an_open_batch_goes_on_with_the_settings_that_it_has_under_older_names(settings: Settings) -> None:
    """Its job has an id, as an unreleased state of format 2 wrote it before these settings were renamed."""
    folder = folder_of(settings, OPEN)
    [left] = [JobFolder(path) for path in folder.path.glob("*/")]
    plan = json.loads(content(folder.path / "plan.json"))
    [job] = plan["jobs"]
    job["id"] = left.id
    job["training"] |= {"tasks": "batch", "tasks_per_step": 3}
    stored = {folder.path / "plan.json": plan, left.job.path: job, left.mode.path: {"tasks": "batch"}}
    for path, document in stored.items():
        path.write_text(json.dumps(document))

    mode = left.mode.read()
    assert mode is not None
    assert mode.objectives == "batch"
    ended = driver.run_night(settings, OPEN)
    assert ended is not None
    [outcome] = ended.outcomes
    assert outcome.promoted
    assert (outcome.job.id, outcome.job) == (left.id, left.job.read())
    assert (outcome.job.training.objectives, outcome.job.training.objectives_per_step) == ("batch", 3)
    assert [json.loads(content(path)) for path in stored] == list(stored.values()), "only sealed, as it was"


@pytest.mark.parametrize("text", [None, "", '{"batch": "op'])
@pytest.mark.usefixtures("without_ray")
def test_a_promoted_job_whose_copy_is_lost_is_not_done_again(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, text: str | None
) -> None:
    """The driver is killed between the promotion and the verdicts, and what its job was to be is gone or cut short."""
    folder = folder_of(settings, OPEN)
    plan = folder.plan
    assert plan is not None
    [planned] = plan.jobs
    (folder.path / "plan.json").unlink()
    folder.plan_once(lambda: plan)  # as this release writes it

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt("killed")

    with monkeypatch.context() as patch:
        patch.setattr(driver, "settle", killed)
        with pytest.raises(KeyboardInterrupt, match="killed"):
            driver.run_night(settings, OPEN)
    left = folder.job(planned.id)
    promoted = left.outcome
    assert promoted is not None
    assert promoted.promoted
    left.job.path.unlink() if text is None else left.job.path.write_text(text)

    ended = driver.run_night(settings, OPEN)
    assert ended is not None
    assert ended.outcomes == (promoted,)
    assert left.job.read() == planned
    assert len(Tracker(settings.tracking).client.search_model_versions("name = 'banners'")) == 1
    assert open_store(settings).get("req-banner").state is RequestState.REMOVED


def test_a_setting_that_is_new_changes_no_id(settings: Settings, night: NightFolder) -> None:
    """A job that was planned before a setting with a default existed."""
    setting = '"forgotten_at":0.6,'
    old = folder_of(settings, OPEN).path / "plan.json"
    [raw] = [content(path).decode() for path in folder_of(settings, OPEN).path.glob("*/job.json")]
    assert setting in raw
    plan = formats.read_plan(content(old).replace(setting.encode(), b""))
    [read] = plan.jobs
    assert read.id == f"banners-{sha256(raw.replace(setting, '').encode()).hexdigest()[:16]}"
    assert read.training.forgotten_at == 0.6

    before = night.plan
    assert before is not None
    for folder in (night.job(each.id) for each in before.jobs):
        folder.job.path.write_bytes(content(folder.job.path).replace(setting.encode(), b""))
    assert night.plan == before


@pytest.mark.parametrize("text", ['{"format": 4}', '{"format": 99, "more": true}'])
def test_a_newer_format_is_refused_and_nothing_is_touched(
    settings: Settings,
    command: Command,
    text: str,
) -> None:
    folder = folder_of(settings, OPEN)
    (folder.path / "format.json").write_text(text)
    with pytest.raises(StorageError, match=rf"reads formats up to {formats.FORMAT}: upgrade expunge"):
        driver.run_night(settings, OPEN)
    [path] = folder.path.glob("*/")
    with pytest.raises(StorageError, match=rf"reads formats up to {formats.FORMAT}: upgrade expunge"):
        job.walk_job(JobFolder(path), remember(settings).id)
    assert open_store(settings).get("req-banner").state is RequestState.BATCHED
    shown = command("verdicts", OPEN)
    assert shown.code == StorageError.exit_code
    assert "upgrade expunge" in shown.err


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "two"}'])
def test_a_format_that_cannot_be_read_is_not_guessed_at(settings: Settings, text: str) -> None:
    (folder_of(settings, OPEN).path / "format.json").write_text(text)
    with pytest.raises(StorageError, match=r"format\.json is damaged: delete it if"):
        driver.run_night(settings, OPEN)
