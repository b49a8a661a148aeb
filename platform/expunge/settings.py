"""Everything that can be set, where it came from, and the default models.

Precedence: `EXPUNGE_*` variables (nested by `__`, e.g. `EXPUNGE_GATE__MIN_PSNR=24`), then the file named by
`EXPUNGE_CONFIG` or `$EXPUNGE_HOME/config.toml`, then the defaults below. Hyper-parameters without a measurement named
beside them are guesses.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import parse_qsl, quote, urlsplit

import platformdirs
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from expunge.errors import InputError
from expunge.sources import (
    NESTED,
    PREFIX,
    as_written,
    check_url,
    check_variables,
    expanded,
    from_json,
    is_optional,
    read_config,
    refused,
    setting_names,
)

Fraction = Annotated[float, Field(gt=0, lt=1)]
Resolution = tuple[Annotated[int, Field(ge=8, le=4096)], Annotated[int, Field(ge=8, le=4096)]]

IDENTIFIER = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"
"""What names models, requests and batches."""

URL_OPTIONS = frozenset({"endpoint_override", "region", "scheme"})
"""What a checkpoint_url may have behind its question mark."""

OFFLOAD_STAGES = (1, 3)
"""Of ZeRO, where the optimizer may be on the host. DeepSpeed has no such stage 0, and on stage 2 it would give that
optimizer a gradient in the backward pass, before surgery has changed it."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True, allow_inf_nan=False)

    @field_validator("*", mode="wrap")
    @classmethod
    def _from_text(cls, value: object, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> object:
        """A variable is text, whatever its field is."""
        return as_written(value, handler, optional=is_optional(cls, info.field_name))


class TrainingSettings(Section):
    """One job's fine-tuning. Batch sizes are global: over all workers."""

    steps: int = Field(default=150, ge=1, description="training steps of a job of at most `steps_cover` new requests")
    steps_cover: int = Field(
        default=4,
        ge=1,
        description="a job of more new requests has more steps, in proportion; without a warm start earlier ones "
        "count, too, and with one they share what the new ones bring (a guess)",
    )
    forget_batch: int = Field(default=8, ge=1, description="target samples a step")
    retain_batch: int = Field(default=8, ge=1, description="retain samples a step")
    learning_rate: float = Field(default=2e-4, gt=0)
    clip: float = Field(default=1.0, gt=0, description="global norm of the combined gradient, after surgery")
    weighting: Literal["uniform", "x0", "min_snr", "band"] = "min_snr"
    density: Literal["uniform", "logit_normal", "band"] = "uniform"
    min_snr_gamma: float = Field(default=1.0, gt=0)
    band_level: Fraction = Field(default=0.45, description="centre of `band`, as the noise level b / (a + b)")
    band_width: float = Field(default=0.8, gt=0, description="standard deviation of log(b / a) in `band`")
    forget_target: Literal["surrogate", "recognition"] = "recognition"
    retain_target: Literal["distill", "data"] = "distill"
    surgery: Literal["none", "retain_normal", "pcgrad", "upgrad", "dualproj", "mgda", "cagrad"] = "retain_normal"
    tasks: Literal["auto", "request", "batch"] = Field(
        default="auto",
        description="one forget gradient a request, or one for all; auto: a request each where `forget_batch` has a "
        "sample of each for every worker, and memory allows it",
    )
    tasks_per_step: int = Field(default=32, ge=1, description="most requests of a step with a gradient of their own")
    surgery_granularity: Literal["global", "layer", "tensor"] = Field(
        default="global", description="what is projected on its own: the whole gradient, each block, or each tensor"
    )
    forget_weight: float = Field(
        default=0.5, gt=0, description="weight of the mean forget gradient; the retain gradient has 1"
    )
    adaptive: bool = Field(
        default=False, description="samples go by what each request misses, and training ends when all are forgotten"
    )
    probe_every: int = Field(default=10, ge=1, description="steps between the probes of `adaptive`")
    forgotten_at: float = Field(
        default=0.6,
        gt=0,
        le=1,
        description="way from target (0) to surrogate (1) at which `adaptive` leaves a request out; a guess",
    )
    adapter: Literal["auto", "lora", "full"] = "auto"
    lora_rank: int = Field(default=16, ge=1)
    zero_stage: Literal[0, 1, 2, 3] = Field(
        default=1,
        description="of DeepSpeed's ZeRO; what workers share: 1 the optimizer, 2 gradients too, 3 weights too",
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32", description="of weights, activations and gradients; the optimizer's own copy is always fp32"
    )
    activation_checkpointing: bool = Field(
        default=False, description="recompute a block's activations in the backward pass instead of keeping them"
    )
    offload_optimizer: bool = Field(
        default=False, description="step on the host, which then holds AdamW's state and its weights; zero_stage 1 or 3"
    )
    micro_batch: int = Field(
        default=0,
        ge=0,
        description="most samples of an objective that a worker has in the network at once; 0: no limit",
    )
    device: Literal["auto", "cpu", "gpu"] = Field(default="auto", description="auto: GPUs where Ray has any")
    workers: int = Field(default=2, ge=1, description="training workers: a GPU each, or a CPU core each")
    min_workers: int = Field(
        default=0, ge=0, description="a job goes on with this many where Ray has no more; 0: it waits for all"
    )
    worker_timeout_s: int = Field(
        default=1800, ge=5, description="a worker that does not answer for so long counts as lost"
    )
    max_bad_steps: int = Field(
        default=3, ge=1, description="steps in a row with a gradient that is not finite, after which a job fails"
    )
    checkpoint_every: int = Field(default=50, ge=1)
    checkpoint_url: str = Field(
        default="",
        description="where checkpoints go: a folder that every node has, or a URL as s3://bucket/path, whose keys are "
        "in AWS_ACCESS_KEY_ID and so on, and whose server in AWS_ENDPOINT_URL; default: the job folder",
    )
    keep_checkpoints: int = Field(default=2, ge=1, description="the newest ones; one is the spare of the other")
    retain_size: int = Field(default=64, ge=1, description="retain images generated by the frozen model")
    retain_folder: Path | None = Field(default=None, description="use these images as the retain set instead")
    max_failures: int = Field(default=2, ge=0, description="worker losses that a job survives")
    seed: int = Field(default=0, ge=0, lt=2**32)

    @field_validator("checkpoint_url")
    @classmethod
    def _no_keys(cls, url: str) -> str:
        """A job's settings are shown in MLflow. Keys hold slashes: where an @ is does not say what is before it."""
        if "://" not in url:
            return url
        if "@" in url:
            raise ValueError("it holds a key: leave it out, and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
        given = parse_qsl(urlsplit(check_url(url)).query, keep_blank_values=True)
        unknown = [name if value else "an option without a value" for name, value in given if name not in URL_OPTIONS]
        if unknown:
            raise ValueError(f"{min(unknown)} is not among {', '.join(sorted(URL_OPTIONS))}: leave it out")
        return url

    @model_validator(mode="after")
    def _batches_divide(self) -> Self:
        """Every rank's mean must weigh the same in the mean over the ranks."""
        for name in ("forget_batch", "retain_batch"):
            if getattr(self, name) % self.workers:
                raise ValueError(f"{name} must be a multiple of workers ({self.workers})")
        return self

    @model_validator(mode="after")
    def _no_more_than_all(self) -> Self:
        if self.min_workers > self.workers:
            raise ValueError(f"min_workers ({self.min_workers}) must be at most workers ({self.workers})")
        return self

    @model_validator(mode="after")
    def _probes_at_checkpoints(self) -> Self:
        """A resumed training probes at its first step: the uninterrupted one must have done so there too."""
        if self.adaptive and self.checkpoint_every % self.probe_every:
            raise ValueError(
                f"probe_every: {self.probe_every} does not divide checkpoint_every ({self.checkpoint_every}): "
                "set it to a divisor"
            )
        return self

    @model_validator(mode="after")
    def _supported(self) -> Self:
        if self.precision == "fp16":
            raise ValueError("precision: fp16 needs a loss scale, which surgery does not have: use bf16 or fp32")
        if self.precision == "bf16" and self.zero_stage == 0:
            raise ValueError("zero_stage: DeepSpeed 0.19 steps bf16 wrongly on stage 0: set zero_stage = 1")
        if self.offload_optimizer and self.zero_stage not in OFFLOAD_STAGES:
            raise ValueError(
                f"zero_stage: stage {self.zero_stage} cannot have offload_optimizer: "
                "set zero_stage = 1 or 3, or offload_optimizer = false"
            )
        return self


class EvaluationSettings(Section):
    levels: tuple[Fraction, ...] = Field(
        default=(0.4, 0.5, 0.6), min_length=1, description="noise levels b / (a + b) of the re-generation test"
    )
    seeds: int = Field(default=4, ge=1, description="noise seeds per level")
    generation_samples: int = Field(default=32, ge=1, description="a request, spread over its prompts")
    integrity_samples: int = Field(default=32, ge=2)
    sampling_steps: int = Field(default=20, ge=1)
    encoder: str = Field(
        default="efficientnet-lite0",
        pattern=r"^(efficientnet-lite0|transformers:.+)$",
        description="efficientnet-lite0, or transformers:PATH_OR_HUB_ID of a vision backbone",
    )


class GateSettings(Section):
    """What a request and a hotfix must show. Guesses, until issue-scale measurements replace them."""

    min_shift: float = Field(
        default=0.5, description="way from target (0) to surrogate (1) in feature space; 0.5 is nearer to the surrogate"
    )
    min_psnr: float = Field(default=20.0, description="dB, same-seed outputs before and after")
    min_ssim: float = Field(default=0.7, le=1, description="of the same pairs; 1 is identity")
    max_kid_ratio: float = Field(
        default=3.0, gt=0, description="distribution distance, as a multiple of base against base"
    )
    max_attempts: int = Field(
        default=3, ge=1, description="nights after which a request that fails its gate needs a person"
    )


class ModelSettings(Section):
    """One base model that requests may name."""

    source: str = Field(
        min_length=1, description="a diffusers pipeline: a path, a hub id with its revision, or testbed:NAME"
    )
    revision: str = Field(
        default="",
        pattern=r"^([0-9a-f]{40})?$",
        description="the commit of a hub id, 40 hexadecimal digits: without one the base model could change",
    )
    resolution: Resolution | None = Field(
        default=None,
        description="(height, width) that images are scaled and centre-cropped to; default: the pipeline's own",
    )
    retain_prompts: tuple[str, ...] = Field(
        default=("",), min_length=1, description="the retain set is generated for these"
    )
    forget_prompts: tuple[str, ...] = Field(
        default=("",),
        description="conditions under which a target is removed, beside its own prompt; what stays is held under "
        "the empty one, too, where that is among them",
    )
    guidance: float = Field(
        default=1.0, ge=1, description="classifier-free guidance of everything generated with this model"
    )
    prompt_tokens: int = Field(default=256, ge=1, description="T5 tokens a prompt has; without a T5, zero tokens")
    editor: str = Field(default="blend", description="the editor where a request brings neither surrogate nor edit")
    editors: tuple[str, ...] = Field(default=("blend", "inpaint"), description="editors that a request may ask for")
    editor_models: tuple[str, ...] = Field(
        default=(),
        description="models that an editor may load, as a request names them: paths, or hub ids as OWNER/NAME@COMMIT; "
        "where there is one alone, a request need not name it",
    )
    training: dict[str, Any] = Field(default_factory=dict, description="overrides of [training]")
    gate: dict[str, Any] = Field(default_factory=dict, description="overrides of [gate]")

    _readable = field_validator("source")(check_url)


def _testbed_models() -> dict[str, ModelSettings]:
    return {
        # With one gradient for all, as its figures were measured; memory would allow one a request. And no more steps
        # for 16 requests, of the 100 people that it knows: unrelated outputs would not hold.
        "faces": ModelSettings(source="testbed:faces", training={"tasks": "batch", "steps_cover": 16}),
        "flags": ModelSettings(
            source="testbed:flags",
            resolution=(32, 48),
            retain_prompts=(
                "a flag",
                "the flag of Japan",
                "the flag of Brazil",
                "the flag of Sweden",
                "the flag of Kenya",
            ),
            guidance=2.0,
            prompt_tokens=1,
            # Chosen by 16 requests at once, in two sets of them (README of `unlearning`).
            training={
                "learning_rate": 3e-3,
                "forget_weight": 2.0,
                "weighting": "x0",
                "density": "band",
                "band_level": 0.5,
            },
        ),
    }


class _Environment(EnvSettingsSource):
    """What is not JSON is left to the field, which refuses it by its name."""

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        try:
            return from_json(value)
        except (ValueError, RecursionError):
            return value


class Settings(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_nested_delimiter=NESTED, extra="forbid", frozen=True, hide_input_in_errors=True
    )

    home: Path = Field(
        default_factory=lambda: Path(platformdirs.user_data_dir("expunge")), description="holds everything embedded"
    )
    config: Path | None = Field(default=None, description="the config file in force")
    database_url: str = Field(default="", description="SQLAlchemy URL; default: expunge.db in the home")
    blob_url: str = Field(default="", description="fsspec URL of the sealed blobs; default: blobs/ in the home")
    blob_key: str = Field(
        default="", repr=False, description="base64 of the 32-byte sealing key; default: blob.key in the home"
    )
    tracking_uri: str = Field(default="", description="MLflow; default: SQLite in the home")
    ray_address: str = Field(
        default="",
        description="job server, e.g. http://127.0.0.1:8265; default: RAY_API_SERVER_ADDRESS, else port 8265 here",
    )
    max_pixels: int = Field(default=32_000_000, ge=64, description="largest image that is decoded")
    max_bytes: int = Field(default=64_000_000, ge=64, description="largest image file that is read")
    night_limit: int = Field(
        default=512, ge=1, le=1_000_000, description="most requests of one night; the others wait for the next"
    )
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    models: dict[str, ModelSettings] = Field(default_factory=_testbed_models)
    training: TrainingSettings = TrainingSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    gate: GateSettings = GateSettings()

    @field_validator("home", mode="before")
    @classmethod
    def _empty_is_unset(cls, home: object) -> object:
        """As for the config file: it must not be the folder where a command happens to run."""
        return platformdirs.user_data_dir("expunge") if home == "" else home

    @field_validator("home")
    @classmethod
    def _absolute(cls, home: Path) -> Path:
        """It is the same folder from wherever it is looked at."""
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
        """Naming a model of one's own does not take the shipped ones away; naming one of theirs replaces it."""
        return {**_testbed_models(), **given} if isinstance(given, dict) else given

    @field_validator("models")
    @classmethod
    def _can_be_named(cls, models: dict[str, ModelSettings]) -> dict[str, ModelSettings]:
        """A request, a registered model and a folder bear the name."""
        for name in models:
            if not re.fullmatch(IDENTIFIER, name):
                rule = "use letters, digits, dot, dash and underscore, at most 63, and a letter or digit first"
                raise ValueError(f"{name[:70]!r} cannot be a model's name: {rule}")
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
    def runs(self) -> Path:
        """Stage outputs, checkpoints and progress of every batch."""
        return self.home / "runs"

    def model(self, name: str) -> ModelSettings:
        try:
            return self.models[name]
        except KeyError:
            known = ", ".join(sorted(self.models))
            raise InputError(
                f"model: {name!r} is not configured",
                hint=f"use one of {known}, or add [models.{name}] to the config file",
            ) from None

    def training_for(self, model: str) -> TrainingSettings:
        return TrainingSettings.model_validate({**self.training.model_dump(), **self.model(model).training})

    def gate_for(self, model: str) -> GateSettings:
        return GateSettings.model_validate({**self.gate.model_dump(), **self.model(model).gate})


def _sqlite(file: Path) -> str:
    """SQLAlchemy and MLflow decode a URL's path: a `?` in it, a `#` or a `%` must not be what they are in a URL."""
    return f"sqlite:///{quote(str(file))}"


def load_settings() -> Settings:
    """Raises InputError naming the setting or the file, and a hint. No value is in it: it may be a password."""
    check_variables(Settings)
    known = [*setting_names(Settings), *setting_names(ModelSettings)]
    try:
        settings = Settings()  # pyright: ignore[reportCallIssue]  # the fields come from the sources
    except ValidationError as error:
        raise refused(error, (), known) from None
    for model in settings.models:
        for part, overridden in (("training", settings.training_for), ("gate", settings.gate_for)):
            try:
                overridden(model)
            except ValidationError as error:
                raise refused(error, ("models", model, part), known) from None
    return settings
