"""`expunge ledger`: what a version of a model has had removed, and how it differs from another version."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from expunge.commands.common import AsJson, NamedVersion, one_line, open_settings, print_json, print_rows

if TYPE_CHECKING:
    from expunge.registry.ledgers import Contents, Removal

COLUMNS = ("request", "verdict", "since version", "verified at promotion")

Against = Annotated[
    str | None,
    typer.Option("--against", metavar="VERSION", help="Compare with this version or alias of the same model."),
]


def ledger(version: NamedVersion, against: Against = None, as_json: AsJson = False) -> None:
    """Print which requests a version removes, how each was judged on it, and which version first removed it."""
    from expunge.registry.ledgers import contents, only_in, removals
    from expunge.registry.tracking import Tracker
    from expunge.registry.versions import named
    from expunge.requests.blobs import open_blobs

    settings = open_settings()
    tracker, key = Tracker(settings.tracking), open_blobs(settings).derive("ledger")
    found = contents(tracker, named(tracker, version), key)
    if against is None:
        listed = removals(tracker, found)
        if as_json:
            print_json({**_head(found), "removals": [asdict(removal) for removal in listed]})
        else:
            _print(found, listed)
        return
    model = found.version.name
    other = contents(tracker, named(tracker, f"{model}@{against.removeprefix('@')}"), key)
    mine, theirs = found.ledger.requests, other.ledger.requests
    here, there = only_in(mine, theirs), only_in(theirs, mine)
    if as_json:
        print_json({**_head(found), "against": _head(other), "only_here": here, "only_there": there})
    else:
        _print_difference(found, other, here, there)


def _head(found: "Contents") -> dict[str, object]:
    return {
        "model": found.version.name,
        "version": found.version.version,
        "aliases": found.version.aliases,
        "promotion": found.ledger.night,
        "signed": found.signed,
        "loosened": found.evidence.basis.loosened if found.evidence.basis else (),
    }


def _print(found: "Contents", listed: "Sequence[Removal]") -> None:
    from expunge.text import counted

    typer.echo(f"{_name(found)} removes {counted(len(listed), 'request')}")
    if found.evidence.basis and found.evidence.basis.loosened:
        from expunge.commands.evidence import loosened_line

        typer.echo(one_line(loosened_line(found.evidence.basis)))
    if listed:
        print_rows(COLUMNS, ((each.request, each.verdict, each.since, each.verified) for each in listed))


def _print_difference(found: "Contents", other: "Contents", here: Sequence[str], there: Sequence[str]) -> None:
    from expunge.text import counted

    both = len(found.ledger.requests) - len(here)
    typer.echo(f"{_name(found)} and {_name(other)} both remove {counted(both, 'request')}")
    for one, ids in ((found, here), (other, there)):
        typer.echo(f"only {one.version.uri} removes {counted(len(ids), 'request')}{':' if ids else ''}")
        for request in ids:
            typer.echo(f"  {one_line(request)}")


def _name(found: "Contents") -> str:
    aliases = f" ({', '.join(found.version.aliases)})" if found.version.aliases else ""
    return f"{found.version.uri}{aliases}{'' if found.signed else ', which is not signed,'}"
