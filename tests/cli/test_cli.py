"""The frame of the command line: its names, its speed, its failures."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from expunge import cli
from expunge.commands.common import one_line

Command = Callable[..., Any]

# Scripts depend on these: taking one away, or renaming it, breaks them.
FLAGS = {
    "submit": {
        "--model",
        "--prompt",
        "--surrogate",
        "--edit",
        "--external-id",
        "--reason",
        "--due",
        "--priority",
        "--batch",
        "--box",
        "--json",
    },
    "list": {"--model", "--state", "--batch", "--limit", "--after", "--by-due", "--json"},
    "show": {"--json"},
    "withdraw": {"--json"},
    "report": {"--open", "--output", "--json"},
    "doctor": {"--deep", "--json"},
    "backup": {"--passphrase-file", "--allow-damaged", "--json"},
    "restore": {"--passphrase-file", "--unverified", "--json"},
    "export": {"--format", "--out", "--base", "--json"},
    "ledger": {"--against", "--json"},
    "promote": {"--accept-resurfacing", "--accept-failed", "--yes", "--json"},
    "prune": {"--dry-run", "--yes", "--json"},
    "purge": {"--dry-run", "--yes", "--json"},
    "audit verify": {"--json"},
    "audit show": {"--json"},
    "rollback": {"--to", "--accept-resurfacing", "--json"},
    "serve": {"--host", "--port", "--docs", "--print-openapi"},
    "tokens create": {"--tenant", "--scope", "--expires", "--json"},
    "tokens list": {"--json"},
    "tokens revoke": {"--json"},
    "version": {"--json"},
    "config show": {"--json"},
    "bench method": {
        "--testbed",
        "--arms",
        "--seeds",
        "--requests",
        "--out",
        "--oracle",
        "--without",
        "--quick",
        "--workers",
        "--json",
    },
}


@pytest.mark.parametrize("name", FLAGS)
def test_flags(command: Command, name: str) -> None:
    ended = command(*name.split(), "--help")
    assert ended.code == 0
    assert set(re.findall(r"^\s+(--[a-z-]+)", ended.out, re.MULTILINE)) - {"--help"} == FLAGS[name]


def test_help_imports_nothing_heavy() -> None:
    script = """
import sys
from expunge.cli import run
assert run(["--help"]) == 0
heavy = {"torch", "ray", "mlflow", "sqlalchemy", "PIL", "pydantic", "rich", "structlog", "numpy", "fsspec"}
print(sorted(heavy & set(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"


def test_version(command: Command) -> None:
    assert command("--version").out == command("version").out
    assert command("--version").out.startswith("expunge ")
    assert f"expunge {command('version', '--json').json['version']}\n" == command("version").out


def test_usage_errors(command: Command) -> None:
    for arguments in (["bogus"], ["list", "--bogus"], ["list", "--limit", "many"], ["show"]):
        ended = command(*arguments)
        assert (ended.code, ended.out) == (2, "")
        assert "Error" in ended.err


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    def install(error: BaseException) -> None:
        app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)

        @app.command()
        def fail(as_json: bool = typer.Option(False, "--json")) -> None:
            raise error

        monkeypatch.setattr(cli, "app", app)

    return install


def test_unexpected_failure_is_one_line(command: Command, failing: Callable[[BaseException], None]) -> None:
    failing(RuntimeError("first\nsecond \x1b[31m"))
    ended = command()
    assert (ended.code, ended.out) == (1, "")
    assert ended.err == "error: RuntimeError: first second \\x1b[31m: set EXPUNGE_LOG_LEVEL=debug for the traceback\n"
    assert command("--json").json["exit_code"] == 1


def test_debug_prints_the_traceback(
    command: Command, failing: Callable[[BaseException], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXPUNGE_LOG_LEVEL", "debug")
    failing(RuntimeError("broken"))
    ended = command()
    assert ended.code == 1
    assert "Traceback" in ended.err


def test_interrupt(command: Command, failing: Callable[[BaseException], None]) -> None:
    failing(KeyboardInterrupt())
    assert command().code == 130


def test_bad_setting(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPUNGE_GATE__MIN_PSNR", "high")
    ended = command("list")
    assert ended.code == 2
    assert ended.err.startswith("error: setting gate.min_psnr: Input should be a valid number")


def test_the_process_itself(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "expunge", "show", "nobody"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr.startswith("error: request 'nobody' does not exist")


def test_one_line() -> None:
    assert one_line("a\nb\x07\x1b]0;x") == "a b\\x07\\x1b]0;x"
