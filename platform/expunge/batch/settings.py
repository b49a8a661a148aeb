"""The settings of nights: how long one may take, and what its cost is reckoned with."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from expunge.section import Section

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
