"""`expunge night` up to Ray: which batches it runs, and that "nothing to do" never hides what waits."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from expunge.batch import submit
from expunge.errors import ExpungeError, UnavailableError
from expunge.files import write_atomically
from expunge.requests.store import RequestStore, open_store
from expunge.runs.night import NightFolder
from expunge.runs.outcomes import NightPlan
from expunge.settings import Settings, load_settings
from expunge.types import RequestState
from tests.cli.conftest import Command


class Drivers:
    """Stands where Ray would start a driver: it decides each batch at once, or fails as it is told."""

    def __init__(self) -> None:
        self.submitted: list[str] = []
        self.failures: dict[str, ExpungeError] = {}

    def submit(self, batch: str, settings: Settings) -> str:
        self.submitted.append(batch)
        store = open_store(settings)
        store.start_batch(batch, 0)
        if batch not in self.failures:
            for request in store.batch(batch).requests:
                store.transition(request, RequestState.REMOVED, batch=batch)
            folder = NightFolder(settings.runs / batch)
            folder.finish(folder.plan_once(lambda: NightPlan(batch=batch, jobs=(), refused={})), [])
            store.close_batch(batch)
        return f"{batch}-job"

    def status(self, batch: str, submission: str, settings: Settings) -> str:
        return "FAILED" if batch in self.failures else "SUCCEEDED"

    def failure(self, batch: str, submission: str, status: str, settings: Settings) -> ExpungeError:
        return self.failures[batch]


@pytest.fixture
def drivers(monkeypatch: pytest.MonkeyPatch) -> Drivers:
    made = Drivers()
    monkeypatch.setattr(submit, "check_reachable", lambda address: None)
    monkeypatch.setattr(submit, "submit_night", made.submit)
    monkeypatch.setattr(submit, "night_status", made.status)
    monkeypatch.setattr(submit, "failure_of", made.failure)
    return made


@pytest.fixture
def store() -> RequestStore:
    return open_store(load_settings())


Accept = Callable[..., str]


@pytest.fixture
def accept(command: Command, tmp_path: Path) -> Accept:
    """Submits a request whose picture differs by its name; returns the request's id."""

    def call(name: str, model: str = "faces") -> str:
        picture = tmp_path / f"{name}.png"
        Image.new("RGB", (24, 24), (ord(name[0]), 9, 9)).save(picture)
        done = command("submit", picture, "--model", model, "--external-id", name, "--json")
        assert done.code == 0, done.out + done.err
        return done.json["id"]

    return call


def test_a_named_night_of_nothing_does_not_hold_later_requests_back(
    command: Command, drivers: Drivers, store: RequestStore, accept: Accept
) -> None:
    empty = command("night", "--batch", "friday")
    assert (empty.code, empty.out) == (0, "nothing to do: no request waits\n")
    request = accept("a")
    done = command("night")
    assert done.code == 0
    assert "nothing to do" not in done.out + done.err
    assert store.get(request).state is RequestState.REMOVED


def test_nothing_to_do_for_one_model_says_what_waits_for_others(
    command: Command, drivers: Drivers, accept: Accept
) -> None:
    accept("a")
    accept("b")
    done = command("night", "--model", "flags")
    assert (done.code, done.out) == (0, "nothing to do: no request of flags waits; 2 others do\n")
    assert drivers.submitted == []


@pytest.mark.parametrize("fails", [False, True])
def test_an_open_batch_is_continued_and_what_waits_is_run_after_it(
    command: Command, drivers: Drivers, store: RequestStore, accept: Accept, fails: bool
) -> None:
    old = accept("old")
    left = store.drain(None).id
    store.start_batch(left, 0)
    new = accept("new")
    if fails:
        drivers.failures[left] = ExpungeError("its driver was killed by SIGKILL")
    done = command("night")
    assert [batch == left for batch in drivers.submitted] == [True, False]
    assert store.get(new).state is RequestState.REMOVED
    assert store.get(old).state is (RequestState.BATCHED if fails else RequestState.REMOVED)
    assert done.code == int(fails)
    assert ("killed by SIGKILL" in done.err) is fails


def test_a_service_that_is_away_ends_it(
    command: Command, drivers: Drivers, store: RequestStore, accept: Accept
) -> None:
    accept("old")
    left = store.drain(None).id
    store.start_batch(left, 0)
    new = accept("new")
    drivers.failures[left] = UnavailableError("MLflow does not answer")
    done = command("night")
    assert done.code == 5
    assert drivers.submitted == [left]
    assert store.get(new).state is RequestState.ACCEPTED


def test_a_new_batch_is_run_once_and_alone(command: Command, drivers: Drivers, accept: Accept) -> None:
    accept("a")
    assert command("night").code == 0
    assert len(drivers.submitted) == 1


def test_no_more_than_the_limit_of_a_night(
    command: Command, drivers: Drivers, store: RequestStore, accept: Accept, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXPUNGE_NIGHT_LIMIT", "2")
    for name in "abc":
        accept(name)
    assert command("night").code == 0
    assert store.count(RequestState.ACCEPTED) == 1


@pytest.mark.parametrize("text", ["", "{", '{"batch": 3}'])
def test_verdicts_that_were_cut_short_say_how_to_get_them_again(
    command: Command, drivers: Drivers, store: RequestStore, accept: Accept, text: str
) -> None:
    accept("a")
    command("night", "--batch", "n1")
    (load_settings().runs / "n1" / "night.json").write_text(text)
    done = command("verdicts", "n1")
    assert done.code == 4
    assert "run `expunge night --batch n1`" in done.err.splitlines()[-1]


@pytest.mark.parametrize("name", ["../../etc", "never", "", "a/b", "."])
def test_verdicts_of_no_batch_look_at_no_file(command: Command, store: RequestStore, name: str) -> None:
    outside = load_settings().runs.parent / "a" / "night.json"
    write_atomically(outside, "{")
    done = command("verdicts", name)
    assert done.code == 4
    assert f"batch {name!r} does not exist" in done.err
    assert outside.read_text() == "{"


def test_looking_at_verdicts_changes_no_file(command: Command, drivers: Drivers, accept: Accept) -> None:
    """A command of another version may not understand what the driver has written."""
    accept("a")
    command("night", "--batch", "n1")
    night = load_settings().runs / "n1" / "night.json"
    night.write_text('{"of": "a newer version"}')
    command("verdicts", "n1")
    assert night.read_text() == '{"of": "a newer version"}'


@pytest.mark.parametrize("arguments", [("--batch", "friday"), ("--model", "faces")])
def test_nothing_to_do_never_hides_an_open_batch(
    command: Command, drivers: Drivers, store: RequestStore, accept: Accept, arguments: tuple[str, str]
) -> None:
    accept("a", "faces")
    accept("b", "flags")
    left = store.drain(None).id
    done = command("night", *arguments)
    assert done.code == 2
    assert f"batch {left} is open and holds " in done.err
    assert f"run `expunge night --batch {left}`" in done.err
    assert drivers.submitted == []


def test_a_batch_that_ray_never_took_is_continued_as_one_that_was_started(
    command: Command, drivers: Drivers, store: RequestStore, accept: Accept
) -> None:
    accept("old")
    left = store.drain(None).id
    new = accept("new")
    assert command("night").code == 0
    assert drivers.submitted[0] == left
    assert store.get(new).state is RequestState.REMOVED


def test_what_a_person_takes_out_of_a_night_is_no_attempt(
    command: Command, store: RequestStore, accept: Accept
) -> None:
    request = accept("a")
    store.drain(None)
    assert command("requeue", request).code == 0
    record = store.get(request)
    assert (record.state, record.attempts) == (RequestState.ACCEPTED, 0)


def requests_file(folder: Path, *names: str) -> Path:
    for name in names:
        Image.new("RGB", (24, 24), (ord(name[0]), 9, 9)).save(folder / name)
    lines = [json.dumps({"model": "faces", "images": [name]}) for name in names]
    (folder / "requests.jsonl").write_text("\n".join(lines))
    return folder / "requests.jsonl"


def test_a_file_of_requests_is_run_alone_and_once(
    command: Command, drivers: Drivers, store: RequestStore, accept: Accept, tmp_path: Path
) -> None:
    waiting = accept("w")
    file = requests_file(tmp_path, "a.png", "b.png")
    done = command("night", "--requests", file)
    assert done.code == 0
    assert "2 accepted" in done.err
    assert [len(store.batch(batch).requests) for batch in drivers.submitted] == [2]
    assert store.get(waiting).state is RequestState.ACCEPTED
    again = command("night", "--requests", file)
    assert (again.code, len(drivers.submitted)) == (0, 1)
    assert again.out.startswith("nothing to do")


def test_an_open_batch_that_holds_one_of_its_requests_is_continued_first(
    command: Command, drivers: Drivers, store: RequestStore, tmp_path: Path
) -> None:
    command("submit", "--batch", requests_file(tmp_path, "a.png"))
    left = store.drain(None).id
    done = command("night", "--requests", requests_file(tmp_path, "a.png", "b.png"))
    assert done.code == 0
    assert [batch == left for batch in drivers.submitted] == [True, False]


def test_a_refused_line_is_reported_and_the_others_are_run(command: Command, drivers: Drivers, tmp_path: Path) -> None:
    file = requests_file(tmp_path, "a.png")
    file.write_text(f"nonsense\n{file.read_text()}")
    done = command("night", "--requests", file)
    assert done.code == 2
    assert "line 1: " in done.err
    assert len(drivers.submitted) == 1


def test_a_url_that_others_would_see_with_its_key_is_refused(command: Command, drivers: Drivers) -> None:
    done = command("night", "--requests", "https://example.org/r.jsonl?X-Amz-Signature=hunter2")
    assert done.code == 2
    assert "hunter2" not in done.out + done.err


def test_a_night_of_days_on_cpus_needs_a_yes(
    command: Command, drivers: Drivers, store: RequestStore, accept: Accept, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submit, "cluster_of", lambda settings: (0, 2))
    monkeypatch.setenv("EXPUNGE_NIGHT__CPU_TFLOPS", "1e-6")
    request = accept("a")
    refused = command("night")
    assert refused.code == 2
    assert "days: Ray has no GPU, and 2 CPU cores" in refused.err
    assert "--yes" in refused.err
    assert (drivers.submitted, store.get(request).state) == ([], RequestState.ACCEPTED)
    assert command("night", "--yes").code == 0
    assert store.get(request).state is RequestState.REMOVED


def test_a_night_takes_what_fits_and_says_what_waits(
    command: Command, drivers: Drivers, store: RequestStore, accept: Accept, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept("a")
    accept("b")
    monkeypatch.setattr(submit, "cluster_of", lambda settings: (1, 2))
    monkeypatch.setenv("EXPUNGE_NIGHT__HOURS", "1e-9")
    none = command("night")
    assert (none.code, drivers.submitted) == (0, [])
    assert "faces: one request alone takes about" in none.err
    monkeypatch.setenv("EXPUNGE_NIGHT__HOURS", "1")
    monkeypatch.setenv("EXPUNGE_NIGHT_LIMIT", "1")
    done = command("night")
    assert done.code == 0
    assert "1 request waits for a later night: at 1 per night, the last is expected on " in done.err
    assert store.count(RequestState.ACCEPTED) == 1
