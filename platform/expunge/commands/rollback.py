"""`expunge rollback`: serve an earlier champion again."""

from typing import Annotated

import typer

from expunge.commands.common import AsJson, one_line, open_platform, print_json
from expunge.commands.promote import check_resurfacing
from expunge.errors import InputError

Model = Annotated[str, typer.Argument(metavar="MODEL", help="The model to roll back.")]
To = Annotated[str, typer.Option("--to", metavar="VERSION", help="An earlier version that was the champion.")]
Accept = Annotated[
    bool, typer.Option("--accept-resurfacing", help="Roll back although this brings removed outputs back.")
]


def rollback(model: Model, to: To, accept_resurfacing: Accept = False, as_json: AsJson = False) -> None:
    """Make an earlier champion the champion again. Exit 3 if that would bring removed outputs back.

    With --accept-resurfacing it is done, and the requests that resurface go back to the queue for the next night. Who
    did it is kept in the history of every request that is concerned.
    """
    from expunge.batch.promoting import roll_back, weigh
    from expunge.batch.webhooks import deliver_what_waits
    from expunge.registry.artifacts import checked_files
    from expunge.registry.ledgers import contents
    from expunge.registry.tracking import Tracker
    from expunge.registry.versions import champion, former_champions, named

    opened = open_platform()
    tracker, key = Tracker(opened.settings.tracking), opened.blobs.derive("ledger")
    target = named(tracker, f"{model}@{to}")
    now = champion(tracker, model)
    if now is not None and int(target.version) > int(now.version):
        raise InputError(
            f"--to: version {target.version} is newer than the champion, {now.version}",
            hint=f"run `expunge promote {model} {target.version}`",
        )
    if target.version not in former_champions(tracker, model):
        raise InputError(
            f"--to: {target.uri} was never the champion, so no gate has let it pass",
            hint=f"run `expunge promote {model} {target.version}`, which verifies it",
        )
    change = weigh(opened.store, tracker, contents(tracker, target, key))
    check_resurfacing(change, accept_resurfacing, f"a rollback to {target.uri}", "roll back")
    with checked_files(tracker, target):
        done = roll_back(opened.store, tracker, change, opened.settings.acting)
    deliver_what_waits(opened.settings, opened.store, tracker)
    if as_json:
        before = change.before.version if change.before else None
        print_json({"model": model, "champion": done.version, "before": before, "resurfaced": change.resurfacing})
        return
    typer.echo(f"champion {done.uri}")
    for request in change.resurfacing:
        typer.echo(f"back in the queue: {one_line(request)}")
