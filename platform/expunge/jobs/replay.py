"""Replay a champion's removals on Ray: `ray job submit -- python -m expunge.jobs.replay --model NAME --source BASE`.

Everything that the model's champion removes and that can still be trained on is unlearned from another base model,
evaluated, and registered as the candidate. Nothing is promoted, and no request changes its state. A replay that was
killed continues when it is submitted again with the same arguments. The output holds ids only.

Exit codes: 0 success; 1 the job failed; 2 bad input; 4 no champion; 5 a service did not answer; 6 storage failed.
"""

import argparse
import sys

import ray

from expunge.batch.replay import run_replay
from expunge.errors import ExpungeError
from expunge.logs import configure
from expunge.settings import load_settings
from expunge.text import visible


def main(arguments: list[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    try:
        settings = load_settings()
        configure(settings.log_level)
        if args.source is not None:
            settings = settings.with_source(args.model, args.source)
        settings.model(args.model)
        ray.init(log_to_driver=False)
        night = run_replay(settings, args.model, args.home)
    except ExpungeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for request, why in night.refused.items():
        print(visible(f"cannot be replayed: {request}: {why}"))
    for outcome in night.outcomes:
        version = outcome.version.uri if outcome.version else "no version"
        passed = f"passed {len(outcome.passed)} of {len(outcome.job.everything)}"
        print(f"{outcome.job.id}: {outcome.error or version}, {passed}")
    return 1 if any(outcome.error for outcome in night.outcomes) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the model whose champion's removals are replayed")
    parser.add_argument("--source", help="the base model: a folder, or OWNER/NAME@COMMIT (default: its own)")
    parser.add_argument("--home", help="the id of the home that the replay was submitted from; refuse any other home")
    return parser


if __name__ == "__main__":
    sys.exit(main())
