"""Render a batch's report: one self-contained HTML document with its requests, their evidence and training curves.

It holds external ids and pictures of requests, so it is personal data: it is handed to the platform team and never
logged to MLflow.
"""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from typing import TYPE_CHECKING

from expunge.evaluation.account import account, extent
from expunge.evaluation.gate import REPRODUCTION, compared, decisive, digits, sentence
from expunge.evaluation.pictures import curves
from expunge.text import visible
from expunge.types import (
    UNRELATED,
    ConditionEvidence,
    Evidence,
    Measured,
    ModelVersion,
    RemovalBatch,
    RemovalRequest,
    RequestEvidence,
    Rule,
    UnlearnJob,
)

if TYPE_CHECKING:
    from jinja2 import Template


@dataclass(frozen=True)
class ReportJob:
    """One job as the report shows it. `pictures` maps request ids and 'unrelated' to PNG grids."""

    job: UnlearnJob
    evidence: Evidence
    version: ModelVersion | None = None
    steps: int | None = None
    curves: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    pictures: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class ReportBatch:
    """A batch and its jobs. `failures` maps request ids to why they have no evidence: a lost job, or none planned."""

    batch: RemovalBatch
    jobs: tuple[ReportJob, ...]
    failures: Mapping[str, str] = field(default_factory=dict)
    generated: datetime = field(default_factory=lambda: datetime.now(UTC))


@dataclass(frozen=True)
class Row:
    """One line of the summary, and one section of its job."""

    request: RemovalRequest
    evidence: RequestEvidence
    job: ReportJob
    anchor: str
    earlier: bool  # from the ledger: removed on an earlier night and verified again
    removed: bool

    @property
    def decisive(self) -> Rule | None:
        """The rule that decided; None where there are none."""
        return decisive(self.evidence.rules) if self.evidence.rules else None

    @property
    def extent(self) -> str:
        return extent(self.evidence)

    @property
    def strip(self) -> "Strip | None":
        return strip(self.evidence)


def render_report(report: ReportBatch) -> bytes:
    """Return the HTML document as UTF-8, without scripts or external resources: every picture is embedded."""
    rows = [row for job in report.jobs for row in _rows(job)]
    new = [row for row in rows if not row.earlier]
    covered = {row.request.id for row in rows}
    missing = [
        (request, report.failures.get(request.id, "It was in no job of this batch."))
        for request in report.batch.requests
        if request.id not in covered
    ]
    return (
        _template()
        .render(
            batch=report.batch,
            loosened=[(job.job.model, named) for job in report.jobs if (named := _loosened(job.evidence))],
            protocols={job.evidence.protocol_version for job in report.jobs},
            jobs=[(job, [row for row in rows if row.job is job], _charts(job)) for job in report.jobs],
            rows=rows,
            missing=missing,
            counts={
                "removed": sum(row.removed for row in new),
                "failed": sum(row.evidence.verdict in ("passed", "failed") and not row.removed for row in new),
                "not_reproduced": sum(row.evidence.verdict == "not_reproduced" for row in new),
                "skipped": sum(row.evidence.verdict == "skipped" for row in new) + len(missing),
                "earlier": sum(len(job.job.ledger) for job in report.jobs),
                "verified": sum(row.earlier for row in rows),
                "resurfaced": sum(row.earlier and not row.removed for row in rows),
            },
            generated=report.generated,
            unrelated=UNRELATED,
        )
        .encode()
    )


def _rows(job: ReportJob) -> list[Row]:
    earlier = {request.id for request in job.job.ledger}
    requests = {request.id: request for request in job.job.everything}
    passed = job.evidence.passed
    found = [evidence for evidence in job.evidence.requests if evidence.request in requests]
    rows = [
        Row(
            request=requests[evidence.request],
            evidence=evidence,
            job=job,
            anchor=f"{job.job.id}-{evidence.request}",
            earlier=evidence.request in earlier,
            removed=evidence.request in passed,
        )
        for evidence in found
    ]
    return sorted(rows, key=lambda row: row.earlier)


def _loosened(evidence: Evidence) -> tuple[str, ...]:
    return evidence.basis.loosened if evidence.basis else ()


def _charts(job: ReportJob) -> list[tuple[str, str]]:
    """Return (name, data URI) of each training curve."""
    return [
        (name, _data_uri(curves({name: points}, name), "image/svg+xml"))
        for name, points in job.curves.items()
        if points
    ]


@cache
def _template() -> "Template":
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("expunge.evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["png"] = lambda data: _data_uri(data, "image/jpeg" if data[:2] == b"\xff\xd8" else "image/png")
    environment.filters["signed"] = lambda value: f"{value:+.2f}"
    environment.filters["digits"] = digits
    environment.filters["sentence"] = sentence
    environment.filters["in_words"] = lambda rule: sentence(compared(rule))
    environment.globals["levels_chart"] = levels_chart
    environment.globals["account"] = account
    return environment.get_template("report.html.j2")


def _visible(value: object) -> object:
    """Escape control and bidi characters: a bidi mark in an id or a reason would reverse the text after it."""
    from markupsafe import Markup

    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


@dataclass(frozen=True)
class Cell:
    """One condition: `shade` is none (decides nothing), open (not drawn), low, near, over or all of the excess."""

    shade: str
    condition: ConditionEvidence
    worst: bool


@dataclass(frozen=True)
class Strip:
    """A request's conditions as a table: a row for each picture and view, a column for each prompt and encoder."""

    prompts: tuple[tuple[str, int], ...]
    """Each prompt, and how many columns it spans."""
    encoders: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell | None, ...]], ...]
    threshold: float


def strip(evidence: RequestEvidence) -> Strip | None:
    """Return the conditions of one request; None if it has none, or no rule that says how much may be left."""
    rule = next((rule for rule in evidence.rules if rule.name == REPRODUCTION), None)
    conditions = evidence.conditions
    if rule is None or not conditions:
        return None
    prompts = dict.fromkeys(c.prompt for c in conditions)
    columns = [(p, e) for p in prompts for e in dict.fromkeys(c.encoder for c in conditions if c.prompt == p)]
    place = {(c.picture, c.view, c.prompt, c.encoder): c for c in conditions}
    bounds = [c.bound for c in conditions if c.informative and c.bound is not None]
    worst = max(bounds, default=None)

    def cell(c: ConditionEvidence | None) -> Cell | None:
        return c and Cell(_shade(c, rule.threshold), c, c.informative and c.bound is not None and c.bound == worst)

    several = len({c.picture for c in conditions}) > 1
    rows = dict.fromkeys((c.picture, c.held_out, c.view) for c in conditions)
    return Strip(
        prompts=tuple((prompt, sum(p == prompt for p, _ in columns)) for prompt in prompts),
        encoders=tuple(encoder for _, encoder in columns),
        rows=tuple(
            (
                f"picture {picture + 1}{' (kept out)' if held_out else ''}, {view}" if several else view,
                tuple(cell(place.get((picture, view, *column))) for column in columns),
            )
            for picture, held_out, view in rows
        ),
        threshold=rule.threshold,
    )


def _shade(condition: ConditionEvidence, threshold: float) -> str:
    if not condition.informative:
        return "none"
    if condition.bound is None:
        return "open"
    if condition.bound <= threshold:
        return "low" if condition.bound <= threshold / 2 else "near"
    return "over" if condition.bound < 1 else "all"


@dataclass(frozen=True)
class LevelMark:
    """One noise level of a request's chart; every y is a percentage of the height, 0 at the top."""

    level: str
    x: float
    base: float
    after: float
    floor_top: float
    floor_bottom: float
    measured: Measured


def levels_chart(levels: Mapping[str, Measured]) -> list[LevelMark]:
    """Return the chart's marks in percent: x by the level's rank, y from similarity 1 (0%) down to -0.5 (100%)."""

    def height(value: float) -> float:
        return round(100 * min(1.0, max(0.0, (1 - value) / 1.5)), 2)

    ordered = sorted(levels.items(), key=lambda item: float(item[0]))
    return [
        LevelMark(
            level=level,
            x=round(100 * (index + 0.5) / len(ordered), 2),
            base=height(measured.base),
            after=height(measured.after),
            floor_top=height(measured.base + measured.floor),
            floor_bottom=height(measured.base - measured.floor),
            measured=measured,
        )
        for index, (level, measured) in enumerate(ordered)
    ]


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{b64encode(data).decode()}"
