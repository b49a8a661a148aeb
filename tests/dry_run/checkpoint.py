"""A Stable Diffusion 3 with random weights, written as the hub has it: folders, configs, bf16 safetensors in shards.

SD3-medium's true widths and depths are 7.6e9 weights with T5-XXL, 15 GB of disk: each component is built without
memory, on the meta device, and its tensors are drawn one shard at a time. Only the tokenizers differ from the hub's,
whose vocabularies are not here: theirs are learned from a few sentences, and their files are of the same kind.
"""

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PretrainedConfig,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from expunge.families.sd3 import SD3

SENTENCES = ("a photo of a bowl of fruit", "a drawing of a house by the sea", "the portrait of a man in a red coat")
ACTIVATIONS = ("quick_gelu", "gelu")
"""Of the two CLIPs."""
SHARD = 5 * 10**9
"""Bytes of a file at most: the hub's T5-XXL has two."""
QUIET = 1e-2
"""Scale of the layers that training starts at 0: the transformer's last one, and the last one of the autoencoder's
residual blocks. The velocity is then close to 0, and sampling returns what it was given.
"""
POOL = 2**24
PATH = ("conv_in", "conv_out", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv")
"""The autoencoder's convolutions that a picture passes outside of residual blocks. They hand its colours on, beside
small random weights, so that a picture comes back, coarsely: a job whose base model reproduces nothing trains nothing.
"""


@dataclass(frozen=True)
class Size:
    """The widths and depths of a pipeline; those that are not given are SD3-medium's."""

    transformer: Mapping[str, Any] = field(default_factory=lambda: SD3.published["sd3-medium"])
    vae: tuple[int, ...] = (128, 256, 512, 512)
    clips: tuple[Mapping[str, int], Mapping[str, int]] = (
        {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "projection_dim": 768},
        {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 20, "projection_dim": 1280},
    )
    t5: Mapping[str, int] = field(
        default_factory=lambda: {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    )
    words: tuple[int, int] = (49408, 32128)
    """Rows of the embeddings of the two CLIPs, and of T5."""


MEDIUM = Size()
TINY = Size(
    transformer={
        **SD3.published["sd3-medium"],
        "sample_size": 8,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "caption_projection_dim": 32,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
        "pos_embed_max_size": 16,
    },
    vae=(32, 32, 32, 32),
    clips=(
        {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 16},
        {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 16},
    ),
    t5={"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 2},
    words=(1024, 256),
)


def write(folder: Path, size: Size) -> Path:
    """Write the pipeline, unless it is there; what a killed call has left is written again."""
    done = folder / "model_index.json"
    if done.is_file():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    index: dict[str, object] = {"_class_name": "StableDiffusion3Pipeline", "_diffusers_version": "0.42.1"}
    for seed, (name, network) in enumerate(_networks(size)):
        _write_network(network, folder / name, seed)
        index[name] = [type(network).__module__.split(".")[0], type(network).__name__]
    for name, tokenizer in _tokenizers().items():
        tokenizer.save_pretrained(folder / name)
        index[name] = ["transformers", type(tokenizer).__name__]
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.save_pretrained(folder / "scheduler")
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    done.write_text(json.dumps(index, indent=2))
    return folder


def _networks(size: Size) -> Iterator[tuple[str, nn.Module]]:
    """Build the networks one by one, without memory."""
    with torch.device("meta"):
        transformer = SD3Transformer2DModel.from_config(dict(size.transformer))
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * len(size.vae),  # pyright: ignore[reportArgumentType]
            up_block_types=("UpDecoderBlock2D",) * len(size.vae),  # pyright: ignore[reportArgumentType]
            block_out_channels=size.vae,  # pyright: ignore[reportArgumentType]
            layers_per_block=2,
            latent_channels=16,
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=1.5305,
            shift_factor=0.0609,
            sample_size=size.transformer["sample_size"] * 8,
        )
        words = {"vocab_size": size.words[1], "feed_forward_proj": "gated-gelu"}
        t5 = T5EncoderModel(T5Config.from_dict({**words, **size.t5}))
        clips = [_clip(widths, size.words[0], kind) for widths, kind in zip(size.clips, ACTIVATIONS, strict=True)]
    assert isinstance(transformer, SD3Transformer2DModel)
    yield from {"transformer": transformer, "vae": vae, "text_encoder": clips[0], "text_encoder_2": clips[1]}.items()
    yield "text_encoder_3", t5


def _clip(widths: Mapping[str, int], words: int, activation: str) -> CLIPTextModelWithProjection:
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    kind = {"vocab_size": words, "intermediate_size": 4 * widths["hidden_size"], "hidden_act": activation}
    return CLIPTextModelWithProjection(CLIPTextConfig.from_dict({**kind, **widths, **ends}))


def _tokenizers() -> dict[str, CLIPTokenizer | T5Tokenizer]:
    clip = CLIPTokenizer(model_max_length=77).train_new_from_iterator(SENTENCES, vocab_size=1024)
    words = {word for sentence in SENTENCES for word in sentence.split()}
    letters = sorted({letter for word in words for letter in word})
    pieces = ["<pad>", "</s>", "<unk>", "▁", *(f"▁{word}" for word in sorted(words)), *letters]
    t5 = T5Tokenizer(vocab=[(piece, -1.0 - len(piece) % 2) for piece in pieces], extra_ids=0, model_max_length=512)
    return {"tokenizer": clip, "tokenizer_2": clip, "tokenizer_3": t5}


def _write_network(network: nn.Module, folder: Path, seed: int) -> None:
    """Draw the weights of a network on the meta device, and write them and its config."""
    folder.mkdir(parents=True)
    _write_config(network, folder)
    stem = "diffusion_pytorch_model" if hasattr(network, "register_to_config") else "model"
    shapes = {name: tensor for name, tensor in network.state_dict().items() if name not in _tied(network)}
    shards: list[list[str]] = [[]]
    room = SHARD
    for name, tensor in shapes.items():
        if tensor.numel() * 2 > room and shards[-1]:
            shards.append([])
            room = SHARD
        shards[-1].append(name)
        room -= tensor.numel() * 2
    numbers = np.random.default_rng(seed)
    pool = torch.from_numpy(numbers.standard_normal(POOL, dtype=np.float32)).bfloat16()
    index: dict[str, str] = {}
    for place, names in enumerate(shards):
        several = f"-{place + 1:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        file = f"{stem}{several}.safetensors"
        drawn = {name: _drawn(name, shapes[name], network, pool, numbers) for name in names}
        save_file(drawn, folder / file, {"format": "pt"})
        index |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(tensor.numel() * 2 for tensor in shapes.values())
        contents = {"metadata": {"total_size": total}, "weight_map": index}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(contents, indent=2))


def _write_config(network: nn.Module, folder: Path) -> None:
    config = network.config
    if isinstance(config, PretrainedConfig):
        config.architectures = [type(network).__name__]
        config.save_pretrained(folder)
    else:
        assert isinstance(network, SD3Transformer2DModel | AutoencoderKL)
        network.save_config(folder)


def _tied(network: nn.Module) -> set[str]:
    """Return the names that repeat another tensor: T5's embedding stands in its state twice."""
    return {"encoder.embed_tokens.weight"} if isinstance(network, T5EncoderModel) else set()


def _drawn(name: str, like: Tensor, network: nn.Module, pool: Tensor, numbers: np.random.Generator) -> Tensor:
    """Draw a tensor in bf16: biases are 0, norms 1, and what multiplies keeps the variance of what it is given.

    pool: bf16 [POOL], standard normal numbers. A tensor is cut out of it, as drawing 7.6e9 would take minutes.
    """
    if name == "pos_embed.pos_embed":
        assert isinstance(network, SD3Transformer2DModel)
        return _positions(network).bfloat16()
    if not like.is_floating_point():
        return torch.arange(like.shape[-1]).expand(like.shape).contiguous()
    if like.ndim == 1:
        return torch.full(like.shape, 0.0 if name.endswith("bias") else 1.0, dtype=torch.bfloat16)
    autoencoder = isinstance(network, AutoencoderKL)
    path = autoencoder and name.removesuffix(".weight").endswith(PATH)
    ends = ("conv2.weight", "to_out.0.weight") if autoencoder else ("proj_out.weight",)
    scale = (QUIET if path or name.endswith(ends) else 1.0) / math.sqrt(math.prod(like.shape[1:]))
    made = torch.empty(like.shape, dtype=torch.bfloat16)
    for part in made.view(-1).split(POOL // 2):
        first = int(numbers.integers(POOL - len(part)))
        torch.mul(pool[first : first + len(part)], scale, out=part)
    if path:
        middle = like.shape[-1] // 2
        made[:, :, middle, middle] += _same_colour(*like.shape[:2])
    return made


def _same_colour(outputs: int, inputs: int) -> Tensor:
    """Return float32 [outputs, inputs], which averages the inputs of an output's colour: channel i has i % 16 % 3."""
    colours = [torch.arange(count) % 16 % 3 for count in (outputs, inputs)]
    same = (colours[0][:, None] == colours[1][None]).float()
    return same / same.sum(1, keepdim=True)


def _positions(network: SD3Transformer2DModel) -> Tensor:
    """Return the transformer's table of positions, which is a formula and not learned."""
    one = SD3Transformer2DModel.from_config({**network.config, "num_layers": 1})
    assert isinstance(one, SD3Transformer2DModel)
    return one.get_buffer("pos_embed.pos_embed")
