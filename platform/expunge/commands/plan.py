"""`expunge plan`: the memory plan of a job, and the ZeRO stage to set."""

import os
from typing import TYPE_CHECKING, Annotated

import typer

from expunge.commands.common import AsJson, open_settings, print_json, print_table

if TYPE_CHECKING:
    from expunge.settings import Settings, TrainingSettings
    from expunge.unlearning.memory import Estimate


GB = 10**9
OPTIONS = {
    "adapter": "--adapter",
    "precision": "--precision",
    "activation_checkpointing": "--checkpointing",
    "offload_optimizer": "--offload",
}
"""The settings that have an option, which is what a person who mistypes it knows."""


def plan(
    model: Annotated[str, typer.Option("--model", help="A configured model, or a published one, such as sd3-medium.")],
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="GPUs that share one job.")] = 1,
    gpu_memory: Annotated[float, typer.Option("--gpu-memory", min=0.1, help="GB of one GPU.")] = 80.0,
    micro_batch: Annotated[int, typer.Option("--micro-batch", min=1, help="Samples in the network at once.")] = 1,
    requests: Annotated[int, typer.Option("--requests", min=1, help="Forget gradients that are kept apart.")] = 32,
    adapter: Annotated[str, typer.Option("--adapter", help="auto, lora or full.")] = "auto",
    precision: Annotated[str, typer.Option("--precision", help="bf16 or fp32.")] = "bf16",
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Recompute activations block by block.")
    ] = False,
    offload: Annotated[bool, typer.Option("--offload", help="Keep the optimizer in host memory.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print the memory per GPU of weights, gradients, stash, optimizer and activations, by ZeRO stage, and choose."""
    settings = open_settings()
    training = _training(
        settings,
        model,
        adapter=adapter,
        precision=precision,
        activation_checkpointing=checkpointing,
        offload_optimizer=offload,
    )
    # transformers says on import that it does without torchvision, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from expunge.unlearning.memory import choose, estimates, footprint

    counted = footprint(model, settings.models, training, micro_batch)
    options = estimates(counted, gpus=gpus, requests=requests, offload=offload)
    gpu_bytes = int(gpu_memory * GB)
    choice = choose(options, gpu_bytes)
    if as_json:
        rows = [{**option.as_dict(), "fits": option.fits(gpu_bytes), "chosen": option is choice} for option in options]
        sizes = {"parameters": counted.parameters, "trained": counted.trained}
        print_json({"model": model, **sizes, "gpus": gpus, "estimates": rows})
        return
    typer.echo(
        f"{model}: {counted.parameters / 1e6:,.1f}M parameters, {counted.trained / 1e6:,.1f}M trained, {precision}, "
        f"{gpus} GPUs of {gpu_memory:g} GB, {micro_batch} samples at once"
    )
    _print_estimates(options, choice, gpu_bytes)
    typer.echo(_advice(choice, offload, requests * gpus))
    typer.echo("counted, not measured; 8% of a GPU is left for what is not counted")


def _training(settings: "Settings", model: str, **asked: object) -> "TrainingSettings":
    """Return the model's training settings with what the options ask for. Raises InputError that names the option."""
    from pydantic import ValidationError

    from expunge.settings import TrainingSettings
    from expunge.validation import input_error

    known = settings.training_for(model) if model in settings.models else settings.training
    try:
        # Any stage that offloading works on: the estimates are for every stage.
        return TrainingSettings.model_validate({**known.model_dump(), **asked, "zero_stage": 1})
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
