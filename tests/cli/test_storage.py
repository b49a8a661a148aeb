"""Where everything lies: private whatever the umask, and what it means that it cannot be written."""

import contextlib
import os
import sqlite3
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from expunge.batch import submit
from expunge.registry.tracking import Tracker
from expunge.settings import load_settings

Command = Callable[..., Any]


@pytest.fixture(params=[0o000, 0o022])
def _umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


@pytest.mark.usefixtures("_umask")
def test_what_the_command_line_makes_is_private(command: Command, picture: Path, tmp_path: Path) -> None:
    settings = load_settings()
    assert command("submit", picture, "--model", "flags", "--reason", "private").code == 0
    assert command("backup", tmp_path / "backup").code == 0
    Tracker(settings.tracking)
    made = [path for root in (settings.home, tmp_path / "backup") for path in (root, *root.rglob("*"))]
    assert {"expunge.db", "blob.key", "mlflow"} <= {path.name for path in made}
    for path in made:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode & 0o077 == 0, f"{path} has mode {mode:o}"


COMMANDS = [
    ("list",),
    ("list", "--json"),
    ("show", "req-1"),
    ("withdraw", "req-1"),
    ("night",),
    ("submit", "{picture}", "--model", "flags"),
]


def spelt(arguments: tuple[str, ...], picture: Path) -> list[str]:
    return [each.format(picture=picture) for each in arguments]


@pytest.fixture(autouse=True)
def _a_ray_that_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "check_reachable", lambda address: None)


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("home", ["/proc/expunge", "/sys/expunge"])
def test_a_home_that_cannot_be_made(
    command: Command, picture: Path, monkeypatch: pytest.MonkeyPatch, home: str, arguments: tuple[str, ...]
) -> None:
    monkeypatch.setenv("EXPUNGE_HOME", home)
    ended = command(*spelt(arguments, picture))
    assert ended.code == 6
    said = ended.json["error"] if "--json" in arguments else ended.err
    assert f"{home} cannot be made" in said


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("reason", ["unable to open database file", "attempt to write a readonly database"])
def test_a_database_on_a_disk_that_is_read_only(
    command: Command, picture: Path, monkeypatch: pytest.MonkeyPatch, reason: str, arguments: tuple[str, ...]
) -> None:
    """Root may write what others may not: SQLite says here what it says on such a disk."""
    command("list")

    def refused(*_: object, **__: object) -> None:
        raise sqlite3.OperationalError(reason)

    monkeypatch.setattr("sqlite3.dbapi2.connect", refused)
    ended = command(*spelt(arguments, picture))
    said = ended.json["error"] if "--json" in arguments else ended.err
    assert ended.code == 6
    assert "does not answer" not in said
    assert reason in said


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ('UPDATE requests SET body = \'{"reason": "Jane Doe"}\'', "holds a row that cannot be read"),
        ("UPDATE requests SET state = 'lost'", "unknown state, 'lost'"),
        ("DROP TABLE requests", "is damaged (no such table: requests)"),
    ],
)
def test_a_database_with_odd_content_is_one_line_without_personal_data(
    command: Command, picture: Path, tmp_path: Path, damage: str, message: str
) -> None:
    assert command("submit", picture, "--model", "flags").code == 0
    with contextlib.closing(sqlite3.connect(load_settings().home / "expunge.db")) as connection:
        connection.execute("PRAGMA foreign_keys = OFF")
        connection.execute("DROP TRIGGER requests_lifecycle")
        connection.execute(damage)
        connection.commit()
    for arguments in (["list"], ["list", "--json"]):
        ended = command(*arguments)
        assert ended.code == 6
        assert message in ended.out + ended.err
        assert "Jane" not in ended.out + ended.err
    ended = command("backup", tmp_path / "b")
    assert ended.code == 6 or "lost" in damage
    assert "Jane" not in ended.err
