"""What the platform can do with a pipeline, read from its config files alone: anything else is refused by name.

A setting that changes what the pipeline itself would sample is either followed by the families or refused here.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from pydantic import TypeAdapter, ValidationError

from expunge.errors import InputError
from expunge.families.source import Config, Layout
from expunge.families.weights import COMPLETE
from expunge.settings import Resolution

DDPM_SCHEDULERS = ("DDIMScheduler", "DDPMScheduler")
FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler",)

_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
_ZERO_SNR = "at the last step nothing but noise is left, and a predicted epsilon says nothing about the picture"

_DEPTHS = ("layers_per_block", "num_layers", "num_hidden_layers")
_DEEPEST = 1000
_MOST_TIMESTEPS = 100_000

_LARGEST = 4096
_RESOLUTION = TypeAdapter(Resolution)


def family_of(layout: Layout) -> str:
    """`ddpm` or `sd3`. Raises InputError where the pipeline is of another class."""
    kind = layout.kind
    if kind not in _FAMILIES:
        raise InputError(f"{layout.label}: {kind} is not supported", hint=f"use one of {', '.join(sorted(_FAMILIES))}")
    return _FAMILIES[kind]


def check(layout: Layout, configured: Resolution | None) -> Resolution:
    """(height, width) in pixels that the model is used at: the configured one, else the pipeline's own.

    Raises InputError naming the file and the field where something is missing, wrong or not supported.
    """
    family = family_of(layout)
    for name in layout.components():
        if layout.library_of(name) not in ("diffusers", "transformers"):
            raise layout.index.refuse(name, "its class must be of diffusers or transformers")
        if not name.startswith(("scheduler", "tokenizer", "feature_extractor", "image_encoder")):
            _buildable(layout.config(name))
    return _CHECKS[family](layout, configured)


def _buildable(config: Config) -> None:
    """A preflight builds the network: one of a million layers would take hours and all the memory there is."""
    for name in _DEPTHS:
        given = config.fields.get(name)
        for depth in given if isinstance(given, list) else [given]:
            if isinstance(depth, int | float) and depth > _DEEPEST:
                raise config.refuse(name, f"must be at most {_DEEPEST}")


def _ddpm(layout: Layout, configured: Resolution | None) -> Resolution:
    _classes(layout, {"unet": ("UNet2DModel",), "scheduler": DDPM_SCHEDULERS})
    unet, scheduler = layout.config("unet"), layout.config("scheduler")
    channels = unet.integer("in_channels", 3)
    if channels not in (1, 3):
        raise unet.refuse("in_channels", "a picture has 1 or 3 channels", "use a model of grey or RGB pictures")
    for name in ("num_class_embeds", "class_embed_type"):
        if unet.has(name):
            raise unet.refuse(name, "a class-conditional UNet is not supported", "use an unconditional model")
    outputs = unet.integer("out_channels", 3)
    if outputs == 2 * channels:
        raise unet.refuse("out_channels", "a learned variance is not supported", "use a model with a fixed variance")
    if outputs != channels:
        raise unet.refuse("out_channels", f"must be in_channels, {channels}")
    if unet.text("time_embedding_type", "positional") == "fourier":
        raise unet.refuse("time_embedding_type", "it divides by the time, which is 0 at the last step of a DDPM")
    ddim = layout.kind == "DDIMPipeline" or layout.class_of("scheduler") == "DDIMScheduler"
    _ddpm_scheduler(scheduler, _SCHEDULES if ddim else (*_SCHEDULES, "sigmoid", "laplace"))

    resolution = configured or _own(layout, _sample_size(unet))
    factor = 2 ** (len(unet.items("down_block_types")) - 1)
    return _divisible(layout, resolution, factor, f"the UNet halves them {factor.bit_length() - 1} times")


def _ddpm_scheduler(config: Config, schedules: tuple[str, ...]) -> None:
    kind = config.text("prediction_type", "epsilon")
    if kind not in ("epsilon", "v_prediction"):
        raise config.refuse("prediction_type", f"{kind!r} is not supported", "use epsilon or v_prediction")
    steps = config.integer("num_train_timesteps", 1000)
    if steps < 2:
        raise config.refuse("num_train_timesteps", "must be at least 2")
    if steps > _MOST_TIMESTEPS:
        raise config.refuse("num_train_timesteps", f"must be at most {_MOST_TIMESTEPS:,}")
    if config.text("variance_type", "fixed_small").startswith("learned"):
        raise config.refuse("variance_type", "a learned variance is not supported", "use a fixed variance")
    if config.flag("thresholding"):
        raise config.refuse("thresholding", "dynamic thresholding is not supported", "use clip_sample instead")
    if config.flag("clip_sample", True) and config.number("clip_sample_range", 1.0) <= 0:
        raise config.refuse("clip_sample_range", "must be above 0")
    if config.flag("rescale_betas_zero_snr") and kind == "epsilon":
        raise config.refuse("rescale_betas_zero_snr", _ZERO_SNR, "use a model with v_prediction")
    if config.text("timestep_spacing", "leading") not in ("leading", "trailing", "linspace"):
        raise config.refuse("timestep_spacing", "must be leading, trailing or linspace")
    if config.fields.get("steps_offset", 0) not in (0, 1):
        raise config.refuse("steps_offset", "must be 0 or 1")
    if config.has("trained_betas"):
        _trained_betas(config, steps, kind)
    elif config.text("beta_schedule", "linear") not in schedules:
        raise config.refuse("beta_schedule", f"must be one of {', '.join(schedules)}")
    start, end = config.number("beta_start", 0.0001), config.number("beta_end", 0.02)
    if not 0 < start <= end < 1:
        raise config.refuse("beta_end", f"beta_start, {start:g}, and beta_end must grow between 0 and 1")


def _trained_betas(config: Config, steps: int, prediction: str) -> None:
    betas = [beta for beta in config.items("trained_betas") if isinstance(beta, int | float) and 0 < beta <= 1]
    if len(betas) != len(config.items("trained_betas")) or len(betas) != steps:
        raise config.refuse("trained_betas", f"must be {steps} numbers above 0 and at most 1")
    if prediction == "epsilon" and 1 in betas:
        raise config.refuse("trained_betas", _ZERO_SNR, "use a model with v_prediction")


def _sd3(layout: Layout, configured: Resolution | None) -> Resolution:
    _classes(layout, _SD3_COMPONENTS)
    transformer, vae, scheduler = (layout.config(name) for name in ("transformer", "vae", "scheduler"))
    latents = vae.integer("latent_channels", 4)
    for name in ("in_channels", "out_channels"):
        if transformer.integer(name, 16) != latents:
            raise transformer.refuse(name, f"must be the autoencoder's latent_channels, {latents}")
        if vae.integer(name, 3) != 3:
            raise vae.refuse(name, "a picture has 3 channels")
    if vae.number("scaling_factor", 0.18215) <= 0:
        raise vae.refuse("scaling_factor", "must be above 0")
    if vae.has("shift_factor"):
        vae.number("shift_factor")
    _flow_scheduler(scheduler)
    transformer.integer("joint_attention_dim", 4096)
    encoders = [layout.config(name) for name in ("text_encoder", "text_encoder_2")]
    pooled = sum(encoder.integer("projection_dim", 512) for encoder in encoders)
    if transformer.integer("pooled_projection_dim", 2048) != pooled:
        raise transformer.refuse("pooled_projection_dim", f"the text encoders' projection_dim add up to {pooled}")

    factor = 2 ** (len(vae.items("block_out_channels")) - 1)
    patch = transformer.integer("patch_size", 2)
    size = transformer.integer("sample_size", 128) * factor
    resolution = configured or _own(layout, [size, size])
    _divisible(layout, resolution, factor * patch, f"the autoencoder's {factor} times the patch size {patch}")
    largest = transformer.integer("pos_embed_max_size", 96)
    if max(resolution) > largest * factor * patch:
        raise transformer.refuse(
            "pos_embed_max_size",
            f"the sides can have up to {largest * factor * patch} pixels, not {max(resolution)}",
            "set a lower resolution",
        )
    return resolution


def _flow_scheduler(config: Config) -> None:
    for name, why in (
        ("stochastic_sampling", "sampling has to be deterministic"),
        ("invert_sigmas", "noise levels must go down"),
    ):
        if config.flag(name):
            raise config.refuse(name, why, "use the scheduler that the model was published with")
    if config.integer("num_train_timesteps", 1000) < 2:
        raise config.refuse("num_train_timesteps", "must be at least 2")
    if config.integer("num_train_timesteps", 1000) > _MOST_TIMESTEPS:
        raise config.refuse("num_train_timesteps", f"must be at most {_MOST_TIMESTEPS:,}")
    if config.number("shift", 1.0) <= 0:
        raise config.refuse("shift", "must be above 0")
    if config.has("shift_terminal") and not 0 < config.number("shift_terminal") < 1:
        raise config.refuse("shift_terminal", "must be between 0 and 1")
    kinds = [f"use_{kind}_sigmas" for kind in ("karras", "exponential", "beta")]
    if sum(config.flag(kind) for kind in kinds) > 1:
        raise InputError(f"{config.where}: only one of {', '.join(kinds)} can be true", hint=COMPLETE)
    if config.flag("use_dynamic_shifting"):
        for name in ("base_shift", "max_shift"):
            config.number(name, 1.0)
        if config.integer("max_image_seq_len", 4096) <= config.integer("base_image_seq_len", 256):
            raise config.refuse("max_image_seq_len", "must be above base_image_seq_len")
        if config.text("time_shift_type", "exponential") not in ("exponential", "linear"):
            raise config.refuse("time_shift_type", "must be exponential or linear")


def _classes(layout: Layout, supported: Mapping[str, tuple[str, ...]]) -> None:
    """Components that are there are of a class that is known; those that may be absent say None among theirs."""
    for name, known in supported.items():
        kind = layout.class_of(name)
        if kind is None and "" in known:
            continue
        if kind is None:
            raise layout.index.refuse(name, "the pipeline needs it")
        if kind not in known:
            use = " or ".join(filter(None, known))
            raise InputError(f"{layout.label}: {name}: {kind} is not supported", hint=f"use a pipeline with {use}")


def _sample_size(unet: Config) -> list[int]:
    size = unet.fields.get("sample_size")
    if size is None:
        raise unet.refuse("sample_size", "the model has no resolution of its own", "set the model's resolution")
    given = size if isinstance(size, list) else [size, size]
    sides = [side for side in given if isinstance(side, int)]
    if not len(sides) == len(given) == 2:
        why = "must be a whole number, or the height and the width"
        raise unet.refuse("sample_size", why, "set the model's resolution")
    return sides


def _own(layout: Layout, sides: list[int]) -> Resolution:
    try:
        return _RESOLUTION.validate_python(sides)
    except ValidationError:
        why = f"{layout.label}: its own resolution, {sides[0]}x{sides[1]}, is outside of 8 to {_LARGEST}"
        raise InputError(why, hint="set the model's resolution") from None


def _divisible(layout: Layout, resolution: Resolution, by: int, why: str) -> Resolution:
    if by > _LARGEST:
        raise InputError(f"{layout.label}: no resolution is possible: {why}", hint="compare it with a published model")
    if any(side % by for side in resolution):
        low, high = (tuple(max(by, (side + up) // by * by) for side in resolution) for up in (0, by - 1))
        raise InputError(
            f"{layout.label}: resolution {list(resolution)}: both sides must be multiples of {by} ({why})",
            hint=f"set it to {list(low)} or {list(high)}",
        )
    return resolution


_CLIP = ("CLIPTextModelWithProjection",)
_SD3_COMPONENTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "transformer": ("SD3Transformer2DModel",),
        "vae": ("AutoencoderKL",),
        "scheduler": FLOW_SCHEDULERS,
        "text_encoder": _CLIP,
        "text_encoder_2": _CLIP,
        "text_encoder_3": ("T5EncoderModel", ""),
        "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
        "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast"),
        "tokenizer_3": ("T5Tokenizer", "T5TokenizerFast", ""),
    }
)
"""Classes of an SD3's components; "" where it may do without."""

_FAMILIES: Mapping[str, str] = MappingProxyType(
    {"DDPMPipeline": "ddpm", "DDIMPipeline": "ddpm", "StableDiffusion3Pipeline": "sd3"}
)
_CHECKS: Mapping[str, Callable[[Layout, Resolution | None], Resolution]] = MappingProxyType(
    {"ddpm": _ddpm, "sd3": _sd3}
)
