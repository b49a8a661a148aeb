"""The settings of nights: how long one may take, and what its cost is reckoned with."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from expunge.section import Section
from expunge.sources import check_url
from expunge.web import is_loopback

Gpu = Literal["a100", "h100", "h200"]

PEAK_TFLOPS: Mapping[Gpu, Mapping[str, float]] = {
    "a100": {"bf16": 312, "fp32": 156},
    "h100": {"bf16": 989, "fp32": 495},
    "h200": {"bf16": 989, "fp32": 495},
}
"""Dense peak of the SXM cards in 10^12 operations per second, from NVIDIA's data sheets; float32 is taken as TF32."""


class NightSettings(Section):
    """What one night may take. The cost model reckons with the rest; nothing of it changes what is computed."""

    hours: float | None = Field(
        default=None,
        gt=0,
        le=24 * 7,
        description="the hours that a new batch may take, by the cost model and what Ray has; the requests that do not "
        "fit wait for the next night; default: no limit but night_limit",
    )
    gpus: int = Field(
        default=0, ge=0, description="how many GPUs a night is reckoned with; 0: as many as Ray says it has"
    )
    gpu: Gpu = Field(default="h100", description="the GPUs that Ray has: a100, h100 or h200")
    utilisation: float = Field(
        default=0.4, gt=0, le=1, description="share of a GPU's peak that is reached; a guess until it is measured"
    )
    price: float = Field(default=3.0, ge=0, description="price of one GPU for one hour, in any currency; a guess")
    cpu_tflops: float = Field(
        default=0.1, gt=0, description="10^12 operations per second of one CPU core, where Ray has no GPU"
    )


class WebhookSettings(Section):
    """Where promotions and rollbacks are told. Messages hold ids only, and are signed with the secret."""

    SHORTEST: ClassVar[int] = 16

    url: str = Field(default="", description="where to POST them; https, or http to this host; default: nowhere")
    secret: str = Field(
        default="", repr=False, description="the secret that signs them; for EXPUNGE_WEBHOOKS__SECRET, not for a file"
    )
    secret_file: Path | None = Field(default=None, description="the file that holds the secret instead")

    @field_validator("url")
    @classmethod
    def _private(cls, url: str) -> str:
        """Refuse to send over a network in the clear, and credentials that a log could show."""
        if not url:
            return url
        parts = urlsplit(check_url(url))
        if "@" in parts.netloc:
            raise ValueError("it contains credentials: the receiver checks the signature instead")
        if parts.scheme != "https" and not (parts.scheme == "http" and is_loopback(parts.hostname or "")):
            raise ValueError("use https://; http:// is for this host alone")
        if not parts.hostname:
            raise ValueError("it names no host")
        return url

    @model_validator(mode="after")
    def _signed(self) -> Self:
        if self.secret and self.secret_file is not None:
            raise ValueError("give secret or secret_file, not both")
        if self.url and self.secret_file is None and len(self.secret) < self.SHORTEST:
            raise ValueError(f"a url needs secret_file, or a secret of at least {self.SHORTEST} characters")
        return self


Days = Annotated[int, Field(ge=0, le=36_500)]


class RetentionSettings(Section):
    """For how many days after it was decided a request is kept; then its pictures and texts are destroyed.

    A state without a number is kept until somebody purges it by hand. With one, every night ends with a purge.
    """

    removed: Days | None = Field(
        default=None, description="days; afterwards the removal cannot be trained or verified again"
    )
    not_reproduced: Days | None = Field(default=None, description="days")
    failed: Days | None = Field(default=None, description="days")
    withdrawn: Days | None = Field(default=None, description="days; its pictures go when it is withdrawn")

    def days(self, state: str) -> int | None:
        """Returns for how long a state is kept; None: without end, as what is undecided is."""
        return self.model_dump().get(state)
