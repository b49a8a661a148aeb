"""Load a registered hotfix as a pipeline that is ready to generate."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from expunge.errors import InputError
from expunge.families.supported import family_named
from expunge.registry.tracking import Tracker
from expunge.registry.versions import ABOUT, download

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def load_pipeline(uri: str, *, tracking_uri: str | None = None, base: str | None = None) -> "DiffusionPipeline":
    """Load the base pipeline on the CPU, and apply the hotfix to it.

    It is in float32, unless its largest network is large and stored in half precision: it then keeps that precision, and
    an adapter stays beside the weights.

    `uri` is `models:/NAME@ALIAS` or `models:/NAME/VERSION`. `tracking_uri` defaults to the one in the settings, `base`
    to the source that the hotfix was trained from; a hub id is written OWNER/NAME@COMMIT.

    Raises InputError if the hotfix does not fit the base, and NotFoundError, StorageError or UnavailableError if the
    version cannot be fetched.
    """
    if tracking_uri is None:
        from expunge.settings import load_settings

        tracking_uri = load_settings().tracking
    return pipeline_of(download(Tracker(tracking_uri), uri), base=base)


def pipeline_of(folder: Path, *, base: str | None = None) -> "DiffusionPipeline":
    """Do what `load_pipeline` does, with the files of a version that `download` has checked."""
    about = json.loads((folder / ABOUT).read_text())
    pipeline = _base(base or about["source"])
    kind = type(pipeline).__name__
    family = family_named(kind)
    try:
        if family is None:
            raise InputError(f"{kind} is not supported")
        family.apply_hotfix(pipeline.components[family.component], about["kind"], folder)
    except (InputError, FileNotFoundError, RuntimeError, ValueError, KeyError) as error:
        what = "a LoRA adapter" if about["kind"] == "lora" else "all weights of a network"
        raise InputError(
            f"the hotfix ({what}) does not fit {kind}", hint="name the pipeline that it was trained from"
        ) from error
    return pipeline


def _base(source: str) -> "DiffusionPipeline":
    from expunge.families.loading import load_base

    label = f"the base model {source}"
    try:
        return load_base(source, label)
    except InputError as error:
        raise InputError(
            f"{label} cannot be loaded ({error.message.removeprefix(f'{label}: ')})",
            hint="name a diffusers pipeline by path, or by hub id as OWNER/NAME@COMMIT, as `base`",
        ) from error
