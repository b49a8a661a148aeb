"""The trigger, run as the chart runs it, against an API server of its own."""

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from expunge.jobs.submit_rayjob import rayjob_name
from expunge.requests.home import recall
from expunge.requests.store import open_store
from expunge.settings import load_settings
from expunge.types import RemovalRequest
from tests.helm.kube import Json, KubeApi, failure, status

NIGHT = "expunge-night-29400060"
RUNNING, DONE = status("RUNNING", "Running"), status("SUCCEEDED", "Complete")
TEMPLATE = {
    "apiVersion": "ray.io/v1",
    "kind": "RayJob",
    "metadata": {"labels": {"app.kubernetes.io/instance": "r"}},
    "spec": {
        "entrypoint": "python -m expunge.jobs.nightly --batch BATCH-ID --home HOME-ID",
        "shutdownAfterJobFinishes": True,
    },
}


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


@pytest.fixture
def api() -> Iterator[KubeApi]:
    with KubeApi([status("", "Initializing"), RUNNING, DONE]).running() as server:
        yield server


@pytest.fixture
def template(tmp_path: Path) -> Path:
    path = tmp_path / "rayjob.json"
    path.write_text(json.dumps(TEMPLATE))
    return path


def trigger(api: KubeApi, template: Path, *arguments: str, night: str = NIGHT) -> Ended:
    clock = ["--poll", "0.05", "--patience", "20", "--deadline", "60"]
    given = ["--server", api.url, "--namespace", "ns", "--template", str(template), "--prefix", "r", "--night", night]
    done = subprocess.run(
        [sys.executable, "-m", "expunge.jobs.submit_rayjob", *clock, *given, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def request(name: str, model: str = "faces") -> str:
    """A request in the store of the test's home."""
    fields = {"id": f"req-{name}", "model": model, "images": ["0" * 64], "external_id": f"jane.doe+{name}@example.org"}
    store = open_store(load_settings())
    store.add(RemovalRequest.model_validate({**fields, "reason": "she asked", "prompt": "Jane Doe"}))
    store.close()
    return fields["id"]


def home() -> str:
    """The id of the test's home, which the driver compares with its own."""
    known = recall(load_settings())
    assert known is not None
    return known.id


def existing(name: str, batch: str, night: str, **fields: Json) -> Json:
    notes = {"expunge/batch": batch, "expunge/night": night}
    return {"metadata": {"name": name, "annotations": notes}, **fields}


def test_what_waits_becomes_one_rayjob_named_after_its_batch(api: KubeApi, template: Path) -> None:
    id = request("a")
    done = trigger(api, template)
    assert done.code == 0, done.err
    store = open_store(load_settings())
    (batch,) = store.batches()
    assert batch.requests == (id,)
    (job,) = api.jobs.values()
    assert job["metadata"]["name"] == f"r-{batch.id}"
    assert job["spec"]["entrypoint"] == f"python -m expunge.jobs.nightly --batch {batch.id} --home {home()}"
    assert done.out == f"r-{batch.id}: SUCCEEDED\n"


def test_it_fills_in_nothing_else(api: KubeApi, template: Path) -> None:
    request("a")
    trigger(api, template)
    (job,) = api.jobs.values()
    name, notes = job["metadata"].pop("name"), job["metadata"].pop("annotations")
    batch = name.removeprefix("r-")
    assert notes == {"expunge/batch": batch, "expunge/night": NIGHT}
    job["spec"]["entrypoint"] = job["spec"]["entrypoint"].replace(batch, "BATCH-ID").replace(home(), "HOME-ID")
    assert job == TEMPLATE


def test_its_log_is_json_and_carries_ids_only(api: KubeApi, template: Path) -> None:
    request("a")
    done = trigger(api, template)
    lines = [json.loads(line) for line in done.err.splitlines()]
    assert [line["event"] for line in lines] == ["created", "status", "status", "status"]
    assert "jane" not in (done.out + done.err + json.dumps(api.jobs)).lower()


def test_an_empty_queue_starts_no_cluster(api: KubeApi, template: Path) -> None:
    done = trigger(api, template)
    assert (done.code, done.out) == (0, "nothing to do: no request waits\n")
    assert api.calls == []


def test_nothing_to_do_never_hides_what_waits(api: KubeApi, template: Path) -> None:
    request("a", "faces")
    done = trigger(api, template, "--model", "flags")
    assert (done.code, done.out) == (0, "nothing to do: no request of flags waits; 1 others do\n")
    assert api.calls == []


def test_an_empty_batch_of_that_name_does_not_keep_requests_waiting(api: KubeApi, template: Path) -> None:
    open_store(load_settings()).drain("friday")
    request("a")
    assert trigger(api, template).code == 0
    assert len(api.jobs) == 1


def test_a_batch_that_fails_again_does_not_hold_up_what_waits(api: KubeApi, template: Path) -> None:
    """An earlier night has left one open; tonight it fails once more, and the new request is run all the same."""
    request("old")
    store = open_store(load_settings())
    old = store.drain(None).id
    store.start_batch(old, 0)
    request("new")
    api.statuses = [status("FAILED", "Failed", message="no memory")]
    done = trigger(api, template)
    assert done.code == 1
    assert f"RayJob r-{old} is FAILED: no memory" in done.err
    assert len(api.jobs) == 2
    [new] = [batch for batch in store.batches() if batch.id != old]
    assert new.requests == ("req-new",)


def test_only_the_named_models_are_drained(api: KubeApi, template: Path) -> None:
    request("a", "faces")
    wanted = request("b", "flags")
    assert trigger(api, template, "--model", "flags").code == 0
    (batch,) = open_store(load_settings()).batches()
    assert batch.requests == (wanted,)


def test_started_again_in_the_same_night_it_waits_for_the_same_rayjob(api: KubeApi, template: Path) -> None:
    """A trigger pod that was evicted: the batch is open still, and so the name is the same."""
    request("a")
    assert trigger(api, template).code == 0
    done = trigger(api, template)
    assert done.code == 0
    assert len(api.jobs) == 1
    assert "exists already" in done.err


def test_a_failed_rayjob_of_the_same_night_is_not_run_again(api: KubeApi, template: Path) -> None:
    api.statuses = [status("FAILED", "Failed")]
    api.jobs["r-n1"] = existing("r-n1", "n1", NIGHT)
    assert trigger(api, template, "--batch", "n1").code == 1
    assert list(api.jobs) == ["r-n1"]


def test_a_batch_that_failed_last_night_gets_another_rayjob(api: KubeApi, template: Path) -> None:
    failed = existing("r-n1", "n1", "yesterday", status=status("FAILED", "Failed"))
    api.jobs = {"r-n1": failed, "r-n1-2": {**failed, "metadata": {**failed["metadata"], "name": "r-n1-2"}}}
    done = trigger(api, template, "--batch", "n1")
    assert (done.code, done.out) == (0, "r-n1-3: SUCCEEDED\n")


def test_a_batch_that_still_runs_since_yesterday_is_waited_for(api: KubeApi, template: Path) -> None:
    api.statuses = [RUNNING, RUNNING, DONE]
    api.jobs["r-n1"] = existing("r-n1", "n1", "yesterday")
    done = trigger(api, template, "--batch", "n1")
    assert (done.code, len(api.jobs)) == (0, 1)


def test_it_gives_up_on_a_batch_that_fails_every_night(api: KubeApi, template: Path) -> None:
    names = ["r-n1", *(f"r-n1-{attempt}" for attempt in range(2, 10))]
    api.jobs = {name: existing(name, "n1", "before", status=status("FAILED", "Failed")) for name in names}
    done = trigger(api, template, "--batch", "n1")
    assert done.code == 1
    assert "batch n1 has failed 9 times" in done.err


def test_a_foreign_rayjob_of_that_name_is_not_waited_for(api: KubeApi, template: Path) -> None:
    api.jobs["r-n1"] = {"metadata": {"name": "r-n1"}}
    done = trigger(api, template, "--batch", "n1")
    assert done.code == 2
    assert "RayJob r-n1 exists and does not belong to batch n1: delete or rename it" in done.err


def test_a_job_that_fails_says_why_and_exits_with_1(api: KubeApi, template: Path) -> None:
    api.statuses = [RUNNING, status("FAILED", "Failed", reason="AppFailed", message="driver exited\nwith 1")]
    done = trigger(api, template, "--batch", "n1")
    assert done.code == 1
    assert "error: RayJob r-n1 is FAILED: AppFailed driver exited with 1: see `kubectl describe" in done.err


def test_a_retry_of_kuberay_is_not_the_end(api: KubeApi, template: Path) -> None:
    api.statuses = [RUNNING, status("FAILED", "Retrying"), status("", "Initializing"), RUNNING, DONE]
    assert trigger(api, template, "--batch", "n1").code == 0


def test_the_operators_deadline_is_a_failure_though_the_job_status_says_running(api: KubeApi, template: Path) -> None:
    api.statuses = [RUNNING, status("RUNNING", "Failed", reason="DeadlineExceeded")]
    done = trigger(api, template, "--batch", "n1")
    assert done.code == 1
    assert "RayJob r-n1 is RUNNING: DeadlineExceeded" in done.err


def test_a_job_that_hangs_past_the_deadline_exits_with_1(api: KubeApi, template: Path) -> None:
    api.statuses = [RUNNING]
    done = trigger(api, template, "--batch", "n1", "--deadline", "0.5")
    assert done.code == 1
    assert "RayJob r-n1 has not ended in 0.5 s (RUNNING): see `kubectl describe rayjob r-n1`" in done.err


def test_a_rayjob_deleted_under_way_exits_with_1(api: KubeApi, template: Path) -> None:
    api.statuses = [RUNNING]
    api.asked = lambda name: threading.Timer(0.1, api.jobs.clear).start()
    done = trigger(api, template, "--batch", "n1")
    assert done.code == 1
    assert "RayJob r-n1 was deleted" in done.err


def test_an_api_server_that_is_away_for_a_while_costs_nothing(api: KubeApi, template: Path) -> None:
    """Away from the first status on; a clock of 1:30, so two seconds stand for a minute."""
    away = threading.Event()

    def leave(name: str) -> None:
        if not away.is_set():
            away.set()
            threading.Thread(target=pause).start()

    def pause() -> None:
        api.stop()
        time.sleep(2)
        api.start()

    api.asked = leave
    done = trigger(api, template, "--batch", "n1")
    assert done.code == 0, done.err
    assert "the Kubernetes API does not answer" in done.err
    assert sum(call.startswith("POST") for call in api.calls) == 1


def test_an_api_server_that_stays_away_exits_with_5(api: KubeApi, template: Path) -> None:
    api.stop()
    done = trigger(api, template, "--batch", "n1", "--patience", "0.5")
    assert done.code == 5
    assert "did not answer for 0.5 s" in done.err
    assert "start the trigger again" in done.err


@pytest.mark.parametrize("code", [429, 500, 503])
def test_an_overloaded_api_server_is_asked_again(api: KubeApi, template: Path, code: int) -> None:
    api.refuse = failure(code, "Busy", "later")
    threading.Timer(2, lambda: setattr(api, "refuse", None)).start()
    assert trigger(api, template, "--batch", "n1").code == 0


def test_a_lost_answer_to_create_makes_no_second_rayjob(api: KubeApi, template: Path) -> None:
    api.lose_answers = 1
    done = trigger(api, template, "--batch", "n1")
    assert (done.code, len(api.jobs)) == (0, 1)


@pytest.mark.parametrize(
    ("code", "reason", "hint"),
    [
        (401, "Unauthorized", "service account token is mounted"),
        (403, "Forbidden", "create and get rayjobs"),
        (404, "NotFound", "install the KubeRay operator"),
        (422, "Invalid", "correct the chart's values"),
    ],
)
def test_a_refusal_exits_with_2_and_the_mend(api: KubeApi, template: Path, code: int, reason: str, hint: str) -> None:
    api.refuse = failure(code, reason, "because")
    done = trigger(api, template, "--batch", "n1")
    assert done.code == 2
    assert re.search(rf"error: the Kubernetes API refuses the RayJob \(because\): .*{hint}", done.err)
    assert len(api.calls) == 1


def test_a_template_that_is_not_mounted_is_one_line(api: KubeApi, tmp_path: Path) -> None:
    done = trigger(api, tmp_path / "nowhere.json", "--batch", "n1")
    assert done.code == 2
    assert re.search(r"error: template: .*nowhere\.json cannot be read .*: mount the chart's ConfigMap", done.err)


@pytest.mark.parametrize("batch", ["night-20261124-030a5e", "B", "a" * 63, "x_y.z", "1-", "..-".join("abc"), "a" * 40])
@pytest.mark.parametrize("attempt", [1, 2, 9])
def test_names_are_dns_labels_within_kuberays_length(batch: str, attempt: int) -> None:
    name = rayjob_name("release-name-of-20ch", batch, attempt)
    assert len(name) <= 47
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)


def test_batches_that_differ_get_names_that_differ() -> None:
    batches = ["a" * 50, "a" * 51, "x_y", "x.y", "x-y", "X-y", "x-y-", "x-y-2"]
    names = {rayjob_name("r", batch, attempt) for batch in batches for attempt in (1, 2)}
    assert len(names) == 2 * len(batches)
