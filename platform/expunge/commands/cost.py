"""The second half of `expunge plan`: what a night costs by stage, for batches of several sizes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import typer

from expunge.commands.common import print_rows
from expunge.text import counted

if TYPE_CHECKING:
    from expunge.batch.cost import Hardware
    from expunge.settings import Settings, TrainingSettings

BATCHES = (1, 16, 256)
"""The batches that are shown where none is asked for."""


@dataclass(frozen=True)
class Batch:
    """What a night removes, as far as its cost depends on it."""

    requests: int
    ledger: int
    pictures: int
    own_prompts: bool
    cached: bool


@dataclass(frozen=True)
class StageCost:
    """One stage of one batch, or all of them together, on hardware that is assumed."""

    batch: Batch
    stage: str
    passes: float
    operations: float
    gpu_hours: float
    hours: float
    money: float

    def as_dict(self) -> dict[str, object]:
        return {
            "requests": self.batch.requests,
            "stage": self.stage,
            "passes": round(self.passes),
            "flop": self.operations,
            "gpu_hours": self.gpu_hours,
            "hours": self.hours,
            "cost": self.money,
            "cost_per_request": self.money / self.batch.requests,
        }


def costs(
    model: str, settings: "Settings", training: "TrainingSettings", hardware: "Hardware", batches: Sequence[Batch]
) -> list[StageCost]:
    """Return the stages of each batch, then their total. Raises InputError where there is no such model."""
    from expunge.batch.cost import Load, night_calls
    from expunge.families.flops import count_flops
    from expunge.settings import ModelSettings

    flops = count_flops(model, settings.models)
    options = settings.models.get(model) or ModelSettings(source=model)  # a published one, with every default
    evaluation = settings.evaluation
    found: list[StageCost] = []
    for batch in batches:
        new, ledger = (
            Load.typical(count, options, evaluation, pictures=batch.pictures, own_prompt=batch.own_prompts)
            for count in (batch.requests, batch.ledger)
        )
        calls = night_calls(new, ledger, options, training, evaluation, cached=batch.cached)
        stages = {stage: (each.passes, each.operations(flops)) for stage, each in calls.items()}
        together = tuple(sum(parts) for parts in zip(*stages.values(), strict=True))
        for stage, (passes, operations) in [*stages.items(), ("total", together)]:
            found.append(
                StageCost(
                    batch,
                    stage,
                    passes,
                    operations,
                    hardware.unit_hours(operations),
                    hardware.hours(operations),
                    hardware.money(operations),
                )
            )
    return found


def print_costs(found: Sequence[StageCost], hardware: "Hardware", settings: "Settings") -> None:
    """Print one row per batch and stage, and everything that the figures take for granted."""
    rows = []
    for cost in found:
        total = cost.stage == "total"
        first = cost.stage == found[0].stage
        rows.append(
            (
                str(cost.batch.requests) if first else "",
                cost.stage,
                f"{cost.passes:,.0f}",
                _short(cost.operations / 1e15),
                _short(cost.gpu_hours),
                f"{cost.money:,.2f}",
                f"{cost.money / cost.batch.requests:,.2f}" if total else "",
            )
        )
    print_rows(("requests", "stage", "passes", "PFLOP", "GPU-hours", "cost", "per request"), rows)
    batch, evaluation = found[0].batch, settings.evaluation
    whole = [cost for cost in found if cost.stage == "total"]
    hours = ", ".join(f"{_short(cost.hours)} h for {cost.batch.requests}" for cost in whole)
    typer.echo(f"on {hardware.units} {hardware.name}: {hours}, if all of them always work")
    pictures = counted(batch.pictures, "picture")
    known = "known from an earlier night" if batch.cached else "measured anew (see --cached)"
    for line in (
        f"assumed: {hardware.rate / 1e12:,.0f} TFLOP/s per GPU, {hardware.utilisation:.0%} of its peak; "
        f"{hardware.price:g} per GPU-hour",
        f"assumed: each request brings {pictures} and {'a' if batch.own_prompts else 'no'} prompt, is reproduced by "
        f"the base model, and is removed after all rounds of draws; robustness is {evaluation.robustness}",
        f"assumed: {counted(batch.ledger, 'earlier removal')}; what depends on the base model alone is {known}",
        "not counted: surrogates that the model paints, the encoders that compare pictures, and whatever calls none of "
        "the model's networks",
    ):
        typer.echo(line)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
