"""`transformers`, `dinov2` and `clip`: vision backbones that transformers loads from a folder or a pinned hub id."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from expunge.errors import InputError, first_line
from expunge.evaluation.encoders.base import Encoder, in_chunks

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig

FILES = ("*.json", "*.safetensors")
"""What is fetched from the hub: configs and weights, never a pickle."""


class TransformersEncoder(Encoder):
    """Class token of a vision transformer, or the mean of a convolutional backbone's last feature map."""

    kind: ClassVar[str] = "transformers"
    loader: ClassVar[str] = "AutoModel"
    """The class of transformers that reads the weights."""
    types: ClassVar[tuple[str, ...]] = ()
    """The `model_type`s that belong to this kind; none: any."""
    usage = "transformers:FOLDER or transformers:OWNER/NAME@COMMIT, a vision backbone such as a DINO"

    def __init__(self, reference: str) -> None:
        self.name = f"{self.kind}:{reference}"
        self._load(reference)

    @classmethod
    def check(cls, reference: str) -> None:
        from expunge.families.source import is_unpinned

        if not reference:
            raise ValueError(f"no backbone is named: use {cls.usage}")
        if is_unpinned(reference):
            raise ValueError(f"a hub id without a commit could change: write {cls.kind}:OWNER/NAME@COMMIT")

    @classmethod
    def find(cls, reference: str) -> str:
        found = cls._folder_or_commit(reference)
        if isinstance(found, tuple):
            return "@".join(found) if not _offline() else str(_cached(*found))
        if not list(found.glob("*.safetensors")):
            raise InputError(f"evaluation.encoders: {found} has no safetensors weights", hint="save the backbone again")
        return str(found)

    def __call__(self, images: Tensor) -> Tensor:
        return in_chunks(images, self.size, self._features)

    @classmethod
    def _folder_or_commit(cls, reference: str) -> Path | tuple[str, str]:
        from expunge.families.source import folder_or_commit

        return folder_or_commit(reference, f"evaluation.encoders: {reference}", hint=f"use {cls.usage}")

    def _load(self, reference: str) -> None:
        import torch
        import transformers

        from expunge.families.source import fetch

        found = self._folder_or_commit(reference)
        if isinstance(found, tuple):
            found = _cached(*found) if _offline() else fetch(*found, f"evaluation.encoders: {reference}", FILES)
        try:
            processor: Any = transformers.AutoImageProcessor.from_pretrained(found, use_fast=False)
            config = self._config(transformers.AutoConfig.from_pretrained(found))
            loader = getattr(transformers, self.loader)
            network, loaded = loader.from_pretrained(
                found, config=config, use_safetensors=True, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise InputError(
                f"evaluation.encoders: transformers cannot load {reference!r} ({first_line(error)})",
                hint="name a vision backbone that has safetensors weights and a preprocessor_config.json",
            ) from None
        # transformers would leave them random, and say so in a log. Only the pooler is not used.
        missing = [name for name in sorted(loaded["missing_keys"]) if "pooler" not in name]
        if missing:
            raise InputError(
                f"evaluation.encoders: {reference!r} lacks the weights {missing[0]}", hint="save the backbone again"
            )
        self._network: Any = network.eval().requires_grad_(False)
        self._mean, self._deviation = (
            torch.tensor(values).view(1, -1, 1, 1) for values in (processor.image_mean, processor.image_std)
        )
        self.size = _input_size(processor.to_dict())

    def _config(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Return the config to load with. Raises ValueError where it is of another kind."""
        if self.types and config.model_type not in self.types:
            raise ValueError(f"it is a {config.model_type}, not a {self.kind}")
        if not self.types and hasattr(config, "vision_config"):
            raise ValueError(f"a {config.model_type} sees more than pictures: use clip: for a CLIP")
        return config

    def _features(self, images: Tensor) -> Tensor:
        return self._pooled(((images + 1) / 2 - self._mean) / self._deviation)

    def _pooled(self, pixels: Tensor) -> Tensor:
        hidden = self._network(pixel_values=pixels).last_hidden_state
        # Not pooler_output: checkpoints such as DINO's come without a pooler, which would then be random.
        return hidden[:, 0] if hidden.ndim == 3 else hidden.mean(dim=(2, 3))


class DINOv2(TransformersEncoder):
    """Class token of a DINOv2 (Oquab et al. 2023)."""

    kind, types = "dinov2", ("dinov2", "dinov2_with_registers")
    usage = "dinov2:FOLDER or dinov2:OWNER/NAME@COMMIT"


class CLIP(TransformersEncoder):
    """Image embedding of a CLIP (Radford et al. 2021): its vision tower and projection, without the text tower."""

    kind, loader, types = "clip", "CLIPVisionModelWithProjection", ("clip", "clip_vision_model")
    usage = "clip:FOLDER or clip:OWNER/NAME@COMMIT"

    def _config(self, config: PreTrainedConfig) -> PreTrainedConfig:
        config = super()._config(config)
        if config.model_type == "clip":  # of both towers; the vision tower's own config need not know the projection
            config.vision_config.projection_dim = config.projection_dim
            return config.vision_config
        return config

    def _pooled(self, pixels: Tensor) -> Tensor:
        return self._network(pixel_values=pixels).image_embeds


def _offline() -> bool:
    from huggingface_hub.constants import is_offline_mode

    return is_offline_mode()


def _cached(repository: str, commit: str) -> Path:
    """Return the folder of a commit in the hub's cache. Raises InputError where it is not there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, revision=commit, local_files_only=True, allow_patterns=list(FILES)))
    except LocalEntryNotFoundError:
        raise InputError(
            f"evaluation.encoders: {repository}@{commit} is not in the hub's cache, and HF_HUB_OFFLINE is set",
            hint="fetch it once with network, or name a folder that holds it",
        ) from None


def _input_size(processor: dict[str, object]) -> tuple[int, int]:
    """Return the (height, width) that the processor produces: the crop's if it crops, otherwise the resized image's."""
    size = processor.get("crop_size") if processor.get("do_center_crop") else processor.get("size")
    match size:
        case {"height": int(height), "width": int(width)}:
            return height, width
        case {"shortest_edge": int(edge)}:
            return edge, edge
    return 224, 224
