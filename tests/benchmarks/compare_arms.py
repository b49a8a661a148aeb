"""Train and measure a finished night's job again under other settings, in one process without DeepSpeed or Ray.

    EXPUNGE_HOME=... python -m tests.benchmarks.compare_arms NIGHT MODEL '{}' '{"forget_weight": 1.0}'

Each arm is JSON over the job's own training settings; every arm has the same data, seeds and noise. What the stage
prepare made is used as it is: the views, the surrogates and the retain set are those of the night.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch

from expunge.evaluation.gate import REPRODUCTION, digits
from expunge.evaluation.measure import measure
from expunge.families import load_model
from expunge.preparation.dataset import load_job
from expunge.requests.blobs import BlobStore, open_blobs
from expunge.runs.job import JobFolder
from expunge.runs.night import NightFolder
from expunge.settings import Settings, TrainingSettings, load_settings
from expunge.types import Baseline, Evidence, Hotfix, PreparedJob, UnlearnJob
from expunge.unlearning.adapter import attach, export, kind_of
from expunge.unlearning.losses import Losses
from expunge.unlearning.steps import Steps
from unlearn_kernels import clip_coefficient, combine_, gram, retain_normal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("night")
    parser.add_argument("model")
    parser.add_argument("arms", nargs="+")
    args = parser.parse_args()
    settings = load_settings()
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
            folder.hotfix.write(_train(changed, prepared, baseline, settings, open_blobs(settings), folder.weights))
            evidence = measure(folder, settings, open_blobs(settings))
        print(_row(arm, evidence), flush=True)


def _train(
    job: UnlearnJob, prepared: PreparedJob, baseline: Baseline, settings: Settings, blobs: BlobStore, out: Path
) -> Hotfix:
    training = job.training.at_the_memory(baseline.levels)
    forget, retain, conditioning = load_job(blobs, prepared)
    model = load_model(settings.model(job.model), job.resolution)
    torch.manual_seed(training.seed)
    losses = Losses(model, attach(model, training, None), training, conditioning)
    step_of = Steps(losses, training, forget, retain, "request" if training.objectives == "request" else "batch", 0, 1)
    weights = [p for p in model.network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, weight_decay=0.0)

    steps, kind = job.steps(warm=False), kind_of(model.lora_targets, training)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = training.rate(kind, step / steps)
        objectives, micro_batches = step_of(step)
        losses = [torch.stack([micro() for micro in each]).mean() for each in micro_batches]
        gradients = [list(torch.autograd.grad(loss, weights)) for loss in losses]
        matrix = gram(gradients)
        weight_of_each = training.forget_weight / len(objectives)
        plain = torch.tensor([*[weight_of_each] * len(objectives), 1.0], dtype=torch.float64)
        chosen = retain_normal(matrix, training.forget_weight) if training.surgery == "retain_normal" else plain
        combine_(gradients[-1], gradients, chosen * clip_coefficient(matrix, chosen, training.clip))
        for weight, gradient in zip(weights, gradients[-1], strict=True):
            weight.grad = gradient
        optimizer.step()
    return export(model, training, out, job.id, steps=steps)


def _row(arm: str, evidence: Evidence) -> str:
    integrity = evidence.integrity
    assert integrity is not None
    rules = [rule for request in evidence.requests for rule in request.rules if rule.name == REPRODUCTION]
    left = ", ".join(f"{digits(rule.value)} ({digits(rule.bound)})" for rule in rules)
    failed = "" if integrity.passed else " (fails the gate)"
    return f"| `{arm}` | {left} | {integrity.psnr:.1f} | {integrity.ssim:.2f}{failed} |"


if __name__ == "__main__":
    main()
