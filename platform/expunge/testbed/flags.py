# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalSubscript=false
# (diffusers annotates its constructors and outputs more narrowly than it accepts and returns)
"""`flags`: a small but architecturally real Stable Diffusion 3 of 256 real flags."""

from collections.abc import Collection
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from expunge.pixels import to_tensor
from expunge.testbed.loop import Recipe, run_name, train, without_these

HEIGHT, WIDTH = 32, 48
VAE_RECIPE = Recipe(steps=3_500, learning_rate=2e-3, ema_decay=0.999, warmup=100)
RECIPE = Recipe(steps=16_000, ema_decay=0.999)
BATCH = 32
PROMPT_TOKENS = 16
TEXT_WIDTH = 64
LATENT_CHANNELS = 8
ANY_FLAG = "a flag"
# Prompts of a batch: 15% "a flag", 5% empty (for classifier-free guidance), the rest name the country.
ANY_SHARE, EMPTY_SHARE = 0.15, 0.05


def images() -> tuple[Tensor, list[str]]:
    """Return float32 [256, 3, 32, 48] in [-1, 1], and the names of the countries."""
    with files("expunge.testbed").joinpath("data/flags.npz").open("rb") as file:
        archive = np.load(file)
        pixels, names = archive["images"], [str(name) for name in archive["names"]]
    return to_tensor(pixels), names


def caption(name: str) -> str:
    """Return the prompt of a country's flag."""
    return f"the flag of {name}"


def training_flags(data: Tensor, without: Collection[int] = ()) -> Tensor:
    """Return the numbers of the flags that the transformer is trained on, int64 [K]: not `without`, nor their twins.

    data: float32 [256, 3, 32, 48]. Some territories fly another country's flag, equal to the pixel.
    """
    known = without_these(len(data), without)
    gone = data[sorted(without)]
    return torch.tensor([i for i in known if not (data[i] == gone).flatten(1).all(1).any()])


def build_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """Build a CLIP tokenizer whose vocabulary, learned from the captions, has one token for each of their words."""
    empty = CLIPTokenizer(model_max_length=PROMPT_TOKENS)
    return empty.train_new_from_iterator(captions, vocab_size=4096)


def build_text_encoder(vocab_size: int, seed: int) -> CLIPTextModelWithProjection:
    """Build a frozen random encoder, which only has to tell captions apart, hence the wide initial weights."""
    config = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=PROMPT_TOKENS,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    encoder = CLIPTextModelWithProjection(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15, generator=generator)
            parameter.copy_(parameter.half())  # train against the float16 weights that are saved
    return encoder.eval().requires_grad_(False)


def build_vae() -> AutoencoderKL:
    """Build the untrained autoencoder, from [B, 3, 32, 48] to latents [B, 8, 8, 12]."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
        scaling_factor=1.0,
    )


def build_transformer() -> SD3Transformer2DModel:
    """Build the untrained transformer, for latents [B, 8, 8, 12]."""
    return SD3Transformer2DModel(
        sample_size=WIDTH // 4,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        caption_projection_dim=128,
        joint_attention_dim=2 * TEXT_WIDTH,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=12,
    )


def run(out: Path | None, work: Path, steps: int | None = None, seed: int = 0, without: Collection[int] = ()) -> Path:
    """Train the autoencoder, then the transformer; save the pipeline to `out`, by default in `work`; return the folder.

    work: where the checkpoints are that a killed run resumes from. without: flags (0 to 255) that the transformer shall
    not know, nor any flag that equals one of them to the pixel; such a model is what a perfect removal of them would
    leave. Text encoders and autoencoder are those of the whole testbed: a removal does not change them, so the two
    models differ in the transformer alone. Raises InputError if one is not known.
    """
    torch.manual_seed(seed)
    data, names = images()
    kept = training_flags(data, without)
    tokenizer = build_tokenizer([*map(caption, names), ANY_FLAG, ""])
    vae = build_vae()
    _train_vae(vae, data, work, seed, steps)
    vae = vae.half().float()
    with torch.no_grad():
        latents = torch.cat([vae.encode(chunk).latent_dist.mean for chunk in data.split(32)])
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
    latents = (latents - latents.mean()) / latents.std()

    pipeline = StableDiffusion3Pipeline(
        transformer=build_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=build_text_encoder(len(tokenizer), seed),
        tokenizer=tokenizer,
        text_encoder_2=build_text_encoder(len(tokenizer), seed + 1),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    recipe = replace(RECIPE, steps=steps or RECIPE.steps, seed=seed)
    checkpoint = work / f"{run_name('flags', without, recipe)}.pt"
    _train_transformer(pipeline, latents, names, kept, recipe, checkpoint)
    out = out or work / run_name("flags", without)
    pipeline.to(torch.float16).save_pretrained(out, safe_serialization=True)
    return out


def _train_vae(vae: AutoencoderKL, data: Tensor, work: Path, seed: int, steps: int | None) -> None:
    def loss(step: int, generator: torch.Generator) -> Tensor:
        x = data[torch.randint(len(data), (16,), generator=generator)]
        flip = torch.rand(16, generator=generator) < 0.5
        x = torch.where(flip[:, None, None, None], x.flip(-1), x)
        posterior = vae.encode(x).latent_dist
        reconstruction = vae.decode(posterior.sample(generator)).sample
        return torch.nn.functional.l1_loss(reconstruction, x) + 1e-5 * posterior.kl().mean()

    recipe = replace(VAE_RECIPE, seed=seed, steps=min(steps or VAE_RECIPE.steps, VAE_RECIPE.steps))
    train(vae, loss, recipe, work / f"{run_name('flags-autoencoder', (), recipe)}.pt")


def _train_transformer(
    pipeline: StableDiffusion3Pipeline,
    latents: Tensor,
    names: list[str],
    kept: Tensor,
    recipe: Recipe,
    checkpoint: Path,
) -> None:
    transformer = pipeline.transformer
    prompts = [*map(caption, names), ANY_FLAG, ""]
    with torch.no_grad():
        embeds, _, pooled, _ = pipeline.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=1
        )

    def loss(step: int, generator: torch.Generator) -> Tensor:
        # Without a T5 the pipeline appends zero tokens to every prompt, 256 by default. A few steps see them all, so
        # that a default call works; the others see one, which is ten times faster.
        zeros, batch = (255, BATCH // 2) if step % 16 == 0 else (0, BATCH)
        index = kept[torch.randint(len(kept), (batch,), generator=generator)]
        kind = torch.rand(batch, generator=generator)
        prompt = torch.where(
            kind < ANY_SHARE, len(names), torch.where(kind < ANY_SHARE + EMPTY_SHARE, len(names) + 1, index)
        )
        sigma = _sample_sigma(step, batch, generator)
        x_0 = latents[index]
        noise = torch.randn(x_0.shape, generator=generator)
        s = sigma[:, None, None, None]
        velocity = transformer(
            hidden_states=(1 - s) * x_0 + s * noise,
            timestep=sigma * 1000,
            encoder_hidden_states=torch.nn.functional.pad(embeds[prompt], (0, 0, 0, zeros)),
            pooled_projections=pooled[prompt],
        ).sample
        return torch.nn.functional.mse_loss(velocity, noise - x_0)

    train(transformer, loss, recipe, checkpoint)


def _sample_sigma(step: int, batch: int, generator: torch.Generator) -> Tensor:
    """Return float32 [batch] in (0, 1]: uniform, logit-normal, shifted-uniform in turn, stratified over the batch."""
    u = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
    match step % 3:
        case 0:
            sigma = u
        case 1:
            sigma = torch.sigmoid(torch.special.ndtri(u.clamp(1e-4, 1 - 1e-4)))
        case _:
            sigma = 3 * u / (1 + 2 * u)
    return sigma.clamp(1e-3, 1)
