"""`expunge webhooks`: what was told to the webhook, and what waits to be told."""

import json
from typing import Annotated

import typer

from expunge.commands.common import AsJson, open_settings, open_store, print_json, print_rows
from expunge.errors import UnavailableError

app = typer.Typer(help="Show and deliver the messages of the webhook.", no_args_is_help=True)

COLUMNS = ("message", "created (UTC)", "event", "model", "version", "attempts", "state")

Limit = Annotated[int, typer.Option("--limit", min=1, help="How many of the last messages to show.")]


@app.command("list")
def list_messages(limit: Limit = 50, as_json: AsJson = False) -> None:
    """Show the last messages, oldest first: promotions and rollbacks, and whether the webhook has got them."""
    found = open_store().all_messages()[-limit:]
    if as_json:
        print_json(
            [
                {
                    "message": each.number,
                    **json.loads(each.body),
                    "attempts": each.attempts,
                    "delivered": each.delivered,
                    "error": each.error,
                }
                for each in found
            ]
        )
        return
    rows = []
    for each in found:
        waiting = each.error or ("waits" if each.happened else "the champion was not replaced yet")
        created = f"{each.created:%Y-%m-%d %H:%M:%S}"
        state = "delivered" if each.delivered else waiting
        rows.append((each.number, created, each.event, each.model, each.version, each.attempts, state))
    print_rows(COLUMNS, rows)


@app.command()
def deliver(as_json: AsJson = False) -> None:
    """Send every message that waits. Exit 5 if the webhook does not take one; those behind it wait, too."""
    from expunge.batch.webhooks import deliver
    from expunge.registry.tracking import Tracker
    from expunge.text import counted

    settings = open_settings()
    sent, left = deliver(settings, open_store(), Tracker(settings.tracking))
    if as_json and not left:
        print_json({"delivered": sent})
    elif not as_json:
        typer.echo(f"delivered {counted(sent, 'message')}")
    if left:
        raise UnavailableError(
            f"message {left[0].number} was not delivered ({left[0].error}); {counted(len(left), 'message')} wait",
            hint="check the webhook, then run `expunge webhooks deliver`",
        )
