"""The cases of `test_training.py`: real steps of the shipped models, under settings that must not change them."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expunge.families import load_model, preflight
from expunge.families.base import DiffusionModel
from expunge.families.family import Family
from expunge.preparation.dataset import ForgetSet, RetainSet
from expunge.settings import Settings, TrainingSettings
from expunge.unlearning.adapter import attach
from expunge.unlearning.losses import Losses
from expunge.unlearning.steps import Steps
from tests.unlearning import plain

COMMITTED = Path(__file__).with_name("trainings.json")
STEPS = 3
REQUESTS = 4
PROMPTS = ("a flag", "the flag of Japan", "the flag of Kenya")

# LoRA on the small SD3 with a gradient per request; all weights of the small UNet with one gradient for all.
JOBS: dict[str, dict[str, Any]] = {
    "flags": {
        "adapter": "lora",
        "lora_rank": 4,
        "learning_rate": 1e-3,
        "objectives": "request",
        "retain_target": "distill",
    },
    "faces": {"adapter": "full", "learning_rate": 1e-4, "objectives": "batch", "retain_target": "data"},
}
COMMON: dict[str, Any] = {
    "forget_weight": 0.5,
    "steps": STEPS,
    "forget_batch": 8,
    "retain_batch": 8,
    "clip": 0.5,
    "weighting": "min_snr",
    "density": "uniform",
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
        *(Variant("faces", stage) for stage in (0, 1)),
        Variant("flags", 1, micro_batch=1),
        Variant("faces", 2, micro_batch=1),
        *(Variant(job, 3, recompute=True) for job in JOBS),
        Variant("flags", 3, precision="bf16"),
        Variant("faces", 1, precision="bf16"),
    ]
}
# Two ranks run everything else: `test_engine.py` runs every stage on one rank, and here only the real models are new.
ALONE = {"flags-stage1-fp32-micro0", "faces-stage0-fp32-micro0"}
# The fast tier trains LoRA where it is hardest to gather and export; whole nights train the default stage.
FAST = {"flags-stage3-fp32-micro0"}


def settings_of(job: str, **more: object) -> TrainingSettings:
    return TrainingSettings.model_validate({**COMMON, **JOBS[job], **more})


def load(job: str) -> Family:
    options = Settings.model_fields["models"].get_default(call_default_factory=True)[job]
    torch.manual_seed(0)
    return load_model(options, preflight("test", options))


def steps_of(model: DiffusionModel, training: TrainingSettings, rank: int, world: int) -> Steps:
    """Attach the trained weights to the model, and make steps for four requests of 1, 2, 3 and 1 pictures of noise."""
    frozen = attach(model, training, None)
    conditioning = model.condition(PROMPTS)
    request = torch.tensor([0, 1, 1, 2, 2, 2, 3])
    generator = torch.Generator().manual_seed(5)
    x_f, x_s, x_0 = (torch.randn(7, *model.latent_shape, generator=generator).clamp(-1, 1) for _ in range(3))
    forget = ForgetSet(x_f, 0.5 * x_f + 0.5 * x_s, torch.arange(7) % len(PROMPTS), request)
    retain = RetainSet(x_0, torch.arange(7) % len(PROMPTS))
    losses = Losses(model, frozen, training, conditioning)
    assert training.objectives != "auto"
    return Steps(losses, training, forget, retain, training.objectives, rank, world)


@cache
def reference(job: str) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Surgery and AdamW in plain torch, one process: how far each trained weight goes, and what each step said."""
    model, training = load(job), settings_of(job)
    step_of = steps_of(model, training, 0, 1)
    trained = {name: p for name, p in model.network.named_parameters() if p.requires_grad}
    start = {name: p.detach().clone() for name, p in trained.items()}
    parameters = list(trained.values())
    whole = [torch.arange(sum(p.numel() for p in parameters))]
    optimizer = torch.optim.AdamW(parameters, lr=training.rate("full"), weight_decay=0.0)
    records = []
    for step in range(STEPS):
        losses = [micro() for [micro] in step_of(step)[1]]
        done = plain.operate([plain.gradient_of(loss, parameters) for loss in losses], whole, training, step)
        plain.hand_over(done.gradient, parameters)
        optimizer.step()
        figures = {"cosine": done.cosine, "conflict": done.conflict, "norm": done.norm}
        records.append({"losses": [loss.item() for loss in losses], **figures})
    return {name: p.detach() - start[name] for name, p in trained.items()}, records


def commit() -> None:
    """`python -m tests.unlearning.training_cases` writes the trajectories anew, after a change that is meant."""
    found: dict[str, object] = {}
    for job in JOBS:
        moved, records = reference(job)
        found[job] = {"records": records, "moved": {name: m.norm().item() for name, m in moved.items()}}
    plain.write(COMMITTED, "tests.unlearning.training_cases", found)


if __name__ == "__main__":
    torch.set_num_threads(1)
    commit()
