"""`expunge prune`: delete the versions and the weights of nights that nobody can come back to."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from expunge.commands.common import AsJson, open_settings, print_json
from expunge.errors import InputError, StorageError

if TYPE_CHECKING:
    from expunge.requests.store import RequestStore
    from expunge.settings import Settings

Model = Annotated[str, typer.Argument(metavar="MODEL", help="The model.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="List what would be deleted.")]
Yes = Annotated[bool, typer.Option("--yes", help="Delete it.")]


def prune(model: Model, dry_run: DryRun = False, yes: Yes = False, as_json: AsJson = False) -> None:
    """Delete a model's superseded candidates, and checkpoints and weights in the folders of nights that have ended.

    A version with an alias, or one that was ever the champion, is kept. So are checkpoints at training.checkpoint_url.
    """
    from expunge.registry import garbage
    from expunge.registry.tracking import Tracker
    from expunge.requests.leases import lease
    from expunge.requests.store import open_store
    from expunge.runs.locks import promotion_lock
    from expunge.text import counted

    if dry_run == yes:
        raise InputError("prune deletes for good", hint="give --dry-run to see what, or --yes to do it")
    settings = open_settings()
    store, tracker = open_store(settings), Tracker(settings.tracking)
    with lease(store, promotion_lock(model), wait=True) as held:
        # A batch that is still open would look for its version.
        versions = [each for each, batch in garbage.superseded(tracker, model) if store.has_ended(batch)]
        folders = _folders(settings, store, model)
        size = sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())
        if yes:
            for version in versions:
                held.check()
                garbage.delete(tracker, version)
            for folder in folders:
                _remove(folder)
    if as_json:
        uris, paths = [version.uri for version in versions], [str(folder) for folder in folders]
        print_json({"deleted": yes, "versions": uris, "folders": paths, "folder_bytes": size})
        return
    did = "deleted" if yes else "would delete"
    for what in (*(version.uri for version in versions), *folders):
        typer.echo(f"{did} {what}")
    typer.echo(f"{did} {counted(len(versions), 'version')}, and {size / 1e6:,.1f} MB of nights that have ended")


def _folders(settings: "Settings", store: "RequestStore", model: str) -> list[Path]:
    """Return the folders of checkpoints and weights of the model's jobs whose batch has ended."""
    from expunge.runs.job import JobFolder

    found = []
    for batch in (record.id for record in store.batches() if record.closed):
        for path in sorted((settings.runs / batch).glob(f"{model}-*")):
            job = JobFolder(path)
            planned = job.job.read()
            if planned is not None and planned.model == model:
                found += [each for each in (job.checkpoints, job.champion, job.weights) if each.is_dir()]
    return found


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise StorageError(
            f"{folder} cannot be deleted ({error.strerror})", hint="check its permissions, then repeat"
        ) from None
