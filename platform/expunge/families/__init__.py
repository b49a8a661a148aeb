"""The diffusion models behind one small protocol."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expunge.errors import InputError
from expunge.settings import ModelSettings, Resolution

if TYPE_CHECKING:
    from expunge.families.base import DiffusionModel

PIPELINES = {"DDPMPipeline": "ddpm", "DDIMPipeline": "ddpm", "StableDiffusion3Pipeline": "sd3"}


def resolve_source(source: str) -> str:
    """`testbed:NAME` to the folder of the shipped model; a path or a hub id stays what it is."""
    kind, _, name = source.partition(":")
    if kind != "testbed":
        return source
    models = Path(__file__).parents[1] / "testbed" / "models"
    if name not in (folder.name for folder in models.iterdir()):
        raise InputError(f"source: there is no testbed model {name!r}", hint="use testbed:faces or testbed:flags")
    return str(models / name)


def native_resolution(settings: ModelSettings) -> Resolution:
    """(height, width) of the pipeline's own sample size, read from its config files alone."""
    folder = _local(settings.source)
    name = pipeline_family(folder, settings.source)
    component = "unet" if name == "ddpm" else "transformer"
    size = config_of(folder / component / "config.json", settings.source)["sample_size"]
    if name == "ddpm":
        return (size, size) if isinstance(size, int) else tuple(size)
    blocks = config_of(folder / "vae" / "config.json", settings.source)["block_out_channels"]
    return size * 2 ** (len(blocks) - 1), size * 2 ** (len(blocks) - 1)


def pipeline_family(folder: Path, source: str) -> str:
    """`ddpm` or `sd3`. Raises InputError where the pipeline is of another class."""
    kind = config_of(folder / "model_index.json", source)["_class_name"]
    if kind not in PIPELINES:
        raise _unsupported(source, kind)
    return PIPELINES[kind]


def load_model(settings: ModelSettings, resolution: Resolution) -> "DiffusionModel":
    """Load a base model in float32 for one resolution. Raises InputError where weights or files are missing."""
    from diffusers import DDIMPipeline, DDPMPipeline, StableDiffusion3Pipeline  # not above: it costs seconds

    from expunge.families.base import load_pipeline

    source = resolve_source(settings.source)
    try:
        pipeline = load_pipeline(source)
    except (OSError, ValueError) as error:
        raise InputError(
            f"model {settings.source}: {str(error).splitlines()[0].rstrip('.')}",
            hint="source must be a complete diffusers pipeline: model_index.json and every component's weights",
        ) from error
    if isinstance(pipeline, StableDiffusion3Pipeline):
        from expunge.families.sd3 import SD3

        model = SD3(pipeline, resolution, settings.prompt_tokens)
    elif isinstance(pipeline, DDPMPipeline | DDIMPipeline):
        from expunge.families.ddpm import DDPM

        model = DDPM(pipeline, resolution)
    else:
        raise _unsupported(settings.source, type(pipeline).__name__)
    model.network.eval().requires_grad_(False)
    return model


def _local(source: str) -> Path:
    """The folder of a pipeline's config files; those of a hub id are fetched, its weights are not."""
    folder = Path(resolve_source(source))
    if folder.is_dir() or folder.is_absolute():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, allow_patterns=["model_index.json", "*/config.json"]))
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise InputError(
            f"model {source}: neither a folder nor a hub id that can be fetched ({type(error).__name__})",
            hint="give the folder of a diffusers pipeline, or a hub id while the hub can be reached",
        ) from error


def _unsupported(source: str, kind: str) -> InputError:
    return InputError(f"model {source}: {kind} is not supported", hint=f"use one of {', '.join(sorted(PIPELINES))}")


def config_of(path: Path, source: str) -> dict[str, Any]:
    """A config file of the pipeline `source`. Raises InputError where it cannot be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(
            f"model {source}: {path.name} cannot be read ({type(error).__name__})",
            hint="source must be a complete diffusers pipeline",
        ) from error
