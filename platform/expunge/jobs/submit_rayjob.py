"""Hand a night to Kubernetes: `python -m expunge.jobs.submit_rayjob --template rayjob.json --prefix RELEASE`.

The chart's trigger runs it: it drains the queue into a batch, creates that batch's RayJob from a rendered template,
waits for the RayJob, and reports its status. If it is killed and started again, it finds the same open batch, and so
the same RayJob. The RayJob carries the batch's id and nothing else about a request.

Exit codes: 0 success, or an empty queue; 1 the night failed; 2 the night was refused; 5 the API server or the database
did not answer.
"""

import argparse
import hashlib
import json
import re
import signal
import sys
import time
from contextlib import closing
from pathlib import Path

from expunge.batch.queue import batches_to_run, capacity
from expunge.errors import ExpungeError, InputError, UnavailableError
from expunge.jobs.kubernetes import Api, Json, in_cluster
from expunge.logs import configure, get_logger
from expunge.requests.home import remember
from expunge.requests.store import nothing_to_do, open_store
from expunge.settings import Settings, load_settings

BATCH, HOME = "BATCH-ID", "HOME-ID"  # placeholders in the template's entrypoint
BATCH_KEY, NIGHT_KEY = "expunge/batch", "expunge/night"  # annotations, because no label may hold every id
NAME_LENGTH = 47  # KubeRay derives names of clusters and services from it, and refuses more
ATTEMPTS = 9
ENDED = frozenset({"Complete", "Failed", "ValidationFailed"})


def main(arguments: list[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # process 1 ignores SIGTERM unless it handles it
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
    """Continue a batch that an earlier night left open, then run the queue, whether or not the first one succeeded.

    Returns the exit code of the first failure, or 0. An empty queue starts no cluster.
    """
    home = remember(settings).id
    codes: list[int] = []
    with closing(open_store(settings)) as store:
        # There is no Ray yet that could say what it has, so night.hours needs night.gpus here.
        fits = capacity(store, settings, lambda: None)
        choose = fits.choose if fits else None
        drained = batches_to_run(store, None, args.model, settings.night_limit, choose=choose)
        for batch in [args.batch] if args.batch else (batch.id for batch, _ in drained):
            name = submit(api, template, prefix=args.prefix, batch=batch, night=args.night, home=home)
            try:
                wait(api, name, deadline=args.deadline)
                print(f"{name}: SUCCEEDED")
                codes.append(0)
            except UnavailableError:
                raise
            except ExpungeError as error:
                print(f"error: {error}", file=sys.stderr)
                codes.append(error.exit_code)
        if not codes:
            print(nothing_to_do(store, args.model))
    return next(filter(None, codes), 0)


def submit(api: Api, template: Json, *, prefix: str, batch: str, night: str, home: str) -> str:
    """Create the batch's RayJob, or find it, and return its name.

    A RayJob that failed on an earlier night is followed by another attempt, under another name. One that failed tonight
    is not. Raises InputError if the name belongs to another batch, ExpungeError after the last attempt.
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
            raise InputError(f"RayJob {name} exists and does not belong to batch {batch}", hint="delete or rename it")
        if not _ended(known) or notes.get(NIGHT_KEY) == night:
            log.info("exists already", rayjob=name, batch=batch)
            return name
    raise ExpungeError(f"batch {batch} has failed {ATTEMPTS} times", hint="see the RayJobs' status, then delete them")


def wait(api: Api, name: str, *, deadline: float) -> None:
    """Wait until the RayJob ends. Raises ExpungeError if it fails, is deleted, or is still there after `deadline` s.

    status.jobStatus decides: the submitter pod of a failed job may have succeeded, and the reverse.
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
    """Return a DNS label of at most 47 characters; different batches get different names."""
    suffix = f"-{attempt}" if attempt > 1 else ""
    name = f"{prefix}-{re.sub('[^a-z0-9-]', '-', batch.lower())}"
    room = NAME_LENGTH - len(f"-{ATTEMPTS}")
    # The last condition keeps `night-2` from being taken for the second attempt of `night`.
    if name != f"{prefix}-{batch}" or len(name) > room or re.search("-[0-9]?$", name):
        name = f"{name[: room - 7].rstrip('-')}-{hashlib.sha256(batch.encode()).hexdigest()[:6]}"
    return name + suffix


def manifest_of(template: Json, name: str, batch: str, night: str, home: str) -> Json:
    """Return the template with the name, the batch, the night and the home's id filled in, and nothing else."""
    metadata, spec = template["metadata"], template["spec"]
    notes = {**metadata.get("annotations", {}), BATCH_KEY: batch, NIGHT_KEY: night}
    entrypoint = spec["entrypoint"].replace(BATCH, batch).replace(HOME, home)
    return {
        **template,
        "metadata": {**metadata, "name": name, "annotations": notes},
        "spec": {**spec, "entrypoint": entrypoint},
    }


def _ended(job: Json) -> bool:
    """Return whether the RayJob has ended. While retries are left, KubeRay reports Retrying instead of Failed."""
    return (job.get("status") or {}).get("jobDeploymentStatus") in ENDED


def _read(path: Path) -> Json:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"template: {path} cannot be read ({error})", hint="mount the chart's ConfigMap") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--template", type=Path, required=True, help="the RayJob as JSON, rendered by the chart")
    parser.add_argument("--prefix", required=True, help="the beginning of every RayJob's name")
    parser.add_argument("--namespace", default="default")
    parser.add_argument("--night", default="by-hand", help="this night's name: the trigger's Job")
    parser.add_argument("--batch", help="run or continue this batch instead of draining the queue")
    parser.add_argument("--model", action="append", help="drain requests of this model only; may be repeated")
    parser.add_argument("--deadline", type=float, default=12 * 3600, help="seconds to wait for the night to end")
    parser.add_argument("--patience", type=float, default=600, help="seconds that the API server may be down")
    parser.add_argument("--poll", type=float, default=15, help="seconds between two looks at the RayJob")
    parser.add_argument("--server", default=in_cluster(), help="the API server (default: the cluster's own)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
