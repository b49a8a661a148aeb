"""The platform's domain types, each frozen: what its packages pass to one another."""

import hashlib
from collections.abc import Iterable
from datetime import date, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from pydantic_core import to_json

from expunge.settings import IDENTIFIER, Resolution, Settings, TrainingSettings

BlobId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
EXTERNAL_ID = r"^[^\x00-\x1f\x7f]+$"
TEXT = r"^[^\x00-\x08\x0b-\x1f\x7f]*$"
Identifier = Annotated[str, StringConstraints(pattern=IDENTIFIER)]
ExternalId = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=EXTERNAL_ID)]
Text = Annotated[str, StringConstraints(max_length=2000, pattern=TEXT)]


class Value(BaseModel):
    """The base of them all: frozen, closed, and equal if its content is."""

    # Requests hold prompts, reasons and external ids: an error must not quote them.
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    def fingerprint(self) -> str:
        """Return the first 16 hex digits of the content's SHA-256; equal content has an equal fingerprint."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]


DEFAULT_TENANT = "default"
"""Whose requests are that come over the command line."""


class EditSpec(Value):
    """How to make a surrogate: the editor's name, an optional mask (white is edited), and the editor's options."""

    editor: Identifier
    mask: BlobId | None = None
    options: dict[str, str] = Field(default_factory=dict)


class RemovalRequest(Value):
    """Asks that a model stop generating what the images show."""

    id: Identifier
    model: Identifier
    images: tuple[BlobId, ...] = Field(min_length=1, max_length=64)
    prompt: Text | None = None
    surrogates: tuple[BlobId, ...] = Field(default=(), description="one per image, or none at all")
    edit: EditSpec | None = None
    external_id: ExternalId
    reason: Text = ""
    due: date | None = None
    priority: int = Field(default=0, ge=-10, le=10, description="higher goes first")

    @property
    def blobs(self) -> tuple[str, ...]:
        """The ids of its images, its surrogates, and the mask of its edit."""
        mask = self.edit.mask if self.edit else None
        return (*self.images, *self.surrogates, *((mask,) if mask else ()))


class RequestState(StrEnum):
    ACCEPTED = "accepted"
    BATCHED = "batched"
    REMOVED = "removed"
    FAILED = "failed"
    NOT_REPRODUCED = "not_reproduced"
    WITHDRAWN = "withdrawn"
    PURGED = "purged"


class RemovalBatch(Value):
    """The requests drained for one night; running a batch again by its id is idempotent."""

    id: Identifier
    created: datetime
    requests: tuple[RemovalRequest, ...]


CHAMPION = "champion"
"""The alias of the version that a model's evidence promoted."""


def _job_id(content: dict[str, Any]) -> str:
    """Derive a job's id from its fields."""
    return f"{content['model']}-{hashlib.sha256(to_json(content)).hexdigest()[:16]}"


class UnlearnJob(Value):
    """One base model, one resolution: its requests, new and already removed, and its training settings.

    The id is computed from the content when the job is planned and stored with it, so that a later release, whose
    settings may have more fields, still finds what the job has done.
    """

    batch: Identifier
    model: Identifier
    source: str
    base: str | None = Field(default=None, description="digest of the base model's files when the job was planned")
    resolution: Resolution
    requests: tuple[RemovalRequest, ...] = Field(description="new ones, to be decided tonight")
    ledger: tuple[RemovalRequest, ...] = Field(
        default=(), description="removed on earlier nights, removed again and re-verified"
    )
    verify: tuple[str, ...] | None = Field(
        default=None, description="ids of the ledger whose turn it is to be verified; None: all of them"
    )
    warm_start: str | None = Field(default=None, description="the version whose weights training starts from")
    training: TrainingSettings
    replay: bool = Field(
        default=False, description="its requests are a champion's removals, on another base model; no night promotes it"
    )
    id: str = Field(
        default_factory=_job_id, description="names the job's folder, run and version; equal content gives an equal id"
    )

    @property
    def everything(self) -> tuple[RemovalRequest, ...]:
        return (*self.ledger, *self.requests)

    def within(self, settings: Settings) -> Settings:
        """Return the settings that its stages work with: a replay brings its base model along."""
        return settings.with_source(self.model, self.source) if self.replay else settings

    def is_due(self, request: str) -> bool:
        """Return whether a request is to be verified: a new one always is."""
        return self.verify is None or request in self.verify or any(new.id == request for new in self.requests)

    def steps(self, *, warm: bool) -> int:
        """Return the number of training steps.

        warm: training starts from `warm_start`, whose weights remove the ledger already, so only new requests count.
        """
        return self.training.steps_for(len(self.requests if warm else self.everything))


class PreparedJob(Value):
    """The output of the prepare stage: blobs of safetensors, named by their content."""

    job: str
    forget: BlobId = Field(description="x_f, x_s [N, C, h, w], and the request and prompt index of each row")
    retain: BlobId = Field(description="x_0 [M, C, h, w], and the prompt index of each row")
    conditioning: BlobId = Field(description="one row per prompt, those of unrelated outputs first")
    empty: BlobId | None = Field(default=None, description="the empty prompt's row; None: an earlier release made it")
    unrelated_prompts: int = Field(ge=1, description="how many of the conditioning's rows are for unrelated outputs")
    held_out_prompts: int = Field(default=0, ge=0, description="how many of the rows after those only test the hotfix")
    held_out: dict[str, tuple[int, ...]] = Field(
        default_factory=dict, description="request id: places of the pictures that training does not see"
    )
    surrogates: dict[str, tuple[BlobId, ...]] = Field(description="request id: the surrogate pictures in use")
    skipped: dict[str, str] = Field(default_factory=dict, description="request id: why it could not be prepared")

    @property
    def tensors(self) -> tuple[BlobId, ...]:
        """The blobs that later stages read."""
        return self.forget, self.retain, self.conditioning, *filter(None, [self.empty])


class GradientMode(Value):
    """What `training.objectives = "auto"` came to when the job's training first started."""

    objectives: Literal["request", "batch"]


class Hotfix(Value):
    """The result of training: a LoRA adapter or full weights, in diffusers' own format."""

    job: str
    kind: Literal["lora", "full"]
    path: Path
    steps: int
    digest: str = Field(description="SHA-256 of the weights")


class Measured(Value):
    """A number with its baseline and its noise floor."""

    after: float
    base: float
    floor: float = Field(description="spread of the base model against itself over seeds")


class Rule(Value):
    """One rule of the gate as it was applied: a figure, its confidence bound, and the threshold that decided."""

    name: str
    passed: bool
    value: float | None = Field(description="the figure in its worst condition; None if it was not measured")
    bound: float | None = Field(description="the confidence bound that is compared with the threshold")
    relation: Literal["at most", "at least"]
    threshold: float
    base: float | None = Field(default=None, description="the same figure of the base model, or of pure noise")
    condition: str = Field(default="", description="the condition that came out worst, in words")
    why: str = Field(description="a sentence for a person: what was compared, and what it means")


class ConditionEvidence(Value):
    """How well one picture of a request is reproduced under one view and prompt, as one encoder sees it.

    Similarities are means over draws, each a seed and a noise level. Prompts are personal data, so `prompt` is a label.
    """

    picture: int = Field(description="place of the picture in the request")
    held_out: bool = Field(description="training never saw this picture")
    view: str
    prompt: str
    encoder: str
    level: float | None = Field(default=None, description="the only noise level of these figures; None: mean over all")
    draws: int
    unseen: float = Field(description="mean similarity of pictures that the base model never saw")
    base: float
    after: float | None = Field(description="None where the verdict was decided before this condition was drawn")
    ratio: float | None = Field(description="excess of the hotfix over that of the base model")
    bound: float | None = Field(description="upper confidence bound of the ratio")
    informative: bool = Field(description="the base model shows excess here; other conditions decide nothing")


class Robustness(Value):
    """What is left of one request's removal after something that people do to a model."""

    request: str
    attack: str = Field(description="what was done to the model, and how much of it")
    decides: bool = Field(description="the request fails if this does; otherwise it is a warning")
    passed: bool
    figure: Literal["excess ratio", "steps until the excess is back"]
    value: float | None = Field(description="None if it could not be measured, or if the excess did not come back")
    before: float | None = Field(default=None, description="the same figure of the hotfix as delivered")
    base: float | None = Field(default=None, description="the same figure of the base model")
    control: float | None = Field(
        default=None, description="the same figure of pictures that the model never knew; None if it is never reached"
    )
    why: str = Field(description="a sentence for a person: what was done, and what it means")

    @property
    def said(self) -> str:
        """`why`, and for an attack that succeeded and does not decide, that this is a warning."""
        warns = not self.passed and not self.decides
        return f"{self.why} This is a warning; it does not decide." if warns else self.why


class RequestEvidence(Value):
    """The evidence of one request.

    Protocol 1 had no rules and conditions; the fields that only its evidence has are at the end.
    """

    request: str
    verdict: Literal["passed", "failed", "skipped", "not_reproduced"]
    why: str
    rules: tuple[Rule, ...] = ()
    conditions: tuple[ConditionEvidence, ...] = ()
    shift: Measured | None = Field(default=None, description="protocol 1, re-generation: 0 target, 1 surrogate")
    target: Measured | None = Field(default=None, description="protocol 1, re-generation: similarity to the target")
    surrogate: Measured | None = Field(default=None, description="protocol 1: similarity to the surrogate")
    nearest: Measured | None = Field(default=None, description="protocol 1, generation: highest similarity")
    levels: dict[str, Measured] = Field(default_factory=dict, description="protocol 1: `target` by noise level")


class IntegrityEvidence(Value):
    """Compares unrelated outputs of the same seeds. `*_unrelated` is the same figure for two different seeds.

    In protocol 1, `psnr` and `ssim` are means; since protocol 2 they are medians, and training held none of the prompts
    or seeds.
    """

    psnr: float
    psnr_unrelated: float
    ssim: float
    ssim_unrelated: float
    kid: float = Field(description="distribution distance between equally many samples of the hotfix and of the base")
    kid_floor: float = Field(description="the same distance between samples of the base model")
    passed: bool
    why: str
    rules: tuple[Rule, ...] = ()
    figures: dict[str, float] = Field(
        default_factory=dict, description="further figures by name, such as psnr_p05, psnr_worst, kid_p, kid_power, fid"
    )


class Basis(Value):
    """What evidence rests on, so that it can be repeated, and judged by someone who was not there."""

    code: str = Field(description="version of expunge")
    base: str | None = Field(description="digest of the base model's files")
    encoders: tuple[str, ...]
    calibration: str = Field(description="where the match thresholds come from")
    reference: str = Field(description="which pictures stand for those that the base model never saw, and how many")
    levels: tuple[float, ...]
    views: tuple[str, ...]
    draws: int = Field(description="seeds per condition")
    confidence: float
    resolution: Resolution | None = Field(default=None, description="height and width in pixels")
    guidance: float | None = Field(default=None, description="of everything that is generated")
    generation_samples: int
    integrity_samples: int
    integrity_prompts: int = Field(description="prompts of the integrity test that training did not hold")
    sampling_steps: int
    passes: int = Field(description="network passes of this evaluation, base model included")
    gate: dict[str, float | None] = Field(description="the thresholds in force")
    loosened: tuple[str, ...] = Field(default=(), description="thresholds in force that are weaker than the defaults")
    not_tested: tuple[str, ...] = Field(default=(), description="in words, what this evidence says nothing about")


UNRELATED = "unrelated"
"""The picture, in `Evidence.pictures`, of outputs that no request concerns."""


class Evidence(Value):
    job: str
    protocol_version: int = Field(default=1, description="evidence of release 0.1.0 does not state it, and has 1")
    requests: tuple[RequestEvidence, ...]
    integrity: IntegrityEvidence | None = Field(description="None if nothing was trained")
    robustness: tuple[Robustness, ...] = ()
    unverified: tuple[str, ...] = Field(
        default=(), description="earlier removals whose turn it was not: trained for, but not verified on this hotfix"
    )
    basis: Basis | None = None
    pictures: dict[str, BlobId] = Field(
        default_factory=dict, description="sealed PNG grids: by request id, and 'unrelated'"
    )

    @property
    def passed(self) -> frozenset[str]:
        """The ids of the requests whose removal this hotfix proves."""
        if self.integrity is None or not self.integrity.passed:
            return frozenset()
        return frozenset(r.request for r in self.requests if r.verdict == "passed")

    def kept(self, ledger: Iterable[RemovalRequest]) -> frozenset[str]:
        """The ids of the earlier removals that stand: verified, not due, or of pictures that the model never knew."""
        earlier = {request.id for request in ledger}
        absent = {r.request for r in self.requests if r.verdict == "not_reproduced"}
        return frozenset(earlier & {*self.passed, *absent, *(self.unverified if self.integrity else ())})


class Baseline(Value):
    """What the base model shows of a job's requests before anything is trained."""

    job: str
    levels: tuple[float, ...] = Field(description="noise levels b / (a + b) at which this model's memory shows")
    not_reproduced: dict[str, str] = Field(
        default_factory=dict, description="request id: why there is nothing to remove; it is not trained for"
    )
    passes: int = Field(default=0, description="network passes that this took")


class ModelVersion(Value):
    """A registered hotfix."""

    name: str
    version: str
    run_id: str
    aliases: tuple[str, ...] = ()

    @property
    def uri(self) -> str:
        return f"models:/{self.name}/{self.version}"


class Ledger(Value):
    """The ids of all requests that a registered version removes."""

    model: Identifier
    version: str | None
    requests: tuple[str, ...]
    night: int = Field(default=0, description="how many versions of the model had been promoted, this one included")
    verified: dict[str, int] = Field(
        default_factory=dict, description="request id: the `night` of the version that it was last verified on"
    )
