"""Hand a night to Ray: the real `ray job submit`, with nothing but ids in what Ray shows in clear."""

import os
import secrets
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from expunge.errors import InputError, UnavailableError, last_line
from expunge.settings import Settings

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
REACH_TIMEOUT_S = 5
STATUS_TRIES, STATUS_PAUSE_S = 5, 2.0


def address_of(settings: Settings) -> str:
    return settings.ray_address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS


def check_reachable(address: str) -> None:
    """Raises UnavailableError where nothing answers: Ray's own command ends in pages of traceback there."""
    try:
        urllib.request.urlopen(f"{address.rstrip('/')}/api/version", timeout=REACH_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return  # it answers; whether it lets us in is for the submission to say
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise UnavailableError(
            f"Ray at {address} does not answer ({reason})", hint="start it, or set EXPUNGE_RAY_ADDRESS"
        ) from None


def submit_night(batch: str, settings: Settings, jobs: Path) -> str:
    """Submit `nightly.py` in the folder `jobs` for `batch`; returns the submission id.

    Raises InputError where the folder has no nightly.py, UnavailableError where Ray does not take the job.
    """
    if not (jobs / "nightly.py").is_file():
        raise InputError(f"jobs: {jobs / 'nightly.py'} does not exist", hint="name the checkout's folder with --jobs")
    if settings.home.resolve().is_relative_to(jobs.resolve()):
        raise InputError(f"home: {settings.home} lies in {jobs}, which Ray uploads", hint="move it: set EXPUNGE_HOME")
    address = address_of(settings)
    check_reachable(address)
    # A killed night is submitted again, and Ray takes no id twice; that only one driver runs is the batch's own lock.
    submission = f"{batch}-{secrets.token_hex(2)}"
    command = [
        str(Path(sys.executable).with_name("ray")),
        "job",
        "submit",
        "--address",
        address,
        "--submission-id",
        submission,
    ]
    command += ["--no-wait", "--working-dir", str(jobs), "--", "python", "nightly.py", "--batch", batch]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        reason = said[-1].rstrip(".") if said else f"exit code {done.returncode}"
        raise UnavailableError(
            f"Ray at {address} refused the job: {reason}", hint="check RAY_AUTH_TOKEN and the cluster's state"
        )
    return submission


def last_words(submission: str, settings: Settings) -> str:
    """The last line that the driver wrote: its error, where it ended with one."""
    from ray.job_submission import JobSubmissionClient

    try:
        lines = JobSubmissionClient(address_of(settings)).get_job_logs(submission).splitlines()
    except (RuntimeError, OSError):
        return "its log cannot be read"
    return next((line.removeprefix("error: ") for line in reversed(lines) if line.strip()), "it wrote nothing")


def night_status(batch: str, submission: str, settings: Settings) -> str:
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED. A server that is away for a moment is asked again.

    Raises UnavailableError where it stays away, or was started anew meanwhile and so knows nothing of the night.
    """
    from ray.job_submission import JobSubmissionClient

    address, why = address_of(settings), ""
    for attempt in range(STATUS_TRIES):
        if attempt:
            time.sleep(STATUS_PAUSE_S)
        try:
            check_reachable(address)  # Ray's client has no timeout: it would wait for ever for a host that fell silent
            return str(JobSubmissionClient(address).get_job_status(submission).value)
        except UnavailableError as error:
            why = error.message
        except (RuntimeError, OSError) as error:  # of its server, or of the connection
            why = f"Ray at {address} does not tell of the night's job {submission} ({last_line(error)})"
    raise UnavailableError(why, hint=f"see that it runs, then run `expunge night --batch {batch}` to continue")
