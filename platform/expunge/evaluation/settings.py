"""The settings of the evaluation, and of the gate that its evidence must pass."""

from pydantic import Field, field_validator

from expunge.evaluation.encoders import USAGE, check_encoder
from expunge.section import Fraction, Section


class EvaluationSettings(Section):
    """How many samples the evaluation generates, and which encoder compares them."""

    levels: tuple[Fraction, ...] = Field(
        default=(0.4, 0.5, 0.6), min_length=1, description="noise levels b / (a + b) of the re-generation test"
    )
    seeds: int = Field(default=4, ge=1, description="noise seeds per level")
    generation_samples: int = Field(default=32, ge=1, description="samples per request, spread over its prompts")
    integrity_samples: int = Field(default=32, ge=2, description="unrelated samples that are compared before and after")
    sampling_steps: int = Field(default=20, ge=1, description="denoising steps per sample")
    encoder: str = Field(default="efficientnet-lite0", description=f"what the similarity is measured with: {USAGE}")

    _known = field_validator("encoder")(check_encoder)


class GateSettings(Section):
    """The thresholds that a request and a hotfix must meet: guesses until measurements on large models replace them."""

    min_shift: float = Field(
        default=0.5,
        description="smallest move from target (0) to surrogate (1) in feature space; above 0.5 the outputs are nearer "
        "to the surrogate",
    )
    min_psnr: float = Field(
        default=20.0, description="smallest PSNR in dB between outputs of the same seed before and after"
    )
    min_ssim: float = Field(default=0.7, le=1, description="smallest SSIM of the same pairs; 1 means identical")
    max_kid_ratio: float = Field(
        default=3.0,
        gt=0,
        description="largest distribution distance, as a multiple of the base model's distance to itself",
    )
    max_attempts: int = Field(
        default=3, ge=1, description="after this many nights without passing its gate, a request waits for a person"
    )
