"""`expunge list`, `show`, `withdraw`, `requeue`: where requests stand."""

from typing import TYPE_CHECKING, Annotated

import typer

from expunge.commands.common import AsJson, open_store, print_json, print_table
from expunge.errors import InputError

if TYPE_CHECKING:
    from expunge.requests.schema import RequestRecord
    from expunge.words import RequestState

Id = Annotated[str, typer.Argument(metavar="ID", help="A request's id.")]
Model = Annotated[str | None, typer.Option("--model", help="Only this model's.")]
State = Annotated[str | None, typer.Option("--state", help="accepted, batched, removed, failed or withdrawn.")]
Batch = Annotated[str | None, typer.Option("--batch", help="Only those that were in this batch.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="At most so many.")]


def list_requests(
    model: Model = None, state: State = None, batch: Batch = None, limit: Limit = None, as_json: AsJson = False
) -> None:
    """List requests, oldest first."""
    wanted = None if state is None else _state(state)
    records = open_store().list(model=model, state=wanted, batch=batch, limit=limit)
    if as_json:
        print_json([record.model_dump(mode="json") for record in records])
        return
    from rich.table import Table

    table = Table("id", "model", "state", "priority", "due", "images", "attempts", "batch", "external id", box=None)
    for record in records:
        request = record.request
        cells = (request.priority, request.due or "", len(request.images), record.attempts, record.batch or "")
        table.add_row(request.id, request.model, record.state, *map(str, cells), request.external_id)
    if records:
        print_table(table)
    else:
        typer.echo("no requests")


def show(id: Id, as_json: AsJson = False) -> None:
    """Show one request, its evidence and its history."""
    record = open_store().get(id)
    if as_json:
        print_json(record.model_dump(mode="json"))
        return
    for name, value in _lines(record):
        typer.echo(f"{name:<12} {value}")


def withdraw(id: Id, as_json: AsJson = False) -> None:
    """Withdraw a request that is not in a batch."""
    from expunge.words import RequestState

    record = open_store().transition(id, RequestState.WITHDRAWN, detail="withdrawn by command")
    if as_json:
        print_json({"id": id, "state": record.state})
    else:
        typer.echo(f"withdrawn {id}")


def requeue(id: Id, as_json: AsJson = False) -> None:
    """Put a failed request back into the queue, once what failed it is fixed."""
    from expunge.words import RequestState

    record = open_store().transition(id, RequestState.ACCEPTED, detail="requeued by command")
    if as_json:
        print_json({"id": id, "state": record.state})
    else:
        typer.echo(f"requeued {id}")


def _state(text: str) -> "RequestState":
    from expunge.words import RequestState

    try:
        return RequestState(text)
    except ValueError:
        raise InputError(f"state: {text!r} is none", hint=f"use one of {', '.join(RequestState)}") from None


def _lines(record: "RequestRecord") -> list[tuple[str, object]]:
    request = record.request
    edit = request.edit
    lines: list[tuple[str, object]] = [
        ("id", request.id),
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
        ("due", request.due),
        ("priority", request.priority),
    ]
    for name, value in (record.evidence or {}).items():
        lines.append(("evidence", f"{name}: {value}"))
    for event in record.history:
        where = f" in {event.batch}" if event.batch else ""
        lines.append(("history", f"{event.at:%Y-%m-%d %H:%M:%S} {event.state}{where} {event.detail}".rstrip()))
    return [line for line in lines if line[1] not in (None, "")]
