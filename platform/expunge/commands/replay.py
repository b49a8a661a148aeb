"""`expunge replay`: unlearn what a champion removes from another base model."""

from typing import TYPE_CHECKING, Annotated

import typer

from expunge.commands.common import AsJson, one_line, open_settings, print_json
from expunge.commands.night import print_outcome, watch
from expunge.errors import ExpungeError, GateError

if TYPE_CHECKING:
    from expunge.batch.replay import Replay
    from expunge.runs.outcomes import JobOutcome

ENTRY_POINT = ("python", "-m", "expunge.jobs.replay")

Model = Annotated[str, typer.Argument(metavar="MODEL", help="The model whose champion's removals are replayed.")]
Source = Annotated[
    str | None,
    typer.Option(
        "--source",
        metavar="BASE",
        help="The new base model: a folder, or OWNER/NAME@COMMIT (default: the model's own source).",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="List what can be replayed, and what cannot.")]
Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it ends, and show its progress.")]


def replay(
    model: Model, source: Source = None, dry_run: DryRun = False, wait: Wait = True, as_json: AsJson = False
) -> None:
    """Unlearn everything that a model's champion removes from another base model. Exit 3 if a removal is not proven.

    The result is registered as the candidate; the champion stays, and no request changes its state. Removals whose
    pictures are gone cannot be replayed, and are listed. A replay that was stopped continues with the same command.
    """
    from expunge.batch.replay import look
    from expunge.batch.submit import address_of, check_reachable, submit_driver
    from expunge.registry.tracking import Tracker
    from expunge.requests.blobs import open_blobs
    from expunge.requests.store import open_store
    from expunge.runs.night import NightFolder
    from expunge.text import counted

    settings = open_settings()
    settings = settings.with_source(model, source) if source is not None else settings
    found = look(settings, open_store(settings), open_blobs(settings), Tracker(settings.tracking), model)
    told = {"batch": found.batch, "champion": found.champion.uri, "refused": found.refused}
    if not as_json:
        for request, why in found.refused.items():
            typer.echo(f"cannot be replayed: {one_line(request)}: {why}", err=not dry_run)
    if dry_run:
        if as_json:
            print_json({**told, "requests": [request.id for request in found.requests]})
            return
        for request in found.requests:
            typer.echo(f"would be replayed: {one_line(request.id)}")
        return
    check_reachable(address_of(settings))
    entry = [*ENTRY_POINT, "--model", model, *(["--source", source] if source is not None else [])]
    submission = submit_driver(found.batch, entry, settings)
    typer.echo(f"{found.batch}: {counted(len(found.requests), 'removal')}, Ray job {submission}", err=True)
    if not wait:
        print_json({**told, "submission": submission}) if as_json else typer.echo(found.batch)
        return
    watch(found.batch, submission, settings)
    outcome = NightFolder(settings.runs / found.batch).verdicts()
    [job] = outcome.outcomes
    if as_json:
        removed, version = sorted(job.passed), job.version.uri if job.version else None
        print_json({**told, "version": version, "removed": removed, "error": job.error})
    else:
        print_outcome(found.batch, outcome)
    _say(found, job, source, quiet=as_json)


def _say(found: "Replay", job: "JobOutcome", source: str | None, *, quiet: bool) -> None:
    """Say how to serve the version. Raises ExpungeError if there is none, GateError if it lacks a removal."""
    name = found.champion.name
    if job.error is not None:
        raise ExpungeError(f"{job.job.id}: {job.error}", hint="repeat this command after that is put right")
    version = job.version
    if version is not None and not quiet:
        first = "" if source is None else f'set source = "{source}" in [models.{name}], and then '
        typer.echo(f"to serve it: {first}run `expunge promote {name} {version.version}`")
    lacking = [*found.refused, *(request.id for request in found.requests if request.id not in job.passed)]
    if lacking:
        raise GateError(
            f"{version.uri if version else 'no version'} does not remove {', '.join(lacking)}",
            hint=f"see `expunge verdicts {found.batch} --explain`",
        )
