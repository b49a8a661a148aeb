"""What batching saves: the CPU time of a night with 1, 4 and 16 requests in one job, and how many requests passed.

    python -m tests.benchmarks.bench_batching [--requests 1,4,16] [--steps 150,150,150] [--model faces] > batching.csv

Each night is a whole one, on a Ray and a home of its own: prepare, train, evaluate, register, gate, report. Every
process that it starts counts, Ray's own too, sampled twice a second. `requests per CPU-hour` counts those that passed
their gate; `against one job each` is that rate over the rate of the first row, the night of a single request.
"""

import argparse
import csv
import itertools
import json
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

import psutil

from expunge.batch.outcome import NightOutcome
from expunge.batch.prepare import to_pictures, to_png
from tests.integration.nights import BIN, JOBS, demo

FIELDS = ("requests", "steps", "passed", "CPU s", "requests per CPU-hour", "against one job each")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", default="1,4,16")
    parser.add_argument("--steps", default="150,150,150", help="training steps of each night")
    arguments = parser.parse_args()
    table = csv.DictWriter(sys.stdout, FIELDS)
    table.writeheader()
    single = 0.0
    sizes = [[int(word) for word in words.split(",")] for words in (arguments.requests, arguments.steps)]
    for count, steps in zip(*sizes, strict=True):
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
            passed, seconds = _night(Path(home), count, steps)
        rate = passed / seconds * 3600
        single = single or rate
        figures = (count, steps, passed, round(seconds), round(rate, 1), round(rate / single, 2) if single else "")
        table.writerow(dict(zip(FIELDS, figures, strict=True)))
        sys.stdout.flush()


def _night(home: Path, count: int, steps: int) -> tuple[int, float]:
    """Requests that passed, and CPU seconds of everything that was started."""
    (home / "config.toml").write_text(f"[training]\nsteps = {steps}\n")
    environment = demo().environment_for(home)
    with _CpuTime() as clock, demo().local_ray(environment) as address:
        environment["EXPUNGE_RAY_ADDRESS"] = address
        for words in (("submit", "--batch", str(_requests(home, count))), ("night", "--jobs", str(JOBS))):
            subprocess.run([BIN / "expunge", *words], env=environment, check=False, stdout=sys.stderr)
    (ended,) = (home / "runs").glob("night-*/night.json")
    night = NightOutcome.model_validate_json(ended.read_text())
    return sum(len(outcome.passed) for outcome in night.outcomes), clock.seconds


def _requests(folder: Path, count: int) -> Path:
    """The first `count` of 16 faces, spread over the 100; each gets its surrogate from the default editor."""
    from expunge.testbed import faces

    people = to_pictures(faces.images().expand(-1, 3, -1, -1))
    lines: list[str] = []
    for person in itertools.islice(range(3, 100, 6), count):
        (folder / f"{person}.png").write_bytes(to_png(people[person]))
        lines.append(json.dumps({"model": "faces", "images": [f"{person}.png"], "external_id": f"face-{person}"}))
    path = folder / "requests.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


class _CpuTime:
    """Of all processes that descend from this one while inside, without this one."""

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
