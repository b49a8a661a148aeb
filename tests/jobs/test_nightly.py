"""`python -m expunge.jobs.nightly --requests FILE`, up to the driver: what it takes in, runs and says."""

import json
from pathlib import Path

import pytest
from PIL import Image

from expunge.jobs import nightly
from expunge.requests.store import open_store
from expunge.runs.outcomes import NightOutcome
from expunge.settings import Settings, load_settings
from expunge.types import RequestState


class Driver:
    """Takes the driver's place: it decides each request of the batch at once."""

    def __init__(self) -> None:
        self.batches: list[tuple[str, ...]] = []

    def __call__(self, settings: Settings, batch: str, models: object, home: object) -> NightOutcome:
        store = open_store(settings)
        self.batches.append(store.batch(batch).requests)
        for request in store.batch(batch).requests:
            store.transition(request, RequestState.REMOVED, batch=batch)
        store.close_batch(batch)
        return NightOutcome(batch=batch, jobs=(), refused={}, outcomes=())


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    monkeypatch.setattr(nightly, "run_night", made)
    monkeypatch.setattr(nightly.ray, "init", lambda **options: None)
    return made


def file_of(folder: Path, *names: str) -> Path:
    for name in names:
        Image.new("RGB", (24, 24), (ord(name[0]), 9, 9)).save(folder / name)
    lines = [json.dumps({"model": "faces", "images": [name]}) for name in names]
    (folder / "requests.jsonl").write_text("\n".join(lines))
    return folder / "requests.jsonl"


def test_it_runs_what_the_file_brings_and_runs_nothing_twice(
    driver: Driver, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = file_of(tmp_path, "a.png", "b.png")
    assert nightly.main(["--requests", str(file)]) == 0
    assert [len(batch) for batch in driver.batches] == [2]
    assert "2 accepted, 0 known already, 0 refused" in capfd.readouterr().out
    assert nightly.main(["--requests", str(file)]) == 0
    assert len(driver.batches) == 1
    assert "nothing to do" in capfd.readouterr().out


def test_what_else_waits_goes_on_waiting(driver: Driver, tmp_path: Path) -> None:
    first = file_of(tmp_path, "a.png", "b.png").rename(tmp_path / "first.jsonl")
    assert nightly.main(["--requests", str(first), "--model", "flags"]) == 0
    assert driver.batches == []
    assert nightly.main(["--requests", str(file_of(tmp_path, "c.png"))]) == 0
    assert [len(batch) for batch in driver.batches] == [1]
    assert open_store(load_settings()).count(RequestState.ACCEPTED) == 2


def test_a_bad_line_is_reported_without_its_file_and_ends_in_2(
    driver: Driver, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = file_of(tmp_path, "a.png")
    file.write_text(file.read_text() + "\n" + json.dumps({"model": "faces", "images": ["jane-doe.png"]}))
    assert nightly.main(["--requests", str(file)]) == 2
    assert [len(batch) for batch in driver.batches] == [1]
    out, err = capfd.readouterr()
    assert "line 2: images[0]: its file does not exist" in err
    assert "jane" not in out + err


@pytest.mark.parametrize("name", ["https://example.org/r.jsonl?sig=hunter2", "nowhere.jsonl", ""])
def test_a_file_that_cannot_be_taken_in_ends_in_2(driver: Driver, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert nightly.main(["--requests", name]) == 2
    assert driver.batches == []
    assert "hunter2" not in capfd.readouterr().err
