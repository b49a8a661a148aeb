"""What `test_training.py` compares: real steps of the shipped models under every setting that must not change them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expunge.families import load_model, native_resolution
from expunge.families.base import DiffusionModel
from expunge.preparation.dataset import ForgetSet, RetainSet
from expunge.settings import Settings, TrainingSettings
from expunge.unlearning.adapter import attach
from expunge.unlearning.objective import Objective
from expunge.unlearning.steps import Steps
from unlearn_kernels import clip_coefficient, combine_, conflicts, cosines, gram, retain_normal

COMMITTED = Path(__file__).with_name("trainings.json")
STEPS = 3
REQUESTS = 4
PROMPTS = ("a flag", "the flag of Japan", "the flag of Kenya")

# LoRA on the small SD3 with a gradient a request; all weights of the small UNet with one gradient for all.
JOBS: dict[str, dict[str, Any]] = {
    "flags": {"adapter": "lora", "lora_rank": 4, "learning_rate": 1e-3, "tasks": "request", "retain_target": "distill"},
    "faces": {"adapter": "full", "learning_rate": 1e-4, "tasks": "batch", "retain_target": "data"},
}
COMMON: dict[str, Any] = {
    "steps": STEPS,
    "forget_batch": 8,
    "retain_batch": 8,
    "clip": 0.5,
    "forget_target": "surrogate",
}


@dataclass(frozen=True)
class Variant:
    job: str
    stage: int
    precision: str = "fp32"
    micro_batch: int = 0
    recompute: bool = False

    @property
    def name(self) -> str:
        recompute = "-recompute" if self.recompute else ""
        return f"{self.job}-stage{self.stage}-{self.precision}-micro{self.micro_batch}{recompute}"

    @property
    def training(self) -> TrainingSettings:
        return settings_of(
            self.job,
            zero_stage=self.stage,
            precision=self.precision,
            micro_batch=self.micro_batch,
            activation_checkpointing=self.recompute,
        )


VARIANTS = {
    variant.name: variant
    for variant in [
        *(Variant("flags", stage) for stage in (0, 1, 2, 3)),
        *(Variant("faces", stage) for stage in (0, 3)),
        *(Variant("flags", stage, micro_batch=1) for stage in (1, 3)),
        Variant("faces", 2, micro_batch=1),
        *(Variant(job, 3, recompute=True) for job in JOBS),
        Variant("flags", 3, precision="bf16"),
        Variant("faces", 1, precision="bf16"),
    ]
}


def settings_of(job: str, **more: object) -> TrainingSettings:
    return TrainingSettings.model_validate({**COMMON, **JOBS[job], **more})


def load(job: str) -> DiffusionModel:
    options = Settings.model_fields["models"].get_default(call_default_factory=True)[job]
    torch.manual_seed(0)
    return load_model(options, options.resolution or native_resolution(options))


def steps_of(model: DiffusionModel, training: TrainingSettings, rank: int, world: int) -> Steps:
    """Attaches what is trained to the model. Four requests, of 1, 2, 3 and 1 pictures: noise will do."""
    frozen = attach(model, training, None)
    conditioning = model.condition(PROMPTS)
    request = torch.tensor([0, 1, 1, 2, 2, 2, 3])
    generator = torch.Generator().manual_seed(5)
    x_f, x_s, x_0 = (torch.randn(7, *model.latent_shape, generator=generator).clamp(-1, 1) for _ in range(3))
    forget = ForgetSet(x_f, 0.5 * x_f + 0.5 * x_s, torch.arange(7) % len(PROMPTS), request)
    retain = RetainSet(x_0, torch.arange(7) % len(PROMPTS))
    objective = Objective(model, frozen, training, conditioning)
    assert training.tasks != "auto"
    return Steps(objective, forget, retain, training.tasks, rank, world)


def reference(job: str) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Plain torch in one process: how far each trained weight goes, and what each step said."""
    model, training = load(job), settings_of(job)
    step_of = steps_of(model, training, 0, 1)
    trained = {name: p for name, p in model.network.named_parameters() if p.requires_grad}
    start = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=training.learning_rate, weight_decay=0.0)
    records = []
    for step in range(STEPS):
        losses = [micro() for [micro] in step_of(step)[1]]
        gradients = [
            list(torch.autograd.grad(loss, list(trained.values()), allow_unused=True, materialize_grads=True))
            for loss in losses
        ]
        matrix = gram(gradients)
        c = retain_normal(matrix, training.forget_weight)
        combine_(gradients[-1], gradients, c * clip_coefficient(matrix, c, training.clip))
        for parameter, gradient in zip(trained.values(), gradients[-1], strict=True):
            parameter.grad = gradient
        optimizer.step()
        records.append(
            {
                "losses": [loss.item() for loss in losses],
                "cosine": cosines(matrix).mean().item(),
                "conflict": conflicts(matrix).double().mean().item(),
                "norm": float(c @ matrix @ c) ** 0.5,
            }
        )
    return {name: p.detach() - start[name] for name, p in trained.items()}, records


def commit() -> None:
    """`python -m tests.unlearning.training_cases` writes the trajectories anew, after a change that is meant."""
    found = {}
    for job in JOBS:
        moved, records = reference(job)
        found[job] = {"records": records, "moved": {name: m.norm().item() for name, m in moved.items()}}
    COMMITTED.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    commit()
