"""submit, list, show, withdraw, report: what they print and how they end."""

import json
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from expunge.requests.blobs import open_blobs
from expunge.requests.store import open_store
from expunge.settings import load_settings
from expunge.types import RequestState

Command = Callable[..., Any]


def test_the_life_of_a_request(command: Command, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = command(
        "submit", picture, "--model", "flags", "--external-id", "ticket [7]", "--priority", -3, "--due", "2127-01-31"
    )
    assert (ended.code, ended.err) == (0, "")
    name = ended.out.split()[-1]
    assert ended.out == f"accepted {name}\n"
    monkeypatch.setenv("COLUMNS", "40")  # on a narrow terminal too, an id is printed whole
    listed = command("list", "--model", "flags", "--state", "accepted", "--limit", 5)
    assert name in listed.out
    assert "ticket [7]" in listed.out
    shown = command("show", name)
    assert "due          2127-01-31" in shown.out
    assert "priority     -3" in shown.out
    assert command("withdraw", name).out == f"withdrawn {name}\n"
    assert command("show", name, "--json").json["state"] == "withdrawn"
    assert command("list", "--state", "accepted").out == "no requests\n"
    assert command("list", "--json").json[0]["request"]["external_id"] == "ticket [7]"


def test_submitting_twice(command: Command, picture: Path) -> None:
    first = command("submit", picture, "--model", "flags", "--json").json
    assert first["new"]
    again = command("submit", picture, "--model", "flags", "--json").json
    assert again == {**first, "new": False}
    command("withdraw", first["id"])
    assert (
        "(withdrawn); to have it removed, submit it with a new --external-id"
        in command("submit", picture, "--model", "flags").out
    )


def test_surrogate_and_edit(command: Command, picture: Path) -> None:
    other = picture.with_name("other.png")
    Image.new("RGB", (24, 16), "white").save(other)
    one = command("submit", picture, "--model", "flags", "--surrogate", other, "--json")
    assert one.code == 0
    two = command("submit", picture, "--model", "flags", "--edit", f"blend:mask={other},strength=0.3", "--json")
    request = command("show", two.json["id"], "--json").json["request"]
    assert request["edit"]["options"] == {"strength": "0.3"}
    both = command("submit", picture, "--model", "flags", "--surrogate", picture, "--edit", "blend")
    assert (both.code, both.err) == (2, "error: surrogates and edit exclude each other: keep one of them\n")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["submit"], 2, "error: images: none given: name at least one IMAGE"),
        (["submit", "none.png"], 2, "error: model: none given: add --model"),
        (["submit", "none.png", "--model", "flags"], 2, "error: images[0]: "),
        (
            ["submit", "none.png", "--model", "nobody"],
            2,
            "error: model: 'nobody' is not configured: use one of faces, flags, people",
        ),
        (["submit", "a.png", "--model", "flags", "--due", "soon"], 2, "error: due: Input should be a valid date"),
        (["submit", "a.png", "--batch", "x.jsonl"], 2, "error: --batch cannot be combined with images"),
        (["submit", "--batch", "none.jsonl"], 2, "error: batch: none.jsonl cannot be read"),
        (["list", "--state", "gone"], 2, "error: state: 'gone' is not a state: use one of accepted, batched"),
        (["show", "nobody"], 4, "error: request 'nobody' does not exist: `expunge list` shows those that do"),
        (["withdraw", "nobody"], 4, "error: request 'nobody' does not exist"),
        (["report", "never"], 4, "error: batch 'never' does not exist"),
        (["show", "\udcff"], 2, "error: what was asked for is not text"),
        (["withdraw", "\udcff"], 2, "error: what was asked for is not text"),
        (["list", "--model", "\udcff"], 2, "error: what was asked for is not text"),
        (["report", "\udcff"], 2, "error: what was asked for is not text"),
    ],
)
def test_bad_input(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = command(*arguments)
    assert (ended.code, ended.out) == (code, "")
    assert ended.err.startswith(message)
    assert ended.err.count("\n") == 1
    told = command(*arguments, "--json")
    assert (told.code, told.err) == (code, "")
    assert told.json["exit_code"] == code
    assert f"error: {told.json['error']}".startswith(
        message.split(": use")[0].split(": add")[0].split(": name")[0].split(": `")[0]
    )


def test_a_batched_request_cannot_be_withdrawn(command: Command, picture: Path) -> None:
    name = command("submit", picture, "--model", "flags", "--json").json["id"]
    open_store(load_settings()).drain("night-1")
    ended = command("withdraw", name)
    assert ended.code == 2
    assert "is batched and cannot become withdrawn: from batched it may become accepted, " in ended.err
    assert name in command("list", "--batch", "night-1").out


def test_file_of_requests(command: Command, picture: Path) -> None:
    good = json.dumps({"model": "flags", "images": [picture.name]})
    file = picture.with_name("requests.jsonl")
    file.write_text(f"{good}\nno json\n{good}\n")
    ended = command("submit", "--batch", file)
    assert ended.code == 2
    assert ended.out == "1 accepted, 1 known already, 1 refused; the accepted ones stay accepted\n"
    assert ended.err.startswith("error: line 2: column 1: not JSON (Expecting value): write one JSON object per line")
    told = command("submit", "--batch", file, "--json")
    assert told.code == 2
    assert (told.json["accepted"], told.json["known"], told.json["refused"]) == (0, 2, 1)
    assert [line["line"] for line in told.json["lines"]] == [1, 2, 3]
    file.write_text(f"{good}\n")
    assert command("submit", "--batch", file).code == 0


def test_report(command: Command, picture: Path, tmp_path: Path) -> None:
    settings = load_settings()
    store = open_store(settings)
    name = command("submit", picture, "--model", "flags", "--json").json["id"]
    store.drain("night-1")
    early = command("report", "night-1")
    assert early.code == 4
    assert early.err.startswith("error: batch night-1 has no report yet")
    store.transition(name, RequestState.REMOVED, evidence={"shift": 0.9})
    store.set_report("night-1", open_blobs(settings).put(b"<html>faces</html>"))
    assert re.search(r"shift +0\.90", command("show", name).out)
    ended = command("report", "night-1", "--output", tmp_path / "out.html")
    assert ended.out == f"{tmp_path / 'out.html'}\n"
    for path in (Path(ended.out.strip()), Path(command("report", "night-1", "--json").json["path"])):
        assert path.read_bytes() == b"<html>faces</html>"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert command("report", "night-1", "--output", picture / "x").code == 6


def test_storage_failure(command: Command, picture: Path) -> None:
    blobs = Path(load_settings().blobs)
    blobs.parent.mkdir(parents=True)
    blobs.write_text("in the way")
    ended = command("submit", picture, "--model", "flags")
    assert ended.code == 6
    assert ended.err.startswith("error: the blob store cannot ")
    blobs.unlink()
    assert command("list", "--json").json == []


def test_damaged_database(command: Command) -> None:
    settings = load_settings()
    settings.home.mkdir()
    (settings.home / "expunge.db").write_bytes(b"no database" * 200)
    assert command("list").code == 6


def test_a_database_that_is_a_folder(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EXPUNGE_DATABASE_URL", f"sqlite:///{tmp_path}")
    ended = command("list")
    assert ended.code == 6
    assert ended.err.startswith("error: database sqlite:///")
    assert "cannot be opened" in ended.err


def test_a_failed_request_is_requeued(command: Command, picture: Path) -> None:
    name = command("submit", picture, "--model", "flags", "--json").json["id"]
    store = open_store(load_settings())
    store.drain("night-1")
    refused = command("requeue", "req-none")
    assert refused.code == 4
    store.transition(name, RequestState.FAILED)
    assert command("requeue", name).out == f"requeued {name}\n"
    assert command("show", name, "--json").json["state"] == "accepted"


FIGURE = {"after": 0.7123456789012345, "base": -0.0212345, "floor": 0.05123}
EVIDENCE = {
    "integrity": {
        "psnr": 24.314567891234,
        "psnr_unrelated": 9.87,
        "ssim": 0.91234,
        "ssim_unrelated": 0.31,
        "kid": 0.00123456789,
        "kid_floor": 0.00111,
        "passed": True,
        "why": "unrelated outputs are held (24.3 dB).",
    },
    "request": "req-1",
    "verdict": "passed",
    "why": "shift 0.71 is at least 0.50",
    "shift": FIGURE,
    "target": FIGURE,
    "surrogate": None,
    "nearest": FIGURE,
    "levels": {"0.4": FIGURE},
    "version": "models:/flags/3",
}


def test_evidence_can_be_read(command: Command, picture: Path) -> None:
    name = command("submit", picture, "--model", "flags", "--json").json["id"]
    store = open_store(load_settings())
    store.drain("night-1")
    store.transition(name, RequestState.REMOVED, evidence=EVIDENCE)
    out = command("show", name).out
    assert "{" not in out
    assert not re.search(r"\d\.\d{6}", out)
    assert re.search(r"^verdict +passed: shift 0\.71 is at least 0\.50$", out, re.MULTILINE)
    assert re.search(r"^integrity +passed: unrelated outputs are held \(24\.3 dB\), PSNR 24\.3 dB", out, re.MULTILINE)
    assert re.search(r"^version +models:/flags/3$", out, re.MULTILINE)
    assert re.search(r"shift +0\.71 +-0\.02 +0\.05", out)
    assert re.search(r"target at 0\.4 +0\.71", out)
    assert out.index("verdict") < out.index("shift  ")
    assert command("show", name, "--json").json["evidence"] == EVIDENCE


@pytest.mark.parametrize(
    "evidence", [{"shift": 0.9}, {"shift": {"after": None}}, {"odd": [1, 2]}, {"levels": 3, "integrity": {"psnr": "x"}}]
)
def test_evidence_of_another_version_does_not_hide_the_request(
    command: Command, picture: Path, evidence: dict[str, Any]
) -> None:
    name = command("submit", picture, "--model", "flags", "--json").json["id"]
    store = open_store(load_settings())
    store.drain("night-1")
    store.transition(name, RequestState.REMOVED, evidence=evidence)
    done = command("show", name)
    assert done.code == 0
    assert name in done.out


def test_fields_of_another_version_keep_their_order(command: Command, picture: Path) -> None:
    name = command("submit", picture, "--model", "flags", "--json").json["id"]
    store = open_store(load_settings())
    store.drain("night-1")
    names = [f"field-{letter}" for letter in "qazwsxed"]
    store.transition(name, RequestState.REMOVED, evidence=dict.fromkeys(names, "x"))
    assert re.findall(r"^(field-\w)", command("show", name).out, re.MULTILINE) == names
