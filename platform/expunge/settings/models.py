"""The settings of one base model. They speak to every component, from editors to the gate, so they belong to none."""

from typing import Any

from pydantic import Field, field_validator

from expunge.section import Resolution, Section
from expunge.sources import check_url


class ModelSettings(Section):
    """One base model that requests may name."""

    source: str = Field(
        min_length=1, description="a diffusers pipeline: a path, a hub id with its revision, or testbed:NAME"
    )
    revision: str = Field(
        default="",
        pattern=r"^([0-9a-f]{40})?$",
        description="the commit of a hub id, as 40 hexadecimal digits; without it the base model could change",
    )
    resolution: Resolution | None = Field(
        default=None,
        description="(height, width) that images are scaled and centre-cropped to; default: the pipeline's own",
    )
    retain_prompts: tuple[str, ...] = Field(
        default=("",), min_length=1, description="the prompts that the retain set is generated from"
    )
    forget_prompts: tuple[str, ...] = Field(
        default=("",),
        description="prompts under which a target is removed, in addition to its own; if the empty prompt is among "
        "them, the retain set is also held under it",
    )
    evaluation_prompts: tuple[str, ...] = Field(
        default=(),
        description="more prompts of unrelated outputs; training never holds them, and the evaluation compares them",
    )
    guidance: float = Field(
        default=1.0, ge=1, description="classifier-free guidance for everything that is generated with this model"
    )
    prompt_tokens: int = Field(default=256, ge=1, description="T5 tokens per prompt; without a T5, zeros")
    editor: str = Field(
        default="regenerate", description="the editor for requests that bring neither a surrogate nor an edit"
    )
    editors: tuple[str, ...] = Field(
        default=("blend", "inpaint", "regenerate"), description="editors that a request may ask for"
    )
    editor_models: tuple[str, ...] = Field(
        default=(),
        description="models that an editor may load, as a request names them: paths, or hub ids as OWNER/NAME@COMMIT; "
        "if there is only one, a request need not name it",
    )
    training: dict[str, Any] = Field(default_factory=dict, description="overrides of [training]")
    gate: dict[str, Any] = Field(default_factory=dict, description="overrides of [gate]")

    _readable = field_validator("source")(check_url)
