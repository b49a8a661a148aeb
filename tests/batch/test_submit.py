"""Handing a night to Ray: what is refused before anything is sent, what is tried again, and what is said of its end."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pytest
from ray import job_submission

from expunge.batch import submit
from expunge.batch.submit import address_of, check_reachable, failure_of, job_server, submit_night
from expunge.errors import InputError, UnavailableError
from expunge.requests.home import recall
from expunge.requests.store import open_store
from expunge.settings import Settings


class Answer(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def head() -> Iterator[str]:
    """Something that answers as a job server does when it is asked whether it is there."""
    server = HTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("http://127.0.0.1:8265", "http://127.0.0.1:8265"),
        ("http://127.0.0.1:8265/", "http://127.0.0.1:8265"),
        ("https://ray.example.org", "https://ray.example.org"),
        ("ray-head:8265", "http://ray-head:8265"),
        ("ray-head", "http://ray-head:8265"),
        ("10.0.0.7:9000", "http://10.0.0.7:9000"),
        ("[::1]:8265", "http://[::1]:8265"),
    ],
)
def test_a_job_server_may_be_named_by_its_host(given: str, expected: str) -> None:
    assert job_server(given) == expected


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("auto", "'auto' does not say where the job server is: leave it empty"),
        ("ray://head:10001", r"ray:// is Ray's client server: write http://head:8265"),
        ("ray://me:hunter2@head:10001", r"ray:// is Ray's client server: write http://head:8265"),
        ("grpc://head", "grpc:// is not Ray's job server: write http://head:8265"),
        ("http://", "it names no host: write http://HOST:8265"),
        ("http://head:port", "ray_address: .*: write http://HOST:8265"),
    ],
)
def test_what_names_no_job_server_is_told_what_to_write(settings: Settings, given: str, said: str) -> None:
    with pytest.raises(InputError, match=rf"^ray_address: .*{said}|{said}") as refused:
        address_of(settings.model_copy(update={"ray_address": given}))
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "http://nonsense.invalid:8265"])
def test_an_address_where_nothing_answers_is_one_line(address: str) -> None:
    with pytest.raises(UnavailableError, match="does not answer") as caught:
        check_reachable(address)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spared", ["", "example.org", "example.org,127.0.0.1"])
def test_a_proxy_does_not_hide_a_ray_on_this_host(head: str, monkeypatch: pytest.MonkeyPatch, spared: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        nowhere = f"http://127.0.0.1:{free.getsockname()[1]}"
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, nowhere)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, spared)
    check_reachable(head)
    # Ray's own client and its command read these.
    assert "127.0.0.1" in os.environ["no_proxy"].split(",")
    assert set(spared.split(",")) - {""} <= set(os.environ["NO_PROXY"].split(","))


Says = Callable[..., None]


@pytest.fixture
def ray_says(monkeypatch: pytest.MonkeyPatch) -> tuple[Says, list[list[str]]]:
    """`ray job submit` as it answers: one text per call, the last for good; an empty one is success."""
    calls: list[list[str]] = []
    answers: list[str] = []

    def run(command: list[str], **options: object) -> "subprocess.CompletedProcess[str]":
        calls.append(command)
        said = answers[min(len(calls), len(answers)) - 1].replace("ID", command[command.index("--submission-id") + 1])
        return subprocess.CompletedProcess(command, int(bool(said)), "", said)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(submit, "SUBMIT_PAUSE_S", 0.0)
    return answers.extend, calls


AGENT = "RuntimeError: Request failed with status code 500: No available agent to submit job, please try again later.\n"


@pytest.mark.parametrize(
    "answers",
    [
        [""],
        [AGENT, ""],
        [AGENT, "requests.exceptions.ConnectionError: Connection reset by peer", ""],
        ["Request failed with status code 503: Service Unavailable", ""],
        [AGENT, "Job with submission_id ID already exists. Please use a different submission_id."],
    ],
)
def test_what_passes_is_tried_again(
    settings: Settings, head: str, ray_says: tuple[Says, list[list[str]]], answers: list[str]
) -> None:
    say, calls = ray_says
    say(answers)
    open_store(settings)
    settings = settings.model_copy(update={"ray_address": head})
    submission = submit_night("night-1", settings)
    assert len(calls) == len(answers)
    assert {command[command.index("--submission-id") + 1] for command in calls} == {submission}
    known = recall(settings)
    assert known is not None
    entry = calls[-1].index("--")
    assert calls[-1][entry + 1 :] == ["python", "-m", "expunge.jobs.nightly", "--batch", "night-1", "--home", known.id]
    assert "--working-dir" not in calls[-1]


@pytest.mark.parametrize(
    ("answer", "times"), [("AuthenticationError: Forbidden", 1), ("ValueError: no such runtime_env", 1), (AGENT, 3)]
)
def test_what_does_not_pass_ends_in_one_line(
    settings: Settings,
    head: str,
    ray_says: tuple[Says, list[list[str]]],
    monkeypatch: pytest.MonkeyPatch,
    answer: str,
    times: int,
) -> None:
    say, calls = ray_says
    say([f"Traceback\n  many lines\n{answer}"])
    clock = iter(range(0, 1000, 50))
    monkeypatch.setattr(submit.time, "monotonic", lambda: float(next(clock)))
    with pytest.raises(UnavailableError, match=r"refused the job: .*: check .*--batch night-1") as refused:
        submit_night("night-1", settings.model_copy(update={"ray_address": head}))
    assert "\n" not in str(refused.value)
    assert len(calls) == times


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (-signal.SIGKILL, "killed by SIGKILL"),
        (128 + signal.SIGTERM, "killed by SIGTERM"),
        (3, "exit code 3"),
        (None, "ended without a message"),
    ],
)
def test_a_driver_that_says_nothing_is_said_to_be_dead(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, code: int | None, said: str
) -> None:
    info = SimpleNamespace(driver_exit_code=code)
    client = SimpleNamespace(get_job_logs=lambda submission: "a log", get_job_info=lambda submission: info)
    monkeypatch.setattr(job_submission, "JobSubmissionClient", lambda address: client)
    failure = failure_of("night-1", "night-1-ab", "FAILED", settings)
    assert said in failure.message
    assert "expunge night --batch night-1" in (failure.hint or "")


def test_a_driver_waits_for_no_import_of_its_workers() -> None:
    """They took 7 s of CPU, in every driver and in every task that only walks a job through its stages."""
    script = "import sys, expunge.batch.driver; print(sorted({'torch', 'diffusers', 'peft'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
