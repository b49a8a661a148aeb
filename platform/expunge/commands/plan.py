"""`expunge plan`: the memory of a job and the ZeRO stage to set, and what a night costs."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from expunge.commands.common import AsJson, hush_libraries, open_settings, print_json, print_table
from expunge.commands.cost import BATCHES, Batch, costs, print_costs
from expunge.text import counted

if TYPE_CHECKING:
    from collections.abc import Mapping

    from expunge.batch.cost import Hardware
    from expunge.section import Section
    from expunge.settings import Settings, TrainingSettings
    from expunge.unlearning.memory import Estimate

S = TypeVar("S", bound="Section")

GB = 10**9
APART = 32
"""Forget gradients that are kept apart where no number of requests is asked for."""
OPTIONS = {
    "adapter": "--adapter",
    "precision": "--precision",
    "activation_checkpointing": "--checkpointing",
    "offload_optimizer": "--offload",
    "gpu": "--gpu",
}
"""The settings that have an option, which is what a person who mistypes it knows."""


def plan(
    model: Annotated[str, typer.Option("--model", help="A configured model, or a published one, such as sd3-medium.")],
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="GPUs that share one job.")] = 1,
    gpu: Annotated[str | None, typer.Option("--gpu", help="a100, h100 or h200 (default: night.gpu).")] = None,
    gpu_memory: Annotated[float, typer.Option("--gpu-memory", min=0.1, help="GB of one GPU.")] = 80.0,
    micro_batch: Annotated[int, typer.Option("--micro-batch", min=1, help="Samples in the network at once.")] = 1,
    requests: Annotated[
        int | None,
        typer.Option(
            "--requests", min=1, help="New requests (default: 32 gradients kept apart; the cost of 1, 16 and 256)."
        ),
    ] = None,
    ledger: Annotated[int, typer.Option("--ledger", min=0, help="Earlier removals, which are trained for again.")] = 0,
    pictures: Annotated[int, typer.Option("--pictures", min=1, max=64, help="Pictures per request.")] = 1,
    own_prompts: Annotated[
        bool, typer.Option("--own-prompts", help="Each request brings a prompt of its own.")
    ] = False,
    cached: Annotated[
        bool, typer.Option("--cached", help="An earlier night has measured what depends on the base model alone.")
    ] = False,
    utilisation: Annotated[
        float | None,
        typer.Option("--utilisation", min=0.01, max=1, help="Share of the peak (default: night.utilisation)."),
    ] = None,
    price: Annotated[
        float | None, typer.Option("--price", min=0, help="Price of a GPU-hour (default: night.price).")
    ] = None,
    adapter: Annotated[str, typer.Option("--adapter", help="auto, lora or full.")] = "auto",
    precision: Annotated[str, typer.Option("--precision", help="bf16 or fp32.")] = "bf16",
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Recompute activations block by block.")
    ] = False,
    offload: Annotated[bool, typer.Option("--offload", help="Keep the optimizer in host memory.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print the memory per GPU by ZeRO stage, and choose; then passes, GPU-hours and money of a night by stage."""
    settings = open_settings()
    training = _training(
        settings,
        model,
        adapter=adapter,
        precision=precision,
        activation_checkpointing=checkpointing,
        offload_optimizer=offload,
    )
    hush_libraries()
    from expunge.unlearning.memory import choose, estimates, footprint

    needs = footprint(model, settings.models, training, micro_batch)
    options = estimates(needs, gpus=gpus, requests=requests or APART, offload=offload)
    gpu_bytes = int(gpu_memory * GB)
    choice = choose(options, gpu_bytes)
    hardware = _hardware(settings, gpus, gpu=gpu, utilisation=utilisation, price=price, precision=precision)
    sizes = (requests,) if requests else BATCHES
    batches = [Batch(count, ledger, pictures, own_prompts, cached) for count in sizes]
    found = costs(model, settings, training, hardware, batches)
    if as_json:
        rows = [{**option.as_dict(), "fits": option.fits(gpu_bytes), "chosen": option is choice} for option in options]
        weights = {"parameters": needs.parameters, "trained": needs.trained}
        assumed = {"flop_per_second": hardware.rate, "price": hardware.price, **asdict(batches[0])}
        del assumed["requests"]
        cost = {"assumed": {"gpu": hardware.name, **assumed}, "cost": [stage.as_dict() for stage in found]}
        print_json({"model": model, **weights, "gpus": gpus, "estimates": rows, **cost})
        return
    typer.echo(
        f"{model}: {needs.parameters / 1e6:,.1f}M parameters, {needs.trained / 1e6:,.1f}M trained, {precision}, "
        f"{counted(gpus, 'GPU')} of {gpu_memory:g} GB, {counted(micro_batch, 'sample')} at once"
    )
    _print_estimates(options, choice, gpu_bytes)
    typer.echo(_advice(choice, offload, (requests or APART) * gpus))
    typer.echo("counted, not measured; 8% of a GPU is left for what is not counted")
    print_costs(found, hardware, settings)


def _hardware(settings: "Settings", gpus: int, *, precision: str, **asked: object) -> "Hardware":
    """Return the GPUs that are reckoned with: `[night]`, with what the options ask for. Raises InputError."""
    from expunge.batch.cost import Hardware

    night = _changed(settings.night, {name: value for name, value in asked.items() if value is not None})
    return Hardware.gpus(gpus, night.gpu, night.utilisation, night.price, precision)


def _training(settings: "Settings", model: str, **asked: object) -> "TrainingSettings":
    """Return the model's training settings with what the options ask for. Raises InputError that names the option."""
    known = settings.training_for(model) if model in settings.models else settings.training
    # Any stage that offloading works on: the estimates are for every stage.
    return _changed(known, {**asked, "zero_stage": 1})


def _changed(section: "S", asked: "Mapping[str, object]") -> "S":
    """Return settings with what the options ask for. Raises InputError that names the option."""
    from pydantic import ValidationError

    from expunge.validation import input_error

    try:
        return section.model_validate({**section.model_dump(), **asked})
    except ValidationError as error:
        raise input_error(error, names=OPTIONS, hint=lambda _: "see `expunge plan --help`") from None


def _advice(choice: "Estimate | None", offload: bool, samples: int) -> str:
    if choice is None:
        return "nothing fits: try --checkpointing, --offload, more --gpus, --adapter lora or fewer --requests"
    offloaded = "training.offload_optimizer = true, " if offload else ""
    batch = f" ({samples} forget samples per step or more)" if choice.objectives == "request" else ""
    return f"set {offloaded}training.zero_stage = {choice.stage} and training.objectives = {choice.objectives}{batch}"


def _print_estimates(options: "list[Estimate]", choice: "Estimate | None", gpu_bytes: int) -> None:
    from rich.table import Table

    unit, name = (GB, "GB") if max(option.total for option in options) > GB else (10**6, "MB")
    parts = ("weights", "gradient", "stash", "optimizer", "activations", "total")
    if any(option.host for option in options):
        parts = (*parts, "host")
    table = Table("stage", "objectives", *parts, f"{name} per GPU", box=None)
    for option in options:
        values = option.as_dict()
        verdict = "chosen" if option is choice else "fits" if option.fits(gpu_bytes) else "too large"
        figures = (f"{int(str(values[part])) / unit:,.2f}" for part in parts)
        table.add_row(str(option.stage), option.objectives, *figures, verdict)
    print_table(table)
