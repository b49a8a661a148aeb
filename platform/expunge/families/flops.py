"""The floating-point operations of a model's networks, counted on the meta device: no weights, no GPU.

One operation is one multiplication or addition, as torch's counter has it: matrix products, convolutions and attention.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from diffusers import AutoencoderKL
from torch import FloatTensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from expunge.families.architectures import architecture, located, published_family
from expunge.families.layout import Layout
from expunge.settings import ModelSettings

_PUBLISHED: Mapping[str, tuple[str, Mapping[str, object]]] = {
    "vae": (
        "AutoencoderKL",
        {
            "block_out_channels": (128, 256, 512, 512),
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "layers_per_block": 2,
            "latent_channels": 16,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        },
    ),
    "text_encoder": (
        "CLIPTextModelWithProjection",
        {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "projection_dim": 768,
        },
    ),
    "text_encoder_2": (
        "CLIPTextModelWithProjection",
        {
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_hidden_layers": 32,
            "num_attention_heads": 20,
            "projection_dim": 1280,
        },
    ),
    "text_encoder_3": (
        "T5EncoderModel",
        {
            "d_model": 4096,
            "d_kv": 64,
            "d_ff": 10240,
            "num_layers": 24,
            "num_heads": 64,
            "feed_forward_proj": "gated-gelu",
        },
    ),
}
"""Class and config of what every published SD3 has beside its transformer."""


@dataclass(frozen=True)
class Flops:
    """Operations for one sample at the model's resolution."""

    network: int
    """One pass of the network that is trained."""
    encode: int = 0
    """One picture into latents."""
    decode: int = 0
    """One latent into a picture."""
    prompt: int = 0
    """One prompt through all text encoders."""


def count_flops(name: str, models: Mapping[str, ModelSettings]) -> Flops:
    """Count a published or configured model; a published one has its three text encoders.

    Raises InputError as `architecture` does.
    """
    with torch.device("meta"), torch.no_grad():
        model = architecture(name, models)
        network = _count(lambda: model.call(1, torch.float32))
        noisy = next(iter(model.inputs.values()))
        if published_family(name) is not None:
            parts, tokens = _PUBLISHED, ModelSettings.model_fields["prompt_tokens"].default
        else:
            layout, _ = located(name, models)
            parts, tokens = _parts(layout), models[name].prompt_tokens
        encode, decode = _autoencoder(parts, noisy)
        prompt = sum(
            _text_encoder(kind, config, tokens)
            for part, (kind, config) in parts.items()
            if part.startswith("text_encoder")
        )
    return Flops(network, encode, decode, prompt)


def _parts(layout: Layout) -> dict[str, tuple[str, Mapping[str, object]]]:
    """Return class and config of the autoencoder and of the text encoders that are there."""
    wanted = [name for name in layout.components() if name == "vae" or name.startswith("text_encoder")]
    return {name: (layout.class_of(name) or "", layout.config(name).fields) for name in wanted}


def _autoencoder(parts: Mapping[str, tuple[str, Mapping[str, object]]], latents: tuple[int, ...]) -> tuple[int, int]:
    if "vae" not in parts:
        return 0, 0
    vae = AutoencoderKL.from_config(dict(parts["vae"][1]))
    assert isinstance(vae, AutoencoderKL)
    factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
    pictures = torch.ones(1, 3, *(factor * side for side in latents[1:]))
    coded = cast("FloatTensor", torch.ones(1, *latents))
    return _count(lambda: vae.encode(pictures)), _count(lambda: vae.decode(coded))


def _text_encoder(kind: str, config: Mapping[str, object], tokens: int) -> int:
    """Count one prompt. tokens: the length of a T5's prompts; a CLIP always has all its positions."""
    if kind == "T5EncoderModel":
        model: nn.Module = T5EncoderModel(T5Config.from_dict(dict(config)))
    else:
        about = CLIPTextConfig.from_dict(dict(config))
        model, tokens = CLIPTextModelWithProjection(about), about.max_position_embeddings
    return _count(lambda: model(input_ids=torch.zeros(1, tokens, dtype=torch.long)))


def _count(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()
