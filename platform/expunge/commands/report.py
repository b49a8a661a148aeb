"""`expunge report` unseals the report of a night for one reader."""

import tempfile
import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from expunge.commands.common import AsJson, one_line, open_platform, print_json
from expunge.errors import NotFoundError, StorageError

BatchId = Annotated[str, typer.Argument(metavar="BATCH", help="The id of a batch.")]
Open = Annotated[bool, typer.Option("--open", help="Open the report in the browser.")]
Output = Annotated[
    Path | None, typer.Option("--output", metavar="FILE", help="The file to write (default: in a new private folder).")
]


def report(batch: BatchId, show: Open = False, output: Output = None, as_json: AsJson = False) -> None:
    """Write the report of a batch to a file that only you can read, and print its path."""
    opened = open_platform()
    blob = opened.store.batch(batch).report
    if blob is None:
        raise NotFoundError(
            f"batch {batch} has no report yet",
            hint=f"the night has not reached it: see `expunge list --batch {batch}`",
        )
    path = _write(opened.blobs.get(blob), batch, output)
    if as_json:
        print_json({"batch": batch, "path": str(path)})
    else:
        typer.echo(one_line(path))
    if show:
        webbrowser.open(path.as_uri())


def _write(data: bytes, batch: str, output: Path | None) -> Path:
    from expunge.files import write_atomically

    try:
        path = output or Path(tempfile.mkdtemp(prefix="expunge-")) / f"{batch}.html"
        path = path.absolute()
        write_atomically(path, data)
    except OSError as error:
        raise StorageError(f"the report cannot be written ({error})", hint="name another --output") from None
    return path
