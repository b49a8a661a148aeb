"""`expunge doctor` checks that everything is there that a night needs."""

from typing import Annotated

import typer

from expunge.commands.common import AsJson, print_json, print_rows
from expunge.errors import StorageError, UnavailableError

Deep = Annotated[bool, typer.Option("--deep", help="Also open every sealed blob. Exit 6 if a request lacks a picture.")]


def doctor(deep: Deep = False, as_json: AsJson = False) -> None:
    """Check the installation: each row is ok or says how to fix it. Exit 5 if something required is missing."""
    from expunge.doctor import examine, examine_deeply

    checks = examine()
    at_rest = examine_deeply() if deep else []
    if as_json:
        print_json([check.as_dict() for check in [*checks, *at_rest]])
    else:
        every = [*checks, *at_rest]
        rows = [(check.name, check.status, check.found, None if check.ok else check.hint) for check in every]
        print_rows(("check", "", "found", "hint"), rows)
    if any(check.required and not check.ok for check in checks):
        raise typer.Exit(UnavailableError.exit_code)
    if any(check.required and not check.ok for check in at_rest):
        raise typer.Exit(StorageError.exit_code)
