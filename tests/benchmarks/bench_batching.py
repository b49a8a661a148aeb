"""Measure what batching saves: requests that pass their gate per CPU-hour, in one job together and in one job each.

    python -m tests.benchmarks.bench_batching [--model flags] [--together 4,16] [--alone 4] [--then 4] [--others] [ARM]

Each night is a whole one, on a Ray and a home of its own: prepare, train, evaluate, register, gate, report. Every
process that it starts counts, Ray's own too, sampled twice a second. ARM is JSON over [training], one for each night
of `--together`, or one for all of them; requests alone have the defaults.

`--then` N adds a second night of N more requests after each of `--together`: a job that begins with the first one's
hotfix and must prove both nights' removals. Its row counts that night's requests and CPU time alone, and what it proves
of the first night is in `proven again`.

The first row sums up `--alone` nights of one request each, the first ones of those that the other nights have together.
`against one job each` is a row's requests per CPU-hour over those of the first row.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from torch import Tensor

from expunge.jobs.local_ray import environment_for, local_ray
from expunge.pixels import to_pictures, to_png
from expunge.runs.night import NightFolder
from tests.integration.nights import BIN

FIELDS = (
    "requests",
    "arm",
    "passed",
    "proven again",
    "CPU s",
    "passed per CPU-hour",
    "against one job each",
    "who passed",
)
MOST = {"faces": 16, "flags": 31}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="*", default=["{}"], metavar="ARM")
    parser.add_argument("--model", default="flags", choices=("faces", "flags"))
    parser.add_argument("--together", default="4,16", help="requests of each night")
    parser.add_argument("--then", type=int, default=0, help="requests of a second night after each of them")
    parser.add_argument("--alone", type=int, default=4, help="nights of one request")
    parser.add_argument("--others", action="store_true", help="other requests than those that settings were tried on")
    arguments = parser.parse_args()
    together = [int(word) for word in arguments.together.split(",") if word]
    if max([arguments.alone, *together]) + arguments.then > MOST[arguments.model]:
        parser.error(f"{arguments.model} has {MOST[arguments.model]} requests at most")
    arms = arguments.arms * len(together) if len(arguments.arms) == 1 else arguments.arms
    table = csv.DictWriter(sys.stdout, FIELDS)
    table.writeheader()
    single = 0.0

    def row(name: str, arm: str, ended: list[Night]) -> None:
        nonlocal single
        passed, seconds = sorted(p for night in ended for p in night.passed), sum(night.seconds for night in ended)
        rate = len(passed) / seconds * 3600
        single = single or (rate if arguments.alone else 0.0)
        again = " ".join(night.again for night in ended if night.again)
        against = round(rate / single, 2) if single else ""
        figures = (name, arm, len(passed), again, round(seconds), round(rate, 1), against, " ".join(passed))
        table.writerow(dict(zip(FIELDS, figures, strict=True)))
        sys.stdout.flush()

    def nights(arm: str, *who: list[int]) -> list[Night]:
        return list(_nights(arguments.model, who, arm, arguments.others))

    if arguments.alone:
        row(f"{arguments.alone} x 1", "{}", [night for i in range(arguments.alone) for night in nights("{}", [i])])
    for count, arm in zip(together, arms, strict=True):
        first, *second = nights(arm, list(range(count)), list(range(count, count + arguments.then)))
        row(str(count), arm, [first])
        for night in second:
            row(f"{arguments.then} more", arm, [night])


@dataclass(frozen=True)
class Night:
    passed: list[str]
    again: str
    """The number of requests of earlier nights that it has proven again."""
    seconds: float
    """CPU time of everything that was started, in seconds."""


def _nights(model: str, whose: tuple[list[int], ...], arm: str, others: bool) -> Iterator[Night]:
    """Run the nights one after the other, in one home."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        home = Path(folder)
        environment = {**environment_for(home), "EXPUNGE_TRAINING": arm}
        for who in filter(None, whose):
            before = set((home / "runs").glob("night-*/"))
            with _CpuTime() as clock, local_ray(environment) as address:
                environment["EXPUNGE_RAY_ADDRESS"] = address
                for words in (
                    ("submit", "--batch", str(_requests(home, model, who, others))),
                    ("night",),
                ):
                    subprocess.run([BIN / "expunge", *words], env=environment, check=False, stdout=sys.stderr)
            [ended] = set((home / "runs").glob("night-*/")) - before
            night = NightFolder(ended).outcome
            assert night is not None
            jobs = night.outcomes
            passed = [r.external_id for job in jobs for r in job.job.requests if r.id in job.passed]
            earlier = [r.id in job.passed for job in jobs for r in job.job.ledger]
            yield Night(passed, f"{sum(earlier)} of {len(earlier)}" if earlier else "", clock.seconds)


def _requests(folder: Path, model: str, who: list[int], others: bool) -> Path:
    """Pick the requests at `who` from a list that is spread over what the model knows.

    A face gets its surrogate from the default editor; a flag is to be drawn as another one.
    """
    from expunge.testbed import faces, flags

    def stored(name: str, picture: Tensor) -> str:
        (folder / f"{name}.png").write_bytes(to_png(to_pictures(picture[None].expand(-1, 3, -1, -1))[0]))
        return f"{name}.png"

    people, (banners, names) = faces.images(), flags.images()
    lines: list[dict[str, object]] = []
    for i in who:
        if model == "faces":
            person = (5 if others else 3) + 6 * i
            name = f"face-{person}"
            lines.append({"images": [stored(name, people[person])]})
        else:
            wrong = 1 + 4 * i + (128 if others else 0)
            name = f"flag-{wrong}"
            surrogate = stored(f"other-{wrong}", banners[wrong + 2])
            prompt = flags.caption(names[wrong])
            lines.append({"images": [stored(name, banners[wrong])], "surrogates": [surrogate], "prompt": prompt})
        lines[-1] |= {"model": model, "external_id": name}
    path = folder / "requests.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


class _CpuTime:
    """Measure the CPU time of all processes that descend from this one while inside, without its own."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, float], float] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @property
    def seconds(self) -> float:
        return sum(self._seen.values())

    def __enter__(self) -> "_CpuTime":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        own = psutil.Process()
        while not self._ended.wait(0.5):
            for process in own.children(recursive=True):
                with suppress(psutil.Error):
                    times = process.cpu_times()
                    self._seen[process.pid, process.create_time()] = times.user + times.system


if __name__ == "__main__":
    main()
