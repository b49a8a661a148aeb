"""What people send cannot forge a line, steer the terminal, or break the JSON."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from expunge.commands.common import one_line, print_json, print_json_list, print_rows
from expunge.requests.store import open_store
from expunge.settings import load_settings
from expunge.types import RemovalRequest

Command = Callable[..., Any]

BIDI, ESCAPE = "\u202e\u2066", "\x9b31m"  # the second is a terminal escape in one character
HOSTILE = f"a{BIDI}b{ESCAPE}\u200b\u2028c\U000e0041"


@pytest.fixture
def hostile() -> str:
    """As a file of an earlier version may have brought it, past any check."""
    request = RemovalRequest(
        id="req-1",
        model="flags",
        images=("0" * 64,),
        external_id=f"ticket{HOSTILE}",
        reason=f"x{HOSTILE}\nstate  removed",
    )
    open_store(load_settings()).add(request)
    return request.id


def unprintable(text: str) -> list[str]:
    return [c for c in text if not c.isprintable() and c != "\n"]


def test_for_people(command: Command, hostile: str) -> None:
    shown, listed = command("show", hostile), command("list")
    assert unprintable(shown.out + listed.out) == []
    assert not any(line.startswith("state  removed") for line in shown.out.splitlines())
    assert r"ticketa\u202e\u2066b\x9b31m\u200b\u2028c\U000e0041" in shown.out
    assert r"ticketa\u202e\u2066b" in listed.out
    assert len(listed.out.splitlines()) == 2


@pytest.mark.parametrize("arguments", [("show", "req-1"), ("list",)])
def test_for_programs(command: Command, hostile: str, arguments: tuple[str, ...]) -> None:
    ended = command(*arguments, "--json")
    assert unprintable(ended.out) == []
    found = ended.json if isinstance(ended.json, dict) else ended.json[0]
    assert found["request"]["external_id"] == f"ticket{HOSTILE}"
    assert found["request"]["reason"] == f"x{HOSTILE}\nstate  removed"


@pytest.mark.parametrize(
    "value",
    [
        {"a": "café 東京 \u202e\x1b\x00\ud800\U000e0001"},
        ["\x7f\x9b\u2028"],
        {"\u202e": 1},
        {"a": [float("nan"), 1e999]},
    ],
)
def test_json_is_json_whatever_it_holds(value: object, capfd: pytest.CaptureFixture[str]) -> None:
    print_json(value)
    print_json_list([value, value])
    print_json_list([])
    out = capfd.readouterr().out
    assert unprintable(out) == []
    decoder = json.JSONDecoder(parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    one, end = decoder.raw_decode(out)
    two, end = decoder.raw_decode(out, end + 1)
    assert two == [one, one]
    assert out[end:] == "\n[]\n"
    if "nan" not in str(value):
        assert one == value
    assert "café 東京" in out or "café" not in str(value)


def test_json_on_a_terminal_that_knows_no_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    print_json({"a": "café"})
    ascii_only.flush()
    assert json.loads(ascii_only.buffer.getvalue()) == {"a": "café"}  # pyright: ignore[reportAttributeAccessIssue]


def test_a_cell_stays_in_its_place(capfd: pytest.CaptureFixture[str]) -> None:
    print_rows(("a", "b"), [("x\ny\u202e", None), ("[bold]", "\ud800")])
    out = capfd.readouterr().out
    assert unprintable(out) == []
    assert len(out.splitlines()) == 3
    assert "[bold]" in out


@pytest.mark.parametrize(
    ("text", "line"),
    [("a\r\nb\tc", "a  b c"), ("\ud800", r"\ud800"), ("\x1b]0;x\x07", r"\x1b]0;x\x07"), ("déjà 東京", "déjà 東京")],
)
def test_one_line(text: str, line: str) -> None:
    assert one_line(text) == line


def test_a_file_whose_name_is_no_text(command: Command, tmp_path: Path) -> None:
    ended = command("submit", tmp_path / "a\udcff\u202e.png", "--model", "flags")
    assert ended.code == 2
    assert unprintable(ended.err) == []
