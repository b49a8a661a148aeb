"""A registered hotfix as a pipeline that is ready to generate."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from expunge.errors import InputError
from expunge.registry.tracking import Tracker
from expunge.registry.versions import download

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

LORA_FILE = "pytorch_lora_weights.safetensors"
NETWORKS = ("unet", "transformer")


def load_pipeline(uri: str, *, tracking_uri: str | None = None, base: str | None = None) -> "DiffusionPipeline":
    """The base pipeline with the hotfix applied, float32 on the CPU.

    `uri` is `models:/NAME@ALIAS` or `models:/NAME/VERSION`; `tracking_uri` defaults to the settings', `base` to the
    source that the hotfix was trained from; a hub id is written OWNER/NAME@COMMIT.

    Raises InputError where the base is not the kind of pipeline the hotfix is for, NotFoundError, StorageError or
    UnavailableError where the version cannot be had.
    """
    if tracking_uri is None:
        from expunge.settings import load_settings

        tracking_uri = load_settings().tracking
    folder = download(Tracker(tracking_uri), uri)
    about = json.loads((folder / "expunge.json").read_text())
    return apply(_base(base or about["source"]), folder, about["kind"])


def apply(pipeline: "DiffusionPipeline", folder: Path, kind: str) -> "DiffusionPipeline":
    """Put the hotfix in `folder` into `pipeline`, in place. Raises InputError where it has no place there."""
    import torch
    from diffusers.loaders import SD3LoraLoaderMixin

    if kind == "lora" and isinstance(pipeline, SD3LoraLoaderMixin):
        pipeline.load_lora_weights(str(folder), weight_name=LORA_FILE)
        return pipeline
    name = next((name for name in NETWORKS if (folder / name).is_dir()), "")
    if kind == "lora" or name not in pipeline.components:
        what = "a LoRA adapter" if kind == "lora" else f"weights of {name or 'no network'}"
        raise InputError(
            f"the hotfix is {what}, which {type(pipeline).__name__} has no place for",
            hint="name the pipeline that it was trained from",
        )
    network = type(pipeline.components[name]).from_pretrained(
        folder / name, torch_dtype=torch.float32, use_safetensors=True
    )
    pipeline.register_modules(**{name: network.eval()})
    return pipeline


def _base(source: str) -> "DiffusionPipeline":
    from expunge.families import loading

    label = f"the base model {source}"
    try:
        return loading.load_pipeline(source, label)
    except InputError as error:
        raise InputError(
            f"{label} cannot be loaded ({error.message.removeprefix(f'{label}: ')})",
            hint="name a diffusers pipeline by path, or by hub id as OWNER/NAME@COMMIT, as `base`",
        ) from error
