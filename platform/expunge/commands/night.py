"""`expunge night`: run what waits, and show how it goes; `expunge verdicts`: what a finished night decided."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from expunge.commands.common import AsJson, open_settings, print_json, print_table
from expunge.errors import ExpungeError, GateError, NotFoundError

if TYPE_CHECKING:
    from expunge.batch.outcome import NightOutcome
    from expunge.settings import Settings

POLL_S = 1.0
# Shares of a job's bar, by what the stages cost on the testbed; a guess elsewhere.
SHARES = {
    "wait": (0, 0),
    "prepare": (0, 10),
    "train": (10, 55),
    "evaluate": (65, 30),
    "register": (95, 5),
    "done": (100, 0),
}

Batch = Annotated[
    str | None, typer.Option("--batch", help="Continue this batch (default: the open one, else a new one).")
]
Models = Annotated[list[str] | None, typer.Option("--model", help="Only requests of this model; may be repeated.")]
Jobs = Annotated[Path, typer.Option("--jobs", help="The folder that holds nightly.py.")]
Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="Wait for the end, showing the progress.")]
BatchId = Annotated[str, typer.Argument(metavar="BATCH", help="A batch's id.")]


def night(
    batch: Batch = None, model: Models = None, jobs: Jobs = Path("jobs"), wait: Wait = True, as_json: AsJson = False
) -> None:
    """Run what waits as one batch, with `ray job submit`. Exits with 3 if a verdict is not `passed`."""
    from expunge.batch.submit import address_of, check_reachable, submit_night
    from expunge.requests.store import open_store

    settings = open_settings()
    check_reachable(address_of(settings))  # before anything is drained
    drained = open_store(settings).drain(batch, model)
    if not drained.requests:
        print_json({"batch": None}) if as_json else typer.echo("nothing to do: no request waits")
        return
    submission = submit_night(drained.id, settings, jobs)
    typer.echo(f"{drained.id}: {len(drained.requests)} requests, Ray job {submission}", err=True)
    if not wait:
        print_json({"batch": drained.id, "submission": submission}) if as_json else typer.echo(drained.id)
        return
    _watch(drained.id, submission, settings)
    _show(drained.id, settings, as_json)


def verdicts(batch: BatchId, as_json: AsJson = False) -> None:
    """Print what a finished night decided. Exits with 3 if a verdict is not `passed`."""
    _show(batch, open_settings(), as_json)


def _watch(batch: str, submission: str, settings: "Settings") -> None:
    """Until the night's Ray job ends, one bar a job. Raises ExpungeError where it fails."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from expunge.batch.plan import Plan
    from expunge.batch.stages import PLAN
    from expunge.batch.stages import Progress as JobProgress
    from expunge.batch.submit import last_words, night_status

    folder = settings.runs / batch
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[stage]}"), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console) as progress:
        bars = {"": progress.add_task("plan", total=100, stage="starting the driver")}
        said: dict[str, str] = {}
        while (status := night_status(batch, submission, settings)) in ("PENDING", "RUNNING"):
            if (folder / PLAN).exists() and "" in bars:
                progress.remove_task(bars.pop(""))
                for job in Plan.model_validate_json((folder / PLAN).read_text()).jobs:
                    bars[job.id] = progress.add_task(job.model, total=100, stage="wait")
            for name in filter(None, bars):
                stage, done, total = JobProgress(folder / name).read()
                start, share = SHARES[stage]
                progress.update(
                    bars[name],
                    completed=start + (share * done / total if total else 0),
                    stage=f"{stage} {done}/{total}" if total else stage,
                )
                if not console.is_terminal and said.get(name) != stage:  # a log gets a line a stage
                    typer.echo(f"{name}: {stage}", err=True)
                said[name] = stage
            time.sleep(POLL_S)
        for name in filter(None, bars):
            progress.update(bars[name], stage=JobProgress(folder / name).read()[0])
    if status != "SUCCEEDED" and not (folder / "night.json").exists():
        raise ExpungeError(
            f"the night's Ray job {submission} is {status}: {last_words(submission, settings)}",
            hint=f"run `expunge night --batch {batch}` to continue",
        )


def _show(batch: str, settings: "Settings", as_json: bool) -> None:
    from expunge.batch.outcome import NightOutcome

    path = settings.runs / batch / "night.json"
    if not path.exists():
        raise NotFoundError(f"batch {batch} has no verdicts yet", hint=f"run `expunge night --batch {batch}`")
    outcome = NightOutcome.model_validate_json(path.read_text())
    if as_json:
        print_json(outcome.model_dump(mode="json"))
    else:
        _print(batch, outcome)
    if not outcome.all_passed:
        raise GateError(
            f"batch {batch}: not every verdict is passed",
            hint="the report says why; what failed is back in the queue or waits for a person",
        )


def _print(batch: str, night: "NightOutcome") -> None:
    from rich.table import Table

    table = Table(title=f"Night {batch}")
    for column in (
        "request",
        "model",
        "verdict",
        "forgetting (shift before -> after)",
        "similarity to target",
        "integrity",
    ):
        table.add_column(column)
    for outcome in night.outcomes:
        if outcome.evidence is None:
            for request in outcome.job.requests:
                table.add_row(request.id, outcome.job.model, "error", outcome.error or "", "", "")
            continue
        integrity = outcome.evidence.integrity
        kept = f"{integrity.psnr:.1f} dB, SSIM {integrity.ssim:.2f}{'' if integrity.passed else ' FAILED'}"
        earlier = {request.id for request in outcome.job.ledger}
        for request in outcome.evidence.requests:
            verdict = "held back" if request.verdict == "passed" and not outcome.promoted else request.verdict
            row = [request.request, outcome.job.model, f"{verdict}{' (again)' if request.request in earlier else ''}"]
            for figure in (request.shift, request.target):
                row.append(f"{figure.base:.2f} -> {figure.after:.2f} (noise {figure.floor:.2f})" if figure else "")
            table.add_row(*row, kept)
    for request, why in night.refused.items():
        table.add_row(request, "", "refused", why, "", "")
    print_table(table)
    for outcome in night.outcomes:
        if outcome.version:
            aliases = ", ".join(outcome.version.aliases) or "no alias"
            typer.echo(f"version  {outcome.version.uri} ({aliases})")
    typer.echo(f"report   expunge report {batch} --open")
