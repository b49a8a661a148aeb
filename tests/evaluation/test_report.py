"""The report is one self-contained document in which every request of the batch is found."""

import re
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser

import pytest
import torch

from expunge.evaluation.pictures import grid
from expunge.evaluation.report import ReportBatch, ReportJob, levels_chart, render_report, strip
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
from tests import evidence as made

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


def proven(*, trained: bool = True, loosened: tuple[str, ...] = ()) -> ReportBatch:
    """A night of protocol 2: one removed, one that failed badly, one that is not reproduced."""
    whole = reported(version=trained)
    (job,) = whole.jobs
    by_verdict = (made.judged("r-0"), made.judged("r-1"), made.judged("r-2", worst=1.31)) if trained else ()
    nothing = [made.not_reproduced(name) for name in (["r-3"] if trained else ["r-1", "r-2", "r-3"])]
    evidence = made.evidence(job.job.id, *by_verdict, *nothing, trained=trained, loosened=loosened)
    return ReportBatch(whole.batch, (replace(job, evidence=evidence),), whole.failures, whole.generated)


@pytest.fixture(scope="module")
def rules_page() -> Page:
    return Page(render_report(proven()))


def test_the_first_screen_says_what_decided_each_request_and_what_it_rests_on(rules_page: Page) -> None:
    first, _, _ = rules_page.text.partition("Job\n")
    for part in (
        "Reproduction is 0.42 in the worst condition (mirrored, empty prompt, edges); at most 0.6 is allowed.",
        "Reproduction is 1.31 in the worst condition",
        "The base model returns the target no better than pictures that it never saw",
        "What was tested?",
        "On what?",
        "With what certainty?",
        "What was not tested?",
        "4 views (as submitted, mirrored, shifted and scaled, photometric)",
        "24 pictures made from the model's own samples",
        "95 % confidence",
        "Other pictures of the same person.",
        "No threshold is weaker than the default.",
    ):
        assert part in first, part
    assert first.count("not reproduced") == 1


def test_tags_of_the_rules_and_conditions_close(rules_page: Page) -> None:
    assert not rules_page.open
    assert {link[1:] for link in rules_page.links} <= set(rules_page.ids)
    assert not {"script", "link", "iframe"} & set(rules_page.tags)


def test_what_is_not_reproduced_is_counted_as_neither_removed_nor_failed(rules_page: Page) -> None:
    counts = " ".join(rules_page.text.partition("Summary")[0].split())
    assert re.findall(r"(Removed|Not removed|Not reproduced|Skipped) ?(\d+)", counts) == [
        ("Removed", "1"),
        ("Not removed", "1"),
        ("Not reproduced", "1"),
        ("Skipped", "1"),
    ]


def test_every_rule_and_condition_of_a_request_is_shown(rules_page: Page) -> None:
    text = " ".join(rules_page.text.split())
    for part in ("free generation", "plausible", "median PSNR", "psnr_worst", "16.8", "1.21 ≤ 1.31", "not drawn", "–"):
        assert part in text, part
    assert (
        "1 picture, in 4 views under 2 prompts, compared by 2 encoders: 16 conditions of 9 to 18 draws each. "
        "The verdict rests on 15 of them; in the others the base model shows no memory, or the surrogate resembles the "
        "target too much. The hotfix was not sampled in 1 of them."
    ) in text


def test_a_loosened_gate_is_said_before_anything_else_is() -> None:
    text = Page(render_report(proven(loosened=("max_excess 1000 instead of 0.6",)))).text
    assert text.index("The gate was loosened for faces: max_excess 1000 instead of 0.6.") < text.index("Summary")
    assert "No threshold is weaker" not in text


def test_a_job_in_which_nothing_was_trained_still_reports() -> None:
    text = " ".join(Page(render_report(proven(trained=False))).text.split())
    assert "Not reproduced3" in text
    assert "Nothing was trained, so the model is what it was." in text
    assert "not registered" not in text


def test_evidence_of_protocol_1_has_no_word_of_what_it_did_not_record(page: Page) -> None:
    assert "What was tested?" not in page.text
    assert "Excess" not in page.text
    assert "Shift" in page.text


def test_the_strip_has_a_cell_for_every_condition_and_frames_the_worst() -> None:
    found = strip(made.judged("r-1", worst=0.9))
    assert found is not None
    assert found.prompts == (("own prompt", 2), ("empty prompt", 2))
    assert [name for name, _ in found.rows] == list(made.VIEWS)
    shades = {name: [cell and cell.shade for cell in cells] for name, cells in found.rows}
    assert shades["as submitted"] == ["low"] * 4
    assert shades["mirrored"] == ["low", "low", "low", "over"]
    assert shades["photometric"] == ["low", "none", "low", "open"]
    assert [cell.condition.bound for _, cells in found.rows for cell in cells if cell and cell.worst] == [0.9]


@pytest.mark.parametrize(("bound", "shade"), [(0.3, "low"), (0.6, "near"), (0.61, "over"), (1.0, "all")])
def test_a_cell_is_shaded_by_its_bound(bound: float, shade: str) -> None:
    found = strip(made.judged("r-1", worst=bound))
    assert found is not None
    assert found.rows[1][1][3] is not None
    assert found.rows[1][1][3].shade == shade


def test_several_pictures_have_rows_of_their_own() -> None:
    one = made.judged("r-1")
    other = tuple(c.model_copy(update={"picture": 1, "held_out": True}) for c in one.conditions)
    found = strip(one.model_copy(update={"conditions": (*one.conditions, *other)}))
    assert found is not None
    assert found.rows[0][0] == "picture 1, as submitted"
    assert found.rows[-1][0] == "picture 2 (kept out), photometric"


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
