"""Settings as a person writes them: each spelling of a right value is taken, a wrong one is refused by its name."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from expunge.errors import InputError
from expunge.settings import GateSettings, ModelSettings, Settings, TrainingSettings, load_settings
from expunge.sources import check_url

MODEL = ModelSettings(source="testbed:flags", resolution=(32, 48))


def scalars(kind: type[BaseModel], defaults: BaseModel, path: tuple[str, ...] = ()) -> Iterator[tuple[str, object]]:
    """(variable, default) of every setting that is no table."""
    for name, field in kind.model_fields.items():
        value, inner = getattr(defaults, name), field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from scalars(inner, value, (*path, name))
        elif not isinstance(value, dict):
            yield "EXPUNGE_" + "__".join((*path, name)).upper(), value


DEFAULTS = Settings.model_construct(home=Path("/srv/expunge"))
OF_A_MODEL = ("models", "own")
CASES = [
    *scalars(Settings, DEFAULTS),
    *scalars(ModelSettings, MODEL, OF_A_MODEL),
    *scalars(TrainingSettings, TrainingSettings(), (*OF_A_MODEL, "training")),
    *scalars(GateSettings, GateSettings(), (*OF_A_MODEL, "gate")),
]


def spellings(value: object) -> list[str]:
    """As a person writes it, as JSON, and as Helm prints a number that came through its values."""
    if value is None:
        return ["", "null"]
    if isinstance(value, bool):
        return [str(value), json.dumps(value)]
    if isinstance(value, int | float):
        return [str(value), json.dumps(value), f"{value:e}", f"{float(value)}"]
    return [str(value)] if isinstance(value, str | Path) else [json.dumps(value)]


def found(variable: str) -> object:
    """The setting in force."""
    here: object = load_settings()
    path = variable.removeprefix("EXPUNGE_").lower().split("__")
    if path[0] == "models" and path[2] in ("training", "gate"):
        settings = load_settings()
        here = settings.training_for("own") if path[2] == "training" else settings.gate_for("own")
        path = path[3:]
    for part in path:
        here = here[part] if isinstance(here, dict) else getattr(here, part)
    return here


@pytest.fixture(autouse=True)
def _a_model_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPUNGE_MODELS__OWN__SOURCE", "testbed:flags")


def test_no_section_is_left_out() -> None:
    assert {"EXPUNGE_TRAINING__ZERO_STAGE", "EXPUNGE_EVALUATION__LEVELS", "EXPUNGE_GATE__MIN_PSNR"} <= set(dict(CASES))
    assert len(CASES) > 100


@pytest.mark.parametrize(("variable", "value"), CASES, ids=[variable for variable, _ in CASES])
def test_every_setting_can_be_a_variable(variable: str, value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    for written in spellings(value):
        if variable == "EXPUNGE_CONFIG" and written == "null":
            continue  # a file's name
        monkeypatch.setenv(variable, written)
        assert found(variable) == value, written


@pytest.mark.parametrize("value", get_args(TrainingSettings.model_fields["zero_stage"].annotation))
def test_every_number_of_a_literal_can_be_a_variable(value: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPUNGE_TRAINING__ZERO_STAGE", str(value))
    assert load_settings().training.zero_stage == value


@pytest.mark.parametrize("written", ["3.2e+07", "3.2e7", "32000000.0", " 32000000 "])
def test_a_large_number_as_helm_prints_it(written: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPUNGE_MAX_PIXELS", written)
    assert load_settings().max_pixels == 32_000_000


# Every text is a right value of the others.
NOT_TEXT = [variable for variable, value in CASES if value is not None and not isinstance(value, str | Path)]


@pytest.mark.parametrize("variable", NOT_TEXT)
def test_a_wrong_value_is_refused_by_its_name_and_never_shown(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ("hunter2", "[hunter2", '{"hunter2": 1}', "nan", "1e999"):
        monkeypatch.setenv(variable, wrong)
        with pytest.raises(InputError, match=rf"see {variable}\b") as refused:
            load_settings()
        assert refused.value.exit_code == 2
        assert wrong not in str(refused.value)


@pytest.mark.parametrize("variable", ["EXPUNGE_TRAINING__WEIGHTING", "EXPUNGE_LOG_LEVEL", "EXPUNGE_TRAINING"])
def test_a_word_that_is_none_of_the_choices_is_not_shown(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "hunter2")
    with pytest.raises(InputError, match=variable) as refused:
        load_settings()
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize(
    ("variable", "hint"),
    [
        ("EXPUNGE_GATE_MIN_PSNR", "did you mean EXPUNGE_GATE__MIN_PSNR?"),
        ("EXPUNGE_MAX__PIXELS", "did you mean EXPUNGE_MAX_PIXELS?"),
        ("EXPUNGE_TRACKING_URL", "did you mean EXPUNGE_TRACKING_URI?"),
        ("EXPUNGE_HOME__X", "did you mean EXPUNGE_HOME?"),
        ("expunge_gates", "did you mean EXPUNGE_GATE?"),
        ("EXPUNGE_ZZZ", "unset it, or correct its name"),
        ("EXPUNGE_GATE__MIN_PSRN", "did you mean min_psnr?"),
        ("EXPUNGE_MODELS__OWN__TRAINING__STEP", "did you mean steps?"),
        ("EXPUNGE_TRAINING__TASKS", ": training.tasks is now training.objectives; see "),
        ("EXPUNGE_TRAINING__TASKS_PER_STEP", ": training.tasks_per_step is now training.objectives_per_step; see "),
        ("EXPUNGE_MODELS__OWN__TRAINING__TASKS", ": training.tasks is now training.objectives; see "),
        ("EXPUNGE_EVALUATION__ENCODER", ": evaluation.encoder is now evaluation.encoders; see "),
        ("EXPUNGE_GATE__MIN_SHIFT", ": gate.min_shift is now gate.max_excess; see "),
        ("EXPUNGE_MODELS__OWN__GATE__MAX_KID_RATIO", ": gate.max_kid_ratio is now gate.min_kid_p; see "),
    ],
)
def test_a_variable_that_sets_nothing_is_refused(variable: str, hint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "3")
    with pytest.raises(InputError, match=r"(there is no such|is not a) setting") as refused:
        load_settings()
    assert hint in str(refused.value)


@pytest.mark.parametrize(
    "variable",
    [
        "EXPUNGE_MLFLOW_SERVICE_HOST",
        "EXPUNGE_MLFLOW_SERVICE_PORT_HTTP",
        "EXPUNGE_MLFLOW_PORT",
        "EXPUNGE_MLFLOW_PORT_5000_TCP_ADDR",
        "EXPUNGE_TEST_POSTGRES",
    ],
)
def test_variables_that_are_not_of_expunge_are_left_alone(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "tcp://10.0.0.1:5000")
    load_settings()


def test_a_config_file_that_is_named_and_not_there_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    load_settings()  # without the variable, the home's need not exist
    monkeypatch.setenv("EXPUNGE_CONFIG", str(tmp_path / "none.toml"))
    with pytest.raises(InputError, match=r"none\.toml does not exist: create it") as refused:
        load_settings()
    assert refused.value.exit_code == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"max_pixels = 1000\n[gate]\nmin_psnr = = 4\n", r"is not TOML: Invalid value \(at line 3, column 12\)"),
        (b"max_pixels = 1000\nmax_pixels = 1000\n", r"is not TOML: .*line 2"),
        (b"max_pixels = 1000\n\n# caf\xe9\n", "line 3 is not UTF-8"),
        ("max_pixels = 1000\n".encode("utf-16"), "line 1 is not UTF-8"),
        (b"max_pixels = 1000\n[gates]\n", r"setting gates: there is no such setting: did you mean gate\?"),
    ],
)
def test_a_bad_config_file_is_refused_by_its_name(
    content: bytes, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "own.toml").write_bytes(content)
    monkeypatch.setenv("EXPUNGE_CONFIG", str(tmp_path / "own.toml"))
    with pytest.raises(InputError, match=message) as refused:
        load_settings()
    assert str(tmp_path / "own.toml") in str(refused.value)


def test_a_byte_order_mark_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.toml").write_bytes(b"\xef\xbb\xbfmax_pixels = 1000\r\n")
    monkeypatch.setenv("EXPUNGE_CONFIG", str(tmp_path / "own.toml"))
    assert load_settings().max_pixels == 1000


@pytest.mark.parametrize("named", [True, False], ids=["EXPUNGE_CONFIG", "home"])
@pytest.mark.parametrize("kind", ["folder", "fifo", "dangling link", "unreadable"])
def test_what_cannot_be_read_is_not_left_out(
    kind: str, named: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "home" / "config.toml"
    file.parent.mkdir()
    if named:
        monkeypatch.setenv("EXPUNGE_CONFIG", str(file))
    match kind:
        case "folder":
            file.mkdir()
        case "fifo":
            os.mkfifo(file)
        case "dangling link":
            file.symlink_to(tmp_path / "gone")
        case _:  # root may read what nobody may
            file.touch()

            def denied(self: Path) -> bytes:
                raise PermissionError(13, "Permission denied")

            monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(InputError, match=r"^config: .*config\.toml (is|does|cannot)") as refused:
        load_settings()
    assert refused.value.hint


def test_no_device_but_null_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPUNGE_CONFIG", os.devnull)
    load_settings()
    monkeypatch.setenv("EXPUNGE_CONFIG", "/dev/zero")
    with pytest.raises(InputError, match="is not a regular file"):
        load_settings()


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://user@host/db",
        "postgresql+psycopg://user@server:p/w?x#y[z@host:5432/db?sslmode=require",
        "postgresql://user:p%40w@[::1]:5432/db",
        "postgresql:///db?host=/run/postgresql",
        "sqlite:////srv/a b@c/expunge.db",
    ],
)
def test_database_urls_that_work(url: str) -> None:
    assert check_url(url, database=True) == url


@pytest.mark.parametrize(
    "url",
    [
        "https://host",
        "https://token@host/path",
        "http://user:pw@127.0.0.1:8265/",
        "http://[::1]:8265",
        "ray://host:10001",
        "s3://bucket/a@b",
        "abfs://container@account.dfs.core.windows.net/path",
        "ftp://user:pw@host:21/blobs",
        "file:///a b@c",
        "relative/folder@2",
        "testbed:flags",
        "memory://blobs",
    ],
)
def test_other_urls_that_work(url: str) -> None:
    assert check_url(url) == url


@pytest.mark.parametrize(
    ("variable", "url"),
    [
        ("EXPUNGE_DATABASE_URL", "postgresql://user:hun@ter2@host/db"),
        ("EXPUNGE_DATABASE_URL", "postgresql://user:hunter2"),
        ("EXPUNGE_DATABASE_URL", "postgresql://user:hun ter2@host/db"),
        ("EXPUNGE_TRACKING_URI", "https://user:hun/ter2@host"),
        ("EXPUNGE_TRACKING_URI", "https://hun/ter2@host"),
        ("EXPUNGE_TRACKING_URI", "https://user:hunter2@host:port"),
        ("EXPUNGE_RAY_ADDRESS", "http://user:[hunter2]@host"),
        ("EXPUNGE_RAY_ADDRESS", "http://[hunter2"),
        ("EXPUNGE_RAY_ADDRESS", "user:hunter2@host:8265"),
        ("EXPUNGE_BLOB_URL", "s3://key:hunter2@bucket/blobs"),
        ("EXPUNGE_BLOB_URL", "ftp://user:hun#ter2@host/blobs"),
        ("EXPUNGE_MODELS__OWN__SOURCE", "https://user:hun/ter2@host/model"),
        ("EXPUNGE_TRAINING__CHECKPOINT_URL", "s3://bucket/path?hunter2"),
        ("EXPUNGE_TRAINING__CHECKPOINT_URL", "s3://[hunter2]/path"),
    ],
)
def test_a_url_whose_password_cannot_be_told_is_refused_unshown(
    variable: str, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, url)
    with pytest.raises(InputError, match=f"see {variable}") as refused:
        load_settings()
    for part in ("hun", "ter2"):
        assert part not in str(refused.value)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("EXPUNGE_NIGHT_LIMIT", "true", "setting night_limit: "),
        ("EXPUNGE_NIGHT_LIMIT", "9" * 20, "setting night_limit: "),
        ("EXPUNGE_GATE", '{"min_psnr": 50, "min_psnr": 5}', "the setting 'min_psnr' is given twice"),
        ("EXPUNGE_MODELS__X", '{"source": "a/b", "source": "c/d"}', "the setting 'source' is given twice"),
        ("EXPUNGE_GATE__MIN_SSIM", "7", "setting gate.min_ssim: Input should be less than or equal to 1"),
        ("EXPUNGE_EVALUATION__LEVEL_GRID", "[]", "setting evaluation.level_grid: "),
        ("EXPUNGE_EVALUATION__ENCODERS", '["resnet"]', "setting evaluation.encoders: "),
        ("EXPUNGE_EVALUATION__SEEDS", "7", "setting evaluation.seeds: Input should be greater than or equal to 8"),
        ("EXPUNGE_TRAINING__SEED", "-1", "setting training.seed: "),
        ("EXPUNGE_TRAINING__SEED", "1e30", "setting training.seed: "),
        ("EXPUNGE_MODELS", '{"x y": {"source": "testbed:faces"}}', "setting models: 'x y' cannot be a model's name"),
        ("EXPUNGE_MODELS__X__SOURCE", "", "setting models.x.source: "),
        ("EXPUNGE_MODELS", '{"": {"source": "testbed:faces"}}', "setting models: '' cannot be a model's name"),
        ("EXPUNGE_HOME", "/tmp/a\udcff", "setting home: its name is not UTF-8"),
    ],
)
def test_what_would_be_found_out_after_hours_is_refused_at_once(
    variable: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        load_settings()


@pytest.mark.parametrize("written", ["night_limit = true", "[training]\nsteps = true", "[gate]\nmin_psnr = false"])
def test_a_truth_value_in_the_file_is_no_number(written: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "config.toml"
    file.write_text(written)
    monkeypatch.setenv("EXPUNGE_CONFIG", str(file))
    with pytest.raises(InputError, match="it must not be true or false"):
        load_settings()
    file.write_text("[training]\nadaptive = true")
    assert load_settings().training.adaptive


def test_an_empty_home_is_the_default_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.delenv("EXPUNGE_HOME", raising=False)
    monkeypatch.delenv("EXPUNGE_CONFIG", raising=False)
    default = load_settings().home
    monkeypatch.setenv("EXPUNGE_HOME", "")
    assert load_settings().home == default == tmp_path / "expunge"
