"""What a dry run shows: a table of its stages, what the plan had predicted, and the faults."""

from collections.abc import Mapping

from expunge.settings import Settings
from tests.dry_run.night import MODEL
from tests.dry_run.watch import Record, Stage

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
ALONE = {(name,) for name in (*ENCODERS, "transformer", "vae")}
PAIR = {("transformer",), ("vae",), ("transformer", "vae")}
ALLOWED: Mapping[str, set[tuple[str, ...]]] = {
    "prepare": ALONE,
    "examine": PAIR,
    "train": {("transformer",)},
    "evaluate": PAIR,
}
"""What a process may hold at once in each stage; in the others, nothing."""
GB = 10**9


def faults(record: Record) -> list[str]:
    """Name each stage that held what it does not need, or that was never seen with a network."""
    found = []
    for name, stage in record.stages.items():
        for held in stage.together:
            if tuple(held) not in ALLOWED.get(name, set()):
                found.append(f"fault: {name} held {', '.join(held)} at once")
    missing = [name for name in ALLOWED if not (name in record.stages and record.stages[name].read)]
    return [*found, *(f"fault: {name} was not seen to read any network" for name in missing)]


def table(record: Record, settings: Settings) -> str:
    """Return a table of the stages in Markdown."""
    lines = ["| stage | minutes | networks read | peak of one process, GB | of it its own | all processes' own |"]
    lines.append("|---|---|---|---|---|---|")
    for name, stage in record.stages.items():
        peak, own = (max(values, default=0) / GB for values in _peaks(stage))
        read = ", ".join(dict.fromkeys(stage.read)) or "none"
        figures = f"{peak:.1f} | {own:.1f}" if stage.processes else "|"
        lines.append(f"| {name} | {stage.seconds / 60:.1f} | {read} | {figures} | {stage.total / GB:.1f} |")
    return "\n".join([*lines, "", planned(record, settings)])


def planned(record: Record, settings: Settings) -> str:
    """Compare the plan's bytes of a training worker with what it took: its growth since it read the network."""
    from expunge.unlearning.memory import estimate, footprint

    training = settings.training_for(MODEL)
    needs = footprint(MODEL, settings.models, training, training.micro_batch)
    plan = estimate(needs, training.zero_stage, "batch", gpus=1, requests=1)
    grown = [memory.peak - memory.before for memory in record.stages.get("train", Stage()).processes.values()]
    took = max(grown, default=0)
    parts = ", ".join(
        f"{name} {getattr(plan, name) / GB:.2f}"
        for name in ("weights", "gradient", "stash", "optimizer", "activations")
    )
    return f"training: planned {plan.total / GB:.2f} GB ({parts}), took {took / GB:.2f} GB ({took / plan.total:.0%})"


def _peaks(stage: Stage) -> tuple[list[int], list[int]]:
    found = stage.processes.values()
    return [memory.peak for memory in found], [memory.own for memory in found]
