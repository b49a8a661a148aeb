"""`expunge export`: hand a version over as files for plain diffusers."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from expunge.commands.common import AsJson, NamedVersion, libraries_on_stderr, one_line, open_settings, print_json

Format = Annotated[
    Literal["diffusers", "lora", "merged"],
    typer.Option(
        "--format",
        help="lora: the adapter alone. diffusers: the changed network alone. merged: a whole pipeline.",
    ),
]
Out = Annotated[Path, typer.Option("--out", metavar="FOLDER", help="A new or empty folder.")]
Base = Annotated[
    str | None,
    typer.Option(
        "--base", metavar="SOURCE", help="The base model: a folder, or OWNER/NAME@COMMIT (default: as trained)."
    ),
]


def export(version: NamedVersion, form: Format, out: Out, base: Base = None, as_json: AsJson = False) -> None:
    """Write a version to a folder that diffusers loads without Expunge. Its files are checked first."""
    from expunge.registry.tracking import Tracker
    from expunge.registry.versions import named

    tracker = Tracker(open_settings().tracking)
    found = named(tracker, version)
    folder = out.expanduser().absolute()
    with libraries_on_stderr():
        from expunge.registry.export import export

        export(tracker, found.uri, form, folder, base=base)
    if as_json:
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        print_json({"version": found.uri, "format": form, "folder": str(folder), "files": files})
    else:
        typer.echo(one_line(folder))
