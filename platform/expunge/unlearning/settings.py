"""The settings of one job's fine-tuning, in the sections that a function can take alone.

`TrainingSettings` joins them, so that users write one `[training]` table. Hyper-parameters without a measurement named
beside them are guesses.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, Self
from urllib.parse import parse_qsl, urlsplit

from pydantic import Field, field_validator, model_validator

from expunge.section import Fraction, Section
from expunge.sources import check_url

URL_OPTIONS = frozenset({"endpoint_override", "region", "scheme"})
"""The options that a checkpoint_url may have behind its question mark."""

OFFLOAD_STAGES = (1, 3)
"""The ZeRO stages on which the optimizer may be on the host.

DeepSpeed has no such stage 0, and on stage 2 it would give that optimizer a gradient during the backward pass, before
surgery has changed it.
"""

LEARNING_RATES: Mapping[Literal["lora", "full"], float] = {"lora": 2e-3, "full": 2e-4}
"""An adapter begins at 0 and is small, so it can and must move faster."""

RENAMED: Mapping[str, str] = {"tasks": "objectives", "tasks_per_step": "objectives_per_step"}
"""The name in release 0.1.0 of each setting of this table that has another one now."""


class MethodSettings(Section):
    """What is optimised, and how. Batch sizes are global: summed over all workers."""

    steps: int = Field(default=400, ge=1, description="training steps for a job of up to `steps_cover` new requests")
    steps_cover: int = Field(
        default=4,
        ge=1,
        description="a job with more new requests trains for proportionally more steps; without a warm start, requests "
        "removed earlier count as new, and with one they share the steps of the new ones (a guess)",
    )
    forget_batch: int = Field(default=8, ge=1, description="target samples per step")
    retain_batch: int = Field(default=32, ge=1, description="retain samples per step")
    views: int = Field(
        default=12,
        ge=1,
        description="views of each target that training sees: itself, mirrored, and others moved and relit at random",
    )
    learning_rate: float | None = Field(
        default=None,
        gt=0,
        description="at the start; it falls to 0 along a cosine; default: 2e-4 for all weights, 2e-3 for an adapter",
    )
    clip: float = Field(default=1.0, gt=0, description="global norm of the combined gradient, after surgery")
    weighting: Literal["uniform", "x0", "min_snr", "band"] = "min_snr"
    density: Literal["memory", "uniform", "logit_normal", "band"] = Field(
        default="memory",
        description="where the noise levels of target samples are drawn; `memory`: a band around the levels at which "
        "the base model's memory shows; those of retain samples are always uniform",
    )
    min_snr_gamma: float = Field(default=1.0, gt=0)
    band_level: Fraction = Field(
        default=0.45,
        description="centre of `band`, as the noise level b / (a + b); of `memory` only where no level is known",
    )
    band_width: float = Field(default=0.8, gt=0, description="standard deviation of log(b / a) in `band` and `memory`")
    forget_target: Literal["surrogate", "recognition"] = "recognition"
    retain_target: Literal["distill", "data"] = "distill"
    surgery: Literal["none", "retain_normal", "pcgrad", "upgrad", "dualproj", "mgda", "cagrad"] = "retain_normal"
    objectives: Literal["auto", "request", "batch"] = Field(
        default="auto",
        description="`request`: each request has a gradient of its own; `batch`: all of them share one; `auto`: each "
        "has its own if `forget_batch` gives every worker a sample of each request, and memory allows it",
    )
    objectives_per_step: int = Field(
        default=32, ge=1, description="the largest number of requests that get a gradient of their own in one step"
    )
    surgery_geometry: Literal["euclidean", "optimizer"] = Field(
        default="euclidean",
        description="the inner product in which surgery projects: the plain one, or the one under AdamW's "
        "preconditioner, in which the step itself does not point against the retain gradient",
    )
    surgery_granularity: Literal["global", "layer", "tensor"] = Field(
        default="global", description="what is projected separately: the whole gradient, each block, or each tensor"
    )
    forget_weight: float = Field(
        default=0.25, gt=0, description="weight of the mean forget gradient; the retain gradient has weight 1"
    )
    adaptive: bool = Field(
        default=False,
        description="draw more samples from requests that are not forgotten yet, and stop when all of them are",
    )
    probe_every: int = Field(default=10, ge=1, description="steps between the probes of `adaptive`")
    forgotten_at: float = Field(
        default=0.6,
        gt=0,
        le=1,
        description="how far a request must have moved from its target (0) to its surrogate (1) before `adaptive` "
        "counts it as forgotten; a guess",
    )
    adapter: Literal["auto", "lora", "full"] = "auto"
    lora_rank: int = Field(default=16, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**32)

    def rate(self, kind: Literal["lora", "full"], done: float = 0.0) -> float:
        """Return the learning rate after a share `done` of the steps, for an adapter or for all weights.

        It falls along a cosine: at a constant rate, unrelated outputs jitter by several dB from step to step.
        """
        return (self.learning_rate or LEARNING_RATES[kind]) * (1 + math.cos(math.pi * done)) / 2

    def steps_for(self, requests: int) -> int:
        """Return the number of steps for so many new requests, which grows in proportion beyond `steps_cover`."""
        return -(-self.steps * max(requests, self.steps_cover) // self.steps_cover)

    def at_the_memory(self, levels: Sequence[float]) -> Self:
        """Centre the band of `density = "memory"` on the noise levels at which the base model's memory shows."""
        if self.density != "memory" or not levels:
            return self
        # The mean of log(b / a), in which the band is symmetric.
        centre = sum(math.log(level / (1 - level)) for level in levels) / len(levels)
        return self.model_copy(update={"band_level": 1 / (1 + math.exp(-centre))})


class ShardingSettings(Section):
    """How the model, the gradients and the optimizer fit into memory."""

    zero_stage: Literal[0, 1, 2, 3] = Field(
        default=1,
        description="stage of DeepSpeed's ZeRO, which says what the workers share: 0 nothing, 1 the optimizer, "
        "2 also the gradients, 3 also the weights",
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32", description="of weights, activations and gradients; the optimizer's own copy is always fp32"
    )
    activation_checkpointing: bool = Field(
        default=False, description="recompute a block's activations in the backward pass instead of keeping them"
    )
    offload_optimizer: bool = Field(
        default=False,
        description="keep AdamW's state and its copy of the weights in host memory, and step there; zero_stage 1 or 3",
    )
    micro_batch: int = Field(
        default=0,
        ge=0,
        description="the largest number of samples that a worker passes through the network at once; 0: no limit",
    )

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


class ClusterSettings(Section):
    """Which workers train, when one counts as lost, and where checkpoints go."""

    device: Literal["auto", "cpu", "gpu"] = Field(default="auto", description="auto: GPUs where Ray has any")
    workers: int = Field(default=2, ge=1, description="training workers, each on one GPU or one CPU core")
    min_workers: int = Field(
        default=0, ge=0, description="a job continues with this many if Ray has no more; 0: it waits for all of them"
    )
    worker_timeout_s: int = Field(
        default=1800, ge=5, description="a worker that does not answer for this many seconds counts as lost"
    )
    max_failures: int = Field(default=2, ge=0, description="how many lost workers a job survives")
    max_bad_steps: int = Field(
        default=3, ge=1, description="a job fails after this many consecutive steps whose gradient is not finite"
    )
    checkpoint_every: int = Field(default=50, ge=1, description="steps between two checkpoints")
    checkpoint_url: str = Field(
        default="",
        description="where checkpoints go: a folder that every node has, or a URL such as s3://bucket/path; its keys "
        "are read from AWS_ACCESS_KEY_ID and so on, its server from AWS_ENDPOINT_URL; default: the job's folder",
    )
    keep_checkpoints: int = Field(
        default=2, ge=1, description="how many of the newest checkpoints to keep; the second is a spare"
    )

    @field_validator("checkpoint_url")
    @classmethod
    def _no_keys(cls, url: str) -> str:
        """Refuse credentials, because MLflow shows a job's settings. Keys may hold slashes, so any @ is refused."""
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
    def _no_more_than_all(self) -> Self:
        if self.min_workers > self.workers:
            raise ValueError(f"min_workers ({self.min_workers}) must be at most workers ({self.workers})")
        return self


class RetainSettings(Section):
    """The pictures whose reproduction must not change."""

    retain_size: int = Field(default=256, ge=1, description="how many retain images the frozen model generates")
    retain_folder: Path | None = Field(default=None, description="use the images in this folder as the retain set")


class TrainingSettings(RetainSettings, ClusterSettings, ShardingSettings, MethodSettings):
    """The `[training]` table: all sections, and the rules between them."""

    @model_validator(mode="after")
    def _batches_divide(self) -> Self:
        """Every worker's mean must weigh the same in the mean over the workers."""
        for name, batch in (("forget_batch", self.forget_batch), ("retain_batch", self.retain_batch)):
            if batch % self.workers:
                raise ValueError(f"{name} must be a multiple of workers ({self.workers})")
        return self

    @model_validator(mode="after")
    def _moments_beside_gradients(self) -> Self:
        """On stage 1 gradients stay on the GPU: fetching AdamW's state there at each step would undo the offload."""
        if self.surgery_geometry == "optimizer" and self.offload_optimizer and self.zero_stage != 3:
            raise ValueError(
                "surgery_geometry: optimizer needs AdamW's state beside the gradients, which offload_optimizer has "
                "only with zero_stage = 3: set that, or surgery_geometry = euclidean"
            )
        return self

    @model_validator(mode="after")
    def _probes_at_checkpoints(self) -> Self:
        """A resumed training probes at its first step, so an uninterrupted one must have probed there, too."""
        if self.adaptive and self.checkpoint_every % self.probe_every:
            raise ValueError(
                f"probe_every: {self.probe_every} does not divide checkpoint_every ({self.checkpoint_every}): "
                "set it to a divisor"
            )
        return self
