"""What batching saves: requests that passed their gate per CPU-hour, in one job together and in one job each.

    python -m tests.benchmarks.bench_batching [--model flags] [--together 4,16] [--alone 4] [--others] [ARM ...]

Each night is a whole one, on a Ray and a home of its own: prepare, train, evaluate, register, gate, report. Every
process that it starts counts, Ray's own too, sampled twice a second. ARM is JSON over [training], one for each night
of `--together`, or one for all of them; requests alone have the defaults.

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
from contextlib import suppress
from pathlib import Path

import psutil
from torch import Tensor

from expunge.batch.outcome import NightOutcome
from expunge.batch.prepare import to_pictures, to_png
from tests.integration.nights import BIN, JOBS, demo

FIELDS = ("requests", "arm", "passed", "CPU s", "passed per CPU-hour", "against one job each", "who passed")
MOST = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="*", default=["{}"], metavar="ARM")
    parser.add_argument("--model", default="flags", choices=("faces", "flags"))
    parser.add_argument("--together", default="4,16", help=f"requests of each night, at most {MOST}")
    parser.add_argument("--alone", type=int, default=4, help="nights of one request")
    parser.add_argument("--others", action="store_true", help="other requests than those that settings were tried on")
    arguments = parser.parse_args()
    together = [int(word) for word in arguments.together.split(",") if word]
    arms = arguments.arms * len(together) if len(arguments.arms) == 1 else arguments.arms
    table = csv.DictWriter(sys.stdout, FIELDS)
    table.writeheader()
    single = 0.0
    rows = [(f"{arguments.alone} x 1", [[i] for i in range(arguments.alone)], "{}")]
    rows += [(str(count), [list(range(count))], arm) for count, arm in zip(together, arms, strict=True)]
    for name, nights, arm in rows:
        ended = [_night(arguments.model, who, arm, arguments.others) for who in nights]
        passed, seconds = sorted(p for night, _ in ended for p in night), sum(s for _, s in ended)
        rate = len(passed) / seconds * 3600
        single = single or rate
        against = round(rate / single, 2) if single else ""
        figures = (name, arm, len(passed), round(seconds), round(rate, 1), against, " ".join(passed))
        table.writerow(dict(zip(FIELDS, figures, strict=True)))
        sys.stdout.flush()


def _night(model: str, who: list[int], arm: str, others: bool) -> tuple[list[str], float]:
    """Whose requests passed, and CPU seconds of everything that was started."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        home = Path(folder)
        environment = {**demo().environment_for(home), "EXPUNGE_TRAINING": arm}
        with _CpuTime() as clock, demo().local_ray(environment) as address:
            environment["EXPUNGE_RAY_ADDRESS"] = address
            for words in (
                ("submit", "--batch", str(_requests(home, model, who, others))),
                ("night", "--jobs", str(JOBS)),
            ):
                subprocess.run([BIN / "expunge", *words], env=environment, check=False, stdout=sys.stderr)
        [ended] = (home / "runs").glob("night-*/night.json")
        night = NightOutcome.model_validate_json(ended.read_text())
        names = {request.id: request.external_id for o in night.outcomes for request in o.job.requests}
        return [names[request] for outcome in night.outcomes for request in outcome.passed], clock.seconds


def _requests(folder: Path, model: str, who: list[int], others: bool) -> Path:
    """Of MOST requests that are spread over what the model knows, those at `who`.

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
