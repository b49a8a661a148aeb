"""Run a night on Ray: `ray job submit -- python -m expunge.jobs.nightly [--batch ID]`.

Whatever is personal stays in the store: the arguments and the output hold ids only. A night that was killed continues
when it is submitted again.
"""

import argparse
import sys

import ray

from expunge.batch.driver import run_night
from expunge.errors import ExpungeError
from expunge.logs import configure
from expunge.requests.store import nothing_to_do, open_store
from expunge.settings import load_settings


def main(arguments: list[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    try:
        settings = load_settings()
        configure(settings.log_level)
        ray.init(log_to_driver=False)
        night = run_night(settings, args.batch, args.model, args.home)
        if night is None:
            print(nothing_to_do(open_store(settings), args.model))
            return 0
    except ExpungeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for outcome in night.outcomes:
        version = outcome.version.uri if outcome.version else "no version"
        passed = f"passed {len(outcome.passed)} of {len(outcome.job.everything)}"
        print(f"{outcome.job.id}: {outcome.error or version}, {passed}")
    return 1 if any(outcome.error for outcome in night.outcomes) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", help="the batch to run or continue (default: the open one, else a new one)")
    parser.add_argument("--model", action="append", help="only requests of this model; may be repeated")
    parser.add_argument("--home", help="the id of the home that the night was submitted from; refuse any other home")
    return parser


if __name__ == "__main__":
    sys.exit(main())
