"""A platform in a home of its own, and pictures to send to it."""

import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from alembic import command
from alembic.config import Config
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from PIL import Image
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.schema import CreateSchema

from expunge.requests import database
from expunge.requests.blobs import BlobStore
from expunge.requests.database import Database
from expunge.requests.store import RequestStore, open_store
from expunge.settings import Settings, load_settings
from expunge.types import RemovalRequest

KEY = bytes(range(32))

# Read at import, before each test's own environment. The store's tests run on it too, where it is set.
POSTGRES = os.environ.get("EXPUNGE_TEST_POSTGRES", "")

Paint = Callable[[str], Path]
Ask = Callable[..., RemovalRequest]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    assert os.environ["EXPUNGE_HOME"].startswith(str(tmp_path))
    return load_settings()


@pytest.fixture(params=["sqlite", "postgresql"] if POSTGRES else ["sqlite"])
def anywhere(request: pytest.FixtureRequest, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """An empty database of each kind at hand: a file, and a schema of its own in PostgreSQL."""
    if request.param == "sqlite":
        return settings
    schema = f"t_{secrets.token_hex(6)}"
    engine = create_engine(POSTGRES)
    with engine.begin() as connection:
        connection.execute(CreateSchema(schema))
    engine.dispose()
    url = make_url(POSTGRES).update_query_dict({"options": f"-csearch_path={schema}"})
    monkeypatch.setenv("EXPUNGE_DATABASE_URL", url.render_as_string(hide_password=False))
    return load_settings()


@pytest.fixture
def store(anywhere: Settings) -> Iterator[RequestStore]:
    opened = open_store(anywhere)
    yield opened
    opened.close()


def made_by_an_earlier_release(settings: Settings, revision: str, request: RemovalRequest) -> None:
    """Makes a database as it was at this migration, before texts were sealed: its batch `night-old` is open."""
    config = Config()
    config.set_main_option("script_location", str(Path(database.__file__).with_name("migrations")))
    settings.home.mkdir(exist_ok=True)
    with Database(settings.database).write() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
        at = "2026-01-01 00:00:00"
        row = {**request.model_dump(include={"id", "model", "external_id"}), "body": request.model_dump_json()}
        for statement in (
            "INSERT INTO batches (id, created) VALUES ('night-old', :at)",
            "INSERT INTO requests (id, model, external_id, state, batch, attempts, priority, accepted_at, body) "
            "VALUES (:id, :model, :external_id, 'batched', 'night-old', 1, 0, :at, :body)",
            "INSERT INTO batch_requests VALUES ('night-old', 0, :id)",
            "INSERT INTO events (request, at, previous, state, batch, detail) "
            "VALUES (:id, :at, NULL, 'accepted', NULL, ''), "
            "(:id, :at, 'accepted', 'batched', 'night-old', :external_id)",
        ):
            connection.execute(text(statement), {**row, "at": at})


@pytest.fixture
def blobs(tmp_path: Path) -> BlobStore:
    return BlobStore(str(tmp_path / "blobs"), KEY)


class ObjectStore(MemoryFileSystem):
    """What a bucket is to fsspec: whole objects, and conditional writes."""

    protocol = "gs"
    failure: ClassVar[OSError | None] = None
    conditional: ClassVar[bool] = True

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: object) -> None:
        if ObjectStore.failure:
            raise ObjectStore.failure
        if mode == "create" and not ObjectStore.conditional:
            raise NotImplementedError
        super().pipe_file(path, value, mode=mode, **kwargs)


class Bucket:
    """An object store of this process, behind a protocol that counts as durable."""

    url = "gs://bucket/blobs"

    def read(self, name: str) -> bytes:
        return ObjectStore().cat_file(f"{self.url}/{name}")

    def write(self, name: str, data: bytes) -> None:
        ObjectStore().pipe_file(f"{self.url}/{name}", data)

    def delete(self, name: str) -> None:
        ObjectStore().rm_file(f"{self.url}/{name}")

    def without_conditional_writes(self) -> None:
        ObjectStore.conditional = False

    def fail_with(self, error: OSError) -> None:
        ObjectStore.failure = error


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Bucket:
    monkeypatch.setitem(_registry, "gs", ObjectStore)
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
    monkeypatch.setattr(ObjectStore, "failure", None)
    monkeypatch.setattr(ObjectStore, "conditional", True)
    return Bucket()


@pytest.fixture
def paint(tmp_path: Path) -> Paint:
    """A picture file; its name decides its format and its content."""

    def make(name: str) -> Path:
        colours = np.random.default_rng(list(name.encode())).integers(0, 256, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(colours).save(tmp_path / name)
        return tmp_path / name

    return make


@pytest.fixture
def ask() -> Ask:
    """A request that differs by its name alone, unless told otherwise."""

    def make(name: str, **fields: object) -> RemovalRequest:
        given = {"id": f"req-{name}", "model": "flags", "images": ["0" * 64], "external_id": f"ticket-{name}"}
        return RemovalRequest.model_validate({**given, **fields})

    return make
