"""The report is one self-contained document in which every request of the batch is found."""

from datetime import UTC, datetime
from html.parser import HTMLParser

import pytest
import torch

from expunge.evaluation.pictures import grid
from expunge.evaluation.report import ReportBatch, ReportJob, levels_chart, render_report
from expunge.settings import TrainingSettings
from expunge.types import (
    Evidence,
    IntegrityEvidence,
    Measured,
    ModelVersion,
    RemovalBatch,
    RemovalRequest,
    RequestEvidence,
    UnlearnJob,
)

VOID = {"meta", "img", "br", "line", "rect", "circle", "link"}
PICTURE = grid(torch.zeros(2, 3, 4, 4), 2)


class Page(HTMLParser):
    """Collects text, links to the outside and anchors; raises where tags do not close in order."""

    def __init__(self, html: bytes) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.resources: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(html.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "src":
                self.resources.append(value or "")
            if name == "href":
                self.links.append(value or "")
            if name == "id":
                self.ids.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "title"):
            self.text += data


def request(identifier: str, external_id: str) -> RemovalRequest:
    return RemovalRequest(id=identifier, model="faces", images=("a" * 64,), external_id=external_id)


def measured(after: float, base: float) -> Measured:
    return Measured(after=after, base=base, floor=0.05)


def judged(identifier: str, verdict: str = "passed", why: str = "It fell.") -> RequestEvidence:
    if verdict == "skipped":
        return RequestEvidence(request=identifier, verdict="skipped", why=why)
    return RequestEvidence.model_validate(
        {
            "request": identifier,
            "verdict": verdict,
            "why": why,
            "shift": measured(0.71, 0.08),
            "target": measured(0.42, 0.78),
            "surrogate": measured(0.8, 0.5),
            "nearest": measured(0.5, 0.6),
            "levels": {"0.4": measured(0.6, 0.9), "0.6": measured(0.2, 0.5)},
        }
    )


def reported(*, intact: bool = True, version: bool = True) -> ReportBatch:
    new = (request("r-1", "DSR-1"), request("r-2", "<script>alert('x')</script>"), request("r-3", "DSR-3"))
    old = request("r-0", "DSR-0")
    integrity = IntegrityEvidence(
        psnr=28.6,
        psnr_unrelated=12.1,
        ssim=0.91,
        ssim_unrelated=0.18,
        kid=0.004,
        kid_floor=0.003,
        passed=intact,
        why="It stayed.",
    )
    job = UnlearnJob(
        batch="night-1",
        model="faces",
        source="testbed:faces",
        resolution=(24, 48),
        requests=new,
        ledger=(old,),
        training=TrainingSettings(),
    )
    evidence = Evidence(
        job=job.id,
        requests=(
            judged("r-0"),
            judged("r-1"),
            judged("r-2", "failed", "Shift 0.31 is below."),
            judged("r-3", "skipped", "No region."),
        ),
        integrity=integrity,
    )
    registered = ModelVersion(name="faces", version="7", run_id="run", aliases=("candidate", "champion"))
    report_job = ReportJob(
        job,
        evidence,
        registered if version else None,
        600,
        {"loss": [(0, 1.0), (1, 0.5)], "empty": []},
        {"r-1": PICTURE, "unrelated": PICTURE},
    )
    batch = RemovalBatch(
        id="night-1", created=datetime(2026, 3, 2, 22, tzinfo=UTC), requests=(*new, request("r-4", "DSR-4"))
    )
    return ReportBatch(
        batch, (report_job,), {"r-4": "Its job lost its workers."}, generated=datetime(2026, 3, 3, 4, tzinfo=UTC)
    )


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(render_report(reported()))


def test_every_request_is_found_with_its_verdict(page: Page) -> None:
    for part in (
        "night-1",
        "DSR-0",
        "DSR-1",
        "DSR-3",
        "DSR-4",
        "Shift 0.31 is below.",
        "No region.",
        "Its job lost its workers.",
        "600 steps",
    ):
        assert part in page.text
    for badge in ("removed", "not removed", "skipped", "still removed"):
        assert badge in page.text


def test_it_says_that_it_is_personal_data(page: Page) -> None:
    assert page.text.strip().startswith("Personal data.")


def test_nothing_is_loaded_from_outside_and_nothing_runs(page: Page) -> None:
    assert page.resources
    assert all(source.startswith("data:image/") for source in page.resources)
    assert all(link.startswith("#") for link in page.links)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert "<script>alert" in page.text  # as text: it was escaped


def test_tags_close_and_links_lead_to_a_section_of_their_own(page: Page) -> None:
    assert not page.open
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))


def test_numbers_stand_with_their_baselines(page: Page) -> None:
    text = " ".join(page.text.split())
    for part in (
        "0.78→0.42 ± 0.05",
        "28.6dB",
        "12.1 dB",
        "0.180",
        "48 × 24 px",
        "version 7",
        "@champion",
        "models:/faces/7",
    ):
        assert part in text, part


def test_an_empty_curve_is_left_out(page: Page) -> None:
    assert sum(source.startswith("data:image/svg+xml") for source in page.resources) == 1


def test_a_pass_is_held_back_when_the_model_changed() -> None:
    page = Page(render_report(reported(intact=False, version=False)))
    for part in ("held back", "changed too much", "not registered", "1 no longer hold"):
        assert part in page.text


def test_a_batch_without_jobs_still_reports() -> None:
    report = reported()
    assert "DSR-4" in Page(render_report(ReportBatch(report.batch, ()))).text


def test_the_levels_chart_is_ordered_and_bounded() -> None:
    marks = levels_chart({"0.6": measured(-3, 0.5), "0.4": measured(0.6, 1.2)})
    assert [mark.level for mark in marks] == ["0.4", "0.6"]
    assert marks[0].base == 0
    assert marks[1].after == 100


def test_nothing_that_was_sent_turns_the_text_around() -> None:
    hostile = request("r-5", "abc\u202edevomer\u2066\u200b")
    why = "lost\u202e its\x1b[31m\nworkers"
    whole = reported()
    batch = whole.batch.model_copy(update={"requests": (*whole.batch.requests, hostile)})
    html = render_report(ReportBatch(batch, whole.jobs, {**whole.failures, "r-5": why})).decode()
    assert [c for c in html if not c.isprintable() and c != "\n"] == []
    assert "abc\\u202edevomer\\u2066\\u200b" in html
    assert "lost\\u202e its\\x1b[31m workers" in html
