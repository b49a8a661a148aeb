"""Checkpoints that lie in a bucket are pruned like those in the home, and only those of nights that have ended."""

from collections.abc import Callable

import boto3
import pytest

from expunge.batch.leftovers import leftovers
from expunge.errors import StorageError
from expunge.requests.store import RequestStore
from expunge.runs.job import JobFolder
from expunge.settings import TrainingSettings, load_settings
from expunge.types import UnlearnJob
from tests.cli.conftest import Command
from tests.registry.test_commands import request

URL = "s3://checkpoints/nights"


@pytest.fixture
def bucket(s3: Callable[[str], str]) -> None:
    s3("checkpoints")


def names() -> set[str]:
    return {each["Key"] for each in boto3.client("s3").list_objects_v2(Bucket="checkpoints").get("Contents", [])}


def job_of(batch: str, url: str = URL) -> UnlearnJob:
    """A job in its folder, with a checkpoint of 1000 bytes in the bucket."""
    job = UnlearnJob(
        batch=batch,
        model="flags",
        source="s",
        resolution=(32, 48),
        requests=(),
        training=TrainingSettings(checkpoint_url=url),
    )
    JobFolder(load_settings().runs / batch / job.id).job.write(job)
    key = f"nights/{job.id}/checkpoint_000004/part-0"
    boto3.client("s3").put_object(Bucket="checkpoints", Key=key, Body=b"0" * 1000)
    return job


@pytest.mark.usefixtures("bucket", "empty_registry")
def test_checkpoints_in_a_bucket_are_pruned_once_their_night_has_ended(command: Command, store: RequestStore) -> None:
    for batch in ("ended", "open"):
        store.add(request(f"r-{batch}"))
        store.drain(batch, only=[f"r-{batch}"])
    store.release_batch("ended", "the test")
    ended, still_open = job_of("ended"), job_of("open")
    assert len(names()) == 2
    planned = command("prune", "flags", "--dry-run", "--json").json
    assert (planned["folders"], planned["folder_bytes"]) == ([f"{URL}/{ended.id}"], 1000)
    assert len(names()) == 2
    assert command("prune", "flags", "--yes", "--json").json == {**planned, "deleted": True}
    assert {name.split("/")[1] for name in names() if "part-0" in name} == {still_open.id}
    assert command("prune", "flags", "--yes", "--json").json["folders"] == []


@pytest.mark.usefixtures("bucket")
def test_a_bucket_that_is_away_is_one_line(store: RequestStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.add(request("r-1"))
    store.drain("ended")
    store.release_batch("ended", "the test")
    job_of("ended", "s3://checkpoints/nights?endpoint_override=127.0.0.1:9&scheme=http&region=us-east-1")
    with pytest.raises(StorageError, match="cannot be looked at") as refused:
        leftovers(load_settings(), store, "flags")
    assert "\n" not in str(refused.value)
