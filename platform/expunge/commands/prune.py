"""`expunge prune`: delete the versions and the weights of nights that nobody can come back to."""

from typing import Annotated

import typer

from expunge.commands.common import AsJson, open_settings, print_json
from expunge.errors import InputError

Model = Annotated[str, typer.Argument(metavar="MODEL", help="The model.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="List what would be deleted.")]
Yes = Annotated[bool, typer.Option("--yes", help="Delete it.")]


def prune(model: Model, dry_run: DryRun = False, yes: Yes = False, as_json: AsJson = False) -> None:
    """Delete a model's superseded candidates, and checkpoints and weights in the folders of nights that have ended.

    A version with an alias, or one that was ever the champion, is kept. Checkpoints at training.checkpoint_url are
    deleted, too.
    """
    from expunge.batch.leftovers import leftovers
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
        folders = leftovers(settings, store, model)
        if yes:
            for version in versions:
                held.check()
                garbage.delete(tracker, version)
            for folder in folders:
                folder.delete()
    size = sum(folder.size for folder in folders)
    if as_json:
        uris, paths = [version.uri for version in versions], [folder.name for folder in folders]
        print_json({"deleted": yes, "versions": uris, "folders": paths, "folder_bytes": size})
        return
    did = "deleted" if yes else "would delete"
    for what in (*(version.uri for version in versions), *(folder.name for folder in folders)):
        typer.echo(f"{did} {what}")
    typer.echo(f"{did} {counted(len(versions), 'version')}, and {size / 1e6:,.1f} MB of nights that have ended")
