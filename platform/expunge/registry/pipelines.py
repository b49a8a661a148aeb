"""Load a registered hotfix as a pipeline that is ready to generate."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expunge.errors import InputError
from expunge.families.supported import family_named
from expunge.registry.artifacts import download
from expunge.registry.seals import ABOUT
from expunge.registry.tracking import Tracker

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import nn

    from expunge.families.family import Family
    from expunge.families.layout import Layout


def load_pipeline(uri: str, *, tracking_uri: str | None = None, base: str | None = None) -> "DiffusionPipeline":
    """Load the base pipeline on the CPU, and apply the hotfix to it.

    It is in float32, unless its largest network is large and stored in half precision: it then keeps that precision,
    and an adapter stays beside the weights.

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
    from expunge.families.loading import load

    about = json.loads((folder / ABOUT).read_text())
    with _base(about, base) as layout:
        pipeline = load(layout)
    with _fitting(type(pipeline).__name__, about["kind"]) as family:
        family.apply_hotfix(pipeline.components[family.component], about["kind"], folder)
    return pipeline


def network_of(folder: Path, *, base: str | None = None) -> "tuple[str, nn.Module]":
    """Read the changed network alone, in float32 and with the changes in its weights.

    Returns the name of its component, and it. folder: the files of a version that `download` has checked. Raises
    InputError as `load_pipeline` does.
    """
    from expunge.families.components import Components

    about = json.loads((folder / ABOUT).read_text())
    with _base(about, base) as layout:
        parts = Components(layout, exact=True)
    with _fitting(layout.kind, about["kind"]) as family:
        network = parts.network(family.component)
        family.apply_hotfix(network, about["kind"], folder)
    return family.component, network


@contextmanager
def _base(about: Mapping[str, Any], base: str | None) -> "Iterator[Layout]":
    """Yield the files of the base model; say that another place can be named where they cannot be read.

    Raises InputError, too, if they are known to be other files than those that the hotfix was trained from.
    """
    from expunge.families.source import locate

    source = base or about["source"]
    label = f"the base model {source}"
    try:
        layout = locate(source, label, weights=True)
        known, found = about.get("base"), layout.digest()
        # A hub's commit and the digest of a copy of its files, which differ in length, say nothing about each other.
        if known is not None and len(known) == len(found) and known != found:
            raise InputError(f"its files are not those that the hotfix was trained from, {about['source']}")
        yield layout
    except InputError as error:
        raise InputError(
            f"{label} cannot be loaded ({error.message.removeprefix(f'{label}: ')})",
            hint="name a diffusers pipeline by path, or by hub id as OWNER/NAME@COMMIT, as `base`",
        ) from error


@contextmanager
def _fitting(pipeline: str, kind: str) -> "Iterator[type[Family]]":
    """Yield the family of this class of pipelines; say so where the hotfix does not fit it."""
    family = family_named(pipeline)
    try:
        if family is None:
            raise InputError(f"{pipeline} is not supported")
        yield family
    except (InputError, FileNotFoundError, RuntimeError, ValueError, KeyError) as error:
        what = "a LoRA adapter" if kind == "lora" else "all weights of a network"
        raise InputError(
            f"the hotfix ({what}) does not fit {pipeline}", hint="name the pipeline that it was trained from"
        ) from error
