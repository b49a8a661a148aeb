"""Measure what the adaptive budget saves, and its effect on the evidence. Prints CSV, a row per request and arm.

    python -m tests.benchmarks.bench_budget [--models faces,flags] [--nights 2] [ARM ...] > budget.csv

Each arm is JSON over the model's training settings; the default arms are `{}` and `{"adaptive": true}`. Every arm
trains the same prepared requests through Ray Train and DeepSpeed, and is measured as a night measures. The second night
adds a request and warm-starts from what the first arm had made on the first night.

The figures of the trainings, probes among them, go to stderr.

`passes`: forward passes of one sample, a backward pass counting as two, those of the probes included.
`cpu_s`: of one of the two workers, from its start on, loading included.
"""

import argparse
import csv
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from torch import Tensor

from expunge.evaluation.gate import REPRODUCTION, digits
from expunge.evaluation.measure import measure
from expunge.families import preflight
from expunge.pixels import to_pictures, to_png
from expunge.preparation.dataset import load_job
from expunge.preparation.prepare import prepare
from expunge.requests.blobs import BlobStore, open_blobs
from expunge.runs.job import JobFolder
from expunge.settings import Settings, TrainingSettings, load_settings
from expunge.testbed import faces, flags
from expunge.types import Evidence, Hotfix, PreparedJob, RemovalRequest, UnlearnJob
from expunge.unlearning.budget import LEVELS
from expunge.unlearning.train import train

FIELDS = [
    *("model", "night", "arm", "steps", "passes", "cpu_s", "psnr", "ssim", "intact"),
    *("request", "excess", "excess_bound", "verdict"),
]
FACES = {3: None, 41: None, 76: 90, 15: 33}
FLAGS = {"Canada": "Peru", "Greece": "Uruguay", "Norway": "Italy", "Cuba": "Nepal", "Japan": "Kenya"}
"""Target and surrogate; None: the editor makes it. The last one comes on the second night."""


@dataclass
class Recorder:
    """Writes down a worker's figures, with the CPU seconds since the recorder was sent there."""

    path: Path

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state
        self._began = time.process_time()

    def __call__(self, step: int, figures: dict[str, float]) -> None:
        line = {"step": step, "cpu_s": time.process_time() - self._began, **figures}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="*", default=["{}", '{"adaptive": true}'])
    parser.add_argument("--models", default="faces,flags")
    parser.add_argument("--nights", type=int, default=2, choices=(1, 2))
    arguments = parser.parse_args()
    table = csv.DictWriter(sys.stdout, FIELDS)
    table.writeheader()
    with tempfile.TemporaryDirectory() as home:
        os.environ["EXPUNGE_HOME"] = home
        settings = load_settings()
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        for model in arguments.models.split(","):
            for row in _model(model, arguments.arms, arguments.nights, settings, Path(home)):
                table.writerow(row)
                sys.stdout.flush()
        ray.shutdown()


def _model(name: str, arms: list[str], nights: int, settings: Settings, home: Path) -> Iterator[dict[str, object]]:
    blobs = open_blobs(settings)
    requests, champion = _requests(name, blobs), None
    for night in range(1, nights + 1):
        old = requests[:-1] if night == 2 else ()
        new = requests[-1:] if night == 2 else requests[:-1]
        options = settings.model(name)
        job = UnlearnJob(
            batch="bench",
            model=name,
            source=options.source,
            resolution=preflight("test", options),
            requests=new,
            ledger=old,
            training=settings.training_for(name),
        )
        common_folder = JobFolder(home / f"{name}-{night}")
        common_folder.job.write(job)
        prepared, first = prepare(common_folder, settings, blobs), None
        for index, arm in enumerate(arms):
            training = TrainingSettings.model_validate({**job.training.model_dump(), **json.loads(arm)})
            folder = home / f"{name}-{night}-{index}"
            hotfix = _train(job.model_copy(update={"training": training}), prepared, folder, champion)
            first = first or hotfix.path
            evidence = measure(JobFolder(folder), settings, blobs)
            rows = len(load_job(blobs, prepared)[0].request)
            common = {"model": name, "night": night, "arm": arm, **_cost(folder, training, rows, hotfix)}
            yield from ({**common, **row} for row in _evidence(evidence))
        champion = first


def _requests(name: str, blobs: BlobStore) -> tuple[RemovalRequest, ...]:
    def stored(picture: Tensor) -> str:
        return blobs.put(to_png(to_pictures(picture[None].expand(-1, 3, -1, -1))[0]))

    def request(target: object, images: list[Tensor], prompt: str | None = None) -> RemovalRequest:
        image, *surrogate = map(stored, images)
        return RemovalRequest(
            id=str(target), model=name, images=(image,), surrogates=tuple(surrogate), prompt=prompt, external_id="bench"
        )

    if name == "faces":
        people = faces.images()
        pairs = {person: [person] if other is None else [person, other] for person, other in FACES.items()}
        return tuple(request(person, [people[p] for p in pair]) for person, pair in pairs.items())
    banners, names = flags.images()
    return tuple(
        request(wrong, [banners[names.index(n)] for n in (wrong, right)], flags.caption(wrong))
        for wrong, right in FLAGS.items()
    )


def _train(job: UnlearnJob, prepared: PreparedJob, folder: Path, warm_start: Path | None) -> Hotfix:
    mine = JobFolder(folder)
    mine.job.write(job)
    mine.prepared.write(prepared)
    return train(mine, warm_start=warm_start, record=Recorder(folder / "figures.jsonl"))


def _cost(folder: Path, training: TrainingSettings, rows: int, hotfix: Hotfix) -> dict[str, object]:
    """Count forward passes. No request leaves between two records, so every step has as many objectives as the last."""
    lines = [json.loads(line) for line in (folder / "figures.jsonl").read_text().splitlines()]
    print(folder.name, *lines, sep="\n", file=sys.stderr)
    passes, before = 0, 0
    frozen = (training.forget_target == "recognition", training.retain_target == "distill")
    for line in lines:
        objectives = int(line.get("surgery/objectives", 0))
        samples = (max(training.forget_batch, objectives * training.workers), training.retain_batch)
        each = sum(count * (3 + extra) for count, extra in zip(samples, frozen, strict=True))
        passes += each * (line["step"] - before) + len(LEVELS) * rows * ("budget/probe_s" in line)
        before = line["step"]
    return {"steps": hotfix.steps, "passes": passes, "cpu_s": round(lines[-1]["cpu_s"], 1)}


def _evidence(evidence: Evidence) -> Iterator[dict[str, object]]:
    integrity = evidence.integrity
    assert integrity is not None
    for request in evidence.requests:
        left = next((rule for rule in request.rules if rule.name == REPRODUCTION), None)
        yield {
            "psnr": round(integrity.psnr, 1),
            "ssim": round(integrity.ssim, 2),
            "intact": integrity.passed,
            "request": request.request,
            "excess": digits(left.value if left else None),
            "excess_bound": digits(left.bound if left else None),
            "verdict": request.verdict,
        }


if __name__ == "__main__":
    main()
