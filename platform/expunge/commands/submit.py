"""`expunge submit` takes one request from the command line, or a file of them."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from expunge.commands.common import AsJson, one_line, open_platform, print_json
from expunge.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from expunge.requests.lines import LineResult
    from expunge.requests.records import RequestRecord

Images = Annotated[
    list[Path] | None, typer.Argument(metavar="IMAGE...", help="Pictures that the model must no longer generate.")
]
Model = Annotated[
    str | None, typer.Option("--model", metavar="NAME", help="The model that must no longer generate them.")
]
Box = Annotated[
    list[str] | None,
    typer.Option(
        "--box",
        metavar="L,T,R,B",
        help="Use this part of IMAGE: left,top,right,bottom in pixels, or in fractions from 0 to 1. "
        "Give one for all images, or one for each.",
    ),
]
Prompt = Annotated[
    str | None, typer.Option("--prompt", metavar="TEXT", help="The prompt that generated them, if known.")
]
Surrogates = Annotated[
    list[Path] | None,
    typer.Option("--surrogate", metavar="IMG", help="The same scene without the part to remove; one for each image."),
]
Edit = Annotated[
    str | None,
    typer.Option(
        "--edit",
        metavar="SPEC",
        help="How to make the surrogates: EDITOR[:key=value,...]; mask=FILE is a key of every editor.",
    ),
]
ExternalId = Annotated[
    str | None,
    typer.Option(
        "--external-id", metavar="ID", help="Your own id for the request. Submitting the same id again changes nothing."
    ),
]
Reason = Annotated[str | None, typer.Option("--reason", metavar="TEXT", help="The reason, for the audit trail.")]
Due = Annotated[
    str | None,
    typer.Option("--due", metavar="DATE", help="The due date, as YYYY-MM-DD. Earlier dates are handled first."),
]
Priority = Annotated[
    int | None, typer.Option("--priority", metavar="N", help="From -10 to 10. Higher priorities are handled first.")
]
Batch = Annotated[
    Path | None,
    typer.Option(
        "--batch", metavar="FILE.jsonl", help="Submit the requests in this file instead, one JSON object per line."
    ),
]

MOST_NOTES = 10


def submit(
    images: Images = None,
    model: Model = None,
    box: Box = None,
    prompt: Prompt = None,
    surrogate: Surrogates = None,
    edit: Edit = None,
    external_id: ExternalId = None,
    reason: Reason = None,
    due: Due = None,
    priority: Priority = None,
    batch: Batch = None,
    as_json: AsJson = False,
) -> None:
    """Submit one removal request with IMAGE and --model, or a file of them with --batch."""
    given = {
        "model": model,
        "images": images,
        "box": box,
        "prompt": prompt,
        "surrogates": surrogate,
        "edit": edit,
        "external_id": external_id,
        "reason": reason,
        "due": due,
        "priority": priority,
    }
    fields: dict[str, object] = {name: value for name, value in given.items() if value not in (None, [])}
    if batch is None:
        _submit_one(fields, as_json)
    elif fields:
        raise InputError(
            f"--batch cannot be combined with {', '.join(fields)}", hint="write them into the file's lines"
        )
    else:
        _submit_file(batch, as_json)


def _submit_one(fields: dict[str, object], as_json: bool) -> None:
    from expunge.preparation.checking import SubmitCheck
    from expunge.requests.intake import accept
    from expunge.requests.submission import Submission, validated

    if "images" not in fields:
        raise InputError("images: none given", hint="name at least one IMAGE, or --batch FILE.jsonl")
    if "model" not in fields:
        raise InputError("model: none given", hint="add --model, `expunge config show` lists them")
    submission = validated(Submission, fields)
    opened = open_platform()
    check = SubmitCheck(opened.settings)
    record, new = accept(
        submission, settings=opened.settings, store=opened.store, blobs=opened.blobs, base=Path.cwd(), check=check
    )
    notes = check.take_notes()
    if as_json:
        told = {"id": record.request.id, "new": new, "state": record.state, "external_id": record.request.external_id}
        print_json({**told, "notes": notes})
        return
    typer.echo(_sentence(record, new))
    for note in notes:
        typer.echo(f"note: {one_line(note)}", err=True)


def _sentence(record: "RequestRecord", new: bool) -> str:
    if new:
        return f"accepted {record.request.id}"
    again = "; to have it removed, submit it with a new --external-id" if record.state == "withdrawn" else ""
    return f"known already: {record.request.id} ({record.state}){again}"


def _submit_file(path: Path, as_json: bool) -> None:
    from expunge.preparation.checking import SubmitCheck
    from expunge.requests.lines import accept_jsonl

    opened = open_platform()
    check = SubmitCheck(opened.settings)
    results: list[LineResult] = []
    notes: dict[int, list[str]] = {}
    with _progress(path, quiet=as_json) as advance:
        for result in accept_jsonl(path, settings=opened.settings, store=opened.store, blobs=opened.blobs, check=check):
            advance(result.end)
            results.append(result)
            noted = check.take_notes()
            if noted and result.id is not None:
                notes[result.line] = noted
    refused = [result for result in results if result.id is None]
    counts = {
        "accepted": sum(r.new for r in results),
        "known": sum(not r.new for r in results) - len(refused),
        "refused": len(refused),
    }
    if as_json:
        lines = [{k: v for k, v in asdict(r).items() if k != "end"} | {"notes": notes.get(r.line, [])} for r in results]
        print_json({**counts, "lines": lines})
    else:
        for result in refused:
            typer.echo(f"error: {result.refusal}", err=True)
        _print_notes(notes)
        kept = "; the accepted ones stay accepted" if refused and len(refused) < len(results) else ""
        typer.echo(f"{counts['accepted']} accepted, {counts['known']} known already, {counts['refused']} refused{kept}")
    if refused:
        raise typer.Exit(InputError.exit_code)


def _print_notes(notes: dict[int, list[str]]) -> None:
    """Print the first notes only: a file may hold thousands of pictures of one shape."""
    for line, told in list(notes.items())[:MOST_NOTES]:
        for note in told:
            typer.echo(f"note: line {line}: {one_line(note)}", err=True)
    if len(notes) > MOST_NOTES:
        typer.echo(f"note: {len(notes) - MOST_NOTES} more lines have such notes; --json lists them all", err=True)


@contextmanager
def _progress(path: Path, *, quiet: bool) -> "Iterator[Callable[[int], None]]":
    """Show a bar over the file's bytes, if stderr is a terminal."""
    if quiet or not sys.stderr.isatty():
        yield lambda end: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("submitting", total=path.stat().st_size if path.is_file() else None)
        yield lambda end: progress.update(task, completed=end)
