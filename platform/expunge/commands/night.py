"""`expunge night` runs the queue and shows the progress; `expunge verdicts` prints what a finished night decided."""

import time
from datetime import date
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from expunge.commands.common import AsJson, one_line, open_settings, print_error, print_json, print_table
from expunge.errors import ExpungeError, GateError, InputError, NotFoundError, UnavailableError
from expunge.text import counted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from expunge.batch.capacity import Capacity
    from expunge.requests.batch_file import BatchFile
    from expunge.requests.store import RequestStore
    from expunge.runs.outcomes import JobOutcome, NightOutcome
    from expunge.settings import Settings
    from expunge.types import IntegrityEvidence, RemovalBatch, RequestEvidence

POLL_S = 1.0
LONG_H = 24.0
"""Hours on CPUs that a night may take without being asked for."""
# Where each stage begins on a job's bar, and its share of it: as measured on the testbed, a guess elsewhere.
SHARES = {
    "wait": (0, 0),
    "prepare": (0, 5),
    "examine": (5, 15),
    "train": (20, 45),
    "evaluate": (65, 30),
    "register": (95, 5),
    "done": (100, 0),
}

Batch = Annotated[
    str | None,
    typer.Option("--batch", metavar="ID", help="Continue or name this batch (default: the open one, else a new one)."),
]
Models = Annotated[
    list[str] | None, typer.Option("--model", metavar="NAME", help="Run only this model's requests; may be repeated.")
]
Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until the night ends, and show its progress.")]
Requests = Annotated[
    str | None,
    typer.Option(
        "--requests",
        metavar="URL.jsonl",
        help="Submit the requests in this file, one JSON object per line, and run only those. A path or a URL; not one "
        "with credentials or a query, because others can see arguments. Running the same file again is safe.",
    ),
]
BatchId = Annotated[str, typer.Argument(metavar="BATCH", help="The id of a batch.")]
Explain = Annotated[
    bool,
    typer.Option("--explain", help="Print every rule with its figure, bound and threshold, and what was tested."),
]


def night(
    batch: Batch = None,
    model: Models = None,
    requests: Requests = None,
    wait: Wait = True,
    yes: Annotated[bool, typer.Option("--yes", help="Run even what would take more than a day on CPUs.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run the queue as one batch, with `ray job submit`. Exit 3 if a verdict is not `passed`.

    A batch that an earlier night left open is continued first; then the queue is run, whether or not that one passed.

    With --requests, only the requests of that file are run, as a batch of their own; the batch that still has one of
    them to decide is continued first. A line that is refused does not stop the others: it is printed with its number
    and the reason, and the exit code is 2 where the night itself ends with 0.
    """
    from expunge.batch.queue import batches_to_run, capacity
    from expunge.batch.submit import address_of, check_reachable, cluster_of
    from expunge.requests.store import nothing_to_do, open_store

    settings = open_settings()
    check_reachable(address_of(settings))  # before anything is taken in or drained
    store = open_store(settings)
    fits = capacity(store, settings, partial(cluster_of, settings))
    if fits is None and not yes:
        _check_length(store, settings, model)
    choose = fits.choose if fits else None
    if requests is None:
        lost = partial(_lost, store, settings, model)
        batches = batches_to_run(store, batch, model, settings.night_limit, lost=lost, choose=choose)
        if not _run(batches, store, settings, wait, as_json):
            _print_nothing(nothing_to_do(store, model), as_json)
        _print_too_long(fits)
        return
    file = _take_in(requests, settings, store)
    batches = batches_to_run(store, batch, model, settings.night_limit, only=file.ids, choose=choose)
    if not _run(batches, store, settings, wait, as_json):
        _print_nothing("nothing to do: no request of the file waits", as_json)
    _print_too_long(fits)
    file.check()


def _check_length(store: "RequestStore", settings: "Settings", models: list[str] | None) -> None:
    """Raise InputError if the night would take days on CPUs, which hardly anybody wants."""
    from expunge.batch.submit import cluster_of
    from expunge.types import RequestState

    cluster = cluster_of(settings) if store.count(RequestState.ACCEPTED, models) else None
    if cluster is None or cluster[0]:
        return
    from expunge.batch.capacity import hours_on_cpus  # imports torch: seconds

    hours = hours_on_cpus(store, settings, cluster[1], models)
    if hours > LONG_H:
        raise InputError(
            f"the night would take about {hours / 24:,.0f} days: Ray has no GPU, and {counted(cluster[1], 'CPU core')}",
            hint="add GPUs to Ray, set night.hours to do a part each night, or run it with --yes",
        )


def _print_too_long(fits: "Capacity | None") -> None:
    """Name the models of which no night of these hours can hold a request."""
    for model, hours in (fits.too_long if fits else {}).items():
        typer.echo(
            f"warning: {model}: one request alone takes about {hours:,.1f} hours: set night.hours higher, or add GPUs",
            err=True,
        )


def _print_outlook(store: "RequestStore", taken: int, night_of: date) -> None:
    """Say how many requests are left in the queue, and when they are expected."""
    from expunge.batch.outlook import outlook

    left = outlook(store.expected(), taken, night_of)
    if left.left:
        typer.echo(str(left), err=True)


def _print_nothing(why: str, as_json: bool) -> None:
    if as_json:
        print_json({"batch": None})
    else:
        typer.echo(why)


def _run(
    batches: "Iterator[tuple[RemovalBatch, bool]]",
    store: "RequestStore",
    settings: "Settings",
    wait: bool,
    as_json: bool,
) -> bool:
    """Run each batch, or without `wait` submit the first one only. Return False if there is none.

    One that fails does not hold up the next. At the end, raises the first failure; UnavailableError is raised at once,
    because every batch would fail the same way.
    """
    from expunge.batch.submit import submit_night

    ran, failure = False, None
    for batch, more in batches:
        submission = submit_night(batch.id, settings)
        typer.echo(f"{batch.id}: {len(batch.requests)} requests, Ray job {submission}", err=True)
        if not more:  # this batch is what tonight took from the queue
            _print_outlook(store, len(batch.requests), batch.created.date())
        ran = True
        if not wait:
            print_json({"batch": batch.id, "submission": submission}) if as_json else typer.echo(batch.id)
            break
        try:
            watch(batch.id, submission, settings)
            _show(batch.id, settings, as_json)
        except UnavailableError:
            raise
        except ExpungeError as error:
            failure = failure or error
            if more or error is not failure:
                print_error(error, as_json=False)
    if failure is not None:
        raise failure
    return ran


def _take_in(name: str, settings: "Settings", store: "RequestStore") -> "BatchFile":
    from expunge.preparation.checking import SubmitCheck
    from expunge.requests.batch_file import take_in
    from expunge.requests.blobs import open_blobs

    check = SubmitCheck(settings)
    file = take_in(name, settings=settings, store=store, blobs=open_blobs(settings), check=check)
    for line in file.refused:
        typer.echo(f"error: {line.refusal}", err=True)
    typer.echo(one_line(file.summary()), err=True)
    return file


def _lost(store: "RequestStore", settings: "Settings", models: list[str] | None) -> bool:
    """Say whether a removal was lost with its model's version: then even an empty queue has something to do."""
    from expunge.types import RequestState

    if not store.ids(RequestState.REMOVED, models):
        return False
    from expunge.batch.lost import lost_removals  # imports MLflow: seconds
    from expunge.registry.tracking import Tracker

    return bool(lost_removals(store, Tracker(settings.tracking), models))


def verdicts(batch: BatchId, explain: Explain = False, as_json: AsJson = False) -> None:
    """Print what a finished night decided. Exit 3 if a verdict is not `passed`, also where nothing failed but the base
    model does not reproduce a target. JSON holds all of the evidence, with or without --explain."""
    from expunge.requests.store import open_store

    settings = open_settings()
    open_store(settings).batch(batch)  # an unknown id must not become a path
    _show(batch, settings, as_json, explain)


def watch(batch: str, submission: str, settings: "Settings") -> None:
    """Show one bar per job until the night's Ray job ends. Raises ExpungeError if it fails."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from expunge.batch.submit import failure_of, night_status
    from expunge.runs.night import NightFolder

    folder = NightFolder(settings.runs / batch)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[stage]}"), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console) as progress:
        bars = {"": progress.add_task("plan", total=100, stage="starting the driver")}
        said: dict[str, str] = {}
        while (status := night_status(batch, submission, settings)) in ("PENDING", "RUNNING"):
            planned = folder.plan if "" in bars else None
            if planned is not None:
                progress.remove_task(bars.pop(""))
                for job in planned.jobs:
                    bars[job.id] = progress.add_task(job.model, total=100, stage="wait")
            for name in filter(None, bars):
                stage, done, total = folder.job(name).progress.read()
                start, share = SHARES[stage]
                progress.update(
                    bars[name],
                    completed=start + (share * done / total if total else 0),
                    stage=f"{stage} {done}/{total}" if total else stage,
                )
                if not console.is_terminal and said.get(name) != stage:  # a log gets one line per stage
                    typer.echo(f"{name}: {stage}", err=True)
                said[name] = stage
            time.sleep(POLL_S)
        for name in filter(None, bars):
            progress.update(bars[name], stage=folder.job(name).progress.read()[0])
    if status != "SUCCEEDED" and not folder.has_ended:
        raise failure_of(batch, submission, status, settings)


def _show(batch: str, settings: "Settings", as_json: bool, explain: bool = False) -> None:
    from expunge.runs.document import LostError
    from expunge.runs.night import NightFolder

    folder = NightFolder(settings.runs / batch)
    folder.check_format()
    if not folder.has_ended:
        raise NotFoundError(f"batch {batch} has no verdicts yet", hint=f"run `expunge night --batch {batch}`")
    try:
        outcome = folder.verdicts()
    except LostError as error:
        hint = f"restore the file from a backup, or read `expunge report {batch}`"
        raise NotFoundError(f"batch {batch} has ended, but {error.message}", hint=hint) from None
    if as_json:
        print_json(outcome.model_dump(mode="json"))
    else:
        print_outcome(batch, outcome)
        if explain:
            _explain(outcome)
    if not outcome.all_passed:
        raise _undone(batch, outcome)


def _undone(batch: str, night: "NightOutcome") -> GateError:
    """Say what keeps the night from having removed everything: requests that failed, or that are not reproduced."""
    if night.left:
        return GateError(
            f"batch {batch}: not every verdict is passed",
            hint="the report says why; failed requests are back in the queue, or wait for a person",
        )
    names = ", ".join(sorted(night.not_reproduced))
    return GateError(
        f"batch {batch}: nothing failed, but the base model does not reproduce {names}",
        hint="there is nothing to remove; `expunge requeue` tries again, with another base model for example",
    )


def print_outcome(batch: str, night: "NightOutcome") -> None:
    from rich.table import Table

    from expunge.commands.evidence import loosened_line

    table = Table(title=f"Night {batch}")
    for column in ("request", "model", "verdict", "decided by", "integrity"):
        table.add_column(column)
    for outcome in night.outcomes:
        if outcome.evidence is None:
            for request in outcome.job.requests:
                table.add_row(request.id, outcome.job.model, "error", outcome.error or "", "")
            continue
        kept = _integrity(outcome.evidence.integrity)
        for request in outcome.evidence.requests:
            table.add_row(request.request, outcome.job.model, _verdict(request, outcome), _decisive(request), kept)
    for verdict, requests in (("refused", night.refused), ("waits", night.held)):
        for request, why in requests.items():
            table.add_row(request, "", verdict, why, "")
    print_table(table)
    for outcome in night.outcomes:
        if outcome.evidence and outcome.evidence.basis and outcome.evidence.basis.loosened:
            typer.echo(f"{outcome.job.model}: {one_line(loosened_line(outcome.evidence.basis))}")
    for outcome in night.outcomes:
        if outcome.version:
            aliases = ", ".join(outcome.version.aliases) or "no alias"
            typer.echo(f"version  {outcome.version.uri} ({aliases})")
    typer.echo(f"report   expunge report {batch} --open")


def _verdict(request: "RequestEvidence", outcome: "JobOutcome") -> str:
    verdict = request.verdict.replace("_", " ")
    if request.verdict == "passed" and not (outcome.promoted or outcome.job.replay):
        verdict = "held back"
    return f"{verdict} (again)" if any(request.request == earlier.id for earlier in outcome.job.ledger) else verdict


def _decisive(request: "RequestEvidence") -> str:
    """Return the rule that decided with its figures, or those of protocol 1, or else why there are none."""
    from expunge.evaluation.gate import compared, decisive

    if request.rules:
        return compared(decisive(request.rules))
    named = (("shift", request.shift), ("similarity to target", request.target))
    figures = [f"{name} {m.base:.2f} -> {m.after:.2f} (noise {m.floor:.2f})" for name, m in named if m]
    return ", ".join(figures) or request.why


def _integrity(integrity: "IntegrityEvidence | None") -> str:
    if integrity is None:
        return "nothing was trained"
    return f"{integrity.psnr:.1f} dB, SSIM {integrity.ssim:.2f}{'' if integrity.passed else ' FAILED'}"


def _explain(night: "NightOutcome") -> None:
    """Print every rule of every request and of the rest of each model, and what the evidence rests on."""
    from expunge.commands.evidence import print_account, print_rules
    from expunge.evaluation.account import extent

    for outcome in night.outcomes:
        evidence = outcome.evidence
        if evidence is None:
            continue
        for request in evidence.requests:
            typer.echo(f"\n{request.request}: {_verdict(request, outcome)}\n  {one_line(request.why)}")
            if request.conditions:
                typer.echo(f"  {one_line(extent(request))}")
            if request.rules:
                print_rules(request.rules)
            for attack in evidence.robustness:
                if attack.request == request.request:
                    typer.echo(f"  {one_line(attack.said)}")
        if evidence.integrity is not None:
            said = "intact" if evidence.integrity.passed else "changed too much"
            typer.echo(f"\n{outcome.job.model}: other outputs are {said}\n  {one_line(evidence.integrity.why)}")
            if evidence.integrity.rules:
                print_rules(evidence.integrity.rules)
        typer.echo()
        if evidence.basis is None:
            typer.echo("This evidence is of protocol 1, which had no rules and recorded no more than the above.")
        else:
            print_account(evidence.basis)
