"""doctor: each row is ok or says how to fix it."""

import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from expunge import doctor
from expunge.doctor import installation
from expunge.families import deep_preflight, preflight, resolve_source
from expunge.files import make_private
from expunge.requests.blobs import open_blobs
from expunge.requests.store import open_store
from expunge.settings import load_settings

Command = Callable[..., Any]
Rows = Callable[[], dict[str, doctor.Check]]


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Rows:
    # Looking for GPUs imports torch: seconds that these tests have no use for.
    for name in ("devices", "kernels"):
        monkeypatch.setitem(doctor.INSTALLATION, name, list)
    monkeypatch.setattr("expunge.families.deep_preflight", lambda name, model, *_, **__: preflight(name, model))
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    return lambda: {check.name: check for check in doctor.examine()}


@pytest.fixture
def server() -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path in ("/health", "/api/version") else 404)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    listening = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{listening.server_port}"
    listening.shutdown()
    thread.join()
    listening.server_close()


def test_embedded_parts_are_well(rows: Rows) -> None:
    found = rows()
    for name in ("python", "home", "models", "store", "blobs", "tracking", "ray job server"):
        assert found[name].status == "ok", found[name]
    assert not load_settings().home.exists()


def test_servers(rows: Rows, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPUNGE_TRACKING_URI", server)
    monkeypatch.setenv("EXPUNGE_RAY_ADDRESS", server + "/")
    found = rows()
    assert found["tracking"].ok
    assert found["ray job server"].ok
    monkeypatch.setenv("EXPUNGE_TRACKING_URI", server + "/elsewhere")
    monkeypatch.setenv("EXPUNGE_RAY_ADDRESS", "http://127.0.0.1:9")
    found = rows()
    assert "check EXPUNGE_TRACKING_URI" in found["tracking"].hint
    assert "check EXPUNGE_RAY_ADDRESS" in found["ray job server"].hint


def test_missing_parts_are_rows(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "PACKAGES", ("no-such-package",))
    monkeypatch.setenv("EXPUNGE_BLOB_KEY", "%%%")
    home = load_settings().home
    home.mkdir()
    (home / "expunge.db").write_bytes(b"no database" * 200)
    found = rows()
    assert found["no-such-package"].hint == "pip install no-such-package"
    assert (found["blobs"].status, found["store"].status) == ("failed", "failed")
    assert "openssl rand -base64 32" in found["store"].hint, "without a key nothing in the database can be read"

    monkeypatch.delenv("EXPUNGE_BLOB_KEY")
    assert "restore it from a backup" in rows()["store"].hint


def test_checkpoints_elsewhere_can_be_written_or_are_a_row(
    rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert rows()["checkpoints"].found == "in each job's folder"
    (tmp_path / "shared").mkdir()
    monkeypatch.setenv("EXPUNGE_TRAINING__CHECKPOINT_URL", str(tmp_path / "shared"))
    assert rows()["checkpoints"].found == f"{tmp_path / 'shared'} can be written"
    assert list((tmp_path / "shared").iterdir()) == []
    (tmp_path / "file").touch()
    monkeypatch.setenv("EXPUNGE_TRAINING__CHECKPOINT_URL", str(tmp_path / "file"))
    found = rows()["checkpoints"]
    assert not found.ok
    assert "training.checkpoint_url" in found.hint


def test_every_model_can_be_used_or_is_named(rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert rows()["models"].found == "faces, flags, people can be used"
    odd = tmp_path / "odd"
    odd.mkdir()
    (odd / "model_index.json").write_text('{"_class_name": ["a", "list"]}')
    monkeypatch.setenv("EXPUNGE_MODELS__ODD__SOURCE", str(odd))
    monkeypatch.setenv("EXPUNGE_MODELS__GONE__SOURCE", "/no/such/folder")
    row = rows()["models"]
    assert not row.ok
    assert f"model odd ({odd}): model_index.json: _class_name is" in row.found
    assert "model gone (/no/such/folder): there is no folder" in row.found
    assert row.hint


def test_models_are_looked_at_deeply(rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their configs alone are no fault; and what passed is kept in the home."""
    monkeypatch.setattr("expunge.families.deep_preflight", deep_preflight)
    make_private(load_settings().home)  # where there is none yet, doctor makes none
    bare = tmp_path / "bare"
    for config in Path(resolve_source("testbed:faces")).rglob("*.json"):
        (bare / config.relative_to(resolve_source("testbed:faces"))).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(config, bare / config.relative_to(resolve_source("testbed:faces")))
    monkeypatch.setenv("EXPUNGE_MODELS__BARE__SOURCE", str(bare))
    row = rows()["models"]
    assert row.found == f"model bare ({bare}): unet has no weights"
    assert len(list(load_settings().model_cache.iterdir())) == 3


def test_home_is_a_file(rows: Rows) -> None:
    load_settings().home.write_text("a file")
    assert not rows()["home"].ok


def test_bad_settings_are_a_row(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPUNGE_MAX_PIXELS", "many")
    assert "max_pixels" in rows()["settings"].found


@pytest.mark.parametrize(("ok", "required", "code"), [(True, True, 0), (False, False, 0), (False, True, 5)])
def test_exit_code(command: Command, monkeypatch: pytest.MonkeyPatch, ok: bool, required: bool, code: int) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: [doctor.Check("disk", ok, "what there is", "free space", required)])
    ended = command("doctor")
    assert ended.code == code
    assert ("free space" in ended.out) is not ok
    told = command("doctor", "--json")
    assert told.code == code
    assert told.json[0]["status"] == ("ok" if ok else "failed" if required else "warning")


def test_kernels_that_were_not_built_are_no_failure_but_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from unlearn_kernels import backends

    reason = "libunlearn_kernels.so was not built"
    monkeypatch.setattr(backends, "why_absent", lambda name: reason if name == "native" else None)
    (row,) = doctor.INSTALLATION["kernels"]()
    assert (row.name, row.status, row.found) == ("CPU kernels", "warning", f"plain torch runs: {reason}")
    assert "C compiler" in row.hint


@pytest.fixture
def deep(rows: Rows, command: Command, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    monkeypatch.setattr(doctor, "examine", list)
    return lambda: command("doctor", "--deep", "--json")


def test_looking_deep_finds_what_a_request_lacks(deep: Callable[[], Any], command: Command, picture: Path) -> None:
    ended = deep()
    assert (ended.code, ended.json[0]["found"]) == (0, "every picture of 0 requests is there and opens")
    request = command("submit", picture, "--model", "faces", "--json").json["id"]
    assert deep().code == 0
    (blob,) = [path for path in (load_settings().home / "blobs").glob("??/*")]
    blob.write_bytes(b"damaged")
    ended = deep()
    assert ended.code == 6
    for words in ("1 of 1 requests", "1 damaged, 0 gone", request):
        assert words in ended.json[0]["found"]
    assert "submit these requests again" in ended.json[0]["hint"]
    command("submit", picture, "--model", "faces")
    assert deep().code == 0


def test_looking_deep_notes_what_nobody_needs(deep: Callable[[], Any]) -> None:
    blobs = open_blobs(load_settings())
    left = [blobs.put(bytes([number])) for number in range(5)]
    ended = deep()
    assert ended.code == 0
    note = ended.json[1]["found"]
    assert "5 blobs; 5 that no request, report or night names: " in note
    assert sum(blob in note for blob in left) == 3


def test_a_foreign_key_is_a_row(rows: Rows, deep: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    open_blobs(load_settings()).put(b"mine")
    monkeypatch.setenv("EXPUNGE_BLOB_KEY", "MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE=")
    ended = deep()
    assert ended.code == 6
    assert "sealed with another key" in ended.json[0]["found"]


def test_a_foreign_key_is_found_without_looking_deep(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    open_blobs(load_settings()).put(b"mine")
    monkeypatch.setenv("EXPUNGE_BLOB_KEY", "MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE=")
    found = rows()["blobs"]
    assert not found.ok
    assert "set EXPUNGE_BLOB_KEY to the key whose fingerprint is" in found.hint


@pytest.fixture
def guarded(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[str]]]:
    """A server that wants the token `right`, and the headers that it was sent."""
    sent: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            given = self.headers.get("Authorization", "")
            sent.append(given)
            known = ("Bearer right", "Basic dXNlcjpwQHc=")  # user:p@w
            self.send_response(200 if given in known else 401 if not given else 403)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    listening = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever)
    thread.start()
    yield f"127.0.0.1:{listening.server_port}", sent
    listening.shutdown()
    thread.join()
    listening.server_close()


@pytest.mark.parametrize(
    ("row", "setting", "variable"),
    [
        ("ray job server", "EXPUNGE_RAY_ADDRESS", "RAY_AUTH_TOKEN"),
        ("tracking", "EXPUNGE_TRACKING_URI", "MLFLOW_TRACKING_TOKEN"),
    ],
)
def test_a_server_that_wants_a_token_answers(
    rows: Rows,
    guarded: tuple[str, list[str]],
    monkeypatch: pytest.MonkeyPatch,
    row: str,
    setting: str,
    variable: str,
) -> None:
    host, sent = guarded
    monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # not for what is on this host
    monkeypatch.setenv(setting, f"http://{host}")
    found = rows()[row]
    assert not found.ok
    assert "wants a token (401)" in found.found
    assert variable in found.hint
    monkeypatch.setenv(variable, "wrong-hunter2")
    found = rows()[row]
    assert f"refuses the token in {variable} (403)" in found.found
    assert "hunter2" not in str(found)
    monkeypatch.setenv(variable, "right")
    assert rows()[row].ok
    monkeypatch.setenv(setting, f"http://user:p%40w@{host}")
    monkeypatch.delenv(variable)
    assert rows()[row].ok
    assert sent[-1].startswith("Basic ")


def test_a_row_that_fails_as_nobody_foresaw_takes_no_other_along(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> str:
        raise RuntimeError("nonnumeric port: 'hunter2@host'")

    looks = ("home", "encoder weights", "store", "blobs", "tracking", "ray job server", "privacy")
    for name in looks:
        monkeypatch.setitem(doctor.LOOKS, name, broken)
    monkeypatch.setitem(doctor.INSTALLATION, "python", broken)
    found = rows()
    for name in (*looks, "python"):
        assert found[name].status == "failed"
        assert found[name].found == "RuntimeError: nonnumeric port: ***@host'"
        assert found[name].hint
    assert found["checkpoints"].ok


def test_every_row_that_is_not_ok_says_what_to_do(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    load_settings().home.write_text("a file")
    monkeypatch.setattr(installation, "PACKAGES", ("no-such-package",))
    monkeypatch.setenv("EXPUNGE_RAY_ADDRESS", "ray://127.0.0.1:10001")
    monkeypatch.setenv("EXPUNGE_TRACKING_URI", "postgresql://127.0.0.1:9/mlflow")
    failed = [check for check in rows().values() if not check.ok]
    assert {"no-such-package", "home", "store", "tracking", "ray job server"} <= {check.name for check in failed}
    assert [check for check in failed if not check.hint] == []


def test_a_home_that_is_not_there_is_not_made(rows: Rows) -> None:
    found = rows()
    assert "made with the first request" in found["home"].found
    assert found["store"].found == found["blobs"].found == "made with the first request"
    assert all(found[name].ok for name in ("home", "store", "blobs", "tracking", "privacy"))
    assert not load_settings().home.exists()


def test_a_home_that_cannot_be_made_is_a_row(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPUNGE_HOME", "/proc/expunge/home")
    found = rows()["home"]
    assert not found.ok
    assert found.found.startswith("/proc/expunge/home cannot be made (")
    assert found.hint.startswith("check the permissions of /proc,")


def test_what_others_may_read_is_named_with_the_command_that_ends_it(
    rows: Rows, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = load_settings()
    shared = [settings.home, settings.runs, settings.home / "mlflow", tmp_path / "a b"]
    for folder in shared:
        folder.mkdir()
        folder.chmod(0o755)
    files = [settings.home / "blob.key", settings.home / "expunge.db", tmp_path / "a b" / "own.toml"]
    open_store(settings).close()
    open_blobs(settings)
    files[-1].touch()
    for file in files:
        file.chmod(0o644)
    monkeypatch.setenv("EXPUNGE_CONFIG", str(files[-1]))
    found = rows()["privacy"]
    assert (found.status, found.required) == ("warning", False)
    for path in (*shared[:3], *files):
        assert str(path) in found.found
    assert f"chmod 700 {settings.home};" in found.hint
    assert f"chmod 600 '{files[-1]}'" in found.hint
    subprocess.run(found.hint, shell=True, check=True)
    assert rows()["privacy"].ok


def test_a_home_of_any_name_is_looked_at(rows: Rows, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EXPUNGE_HOME", str(tmp_path / "100%20 ?#"))
    settings = load_settings()
    open_store(settings).close()
    settings.home.chmod(0o755)
    (settings.home / "expunge.db").chmod(0o644)
    assert str(settings.home / "expunge.db") in rows()["privacy"].found


def test_looking_deep_takes_what_nobody_foresaw_as_a_row(
    deep: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("lost redis://:hunter2@host")

    monkeypatch.setattr("expunge.requests.inventory.take_inventory", broken)
    ended = deep()
    assert ended.code == 6
    assert ended.json[0]["found"] == "RuntimeError: lost ***@host"


def test_what_lies_in_a_closed_folder_is_closed(rows: Rows) -> None:
    settings = load_settings()
    open_store(settings).close()
    settings.home.chmod(0o700)
    (settings.home / "expunge.db").chmod(0o644)
    assert rows()["privacy"].ok


def test_privacy_closes_no_folder_that_others_need(rows: Rows, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    common = tmp_path / "tmp"
    common.mkdir()
    common.chmod(0o1777)
    monkeypatch.setenv("EXPUNGE_HOME", str(common))
    found = rows()["privacy"]
    assert (found.status, found.hint) == ("warning", "set EXPUNGE_HOME to a folder of its own")
    monkeypatch.setenv("EXPUNGE_HOME", os.devnull)
    assert "chmod" not in rows()["privacy"].hint


def test_an_open_database_is_seen_in_a_home_of_any_name(
    rows: Rows, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    home = tmp_path / "a%20 b?#"
    monkeypatch.setenv("EXPUNGE_HOME", str(home))
    open_store(load_settings()).close()
    home.chmod(0o755)
    (home / "expunge.db").chmod(0o644)
    assert f"chmod 600 '{home}/expunge.db'" in rows()["privacy"].hint


def test_a_home_that_is_a_file_is_called_that(rows: Rows, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("EXPUNGE_HOME", str(tmp_path / "file"))
    found = rows()["store"]
    assert (found.found, found.hint) == (f"home {tmp_path}/file is not a folder", "correct EXPUNGE_HOME")
