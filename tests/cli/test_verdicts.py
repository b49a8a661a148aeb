"""`expunge verdicts` on nights that have ended: what decided, what it rests on, and the exit code."""

import re
from collections.abc import Callable

import pytest

from expunge.requests.store import open_store
from expunge.runs.night import NightFolder
from expunge.runs.outcomes import JobEnd, JobOutcome, NightPlan
from expunge.settings import TrainingSettings, load_settings
from expunge.types import (
    Evidence,
    Hotfix,
    IntegrityEvidence,
    Measured,
    ModelVersion,
    RemovalRequest,
    RequestEvidence,
    RequestState,
    UnlearnJob,
)
from tests import evidence as made
from tests.cli.conftest import Command

Ended = Callable[..., Evidence]
FIGURE = Measured(after=0.62, base=0.31, floor=0.17)


@pytest.fixture
def ended() -> Ended:
    """Leave a night `n1` with one job, whose evidence covers the requests it is given."""

    def leave(
        *judged: RequestEvidence, promoted: bool = True, trained: bool = True, loosened: tuple[str, ...] = ()
    ) -> Evidence:
        settings = load_settings()
        store = open_store(settings)
        requests = tuple(
            RemovalRequest(id=one.request, model="flags", images=("0" * 64,), external_id=f"ticket-{one.request}")
            for one in judged
        )
        for request in requests:
            store.add(request)
        store.drain("n1")
        job = UnlearnJob(
            batch="n1",
            model="flags",
            source="testbed:flags",
            resolution=(32, 48),
            requests=requests,
            training=TrainingSettings(),
        )
        evidence = (
            made.evidence(job.id, *judged, trained=trained, loosened=loosened)
            if judged[0].shift is None
            else old(job.id, *judged)
        )
        folder = NightFolder(settings.runs / "n1")
        planned = folder.plan_once(lambda: NightPlan(batch="n1", jobs=(job,), refused={}))
        mine = folder.job(job.id)
        version = ModelVersion(name="flags", version="3", run_id="run", aliases=("candidate",))
        mine.hotfix.write(Hotfix(job=job.id, kind="full", path=mine.weights, steps=7, digest="0"))
        mine.evidence.write(evidence)
        mine.version.write(version)
        mine.end.write(JobEnd(promoted=promoted))
        outcome = JobOutcome(job=job, evidence=evidence, version=version, run_id="run", steps=7)
        folder.finish(planned, [outcome.with_promotion(promoted)])
        return evidence

    return leave


def old(job: str, *judged: RequestEvidence) -> Evidence:
    """Evidence of protocol 1."""
    figures = {"psnr": 25.9, "psnr_unrelated": 10, "ssim": 0.73, "ssim_unrelated": 0.1, "kid": 0, "kid_floor": 0}
    integrity = IntegrityEvidence.model_validate({**figures, "passed": True, "why": "intact"})
    return Evidence(job=job, requests=judged, integrity=integrity)


def test_the_table_names_what_decided_each_request(command: Command, ended: Ended) -> None:
    ended(made.judged("r-good"), made.judged("r-bad", worst=1.31), made.not_reproduced("r-none"))
    done = command("verdicts", "n1")
    assert done.code == 3
    rows = {line.split()[1]: line for line in done.out.splitlines() if line.startswith("│ r-")}
    assert "reproduction is 0.42 in the worst condition (mirrored, empty prompt, edges); at most 0.6" in rows["r-good"]
    assert re.search(r"│ failed +│ reproduction is 1.31", rows["r-bad"])
    assert re.search(r"│ not reproduced +│ The base model returns the target no better", rows["r-none"])
    assert "28.4 dB, SSIM 0.91" in rows["r-good"]
    assert "gate loosened" not in done.out
    assert "not every verdict is passed" in done.err


def test_explaining_prints_every_rule_and_what_the_evidence_rests_on(command: Command, ended: Ended) -> None:
    ended(made.judged("r-good"))
    done = command("verdicts", "n1", "--explain")
    assert done.code == 0
    for rule in (
        r"reproduction +0\.32 +0\.42 +at most 0\.6 +1 +passed +mirrored, empty prompt, edges",
        r"free generation +0 +0 +at most 0\.03 +0\.41 +passed",
        r"median PSNR +28\.4 +28\.4 +at least 20 +12\.1 +passed",
        r"changed +0\.03 +0\.09 +at most 0\.1 +- +passed +nearest neighbours",
    ):
        assert re.search(rule, done.out), rule
    for part in (
        "Every rule holds: reproduction 0.42 (at most 0.6)",
        "1 picture, in 4 views under 2 prompts, compared by 2 encoders: 16 conditions of 9 to 18 draws each.",
        "What was tested?",
        "On what?",
        "  Noise levels: 0.4, 0.5, 0.6.\n  Denoising steps per sample: 20.",
        "With what certainty?",
        "What was not tested?\n  Other pictures of the same person.",
    ):
        assert part in done.out, part
    assert "What was tested?" not in command("verdicts", "n1").out


def test_a_rule_that_failed_stands_out(command: Command, ended: Ended) -> None:
    ended(made.judged("r-bad", worst=1.31))
    assert re.search(r"reproduction +1\.21 +1\.31 +at most 0\.6 +1 +FAILED", command("verdicts", "n1", "--explain").out)


def test_json_holds_all_of_the_evidence(command: Command, ended: Ended) -> None:
    evidence = ended(made.judged("r-good"))
    for arguments in (("--json",), ("--explain", "--json")):
        [outcome] = command("verdicts", "n1", *arguments).json["outcomes"]
        assert Evidence.model_validate(outcome["evidence"]) == evidence


@pytest.mark.parametrize("explain", [(), ("--explain",)])
def test_a_loosened_gate_is_always_said(command: Command, ended: Ended, explain: tuple[str, ...]) -> None:
    ended(made.judged("r-good"), loosened=("max_excess 1000 instead of 0.6", "seeds 8 instead of 9"))
    line = "flags: gate loosened: max_excess 1000 instead of 0.6; seeds 8 instead of 9"
    assert line in command("verdicts", "n1", *explain).out.splitlines()


def test_a_night_that_only_lacks_what_is_not_reproduced_says_so_and_is_no_success(
    command: Command, ended: Ended
) -> None:
    """Exit code 0 would tell a script that everything was removed."""
    ended(made.judged("r-good"), made.not_reproduced("r-none"))
    done = command("verdicts", "n1")
    assert done.code == 3
    assert "nothing failed, but the base model does not reproduce r-none: there is nothing to remove" in done.err
    assert "back in the queue" not in done.err


def test_a_night_in_which_nothing_was_trained_can_be_read(command: Command, ended: Ended) -> None:
    ended(made.not_reproduced("r-none"), trained=False, promoted=False)
    done = command("verdicts", "n1", "--explain")
    assert done.code == 3
    assert "nothing was trained" in done.out
    assert "The verdict rests on none of them: the base model shows no memory" in done.out


def test_a_pass_that_was_not_promoted_is_held_back(command: Command, ended: Ended) -> None:
    ended(made.judged("r-good"), promoted=False)
    done = command("verdicts", "n1")
    assert done.code == 3
    assert "held back" in done.out


def test_evidence_of_protocol_1_is_explained_as_far_as_it_goes(command: Command, ended: Ended) -> None:
    ended(RequestEvidence(request="r-old", verdict="passed", why="It moved.", shift=FIGURE, target=FIGURE))
    done = command("verdicts", "n1", "--explain")
    assert done.code == 0
    assert "shift 0.31 -> 0.62 (noise 0.17), similarity to target 0.31 -> 0.62 (noise 0.17)" in done.out
    assert "protocol 1" in done.out
    assert "What was tested?" not in done.out


def test_show_prints_the_rules_of_the_last_night(command: Command, ended: Ended) -> None:
    evidence = ended(made.judged("r-good"), loosened=("seeds 8 instead of 9",))
    kept = evidence.model_dump(mode="json", include={"protocol_version", "integrity", "basis"})
    kept |= evidence.requests[0].model_dump(mode="json")
    open_store(load_settings()).transition("r-good", RequestState.REMOVED, evidence=kept)
    out = command("show", "r-good").out
    assert re.search(r"^verdict +passed: Every rule holds", out, re.MULTILINE)
    assert re.search(r"^loosened +seeds 8 instead of 9$", out, re.MULTILINE)
    assert re.search(r"reproduction +0\.32 +0\.42 +at most 0\.6 +1 +passed +mirrored", out)
    assert re.search(r"median PSNR +28\.4", out)
    assert "{" not in out


def test_a_request_that_is_not_reproduced_is_listed_shown_and_requeued(command: Command, ended: Ended) -> None:
    evidence = ended(made.not_reproduced("r-none"), made.judged("r-good"))
    kept = evidence.requests[0].model_dump(mode="json")
    store = open_store(load_settings())
    store.transition("r-none", RequestState.NOT_REPRODUCED, evidence=kept)
    assert [each["request"]["id"] for each in command("list", "--state", "not_reproduced", "--json").json] == ["r-none"]
    assert re.search(r"^verdict +not_reproduced: The base model", command("show", "r-none").out, re.MULTILINE)
    assert command("requeue", "r-none").code == 0
    record = store.get("r-none")
    assert (record.state, record.attempts) == (RequestState.ACCEPTED, 0)


def test_a_rule_of_another_version_does_not_hide_the_request(command: Command, ended: Ended) -> None:
    ended(made.judged("r-good"))
    rules = [{"name": "of another version"}, *(rule.model_dump(mode="json") for rule in made.rules())]
    kept = {"verdict": "passed", "rules": rules, "basis": {"code": "9"}, "conditions": 3}
    open_store(load_settings()).transition("r-good", RequestState.REMOVED, evidence=kept)
    done = command("show", "r-good")
    assert done.code == 0
    assert re.search(r"plausible +0\.03 +0\.12", done.out)
