"""config show: every setting, where it came from, and no secret."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from expunge.settings import Settings, load_settings

Command = Callable[..., Any]


def shown(command: Command) -> dict[str, tuple[object, str]]:
    return {row["name"]: (row["value"], row["source"]) for row in command("config", "show", "--json").json["settings"]}


def test_sources(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    home = load_settings().home
    home.mkdir()
    (home / "config.toml").write_text("max_pixels = 1000\n[gate]\nmin_psnr = 24.0\nmin_ssim = 0.8\n")
    monkeypatch.setenv("EXPUNGE_GATE__MIN_SSIM", "0.9")
    rows = shown(command)
    assert rows["max_pixels"] == (1000, "config file")
    assert rows["gate.min_psnr"] == (24.0, "config file")
    assert rows["gate.min_ssim"] == (0.9, "environment (EXPUNGE_GATE__MIN_SSIM)")
    assert rows["training.seed"] == (0, "default")
    assert rows["home"] == (str(home), "environment (EXPUNGE_HOME)")
    assert rows["models.flags.source"] == ("testbed:flags", "default")
    assert rows["(blobs)"] == (str(home / "blobs"), "in force")


def test_every_setting_is_shown(command: Command) -> None:
    assert {name.partition(".")[0] for name in shown(command)} >= set(Settings.model_fields)


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_secrets_are_masked(command: Command, monkeypatch: pytest.MonkeyPatch, flags: list[str]) -> None:
    monkeypatch.setenv("EXPUNGE_BLOB_KEY", "c2VjcmV0LWtleQ==")
    monkeypatch.setenv("EXPUNGE_DATABASE_URL", "postgresql+psycopg://expunge:hunter2@host/db")
    ended = command("config", "show", *flags)
    assert ended.code == 0
    assert "c2VjcmV0" not in ended.out
    assert "hunter2" not in ended.out
    assert "postgresql+psycopg://expunge:***@host/db" in ended.out


def test_table_names_the_file(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "(none)" in command("config", "show").out
    file = tmp_path / "own.toml"
    file.write_text("")
    monkeypatch.setenv("EXPUNGE_CONFIG", str(file))
    assert command("config", "show").out.splitlines()[-1] == f"config file: {file}"


def test_a_model_of_ones_own_stands_beside_the_shipped_ones(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('[models.own]\nsource = "/models/own"\n[models.flags]\nsource = "/models/flags"\n')
    monkeypatch.setenv("EXPUNGE_CONFIG", str(file))
    models = load_settings().models
    assert {name: model.source for name, model in models.items()} == {
        "faces": "testbed:faces",
        "flags": "/models/flags",
        "own": "/models/own",
        "people": "testbed:people",
    }
