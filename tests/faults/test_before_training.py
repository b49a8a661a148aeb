"""What needs no Ray: the number of workers, Ray's own list of its checkpoints, and the reason that workers leave."""

import json
import re
from pathlib import Path

import pytest
from pydantic import ValidationError
from structlog.testing import capture_logs

from expunge.errors import ExpungeError, InputError, StorageError
from expunge.runs.failures import Hopeless
from expunge.runs.job import JobFolder
from expunge.settings import ClusterSettings, TrainingSettings, load_settings
from expunge.unlearning import train
from expunge.unlearning.checkpoints import SNAPSHOT, drop_broken_snapshot, open_storage


def test_no_fewer_workers_than_the_fewest() -> None:
    with pytest.raises(ValidationError, match=r"min_workers \(3\) must be at most workers \(2\)"):
        TrainingSettings(workers=2, min_workers=3)


@pytest.mark.parametrize(
    ("gpus", "workers", "min_workers", "device", "chosen"),
    [
        (0, 2, 0, "auto", ("cpu", 2, 2)),
        (0, 2, 1, "auto", ("cpu", 1, 2)),
        (1, 2, 1, "auto", ("gpu", 1, 2)),
        (2, 2, 0, "auto", ("gpu", 2, 2)),
        (8, 2, 0, "auto", ("gpu", 2, 2)),
        (1, 2, 1, "gpu", ("gpu", 1, 2)),
        (2, 2, 0, "gpu", ("gpu", 2, 2)),
        (2, 2, 0, "cpu", ("cpu", 2, 2)),
    ],
)
def test_gpus_where_there_are_enough_to_start(
    gpus: int,
    workers: int,
    min_workers: int,
    device: str,
    chosen: tuple[str, int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: {"GPU": float(gpus)})
    asked = {"workers": workers, "min_workers": min_workers, "device": device}
    got = train.choose_workers(ClusterSettings.model_validate(asked))
    assert (got.device, got.fewest, got.most) == chosen


@pytest.mark.parametrize(("gpus", "workers", "min_workers"), [(1, 2, 0), (1, 2, 2), (3, 4, 0), (2, 8, 4)])
def test_the_gpus_there_are_are_used_and_it_is_said(
    gpus: int, workers: int, min_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: {"GPU": float(gpus)})
    asked = {"workers": workers, "min_workers": min_workers, "device": "auto"}
    with capture_logs() as said:
        got = train.choose_workers(ClusterSettings.model_validate(asked))
    assert (got.device, got.fewest, got.most) == ("gpu", gpus, gpus)
    [line] = said
    assert line["log_level"] == "warning"
    assert f"Ray has {gpus} GPUs for {workers} workers: training with {gpus} on GPUs" in line["event"]
    assert f"set training.workers = {gpus}" in line["hint"]


def test_too_few_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: {"GPU": 1.0})
    with pytest.raises(InputError, match=r"training\.device: gpu, but Ray has 1 GPUs for 2 workers"):
        train.choose_workers(ClusterSettings(workers=2, device="gpu"))


GOOD = json.dumps({"checkpoint_results": [{"checkpoint_dir_name": "checkpoint_000003_a", "metrics": {"step": 3}}]})


@pytest.mark.parametrize(
    ("written", "broken"),
    [
        pytest.param(GOOD, False, id="good"),
        pytest.param(json.dumps({"checkpoint_results": []}), False, id="no checkpoint yet"),
        pytest.param("", True, id="empty"),
        pytest.param(GOOD[:20], True, id="cut short"),
        pytest.param("[]", True, id="something else"),
        pytest.param(GOOD.replace("_a", "_b"), True, id="names what is gone"),
    ],
)
def test_a_list_that_ray_would_not_start_on_is_dropped(tmp_path: Path, written: str, broken: bool) -> None:
    (tmp_path / "checkpoint_000003_a").mkdir()
    (tmp_path / SNAPSHOT).write_text(written)
    assert drop_broken_snapshot(*open_storage(str(tmp_path.parent), tmp_path.name)) is broken
    assert (tmp_path / SNAPSHOT).exists() is not broken
    assert (tmp_path / "checkpoint_000003_a").exists()


def test_where_there_is_no_list_nothing_is_done(tmp_path: Path) -> None:
    assert not drop_broken_snapshot(*open_storage(str(tmp_path), "job"))
    assert (tmp_path / "job").is_dir()


NO_SERVER = "s3://bucket/x?endpoint_override=127.0.0.1:9&scheme=http&region=us-east-1"


@pytest.mark.parametrize(
    "url", ["nowhere://x/y", "relative/folder", "{}/file", "{}/not/mounted", "mock:///x", NO_SERVER]
)
def test_checkpoints_that_have_no_place_are_refused_before_anything_starts(tmp_path: Path, url: str) -> None:
    (tmp_path / "file").touch()
    url = url.format(tmp_path)
    with pytest.raises(StorageError, match=f"^no checkpoint can be written to {re.escape(url)}: .+ change training"):
        open_storage(url, "job")


@pytest.mark.parametrize("where", ["TRAINING", "MODELS__FACES__TRAINING"])
@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("s3://me:hunter2@bucket/path", "it holds a key: leave it out, and set AWS_ACCESS_KEY_ID"),
        ("s3://me:hunter2/more@bucket/path", "it holds a key: leave it out, and set AWS_ACCESS_KEY_ID"),
        ("s3://bucket/path?sig=hunter2", "sig is not among endpoint_override, region, scheme: leave it out"),
    ],
)
def test_a_url_with_a_secret_is_refused_without_showing_it(
    url: str, why: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job's settings are shown in MLflow."""
    monkeypatch.setenv(f"EXPUNGE_{where}__CHECKPOINT_URL", url)
    if where != "TRAINING":
        monkeypatch.setenv("EXPUNGE_MODELS__FACES__SOURCE", "testbed:faces")
    with pytest.raises(
        InputError, match=re.escape(f"{where.replace('__', '.').lower()}.checkpoint_url: {why}")
    ) as refused:
        load_settings()
    assert "hunter2" not in str(refused.value)
    with pytest.raises(ValidationError, match=re.escape(why)) as raw:
        TrainingSettings(checkpoint_url=url)
    assert "hunter2" not in str(raw.value)


@pytest.mark.parametrize(("kind", "code"), [(Hopeless, 1), (InputError, 2), (StorageError, 6)])
@pytest.mark.parametrize("hint", ["set it to 1", None])
def test_why_training_gave_up_keeps_its_exit_code(
    tmp_path: Path, kind: type[ExpungeError], code: int, hint: str | None
) -> None:
    folder = JobFolder(tmp_path)
    assert folder.failure is None
    thrown = kind("job j: no", hint=hint)
    folder.give_up(thrown)
    read = folder.failure
    assert read is not None
    assert type(read) is kind
    assert read.exit_code == code
    assert str(read) == str(thrown)
