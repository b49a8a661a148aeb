"""The `expunge` command. Its exit codes are those of expunge.errors, and 130 after Ctrl-C."""

import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from typing import Annotated

import typer

from expunge.commands import (
    audit,
    backup,
    bench,
    calibrate,
    config,
    doctor,
    export,
    ledger,
    night,
    plan,
    promote,
    prune,
    purge,
    replay,
    report,
    requests,
    rollback,
    serve,
    submit,
    testbed,
    tokens,
    webhooks,
)
from expunge.commands.common import print_error, unexpected
from expunge.errors import ExpungeError

app = typer.Typer(
    name="expunge",
    help="Remove specific outputs from trained diffusion models, in nightly batches, with evidence.",
    no_args_is_help=True,
    rich_markup_mode=None,  # rich would cost --help more than everything else together
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        config.version()
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
    actor: Annotated[
        str | None, typer.Option("--actor", metavar="NAME", help="Who acts, for the audit log (or EXPUNGE_ACTOR).")
    ] = None,
) -> None:
    """Remove specific outputs from trained diffusion models, in nightly batches, with evidence."""
    if actor is not None:
        os.environ["EXPUNGE_ACTOR"] = actor


app.command("submit")(submit.submit)
app.command("list")(requests.list_requests)
app.command("show")(requests.show)
app.command("withdraw")(requests.withdraw)
app.command("requeue")(requests.requeue)
app.command("night")(night.night)
app.command("verdicts")(night.verdicts)
app.command("report")(report.report)
app.command("replay")(replay.replay)
app.command("ledger")(ledger.ledger)
app.command("promote")(promote.promote)
app.command("rollback")(rollback.rollback)
app.command("export")(export.export)
app.command("prune")(prune.prune)
app.command("purge")(purge.purge)
app.add_typer(webhooks.app, name="webhooks")
app.add_typer(audit.app, name="audit")
app.command("serve")(serve.serve)
app.add_typer(tokens.app, name="tokens")
app.command("backup")(backup.backup)
app.command("restore")(backup.restore)
app.command("plan")(plan.plan)
app.command("calibrate")(calibrate.calibrate)
app.add_typer(config.app, name="config")
app.add_typer(bench.app, name="bench")
app.command("doctor")(doctor.doctor)
app.command("testbed")(testbed.train_testbed)
app.command("version")(config.version)


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code. A failure prints one line, or one JSON object with --json."""
    as_json = "--json" in arguments[: arguments.index("--") if "--" in arguments else None]
    try:
        app(args=list(arguments), prog_name="expunge")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except ExpungeError as error:
        print_error(error, as_json=as_json)
        return error.exit_code
    except Exception as error:  # the last line of defence of a command line
        print_error(unexpected(error), as_json=as_json)
        return ExpungeError.exit_code
    return 0


def main() -> None:
    """Run the command line of this process."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(
                errors="backslashreplace"
            )  # a terminal that cannot show a character must not fail the command
    try:
        sys.exit(run(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
