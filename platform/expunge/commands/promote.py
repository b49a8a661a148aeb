"""`expunge promote`: make the champion a version that no night has promoted, or an older one again."""

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from expunge.commands.common import AsJson, Opened, libraries_on_stderr, one_line, open_platform, print_json
from expunge.errors import GateError, InputError

if TYPE_CHECKING:
    from pathlib import Path

    from expunge.batch.promoting import Change
    from expunge.registry.ledgers import Contents
    from expunge.registry.tracking import Tracker

Model = Annotated[str, typer.Argument(metavar="MODEL", help="The model.")]
Version = Annotated[str, typer.Argument(metavar="VERSION", help="The version or alias to promote, such as candidate.")]
Resurfacing = Annotated[
    bool, typer.Option("--accept-resurfacing", help="Promote although this brings removed outputs back.")
]
Failed = Annotated[
    bool, typer.Option("--accept-failed", help="Promote although the evidence fails; this is recorded with your name.")
]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]


def promote(
    model: Model,
    version: Version,
    accept_resurfacing: Resurfacing = False,
    accept_failed: Failed = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Make a version the champion, after every removal in its ledger was verified. Exit 3 if one is not proven.

    Unless the version's own evidence covers its whole ledger, this loads the model and evaluates the version again,
    which takes as long as in a night. What it does not remove goes back to the queue; what it removes and waits in the
    queue becomes removed.
    """
    from expunge.batch.promoting import promote_by_hand, weigh
    from expunge.batch.webhooks import deliver_what_waits
    from expunge.registry.artifacts import checked_files
    from expunge.registry.ledgers import contents
    from expunge.registry.tracking import Tracker
    from expunge.registry.versions import named

    if not yes and (as_json or not sys.stdin.isatty()):
        raise InputError("there is nobody to ask for a confirmation", hint="add --yes")
    opened = open_platform()
    tracker, key = Tracker(opened.settings.tracking), opened.blobs.derive("ledger")
    found = contents(tracker, named(tracker, f"{model}@{version}"), key)
    first = weigh(opened.store, tracker, found)
    check_resurfacing(first, accept_resurfacing, found.version.uri, "promote it")
    with checked_files(tracker, found.version) as weights:
        verified = _verified(found, weights, tracker, opened)
        failures = _failures(found, verified)
        if failures and not accept_failed:
            raise GateError(
                f"{found.version.uri} does not pass: {'; '.join(failures)}",
                hint="add --accept-failed to promote it anyway, which is recorded with your name",
            )
        # Over the champion that was there before the verification: another one by now has the last word.
        change = replace(weigh(opened.store, tracker, verified), before=first.before)
        check_resurfacing(change, accept_resurfacing, found.version.uri, "promote it")
        if not yes:
            typer.confirm(_question(change, failures), abort=True, err=True)
        accepted = f", who accepted: {'; '.join(failures)}" if failures else ""
        record = None if verified is found else key
        done = promote_by_hand(opened.store, tracker, change, opened.settings.acting, accepted=accepted, record=record)
    deliver_what_waits(opened.settings, opened.store, tracker)
    if as_json:
        before = change.before.version if change.before else None
        moved = {"resurfaced": change.resurfacing, "removed": change.waiting, "accepted_failures": failures}
        print_json({"model": model, "champion": done.version, "before": before, **moved})
        return
    typer.echo(f"champion {done.uri}")
    for said, requests in (("removed", change.waiting), ("back in the queue", change.resurfacing)):
        for request in requests:
            typer.echo(f"{said}: {one_line(request)}")


def check_resurfacing(change: "Change", accepted: bool, what: str, act: str) -> None:
    """Raise GateError if `what` would bring back removals and nobody has accepted that. act: as in "to ACT anyway"."""
    from expunge.text import counted

    if change.resurfacing and not accepted:
        raise GateError(
            f"{what} would bring back {counted(len(change.resurfacing), 'removal')}: {', '.join(change.resurfacing)}",
            hint=f"add --accept-resurfacing to {act} anyway; the next night removes them again",
        )


def _verified(found: "Contents", weights: "Path", tracker: "Tracker", opened: Opened) -> "Contents":
    """Return the version with evidence about its whole ledger, and what it removes by that evidence."""
    from expunge.batch.verifying import check_base, is_verified, ledger_after, unproven, verify_again
    from expunge.text import counted

    check_base(found.version, weights, opened.settings)
    evidence = found.evidence
    if not is_verified(found, opened.settings):
        typer.echo(f"verifying {counted(len(found.ledger.requests), 'removal')} on {found.version.uri}", err=True)
        with libraries_on_stderr():
            evidence = verify_again(found, weights, opened.settings, opened.store, opened.blobs)
    elif not unproven(found, evidence):
        return found
    return replace(found, evidence=evidence, ledger=ledger_after(tracker, found, evidence))


def _failures(found: "Contents", verified: "Contents") -> list[str]:
    """Return in words what the evidence does not show: removals by their id, and that other outputs are intact."""
    from expunge.batch.verifying import unproven

    evidence = verified.evidence
    verdicts = {request: verified.verdict(request) for request in unproven(found, evidence)}
    failures = [f"{request} {verdict}" for request, verdict in verdicts.items() if verdict != "passed"]
    if evidence.integrity is None or not evidence.integrity.passed:
        failures.append("unrelated outputs changed too much")
    elif not evidence.passed:
        failures.append("it is not shown to remove anything")
    return failures


def _question(change: "Change", failures: list[str]) -> str:
    over = f" over {change.before.uri}" if change.before else ""
    lines = [f"{change.after.version.uri} becomes the champion{over}. It removes {len(change.after.ledger.requests)}."]
    lines += [f"Accepted: {failure}." for failure in failures]
    lines += [f"Brought back: {', '.join(change.resurfacing)}."] if change.resurfacing else []
    return one_line(" ".join((*lines, "Go on?")))
