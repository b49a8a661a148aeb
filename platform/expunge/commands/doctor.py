"""`expunge doctor`: is everything there that a night needs?"""

import typer

from expunge.commands.common import AsJson, print_json, print_table
from expunge.errors import UnavailableError


def doctor(as_json: AsJson = False) -> None:
    """Check the installation: each row is ok or says how to fix it. Exit 5 if something required is missing."""
    from expunge.doctor import examine

    checks = examine()
    if as_json:
        print_json([check.as_dict() for check in checks])
    else:
        from rich.table import Table

        table = Table("check", "", "found", "hint", box=None)
        for check in checks:
            table.add_row(check.name, check.status, check.found, "" if check.ok else check.hint)
        print_table(table)
    if any(check.required and not check.ok for check in checks):
        raise typer.Exit(UnavailableError.exit_code)
