"""Load a registered hotfix as a pipeline that is ready to generate."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from expunge.errors import InputError
from expunge.families import supported
from expunge.registry.tracking import Tracker
from expunge.registry.versions import download

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def load_pipeline(uri: str, *, tracking_uri: str | None = None, base: str | None = None) -> "DiffusionPipeline":
    """Load the base pipeline and apply the hotfix to it, in float32 on the CPU.

    `uri` is `models:/NAME@ALIAS` or `models:/NAME/VERSION`. `tracking_uri` defaults to the one in the settings, `base`
    to the source that the hotfix was trained from; a hub id is written OWNER/NAME@COMMIT.

    Raises InputError if the hotfix does not fit the base, and NotFoundError, StorageError or UnavailableError if the
    version cannot be fetched.
    """
    if tracking_uri is None:
        from expunge.settings import load_settings

        tracking_uri = load_settings().tracking
    folder = download(Tracker(tracking_uri), uri)
    about = json.loads((folder / "expunge.json").read_text())
    pipeline = _base(base or about["source"])
    if about["kind"] == "lora":
        _put_adapter_on(pipeline, folder)
    else:
        _replace_network(pipeline, folder)
    return pipeline


def _put_adapter_on(pipeline: "DiffusionPipeline", folder: Path) -> None:
    if not any(family.load_adapter(pipeline, folder) for family in supported.FAMILIES):
        raise _no_place("a LoRA adapter", pipeline)


def _replace_network(pipeline: "DiffusionPipeline", folder: Path) -> None:
    import torch

    components = [family.component for family in supported.FAMILIES if (folder / family.component).is_dir()]
    if not components or components[0] not in pipeline.components:
        raise _no_place(f"weights of {components[0] if components else 'an unknown network'}", pipeline)
    name = components[0]
    network = type(pipeline.components[name]).from_pretrained(
        folder / name, torch_dtype=torch.float32, use_safetensors=True
    )
    pipeline.register_modules(**{name: network.eval()})


def _no_place(hotfix: str, pipeline: "DiffusionPipeline") -> InputError:
    return InputError(
        f"the hotfix ({hotfix}) does not fit {type(pipeline).__name__}",
        hint="name the pipeline that it was trained from",
    )


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
