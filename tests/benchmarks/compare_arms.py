"""Train and measure a finished night's job again under other settings, in one process without DeepSpeed or Ray.

    EXPUNGE_HOME=... python -m tests.benchmarks.compare_arms NIGHT MODEL '{}' '{"forget_weight": 1.0}'

Each arm is JSON over the job's own training settings; every arm has the same data, seeds and noise. What the stage
prepare made is used as it is: the views, the surrogates and the retain set are those of the night. `expunge bench
method` compares methods on a testbed; this compares settings on what somebody asked for.
"""

import argparse
import json
import tempfile
from pathlib import Path

from expunge.bench.arms import Arm
from expunge.bench.product import passes_of_product, product
from expunge.bench.training import train_arm
from expunge.evaluation.gate import REPRODUCTION, digits
from expunge.evaluation.measure import measure
from expunge.requests.blobs import open_blobs
from expunge.runs.job import JobFolder
from expunge.runs.night import NightFolder
from expunge.settings import TrainingSettings, load_settings
from expunge.types import Evidence


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("night")
    parser.add_argument("model")
    parser.add_argument("arms", nargs="+")
    args = parser.parse_args()
    settings = load_settings()
    blobs = open_blobs(settings)
    night = NightFolder(settings.runs / args.night)
    assert night.plan is not None
    job = next(j for j in night.plan.jobs if j.model == args.model)
    prepared, baseline = night.job(job.id).prepared.expect(), night.job(job.id).baseline.expect()
    print("| arm | excess left (upper bound), per request | PSNR dB | SSIM |\n|---|---|---|---|")
    for arm in args.arms:
        training = TrainingSettings.model_validate({**job.training.model_dump(), **json.loads(arm)})
        changed = job.model_copy(update={"training": training})
        with tempfile.TemporaryDirectory() as out:
            folder = JobFolder(Path(out))
            folder.job.write(changed)
            folder.prepared.write(prepared)
            folder.baseline.write(baseline)
            trained = train_arm(
                Arm("", product, passes_of_product), changed, prepared, baseline, settings, blobs, folder.weights
            )
            folder.hotfix.write(trained.hotfix)
            evidence = measure(folder, settings, blobs)
        print(_row(arm, evidence), flush=True)


def _row(arm: str, evidence: Evidence) -> str:
    integrity = evidence.integrity
    assert integrity is not None
    rules = [rule for request in evidence.requests for rule in request.rules if rule.name == REPRODUCTION]
    left = ", ".join(f"{digits(rule.value)} ({digits(rule.bound)})" for rule in rules)
    failed = "" if integrity.passed else " (fails the gate)"
    return f"| `{arm}` | {left} | {integrity.psnr:.1f} | {integrity.ssim:.2f}{failed} |"


if __name__ == "__main__":
    main()
