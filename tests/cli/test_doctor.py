"""doctor: each row is ok or says how to fix it."""

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from expunge import doctor
from expunge.settings import load_settings

Command = Callable[..., Any]
Rows = Callable[[], dict[str, doctor.Check]]


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Rows:
    # Looking for GPUs imports torch: seconds that these tests have no use for.
    monkeypatch.setattr(doctor, "_devices", lambda: doctor.Check("devices", True, "cpu"))
    monkeypatch.setattr(doctor, "_kernels", list)
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
    for name in ("python", "home", "store", "blobs", "tracking", "ray job server"):
        assert found[name].status == "ok", found[name]
    blobs = load_settings().home / "blobs"
    assert not [path for path in blobs.rglob("*") if path.is_file()]


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
    monkeypatch.setattr(doctor, "_PACKAGES", ("no-such-package",))
    monkeypatch.setenv("EXPUNGE_BLOB_KEY", "%%%")
    home = load_settings().home
    home.mkdir()
    (home / "expunge.db").write_bytes(b"no database" * 200)
    found = rows()
    assert found["no-such-package"].hint == "pip install no-such-package"
    assert (found["blobs"].status, found["store"].status) == ("failed", "failed")
    assert "restore it from a backup" in found["store"].hint


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
    (row,) = doctor._kernels()
    assert (row.name, row.status, row.found) == ("CPU kernels", "warning", f"plain torch runs: {reason}")
    assert "C compiler" in row.hint
