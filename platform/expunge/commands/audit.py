"""`expunge audit`: check the audit log, and show one request's whole life."""

from typing import Annotated

import typer

from expunge.commands.common import AsJson, open_store, print_json, print_rows
from expunge.errors import StorageError

app = typer.Typer(help="Check the audit log, and show what it says of a request.", no_args_is_help=True)

COLUMNS = ("time (UTC)", "from", "to", "reason", "actor", "version", "batch", "detail")


@app.command()
def verify(as_json: AsJson = False) -> None:
    """Recompute the audit log from its first event; exit code 6 if a row was changed, removed or put in between."""
    from expunge.text import counted

    found = open_store().verify_audit()
    if as_json and found.problem is None:
        print_json({"events": found.events, "clock_set_back_at": found.backwards, "anchored": found.anchored})
    if found.problem is not None:
        hint = "compare it with a backup, and ask who could write to the database"
        raise StorageError(f"audit log: {found.problem}", hint=hint)
    if as_json:
        return
    typer.echo(f"{counted(found.events, 'event')}, unbroken")
    if found.anchored is None:
        typer.echo("the home has no copy of the log's head: an old database put back as a whole would not be noticed")
    if found.backwards:
        some = ", ".join(map(str, found.backwards[:5])) + (", ..." if len(found.backwards) > 5 else "")
        typer.echo(
            f"a clock was set back before {counted(len(found.backwards), 'event')} ({some}); the numbers order them"
        )


@app.command()
def show(
    id: Annotated[str, typer.Argument(metavar="ID", help="The id of a request.")], as_json: AsJson = False
) -> None:
    """Show every event of a request: when, who, from where to where, and why."""
    record = open_store().get(id)
    if as_json:
        print_json(
            {"request": id, "state": record.state, "events": [e.model_dump(mode="json") for e in record.history]}
        )
        return
    rows = (
        (
            f"{event.at:%Y-%m-%d %H:%M:%S}",
            event.previous,
            event.state,
            event.reason,
            event.actor,
            event.release,
            event.batch,
            event.detail,
        )
        for event in record.history
    )
    print_rows(COLUMNS, rows)
