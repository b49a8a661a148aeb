"""`expunge doctor`: is everything there that a night needs?"""

import typer

from expunge.commands.common import AsJson, print_json, print_rows
from expunge.errors import UnavailableError


def doctor(as_json: AsJson = False) -> None:
    """Check the installation: each row is ok or says how to fix it. Exit 5 if something required is missing."""
    from expunge.doctor import examine

    checks = examine()
    if as_json:
        print_json([check.as_dict() for check in checks])
    else:
        rows = [(check.name, check.status, check.found, None if check.ok else check.hint) for check in checks]
        print_rows(("check", "", "found", "hint"), rows)
    if any(check.required and not check.ok for check in checks):
        raise typer.Exit(UnavailableError.exit_code)
