"""The platform's domain types, each frozen: what its packages pass to one another."""

import hashlib
from datetime import date, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from pydantic_core import to_json

from expunge.settings import IDENTIFIER, Resolution, TrainingSettings

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


class RequestState(StrEnum):
    ACCEPTED = "accepted"
    BATCHED = "batched"
    REMOVED = "removed"
    FAILED = "failed"
    WITHDRAWN = "withdrawn"


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
    warm_start: str | None = Field(default=None, description="the version whose weights training starts from")
    training: TrainingSettings
    id: str = Field(
        default_factory=_job_id, description="names the job's folder, run and version; equal content gives an equal id"
    )

    @property
    def everything(self) -> tuple[RemovalRequest, ...]:
        return (*self.ledger, *self.requests)

    def steps(self, *, warm: bool) -> int:
        """Return the number of training steps, which grows in proportion beyond `training.steps_cover` requests.

        warm: training starts from `warm_start`, whose weights remove the ledger already, so only new requests count.
        """
        new, cover = len(self.requests if warm else self.everything), self.training.steps_cover
        return -(-self.training.steps * max(new, cover) // cover)


class PreparedJob(Value):
    """The output of the prepare stage: blobs of safetensors, named by their content."""

    job: str
    forget: BlobId = Field(description="x_f, x_s [N, C, h, w], and the request and prompt index of each row")
    retain: BlobId = Field(description="x_0 [M, C, h, w], and the prompt index of each row")
    conditioning: BlobId = Field(description="one row per prompt, those of unrelated outputs first")
    unrelated_prompts: int = Field(ge=1, description="how many of the conditioning's rows are for unrelated outputs")
    surrogates: dict[str, tuple[BlobId, ...]] = Field(description="request id: the surrogate pictures in use")
    skipped: dict[str, str] = Field(default_factory=dict, description="request id: why it could not be prepared")


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


class RequestEvidence(Value):
    """The evidence of one request. Similarities are mean cosines of centred features over levels, seeds and images."""

    request: str
    verdict: Literal["passed", "failed", "skipped"]
    why: str
    shift: Measured | None = Field(default=None, description="re-generation: 0 is the target, 1 the surrogate")
    target: Measured | None = Field(default=None, description="re-generation: similarity to the target")
    surrogate: Measured | None = Field(default=None, description="re-generation: similarity to the surrogate")
    nearest: Measured | None = Field(
        default=None, description="generation: highest similarity to the target over all samples"
    )
    levels: dict[str, Measured] = Field(default_factory=dict, description="noise level: similarity to the target")


class IntegrityEvidence(Value):
    """Compares unrelated outputs of the same seeds. `*_unrelated` is the same figure for two different seeds."""

    psnr: float
    psnr_unrelated: float
    ssim: float
    ssim_unrelated: float
    kid: float = Field(description="distribution distance between equally many samples of the hotfix and of the base")
    kid_floor: float = Field(description="the largest such distance between random halves of the base's samples")
    passed: bool
    why: str


UNRELATED = "unrelated"
"""The picture, in `Evidence.pictures`, of outputs that no request concerns."""


class Evidence(Value):
    job: str
    requests: tuple[RequestEvidence, ...]
    integrity: IntegrityEvidence
    pictures: dict[str, BlobId] = Field(
        default_factory=dict, description="sealed PNG grids: by request id, and 'unrelated'"
    )

    @property
    def passed(self) -> frozenset[str]:
        """The ids of the requests whose removal this hotfix proves."""
        if not self.integrity.passed:
            return frozenset()
        return frozenset(r.request for r in self.requests if r.verdict == "passed")


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
