"""What a benchmark measured, and the file of each result: one per arm and group of requests."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from expunge.bench.training import Trained
from expunge.evaluation.gate import REPRODUCTION
from expunge.runs.document import Document
from expunge.types import Evidence, RequestEvidence, Value

COLLATERAL = "collateral"
ROBUSTNESS = "robustness"


class RequestResult(Value):
    """How one request fared in one arm."""

    request: str
    verdict: str = Field(description="its own: passed, failed, skipped or not_reproduced")
    removed: bool = Field(description="a night would count it as removed: it passed, and so did integrity")
    left: float | None = Field(description="excess reproduction that is left in the worst condition, as a ratio")
    bound: float | None = Field(description="upper confidence bound of `left`")
    failed: tuple[str, ...] = Field(description="names of its rules that failed")
    attacks: dict[str, bool] = Field(description="attack: whether the removal held; empty unless it passed otherwise")


class ArmResult(Value):
    """What one arm did to one group of requests."""

    arm: str
    group: int
    requests: tuple[RequestResult, ...]
    psnr: float | None = Field(description="median PSNR of unrelated samples in dB; None if nothing was trained")
    ssim: float | None
    psnr_p05: float | None = Field(description="5 % quantile of the PSNR")
    collateral: float | None = Field(description="PSNR in dB of the worst tenth of the samples most like a target")
    intact: bool = Field(description="integrity passed the gate")
    steps: int
    passes: int = Field(description="network passes of the training; a backward pass counts as two")
    diverged: bool
    seconds: float = Field(description="training and evaluation")


def result_of(arm: str, group: int, evidence: Evidence, trained: Trained, seconds: float) -> ArmResult:
    """Take from the evidence what the table shows."""
    integrity = evidence.integrity
    rules = {rule.name: rule for rule in integrity.rules} if integrity else {}
    return ArmResult(
        arm=arm,
        group=group,
        requests=tuple(_request(request, evidence) for request in evidence.requests),
        psnr=integrity.psnr if integrity else None,
        ssim=integrity.ssim if integrity else None,
        psnr_p05=integrity.figures.get("psnr_p05") if integrity else None,
        collateral=rules[COLLATERAL].value if COLLATERAL in rules else None,
        intact=integrity is not None and integrity.passed,
        steps=trained.hotfix.steps,
        passes=trained.passes,
        diverged=trained.diverged,
        seconds=round(seconds, 1),
    )


def result_file(folder: Path, arm: str, group: int) -> Document[ArmResult]:
    """Return the file that is there once the arm has been measured on the group."""
    return Document(folder / "results" / f"{arm}-{group}.json", ArmResult.model_validate_json)


def read_results(folder: Path, arms: Sequence[str], groups: int) -> list[ArmResult]:
    """Return the results that are there, arm by arm."""
    files = (result_file(folder, arm, group) for arm in arms for group in range(groups))
    return [found for file in files if (found := file.read()) is not None]


def _request(request: RequestEvidence, evidence: Evidence) -> RequestResult:
    left = next((rule for rule in request.rules if rule.name == REPRODUCTION), None)
    return RequestResult(
        request=request.request,
        verdict=request.verdict,
        removed=request.request in evidence.passed,
        left=left.value if left else None,
        bound=left.bound if left else None,
        failed=tuple(dict.fromkeys(rule.name for rule in request.rules if not rule.passed)),
        attacks={each.attack: each.passed for each in evidence.robustness if each.request == request.request},
    )
