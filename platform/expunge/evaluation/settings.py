"""The settings of the evaluation, and of the gate that its evidence must pass."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from expunge.evaluation.encoders import USAGE, check_encoder
from expunge.section import Fraction, Section

REPLACED: Mapping[str, str] = {
    "evaluation.encoder": "evaluation.encoders",
    "gate.min_shift": "gate.max_excess",
    "gate.max_kid_ratio": "gate.min_kid_p",
}
"""Settings of protocol 1, by what protocol 2 has in their place."""


class EvaluationSettings(Section):
    """How much the evaluation generates, and which encoders compare it; fewer than the minimum prove nothing."""

    encoders: tuple[str, ...] = Field(
        default=("efficientnet-lite0", "edges"),
        min_length=1,
        description=f"what similarity is measured with; the worst of them decides: {USAGE}",
    )
    levels: tuple[Fraction, ...] = Field(
        default=(), description="noise levels b / (a + b) of the re-generation test; default: chosen for each model"
    )
    level_grid: tuple[Fraction, ...] = Field(
        default=(0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8), min_length=1, description="the levels that are chosen from"
    )
    seeds: int = Field(
        default=9, ge=8, description="draws per condition, spread over the levels; more are drawn where 9 leave it open"
    )
    confidence: float = Field(default=0.95, ge=0.8, lt=1, description="of every one-sided bound")
    unseen_folder: Path | None = Field(
        default=None,
        description="pictures of the model's domain that it never saw; default: made from its own samples",
    )
    unseen_pictures: int = Field(default=24, ge=16, description="how many of them are used")
    pictures: int = Field(default=4, ge=1, description="pictures per request that are tested each night, rotating")
    held_out: float = Field(
        default=0.25,
        ge=0,
        le=0.5,
        description="share of a request's pictures that is kept out of training, where it brings four or more",
    )
    generation_samples: int = Field(default=32, ge=16, description="free samples per prompt")
    integrity_samples: int = Field(
        default=64, ge=16, description="unrelated samples that are compared before and after"
    )
    sampling_steps: int = Field(default=20, ge=2, description="denoising steps per sample")
    robustness: Literal["off", "small", "full"] = Field(
        default="small", description="how much of the robustness tests every night runs"
    )
    ledger_share: float = Field(
        default=0.25, gt=0, le=1, description="share of the earlier removals that each night verifies again, rotating"
    )

    _known = field_validator("encoders")(lambda names: tuple(check_encoder(name) for name in names))


class GateSettings(Section):
    """The thresholds that a request and a hotfix must meet. Evidence, verdicts and registry name weaker ones."""

    max_excess: float = Field(
        default=0.8,
        ge=0,
        description="largest excess reproduction that may be left, as a share of the base model's (upper bound); less "
        "fails perfect removals, see expunge.evaluation.reproduction",
    )
    max_matches: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="largest share of free samples that may match a target; default: what unseen pictures give",
    )
    max_recognised: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="largest share of a picture's re-generations in which every encoder may still recognise it (lower "
        "bound)",
    )
    max_implausible: float = Field(
        default=0.2, ge=0, le=1, description="largest share of outputs that are no picture of the model's domain"
    )
    max_alike: float = Field(
        default=0.5, ge=0, le=1, description="largest share of pairs of outputs of different requests that are alike"
    )
    max_changed: float = Field(
        default=0.1, ge=0, le=1, description="largest share of unrelated samples that no longer match what they were"
    )
    min_psnr: float = Field(default=20.0, ge=0, description="smallest median PSNR in dB of unrelated samples")
    min_ssim: float = Field(default=0.7, ge=-1, le=1, description="smallest median SSIM of the same samples")
    min_kid_p: float = Field(
        default=0.01,
        ge=0,
        le=1,
        description="a change of the samples' distribution counts where its permutation test gives a smaller p-value",
    )
    max_attempts: int = Field(
        default=3, ge=1, description="after this many nights without passing its gate, a request waits for a person"
    )
