"""`expunge calibrate`: the match thresholds of a model of one's own."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from expunge.commands.common import AsJson, hush_libraries, open_settings, print_json, print_rows
from expunge.errors import InputError, StorageError

if TYPE_CHECKING:
    from torch import Tensor

    from expunge.evaluation.calibration import Calibration
    from expunge.settings import ModelSettings, Resolution, Settings

SAMPLES = 128
"""Free samples of the base model."""
CHUNK = 16
"""Of these, between two steps of the progress bar."""
SEED = 60_000_000
"""The first sample's seed, far from those of training and evaluation."""


def calibrate(
    model: Annotated[str, typer.Argument(help="A configured model.")],
    pictures: Annotated[
        Path | None,
        typer.Option(
            "--pictures",
            help="A folder of pictures of its domain, such as those it was trained on, each of "
            "something else. Default: its own samples.",
        ),
    ] = None,
    unseen: Annotated[
        Path | None,
        typer.Option(
            "--unseen", help="A folder of pictures of its domain that it never saw. Default: evaluation.unseen_folder."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Find from which similarity on two pictures match, for each encoder, and keep it for the nights to come."""
    settings = open_settings()
    options = settings.model(model)

    from expunge.families import preflight

    resolution = preflight(model, options)
    unseen = unseen or settings.evaluation.unseen_folder
    known = _folder(pictures, "--pictures", resolution, settings)
    strangers = _folder(unseen, "--unseen", resolution, settings)
    found = _calibrate(model, options, resolution, known, strangers, settings)

    from expunge.evaluation.calibration import calibration_file
    from expunge.files import write_atomically

    file = calibration_file(settings, model)
    try:
        write_atomically(file, found.model_dump_json(indent=2) + "\n")
    except OSError as error:
        raise StorageError(f"{file} cannot be written ({error.strerror})", hint="free space, or set home") from error
    if as_json:
        print_json({"file": str(file), **found.model_dump()})
        return
    _print(found)
    typer.echo(f"written to {file}")


def _folder(folder: Path | None, option: str, resolution: "Resolution", settings: "Settings") -> "Tensor | None":
    """Return its pictures, float32 [N, 3, h, w] in [-1, 1]. Raises InputError where they are unusable or too few."""
    if folder is None:
        return None
    from expunge.evaluation.calibration import FEWEST
    from expunge.pixels import to_tensor
    from expunge.preparation.pictures import load_folder

    if not folder.is_dir():
        raise InputError(f"{option}: there is no folder {folder}", hint="name a folder of PNG, JPEG or WEBP files")
    found = load_folder(folder, resolution, field=option, max_bytes=settings.max_bytes, max_pixels=settings.max_pixels)
    if len(found) < FEWEST:
        raise InputError(f"{option}: {folder} holds {len(found)} pictures", hint=f"give at least {FEWEST}")
    return to_tensor(found)


def _calibrate(
    model: str,
    options: "ModelSettings",
    resolution: "Resolution",
    pictures: "Tensor | None",
    unseen: "Tensor | None",
    settings: "Settings",
) -> "Calibration":
    hush_libraries()
    import diffusers
    import torch
    import transformers
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from expunge.evaluation.calibration import calibrate
    from expunge.evaluation.encoders import find_encoder
    from expunge.evaluation.space import Space
    from expunge.evaluation.subject import ModelSubject
    from expunge.families import load_model, source_digest
    from expunge.generation.placement import device

    for library in (diffusers, transformers):  # whose bars would tear this one
        library.utils.logging.disable_progress_bar()
    names = settings.evaluation.encoders
    for name in names:
        find_encoder(name)  # before the samples, which may take long
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        bar = progress.add_task("samples", total=SAMPLES)
        loaded = load_model(options, resolution, device=device())
        prompts = tuple(dict.fromkeys(options.retain_prompts))
        subject = ModelSubject(
            loaded,
            loaded.condition(prompts),
            loaded.condition([""]),
            guidance=options.guidance,
            steps=settings.evaluation.sampling_steps,
        )
        parts = []
        for index in torch.arange(SAMPLES).split(CHUNK):
            parts.append(subject.generate(index % len(prompts), SEED + index))
            progress.advance(bar, len(index))
        samples = torch.cat(parts)

        known = samples if pictures is None else pictures
        bar = progress.add_task("pictures", total=len(known))
        return calibrate(
            Space.around(names, samples)[0],
            pictures,
            unseen,
            samples,
            source=_source(model, pictures, unseen),
            base=source_digest(options),
            step=lambda: progress.advance(bar),
        )


def _source(model: str, pictures: "Tensor | None", unseen: "Tensor | None") -> str:
    """Say what a calibration was made of. The names of folders may say more than they should, so they are not there."""
    from importlib.metadata import version

    given = {"--pictures": pictures, "--unseen": unseen}
    folders = {option: len(found) for option, found in given.items() if found is not None}
    command = " ".join(["expunge calibrate", model, *(f"{option} FOLDER" for option in folders)])
    counts = [f"{count} pictures of {option}" for option, count in folders.items()]
    return f"{command} (expunge {version('expunge')}): {', '.join([*counts, f'{SAMPLES} samples of the base model'])}"


def _print(found: "Calibration") -> None:
    rows = [
        (
            name,
            f"{limit.threshold:.3f}",
            f"{limit.false_match:.2%}",
            f"{limit.missed:.1%}",
            limit.matching,
            limit.non_matching,
            limit.how,
        )
        for name, limit in found.thresholds.items()
    ]
    print_rows(
        ("encoder", "threshold", "false match", "missed", "matching", "non-matching pairs", "false match by"), rows
    )
    typer.echo(
        f"{found.missed:.1%} of the altered copies are missed by every encoder; at most {found.chance:.2%} of pictures "
        "match one of something else by chance"
    )
