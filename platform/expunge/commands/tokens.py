"""`expunge tokens`: who may use the HTTP service."""

from datetime import UTC, datetime
from typing import Annotated

import typer

from expunge.commands.common import AsJson, open_store, print_json, print_rows

app = typer.Typer(help="Create, list and revoke the tokens of the HTTP service.", no_args_is_help=True)

COLUMNS = ("id", "tenant", "scopes", "created", "created by", "expires", "revoked")

Tenant = Annotated[str, typer.Option("--tenant", metavar="NAME", help="Whose requests it opens.")]
Scopes = Annotated[
    list[str], typer.Option("--scope", metavar="SCOPE", help="submit, review or admin; may be given several times.")
]
Expires = Annotated[
    datetime | None,
    typer.Option("--expires", formats=["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"], help="When it ends, UTC (default: never)."),
]


@app.command()
def create(tenant: Tenant, scope: Scopes, expires: Expires = None, as_json: AsJson = False) -> None:
    """Create a token and print it, once: only a keyed hash of it is kept."""
    from expunge.service import tokens

    until = None if expires is None else expires.replace(tzinfo=UTC)
    token = tokens.create(open_store(), tenant, scope, until)
    if as_json:
        print_json({"token": token})
    else:
        typer.echo(token)


@app.command("list")
def list_tokens(as_json: AsJson = False) -> None:
    """List all tokens, revoked ones included, without their secrets."""
    from dataclasses import asdict

    from expunge.service import tokens

    found = tokens.listed(open_store())
    if as_json:
        print_json([asdict(each) for each in found])
        return
    rows = [
        (t.id, t.tenant, " ".join(t.scopes), _day(t.created), t.created_by, _day(t.expires), _day(t.revoked))
        for t in found
    ]
    print_rows(COLUMNS, rows)


@app.command()
def revoke(
    id: Annotated[str, typer.Argument(metavar="ID", help="The id of a token: its middle part.")],
    as_json: AsJson = False,
) -> None:
    """Revoke a token at once and for good."""
    from expunge.service import tokens

    tokens.revoke(open_store(), id)
    if as_json:
        print_json({"id": id, "revoked": True})
    else:
        typer.echo(f"revoked {id}")


def _day(at: datetime | None) -> str | None:
    return None if at is None else f"{at:%Y-%m-%d %H:%M}"
