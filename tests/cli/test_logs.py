"""Logs: to stderr, as JSON where nobody looks, by level, and never what people sent."""

import io
import json
import sys

import pytest
import structlog

from expunge.logs import configure, get_logger


@pytest.fixture(autouse=True)
def _reset() -> None:
    structlog.reset_defaults()


def test_json_lines_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    configure("info")
    log = get_logger("batch")
    log.debug("unseen")
    log.info("drained", batch="night-1", count=3)
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = map(json.loads, err.splitlines())
    assert line.pop("timestamp").endswith("Z")
    assert line == {"event": "drained", "batch": "night-1", "count": 3, "level": "info", "component": "batch"}


def test_private_values_are_blanked(capsys: pytest.CaptureFixture[str]) -> None:
    configure("debug")
    get_logger("requests").warning("slip", request="req-1", prompt="somebody", external_id="a@b", images=["face.png"])
    err = capsys.readouterr().err
    assert "req-1" in err
    for word in ("somebody", "a@b", "face.png"):
        assert word not in err


def test_without_configuration_nothing_goes_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    get_logger("unlearning").info("step", step=1)
    out, err = capsys.readouterr()
    assert out == ""
    assert json.loads(err)["step"] == 1


def test_a_stderr_that_was_closed_since_does_not_matter(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with io.StringIO() as earlier:
        monkeypatch.setattr(sys, "stderr", earlier)
        configure("info")
        log = get_logger("unlearning")
    monkeypatch.undo()
    log.warning("still said")
    assert json.loads(capsys.readouterr().err)["event"] == "still said"
