"""All settings as one object, and what it derives from them: where things lie, and each model's own overrides."""

import getpass
import os
import re
from pathlib import Path
from typing import Literal, Self
from urllib.parse import quote

import platformdirs
from pydantic import Field, ValidationInfo, ValidatorFunctionWrapHandler, field_validator
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from expunge.batch.settings import NightSettings, RetentionSettings, WebhookSettings
from expunge.errors import InputError
from expunge.evaluation.settings import EvaluationSettings, GateSettings
from expunge.section import IDENTIFIER, IDENTIFIER_RULE
from expunge.service.settings import ServiceSettings
from expunge.settings.models import ModelSettings
from expunge.sources import NESTED, PREFIX, as_written, check_url, expanded, from_json, is_optional, read_config
from expunge.testbed.settings import MODELS
from expunge.unlearning.settings import TrainingSettings


def testbed_models() -> dict[str, ModelSettings]:
    return {name: ModelSettings.model_validate(table) for name, table in MODELS.items()}


class _Environment(EnvSettingsSource):
    """Passes on what is not JSON, so that the field refuses it by its name."""

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: str) -> object:
        try:
            return from_json(value)
        except (ValueError, RecursionError):
            return value


class Settings(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_nested_delimiter=NESTED, extra="forbid", frozen=True, hide_input_in_errors=True
    )

    home: Path = Field(
        default_factory=lambda: Path(platformdirs.user_data_dir("expunge")),
        description="the folder for everything that has no URL of its own",
    )
    config: Path | None = Field(default=None, description="the config file to read; default: config.toml in the home")
    database_url: str = Field(default="", description="SQLAlchemy URL; default: expunge.db in the home")
    blob_url: str = Field(default="", description="fsspec URL of the sealed blobs; default: blobs/ in the home")
    blob_key: str = Field(
        default="", repr=False, description="base64 of the 32-byte sealing key; default: blob.key in the home"
    )
    tracking_uri: str = Field(default="", description="MLflow's server; default: SQLite in the home")
    ray_address: str = Field(
        default="",
        description="Ray's job server, e.g. http://127.0.0.1:8265; default: RAY_API_SERVER_ADDRESS, else port "
        "8265 of this machine",
    )
    actor: str = Field(
        default="",
        max_length=200,
        description="who acts, for the audit log; `expunge --actor` names it for one command; default: the user",
    )
    max_pixels: int = Field(default=32_000_000, ge=64, description="the largest image that is decoded, in pixels")
    max_bytes: int = Field(default=64_000_000, ge=64, description="the largest image file that is read, in bytes")
    night_limit: int = Field(
        default=512,
        ge=1,
        le=1_000_000,
        description="the largest number of requests in one night; the others wait for the next",
    )
    due_days: int = Field(
        default=28,
        ge=0,
        le=3650,
        description="days until a request that names no date is due: GDPR Art. 12(3) gives a month; 0: it has no date",
    )
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    models: dict[str, ModelSettings] = Field(default_factory=testbed_models)
    training: TrainingSettings = TrainingSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    gate: GateSettings = GateSettings()
    night: NightSettings = NightSettings()
    retention: RetentionSettings = RetentionSettings()
    service: ServiceSettings = ServiceSettings()
    webhooks: WebhookSettings = WebhookSettings()

    @field_validator("home", mode="before")
    @classmethod
    def _empty_is_unset(cls, home: object) -> object:
        """An empty home is the default one, and not the folder where a command happens to run."""
        return platformdirs.user_data_dir("expunge") if home == "" else home

    @field_validator("home")
    @classmethod
    def _absolute(cls, home: Path) -> Path:
        """Make it the same folder from wherever a command runs."""
        try:
            str(home).encode()
        except UnicodeEncodeError:
            raise ValueError("its name is not UTF-8: name another folder") from None
        return expanded(home).absolute()

    @field_validator("*", mode="wrap")
    @classmethod
    def _from_text(cls, value: object, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> object:
        return as_written(value, handler, optional=is_optional(cls, info.field_name))

    @field_validator("database_url", "blob_url", "tracking_uri", "ray_address")
    @classmethod
    def _readable(cls, url: str, info: ValidationInfo) -> str:
        if "@" in url and "://" not in url and info.field_name != "blob_url":  # that may be a folder
            raise ValueError("it is not a URL: write scheme://user:password@host")
        return check_url(url, database=info.field_name == "database_url")

    @field_validator("models", mode="before")
    @classmethod
    def _beside_the_testbed(cls, given: object) -> object:
        """Configuring a model keeps the shipped ones; one of the same name is replaced."""
        return {**testbed_models(), **given} if isinstance(given, dict) else given

    @field_validator("models")
    @classmethod
    def _can_be_named(cls, models: dict[str, ModelSettings]) -> dict[str, ModelSettings]:
        """Requests, registered models and folders are named after it."""
        for name in models:
            if not re.fullmatch(IDENTIFIER, name):
                raise ValueError(f"{name[:70]!r} cannot be a model's name: {IDENTIFIER_RULE}")
        return models

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, _Environment(settings_cls), InitSettingsSource(settings_cls, read_config())

    @property
    def database(self) -> str:
        return self.database_url or _sqlite(self.home / "expunge.db")

    @property
    def blobs(self) -> str:
        return self.blob_url or str(self.home / "blobs")

    @property
    def tracking(self) -> str:
        return self.tracking_uri or _sqlite(self.home / "mlflow" / "mlflow.db")

    @property
    def acting(self) -> str:
        """Who acts, for the audit log; a container may have no name for its user's number."""
        try:
            return self.actor or getpass.getuser()
        except (KeyError, OSError):
            return f"user {os.getuid()}"

    @property
    def runs(self) -> Path:
        """The folder with the stage outputs, checkpoints and progress of every batch."""
        return self.home / "runs"

    @property
    def model_cache(self) -> Path:
        """The folder that remembers which models have passed the deep preflight."""
        return self.home / "cache" / "models"

    def model(self, name: str) -> ModelSettings:
        try:
            return self.models[name]
        except KeyError:
            known = ", ".join(sorted(self.models))
            raise InputError(
                f"model: {name!r} is not configured",
                hint=f"use one of {known}, or add [models.{name}] to the config file",
            ) from None

    def with_source(self, model: str, source: str) -> Self:
        """Return settings in which this model's base is `source`: a path, OWNER/NAME@COMMIT, or testbed:NAME."""
        changed = self.model(model).model_copy(update={"source": source, "revision": ""})
        return self.model_copy(update={"models": {**self.models, model: changed}})

    def training_for(self, model: str) -> TrainingSettings:
        return TrainingSettings.model_validate({**self.training.model_dump(), **self.model(model).training})

    def gate_for(self, model: str) -> GateSettings:
        return GateSettings.model_validate({**self.gate.model_dump(), **self.model(model).gate})


def _sqlite(file: Path) -> str:
    """SQLAlchemy and MLflow decode a URL's path: a `?` in it, a `#` or a `%` must not be what they are in a URL."""
    return f"sqlite:///{quote(str(file))}"
