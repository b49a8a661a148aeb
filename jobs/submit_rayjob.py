"""Hand a night to Kubernetes: `python submit_rayjob.py --template rayjob.json --prefix RELEASE [--batch ID]`.

What the chart's trigger runs: drain what waits, create the RayJob of that batch from a rendered template, wait for it,
report its status. Killed and started again it finds the same open batch, and so the same RayJob. Nothing of a request
but its batch's id is sent. Exit codes: 0 succeeded, or nothing waits; 1 the night failed; 2 it was refused; 5 the API
server or the database stayed away.

Create and get are all it asks for, so the standard library speaks to the API server: the official client would add
eight packages and 74 MB to the image, and knows RayJobs only as dictionaries, too.
"""

import argparse
import hashlib
import json
import os
import re
import signal
import ssl
import sys
import time
import urllib.error
import urllib.request
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from http.client import HTTPException
from pathlib import Path
from typing import Any

from expunge.errors import ExpungeError, InputError, UnavailableError
from expunge.logs import configure, get_logger
from expunge.requests.home import remember
from expunge.requests.store import nothing_to_do, open_store
from expunge.settings import Settings, load_settings

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
BATCH, HOME = "BATCH-ID", "HOME-ID"  # stand in the template's entrypoint
BATCH_KEY, NIGHT_KEY = "expunge/batch", "expunge/night"  # annotations: an id may end in what no label may
NAME_LENGTH = 47  # KubeRay derives names of clusters and services from it, and refuses more
ATTEMPTS = 9
REQUEST_TIMEOUT_S = 30
ENDED = frozenset({"Complete", "Failed", "ValidationFailed"})

Json = dict[str, Any]


@dataclass(frozen=True)
class Api:
    """The rayjobs of one namespace. A server that is away, overloaded or failing is asked again for `patience` s."""

    server: str
    namespace: str
    patience: float
    pause: float

    def create(self, manifest: Json) -> bool:
        """False where one of that name exists. A repeated create whose first answer was lost ends there, too."""
        status, answer = self._ask("POST", "", manifest)
        if status in (200, 201):
            return True
        if status == 409 and answer.get("reason") == "AlreadyExists":
            return False
        raise _refusal(status, answer)

    def get(self, name: str) -> Json | None:
        status, answer = self._ask("GET", f"/{name}")
        if status == 404:
            return None
        if status != 200:
            raise _refusal(status, answer)
        return answer

    def _ask(self, method: str, path: str, body: Json | None = None) -> tuple[int, Json]:
        url = f"{self.server}/apis/ray.io/v1/namespaces/{self.namespace}/rayjobs{path}"
        until = time.monotonic() + self.patience
        while True:
            try:
                return self._once(method, url, body)
            except (OSError, HTTPException, ValueError) as error:  # refused, reset, timed out, or cut short
                reason = str(getattr(error, "reason", None) or error)
            if time.monotonic() > until:
                raise UnavailableError(
                    f"the Kubernetes API at {self.server} did not answer for {self.patience:g} s ({reason})",
                    hint="the night goes on without us; start the trigger again and it waits for the same RayJob",
                )
            get_logger("trigger").warning("the Kubernetes API does not answer", why=reason)
            time.sleep(self.pause)

    def _once(self, method: str, url: str, body: Json | None) -> tuple[int, Json]:
        headers = {"Accept": "application/json", "Content-Type": "application/json"}
        token = ACCOUNT / "token"
        if token.exists():  # read each time: it is renewed under way
            headers["Authorization"] = f"Bearer {token.read_text().strip()}"
        authority = ACCOUNT / "ca.crt"
        context = ssl.create_default_context(cafile=str(authority)) if authority.exists() else None
        request = urllib.request.Request(url, json.dumps(body).encode() if body else None, headers, method=method)
        # The API server is never behind the proxy that a pod may have for the outside.
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
        )
        try:
            with opener.open(request, timeout=REQUEST_TIMEOUT_S) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            if error.code == 429 or error.code >= 500:
                raise OSError(f"it answers {error.code}") from None
            return error.code, _status_of(error)


def main(arguments: list[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as process 1 nothing else would end it
    try:
        settings = load_settings()
        configure(settings.log_level)
        template = _read(args.template)
        api = Api(args.server, args.namespace, args.patience, args.poll)
        return run(api, template, args, settings)
    except ExpungeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def run(api: Api, template: Json, args: argparse.Namespace, settings: Settings) -> int:
    """Continue a batch that an earlier night left open; then run what waits, however that ended."""
    store, home = open_store(settings), remember(settings).id
    began = datetime.now(UTC)
    done: list[str] = []
    code = 0
    with closing(store):
        while True:
            batch, continued = args.batch, False
            if batch is None:
                drained = store.drain(None, args.model, settings.night_limit, skip=done)
                if not drained.requests:  # no cluster is started for nothing
                    break
                batch, continued = drained.id, drained.created < began
            name = submit(api, template, prefix=args.prefix, batch=batch, night=args.night, home=home)
            done.append(batch)
            try:
                wait(api, name, deadline=args.deadline)
                print(f"{name}: SUCCEEDED")
            except UnavailableError:
                raise
            except ExpungeError as error:
                print(f"error: {error}", file=sys.stderr)
                code = code or error.exit_code
            if args.batch or not continued:
                break
        if not done:
            print(nothing_to_do(store, args.model))
    return code


def submit(api: Api, template: Json, *, prefix: str, batch: str, night: str, home: str) -> str:
    """Create the batch's RayJob, or find it; returns its name. Only one that failed in an earlier night is followed
    by another attempt, under another name.
    """
    log = get_logger("trigger")
    for attempt in range(1, ATTEMPTS + 1):
        name = rayjob_name(prefix, batch, attempt)
        if api.create(manifest_of(template, name, batch, night, home)):
            log.info("created", rayjob=name, batch=batch)
            return name
        known = api.get(name)
        if known is None:
            continue  # deleted in between
        notes = known["metadata"].get("annotations") or {}
        if notes.get(BATCH_KEY) != batch:
            raise InputError(f"RayJob {name} exists and is not of batch {batch}", hint="delete or rename it")
        if not _ended(known) or notes.get(NIGHT_KEY) == night:
            log.info("exists already", rayjob=name, batch=batch)
            return name
    raise ExpungeError(f"batch {batch} has failed {ATTEMPTS} times", hint="see the RayJobs' status, then delete them")


def wait(api: Api, name: str, *, deadline: float) -> None:
    """Until the RayJob ends. Raises ExpungeError where it does not succeed, is deleted, or hangs past `deadline` s.

    What counts is status.jobStatus: the submitter pod of a job that failed may have ended well, and the reverse.
    """
    log, until, seen = get_logger("trigger"), time.monotonic() + deadline, ()
    while True:
        job = api.get(name)
        if job is None:
            raise ExpungeError(f"RayJob {name} was deleted", hint="start the trigger again: the batch is still open")
        status = job.get("status") or {}
        state = status.get("jobStatus") or "", status.get("jobDeploymentStatus") or ""
        if state != seen:
            log.info("status", rayjob=name, job=state[0], deployment=state[1])
            seen = state
        if state[0] == "SUCCEEDED":
            return
        if _ended(job):
            why = " ".join(str(status.get(field) or "") for field in ("reason", "message")).split()
            raise ExpungeError(
                f"RayJob {name} is {state[0] or state[1]}: {' '.join(why) or 'it gives no reason'}",
                hint=f"see `kubectl describe rayjob {name}`; the next night continues its batch",
            )
        if time.monotonic() > until:
            raise ExpungeError(
                f"RayJob {name} has not ended in {deadline:g} s ({state[0] or state[1] or 'no status'})",
                hint=f"see `kubectl describe rayjob {name}` and whether the KubeRay operator runs",
            )
        time.sleep(api.pause)


def rayjob_name(prefix: str, batch: str, attempt: int = 1) -> str:
    """A DNS label of at most 47 characters; batches that differ get names that differ."""
    suffix = f"-{attempt}" if attempt > 1 else ""
    name = f"{prefix}-{re.sub('[^a-z0-9-]', '-', batch.lower())}"
    room = NAME_LENGTH - len(f"-{ATTEMPTS}")
    # The last condition: `night-2` must not pass for the second attempt of `night`.
    if name != f"{prefix}-{batch}" or len(name) > room or re.search("-[0-9]?$", name):
        name = f"{name[: room - 7].rstrip('-')}-{hashlib.sha256(batch.encode()).hexdigest()[:6]}"
    return name + suffix


def manifest_of(template: Json, name: str, batch: str, night: str, home: str) -> Json:
    """The template, with the name, the batch, the night and the home's id: nothing else is filled in."""
    metadata, spec = template["metadata"], template["spec"]
    notes = {**metadata.get("annotations", {}), BATCH_KEY: batch, NIGHT_KEY: night}
    entrypoint = spec["entrypoint"].replace(BATCH, batch).replace(HOME, home)
    return {
        **template,
        "metadata": {**metadata, "name": name, "annotations": notes},
        "spec": {**spec, "entrypoint": entrypoint},
    }


def _ended(job: Json) -> bool:
    """Failed is not the end while retries are left: KubeRay then says Retrying."""
    return (job.get("status") or {}).get("jobDeploymentStatus") in ENDED


def _refusal(status: int, answer: Json) -> ExpungeError:
    said = str(answer.get("message") or f"HTTP {status}")
    hints = {
        401: "check that the trigger's service account token is mounted",
        403: "let the trigger's service account create and get rayjobs",
        404: "install the KubeRay operator and its definitions (ray.io/v1)",
    }
    hint = hints.get(status, "correct the chart's values and upgrade")
    return InputError(f"the Kubernetes API refuses the RayJob ({said})", hint=hint)


def _status_of(error: urllib.error.HTTPError) -> Json:
    try:
        answer = json.load(error)
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}


def _read(path: Path) -> Json:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"template: {path} cannot be read ({error})", hint="mount the chart's ConfigMap") from None


def _in_cluster() -> str:
    host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
    return f"https://[{host}]:{port}" if host and ":" in host else f"https://{host or 'kubernetes.default.svc'}:{port}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--template", type=Path, required=True, help="the RayJob as JSON, rendered by the chart")
    parser.add_argument("--prefix", required=True, help="what every RayJob of this release is named by")
    parser.add_argument("--namespace", default="default")
    parser.add_argument("--night", default="by-hand", help="names this night: the trigger's Job")
    parser.add_argument("--batch", help="run or continue this batch instead of draining")
    parser.add_argument("--model", action="append", help="drain requests of this model only; may be repeated")
    parser.add_argument("--deadline", type=float, default=12 * 3600, help="seconds to wait for the end")
    parser.add_argument("--patience", type=float, default=600, help="seconds that the API server may be away")
    parser.add_argument("--poll", type=float, default=15, help="seconds between questions")
    parser.add_argument("--server", default=_in_cluster(), help="the API server (default: the cluster's own)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
