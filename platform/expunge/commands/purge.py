"""`expunge purge`: destroy what is kept of requests that are decided."""

from typing import Annotated

import typer

from expunge.commands.common import AsJson, open_platform, print_json
from expunge.errors import InputError

Ids = Annotated[
    list[str] | None,
    typer.Argument(metavar="[ID...]", help="Requests to purge now (default: those past their time in [retention])."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="List what would be destroyed.")]
Yes = Annotated[bool, typer.Option("--yes", help="Destroy it.")]


def purge(ids: Ids = None, dry_run: DryRun = False, yes: Yes = False, as_json: AsJson = False) -> None:
    """Destroy the pictures and texts of decided requests; their ids, digests and a certificate stay.

    A removed request that is purged cannot be trained or verified again: the next night's hotfix leaves it out.
    """
    from dataclasses import asdict

    from expunge.batch import purging
    from expunge.text import counted

    if dry_run == yes:
        raise InputError("purge destroys for good", hint="give --dry-run to see what, or --yes to do it")
    opened = open_platform()
    wanted = ids or purging.due(opened.settings, opened.store)
    done = []
    try:
        for id in dict.fromkeys(wanted):
            done.append(purging.purge(opened.settings, opened.store, opened.blobs, id, dry_run=dry_run))
            if not as_json:
                typer.echo(f"{'purged' if yes else 'would purge'} {id}: {done[-1]}")
    finally:
        if yes and done:
            opened.store.database.scrub()
    if as_json:
        print_json({"purged": yes, "certificates": [asdict(each) for each in done]})
    else:
        typer.echo(f"{'purged' if yes else 'would purge'} {counted(len(done), 'request')}")
