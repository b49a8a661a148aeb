"""Hand a night to Ray with the real `ray job submit`. Ray shows a job's arguments in clear, so they are ids only."""

import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from expunge.errors import ExpungeError, InputError, NotFoundError, StorageError, UnavailableError, last_line
from expunge.requests.home import remember
from expunge.runs.night import how_to_continue
from expunge.settings import Settings
from expunge.sources import check_url
from expunge.web import is_loopback, status_of

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
DEFAULT_PORT = 8265
REACH_TIMEOUT_S = 5
STATUS_TRIES, STATUS_PAUSE_S = 5, 2.0
SUBMIT_PATIENCE_S, SUBMIT_PAUSE_S = 120.0, 3.0
"""A Ray head that has just started has no agent yet, for up to half a minute on a busy machine."""
ENTRY_POINT = ("python", "-m", "expunge.jobs.nightly")
"""The command that Ray starts. Every node has Expunge installed, so nothing is uploaded."""

_PASSING = re.compile(
    r"try again later|no available agent|temporarily unavailable|timed? ?out|connection (reset|refused|aborted)"
    r"|remote end closed|status code:? 50[0234]|\b50[0234] (internal|bad|service|gateway)",
    re.IGNORECASE,
)
_KINDS: dict[int, type[ExpungeError]] = {2: InputError, 4: NotFoundError, 5: UnavailableError, 6: StorageError}


def address_of(settings: Settings) -> str:
    """Return the URL of Ray's job server. Raises InputError if the setting is the address of something else."""
    given = settings.ray_address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS
    return job_server(given)


def job_server(given: str) -> str:
    """Return `given`, a URL or a host with or without a port, as a URL. Raises InputError if it is no job server."""
    scheme, separator, rest = given.partition("://")
    if separator and scheme not in ("http", "https"):
        host = rest.rpartition("@")[2].partition(":")[0] or "HOST"
        what = "Ray's client server" if scheme == "ray" else "not Ray's job server"
        raise InputError(f"ray_address: {scheme}:// is {what}", hint=f"write http://{host}:{DEFAULT_PORT}")
    if given in ("auto", "local"):
        raise InputError(
            f"ray_address: {given!r} does not say where the job server is",
            hint=f"leave it empty for {DEFAULT_ADDRESS}, or write http://HOST:{DEFAULT_PORT}",
        )
    url = given if separator else f"http://{given}"
    try:
        parts = urlsplit(check_url(url))
    except ValueError as error:
        raise InputError(f"ray_address: {error}", hint=f"write http://HOST:{DEFAULT_PORT}") from None
    if not parts.hostname:
        raise InputError("ray_address: it names no host", hint=f"write http://HOST:{DEFAULT_PORT}")
    if not separator and parts.port is None:
        url = f"{url.rstrip('/')}:{DEFAULT_PORT}"
    return url.rstrip("/")


def check_reachable(address: str) -> None:
    """Raise UnavailableError if nothing answers; Ray's own command would print pages of traceback."""
    _past_the_proxy(address)
    try:  # any answer will do: the submission will show whether access is granted
        status_of(f"{address}/api/version", timeout=REACH_TIMEOUT_S)
    except OSError as error:
        raise UnavailableError(
            f"Ray at {address} does not answer ({error})", hint="start it, or set EXPUNGE_RAY_ADDRESS"
        ) from None


def cluster_of(settings: Settings) -> tuple[int, int] | None:
    """Return how many GPUs and CPU cores Ray has; None if it does not say."""
    from ray.util.state import list_nodes
    from ray.util.state.exception import RayStateApiException

    try:
        nodes = list_nodes(address_of(settings), filters=[("state", "=", "ALIVE")], timeout=REACH_TIMEOUT_S)
    except (RayStateApiException, RuntimeError, OSError):
        return None
    totals = [vars(node)["resources_total"] for node in nodes]
    gpus, cores = (int(sum(total.get(name, 0) for total in totals)) for name in ("GPU", "CPU"))
    return gpus, cores


def submit_night(batch: str, settings: Settings) -> str:
    """Submit the night of `batch` to Ray and return the submission id.

    Raises UnavailableError if Ray does not answer or refuses the job.
    """
    return submit_driver(batch, [*ENTRY_POINT, "--batch", batch], settings)


def submit_driver(batch: str, entry: Sequence[str], settings: Settings) -> str:
    """Submit the driver of a batch as `submit_night` does."""
    address = address_of(settings)
    check_reachable(address)
    # A killed night is submitted again, and Ray accepts no id twice. The batch's own lock keeps a second driver out.
    submission = f"{batch}-{secrets.token_hex(2)}"
    command = [str(Path(sys.executable).with_name("ray")), "job", "submit", "--address", address]
    command += ["--submission-id", submission, "--no-wait"]
    command += ["--", *entry, "--home", remember(settings).id]
    until = time.monotonic() + SUBMIT_PATIENCE_S
    while True:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        said = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        # The job already exists if the answer to an earlier try was lost.
        if not done.returncode or any(f"{submission} already exists" in line for line in said):
            return submission
        reason = said[-1].rstrip(".") if said else f"exit code {done.returncode}"
        if not _PASSING.search(reason) or time.monotonic() > until:
            break
        time.sleep(SUBMIT_PAUSE_S)
    raise UnavailableError(
        f"Ray at {address} refused the job: {reason}",
        hint=f"check RAY_AUTH_TOKEN and the cluster's state, then {how_to_continue(batch)}",
    )


def failure_of(batch: str, submission: str, status: str, settings: Settings) -> ExpungeError:
    """Describe a night whose Ray job failed, as an error with its driver's exit code."""
    from ray.job_submission import JobSubmissionClient

    try:
        client = JobSubmissionClient(address_of(settings))
        lines = client.get_job_logs(submission).splitlines()
        code = client.get_job_info(submission).driver_exit_code
    except (RuntimeError, OSError):
        lines, code = [], None
    said = next((line.removeprefix("error: ") for line in reversed(lines) if line.startswith("error: ")), None)
    why = said or _how_it_ended(code)
    hint = how_to_continue(batch)
    # A shell reports a signal as 128 plus its number; a driver's own exit codes are small.
    kind = _KINDS.get(code or 0, ExpungeError)
    said_how = "expunge night" in why or "expunge replay" in why
    return kind(f"the night's Ray job {submission} is {status}: {why}", hint=None if said_how else hint)


def night_status(batch: str, submission: str, settings: Settings) -> str:
    """Return PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED. A server that is down for a moment is asked again.

    Raises UnavailableError if it stays down, or if it has been restarted and does not know the night.
    """
    from ray.job_submission import JobSubmissionClient

    address, why = address_of(settings), ""
    for attempt in range(STATUS_TRIES):
        if attempt:
            time.sleep(STATUS_PAUSE_S)
        try:
            check_reachable(address)  # Ray's client has no timeout: it would wait forever for a silent host
            return str(JobSubmissionClient(address).get_job_status(submission).value)
        except UnavailableError as error:
            why = error.message
        except (RuntimeError, OSError) as error:  # from its server, or from the connection
            why = f"Ray at {address} does not know the night's job {submission} ({last_line(error)})"
    raise UnavailableError(why, hint=f"check that it is running, then {how_to_continue(batch)}")


def _how_it_ended(code: int | None) -> str:
    if code is None:
        return "its driver ended without a message, which happens when its node is lost"
    number = -code if code < 0 else code - 128 if code > 128 else 0
    if number in set(signal.Signals):
        hint = ", which happens when memory runs out" if number == signal.SIGKILL else ""
        return f"its driver was killed by {signal.Signals(number).name}{hint}"
    return f"its driver ended with exit code {code} and printed no error"


def _past_the_proxy(address: str) -> None:
    """Exempt this machine's own addresses from the proxy, also for Ray's client."""
    host = urlsplit(address).hostname or ""
    if not is_loopback(host):
        return
    for name in ("no_proxy", "NO_PROXY"):
        spared = [entry for entry in os.environ.get(name, "").split(",") if entry]
        if host not in spared and "*" not in spared:
            os.environ[name] = ",".join([*spared, host])
