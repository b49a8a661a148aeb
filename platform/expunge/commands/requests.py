"""`expunge list`, `show`, `withdraw` and `requeue`: look at requests, and move them."""

from datetime import date
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from expunge.commands.common import AsJson, one_line, open_platform, open_store, print_json, print_json_list, print_rows
from expunge.errors import InputError

if TYPE_CHECKING:
    from expunge.requests.records import RequestRecord
    from expunge.types import RequestState

LIMIT = 100
TABLE = 1000
"""How many rows are printed as one table. Its columns fit the widest row, so nothing is printed before the last."""

COLUMNS = ("id", "model", "state", "priority", "due", "days left", "images", "attempts", "batch", "external id")

Id = Annotated[str, typer.Argument(metavar="ID", help="The id of a request.")]
Model = Annotated[str | None, typer.Option("--model", metavar="NAME", help="List only this model's requests.")]
State = Annotated[
    str | None,
    typer.Option(
        "--state",
        metavar="STATE",
        help="List only requests that are accepted, batched, removed, failed, not_reproduced, withdrawn or purged.",
    ),
]
Batch = Annotated[
    str | None, typer.Option("--batch", metavar="ID", help="List only requests that were ever in this batch.")
]
Limit = Annotated[
    int | None,
    typer.Option("--limit", min=1, max=10**9, help=f"List at most this many (default: {LIMIT}; with --json, all)."),
]
After = Annotated[str | None, typer.Option("--after", metavar="ID", help="Start after this request: the next page.")]
ByDue = Annotated[bool, typer.Option("--by-due", help="List what is due soonest first.")]


def list_requests(
    model: Model = None,
    state: State = None,
    batch: Batch = None,
    limit: Limit = None,
    after: After = None,
    by_due: ByDue = False,
    as_json: AsJson = False,
) -> None:
    """List requests, oldest first."""
    wanted = None if state is None else _state(state)
    store = open_store()
    if as_json:
        records = store.each(model, wanted, batch, limit, after, by_due=by_due)
        print_json_list(record.model_dump(mode="json") for record in records)
        return
    shown, left, last = 0, limit or LIMIT, after
    page = partial(store.list, model, wanted, batch, history=False, by_due=by_due)
    while left > 0 and (records := page(min(left, TABLE), last)):
        print_rows(COLUMNS, map(_row, records), header=not shown)
        shown, left, last = shown + len(records), left - len(records), records[-1].request.id
    if not shown:
        typer.echo("no requests" if after is None else "no more requests")
    elif not left and page(1, last):
        total = store.total(model, wanted, batch)
        typer.echo(f"showing {shown:,} of {total:,}; for more, add --after {last} or a larger --limit", err=True)


def _row(record: "RequestRecord") -> tuple[object, ...]:
    request = record.request
    counts = (request.priority, record.due, record.days_left(date.today()), len(request.images), record.attempts)
    return (request.id, request.model, record.state, *counts, record.batch, request.external_id)


def show(id: Id, as_json: AsJson = False) -> None:
    """Show one request, its evidence and its history."""
    record = open_store().get(id)
    if as_json:
        print_json(record.model_dump(mode="json"))
        return
    for name, value in _lines(record):
        typer.echo(f"{name:<12} {one_line(value)}")
    if record.evidence:
        from expunge.commands.evidence import print_evidence

        typer.echo()
        print_evidence(record.evidence)


def withdraw(id: Id, as_json: AsJson = False) -> None:
    """Withdraw a request that is not in a batch, and delete its pictures unless another request needs them."""
    from expunge.batch.purging import drop_pictures
    from expunge.types import RequestState

    opened = open_platform()
    record = opened.store.transition(id, RequestState.WITHDRAWN, reason="withdrawn")
    drop_pictures(opened.store, opened.blobs, record)
    if as_json:
        print_json({"id": id, "state": record.state})
    else:
        typer.echo(f"withdrawn {id}")


def requeue(id: Id, as_json: AsJson = False) -> None:
    """Put a request back into the queue that failed, after fixing what made it fail, or that was not reproduced."""
    from expunge.types import RequestState

    record = open_store().transition(id, RequestState.ACCEPTED, reason="requeued", attempt=False)
    if as_json:
        print_json({"id": id, "state": record.state})
    else:
        typer.echo(f"requeued {id}")


def _due(record: "RequestRecord") -> str | None:
    left = record.days_left(date.today())
    return None if record.due is None else str(record.due) if left is None else f"{record.due} ({left} days left)"


def _state(text: str) -> "RequestState":
    from expunge.types import RequestState

    try:
        return RequestState(text)
    except ValueError:
        raise InputError(f"state: {text!r} is not a state", hint=f"use one of {', '.join(RequestState)}") from None


def _lines(record: "RequestRecord") -> list[tuple[str, object]]:
    from expunge.types import DEFAULT_TENANT

    request = record.request
    edit = request.edit
    lines: list[tuple[str, object]] = [
        ("id", request.id),
        ("tenant", None if record.tenant == DEFAULT_TENANT else record.tenant),
        ("external id", request.external_id),
        ("model", request.model),
        ("state", record.state),
        ("batch", record.batch),
        ("attempts", record.attempts),
        ("images", len(request.images)),
        ("surrogates", len(request.surrogates) or None),
        ("edit", None if edit is None else edit.editor),
        ("prompt", request.prompt),
        ("reason", request.reason),
        ("due", _due(record)),
        ("priority", request.priority),
    ]
    for event in record.history:
        where = f" in {event.batch}" if event.batch else ""
        detail = f": {event.detail}" if event.detail else ""
        lines.append(("history", f"{event.at:%Y-%m-%d %H:%M:%S} {event.state}{where}{detail}"))
    return [line for line in lines if line[1] not in (None, "")]
