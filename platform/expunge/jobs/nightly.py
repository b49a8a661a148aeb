"""Run a night on Ray: `ray job submit -- python -m expunge.jobs.nightly [--batch ID | --requests URL]`.

Personal data stays in the store: the output holds ids only. A night that was killed continues when it is submitted
again.

With --requests, the night takes in a file of requests, one JSON object per line, and runs only those: the batch that
still has one of them to decide, or a new batch of those that wait. Pictures are paths or URLs; relative ones are looked
up beside the file. Ray shows a job's arguments in clear, so a URL with credentials or a query is
refused: put credentials into the environment of Ray's nodes.

Exit codes: 0 success, or nothing to do; 1 a job failed; 2 bad input, or a line of the file was refused (the others are
run); 4 not found; 5 a service did not answer; 6 storage failed.
"""

import argparse
import sys
from contextlib import closing

import ray

from expunge.batch.driver import run_night
from expunge.errors import ExpungeError
from expunge.logs import configure
from expunge.preparation.checking import SubmitCheck
from expunge.requests.batch_file import take_in
from expunge.requests.blobs import open_blobs
from expunge.requests.home import check_home
from expunge.requests.store import nothing_to_do, open_store
from expunge.settings import Settings, load_settings


def main(arguments: list[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    try:
        settings = load_settings()
        configure(settings.log_level)
        return _run_file(settings, args) if args.requests else _run(settings, args.batch, args)
    except ExpungeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _run(settings: Settings, batch: str | None, args: argparse.Namespace) -> int:
    ray.init(log_to_driver=False)
    night = run_night(settings, batch, args.model, args.home)
    if night is None:
        print(nothing_to_do(open_store(settings), args.model))
        return 0
    for outcome in night.outcomes:
        version = outcome.version.uri if outcome.version else "no version"
        passed = f"passed {len(outcome.passed)} of {len(outcome.job.everything)}"
        print(f"{outcome.job.id}: {outcome.error or version}, {passed}")
    return 1 if any(outcome.error for outcome in night.outcomes) else 0


def _run_file(settings: Settings, args: argparse.Namespace) -> int:
    """Take in the file and run its requests. Raises InputError at the end if a line was refused."""
    if args.home is not None:
        check_home(settings, args.home)
    with closing(open_store(settings)) as store:
        blobs, check = open_blobs(settings), SubmitCheck(settings)
        file = take_in(args.requests, settings=settings, store=store, blobs=blobs, check=check, private=True)
        for line in file.refused:
            print(f"error: {line.refusal}", file=sys.stderr)
        print(file.summary())
        batch = store.drain(args.batch, args.model, settings.night_limit, only=file.ids)
    if not batch.requests:
        print("nothing to do: no request of the file waits")
    code = _run(settings, batch.id, args) if batch.requests else 0
    if not code:
        file.check()
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", help="the batch to run or continue (default: the open one, or a new one)")
    parser.add_argument("--model", action="append", help="only requests of this model; may be repeated")
    parser.add_argument("--requests", metavar="URL", help="submit the requests in this file, and run only those")
    parser.add_argument("--home", help="the id of the home that the night was submitted from; refuse any other home")
    return parser


if __name__ == "__main__":
    sys.exit(main())
