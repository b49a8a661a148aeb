"""A file of requests for one night: its pictures on disk, on a web server and in a bucket; bad lines and bad names."""

import json
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from expunge.errors import InputError
from expunge.requests import locations
from expunge.requests.batch_file import BatchFile, check_name, take_in
from expunge.requests.blobs import BlobStore
from expunge.requests.locations import read_location
from expunge.requests.store import RequestStore
from expunge.settings import Settings
from tests.requests.conftest import Paint

KEYS = {"AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "any/will+do", "AWS_DEFAULT_REGION": "us-east-1"}

Taken = Callable[..., BatchFile]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """The test's folder, as a web server shows it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The test's folder, as a bucket."""
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": s3_server}.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="requests")
    for file in tmp_path.iterdir():
        if file.is_file():
            client.upload_file(str(file), "requests", f"tonight/{file.name}")
    return "s3://requests/tonight"


@pytest.fixture
def folder(tmp_path: Path, paint: Paint) -> Path:
    """Two pictures, and a file that names them: one beside it, one by its whole path."""
    lines = [{"model": "flags", "images": [paint("a.png").name]}, {"model": "flags", "images": [str(paint("b.png"))]}]
    (tmp_path / "f.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


@pytest.fixture
def taken(settings: Settings, store: RequestStore, blobs: BlobStore) -> Taken:
    def call(name: object, private: bool = False) -> BatchFile:
        return take_in(str(name), settings=settings, store=store, blobs=blobs, private=private)

    return call


@pytest.mark.parametrize("where", ["{folder}/f.jsonl", "file://{folder}/f.jsonl", "{web}/f.jsonl"])
def test_the_same_file_is_taken_in_once_wherever_it_lies(taken: Taken, folder: Path, web: str, where: str) -> None:
    name = where.format(folder=folder, web=web)
    first = taken(name)
    assert (len(first.ids), first.accepted, first.refused) == (2, 2, ())
    again = taken(name)
    assert (again.ids, again.accepted) == (first.ids, 0)
    assert taken(folder / "f.jsonl").ids == first.ids


@pytest.mark.slow
def test_a_file_and_its_pictures_may_lie_in_a_bucket(taken: Taken, folder: Path, bucket: str) -> None:
    lines = [{"model": "flags", "images": [name]} for name in ("a.png", f"{bucket}/b.png", "none.png")]
    boto3.client("s3").put_object(
        Bucket="requests", Key="tonight/s3.jsonl", Body="\n".join(map(json.dumps, lines)).encode()
    )
    found = taken(f"{bucket}/s3.jsonl")
    assert found.ids == taken(folder / "f.jsonl").ids
    [refused] = found.refused
    assert refused.line == 3
    assert f"images[0]: {bucket}/none.png does not exist" in str(refused.error)


def test_a_bad_line_leaves_the_others_alone(taken: Taken, folder: Path, web: str) -> None:
    bad = ["no json", json.dumps({"model": "flags", "images": [f"{web}/none.png"]}), json.dumps({"model": "nobody"})]
    (folder / "f.jsonl").write_text("\n".join([*bad, (folder / "f.jsonl").read_text()]))
    found = taken(f"{web}/f.jsonl")
    assert len(found.ids) == 2
    assert [line.line for line in found.refused] == [1, 2, 3]
    assert f"{web}/none.png does not exist" in str(found.refused[1].error)
    with pytest.raises(InputError, match="3 lines were refused"):
        found.check()


def test_a_report_that_others_can_read_names_no_picture(taken: Taken, folder: Path, web: str) -> None:
    (folder / "jane-doe.png").write_text("not a picture")
    names = ["jane-doe.png", f"{web}/jane-doe.png", f"{web}/jane-doe-2.png", "jane-doe-3.png", "data://jane-doe"]
    names += ["file:///srv/jane%20doe.png", "jane-doe\0.png", "s"]
    (folder / "f.jsonl").write_text("\n".join(json.dumps({"model": "flags", "images": [name]}) for name in names))
    assert all("jane" in str(line.error) for line in taken(folder / "f.jsonl").refused[:4])
    with (folder / "f.jsonl").open("a") as file:
        edited = {"model": "flags", "images": ["a.png"], "edit": "inpaint:prompt for jane doe"}
        file.write("\n" + json.dumps(edited))
    refused = taken(folder / "f.jsonl", private=True).refused
    assert len(refused) == len(names) + 1
    assert not [line for line in refused if "jane" in f"{line.error}{line.hint}"]
    assert all("images[0]: its file" in str(line.error) for line in refused if line.line not in (5, 9))


@pytest.fixture
def refusing() -> Iterator[str]:
    """A web server that answers each path with the status in it, and `/silent` with nothing."""
    over = threading.Event()

    class Refusing(Quiet):
        def do_GET(self) -> None:
            if self.path == "/silent":
                over.wait()
            else:
                self.send_error(int(self.path[1:]))

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    over.set()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("404", "does not exist"),
        ("401", r"cannot be read \(HTTP status 401\)"),
        ("500", r"cannot be read \(HTTP status 500\)"),
        ("silent", r"cannot be read \(\w*Timeout"),
    ],
)
def test_what_a_web_server_refuses_is_told_from_what_is_not_there(
    refusing: str, path: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locations, "SILENCE_S", 0.5)
    with pytest.raises(InputError, match=rf"images\[0\]: {refusing}/{path} {said}"):
        read_location(f"{refusing}/{path}", field="images[0]", max_bytes=4000)


def test_a_web_server_that_is_not_there() -> None:
    with pytest.raises(InputError, match=r"cannot be read \(Client\w*Error\)"):
        read_location("http://127.0.0.1:1/a.png", field="images[0]", max_bytes=4000)


def test_no_more_is_read_than_is_allowed(
    settings: Settings, store: RequestStore, blobs: BlobStore, folder: Path, web: str
) -> None:
    (folder / "large.png").write_bytes(b"x" * 5000)
    with pytest.raises(InputError, match=r"over the limit of 4,000 bytes"):
        read_location(f"{web}/large.png", field="images[0]", max_bytes=4000)
    small = settings.model_copy(update={"max_bytes": 64})
    with pytest.raises(InputError, match=r"batch: .*f\.jsonl is over the limit of 64 bytes"):
        take_in(f"{web}/f.jsonl", settings=small, store=store, blobs=blobs)


@pytest.mark.parametrize(
    "name",
    [
        "s3://key:hunter2@bucket/f.jsonl",
        "https://hunter2@example.org/f.jsonl",
        "https://example.org/f.jsonl?X-Amz-Signature=hunter2",
        "s3://bucket/f.jsonl?hunter2",
        "https://example.org/f.jsonl#hunter2",
    ],
)
def test_a_url_that_ray_must_not_show_is_refused_unshown(taken: Taken, name: str) -> None:
    with pytest.raises(InputError, match="credentials") as refused:
        taken(name)
    assert "hunter2" not in str(refused.value)


def test_an_azure_container_is_no_credential() -> None:
    check_name("abfss://container@account.dfs.core.windows.net/f.jsonl")
    with pytest.raises(InputError, match="credentials"):
        check_name("abfss://me:hunter2@account.dfs.core.windows.net/f.jsonl")


@pytest.mark.parametrize("name", ["memory://f.jsonl", "zip://f.jsonl::s3://b/a.zip", "sftp://host/f.jsonl"])
def test_what_cannot_be_read_is_refused_by_its_scheme(taken: Taken, name: str) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        taken(name)


def test_only_its_requests_are_drained(taken: Taken, store: RequestStore, folder: Path, paint: Paint) -> None:
    ids = taken(folder / "f.jsonl").ids
    line = {"model": "flags", "images": [paint("c.png").name], "priority": 9}
    (folder / "other.jsonl").write_text(json.dumps(line))
    [other] = taken(folder / "other.jsonl").ids
    assert {request.id for request in store.drain(None, only=ids, limit=1).requests} < {*ids}
    batch = store.drain(None, only=[other])
    assert [request.id for request in batch.requests] == [other]
    left = store.drain(None, only=ids)
    assert left.id != batch.id
    assert {request.id for request in left.requests} < {*ids}
    assert store.drain(None, only=ids, skip=[left.id]).requests != left.requests
