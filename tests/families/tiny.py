"""Pipelines with random weights, as small as their classes allow, and hands to change their files."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
    UNet2DModel,
)
from safetensors.torch import load_file

from expunge.families import load_model
from expunge.settings import ModelSettings
from expunge.testbed import flags

Build = Callable[[Path], Path]

REPOSITORY, COMMIT = "someone/model", "0123456789abcdef0123456789abcdef01234567"


def unet(**config: object) -> UNet2DModel:
    torch.manual_seed(0)
    defaults = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (8, 8),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    network = UNet2DModel.from_config({**defaults, **config})
    assert isinstance(network, UNet2DModel)
    return network


def ddpm(folder: Path, **scheduler: object) -> Path:
    kind = DDPMScheduler.from_config({"num_train_timesteps": 50, **scheduler})
    assert isinstance(kind, DDPMScheduler)
    DDPMPipeline(unet(), kind).save_pretrained(folder)
    return folder


def ddim(folder: Path, **scheduler: object) -> Path:
    kind = DDIMScheduler.from_config({"num_train_timesteps": 50, **scheduler})
    assert isinstance(kind, DDIMScheduler)
    DDIMPipeline(unet(), kind).save_pretrained(folder)
    return folder


def at_the_root(folder: Path) -> Path:
    """As google/ddpm-* are laid out: everything in one folder, and no model_index.json."""
    ddpm(folder)
    for path in (*(folder / "unet").iterdir(), *(folder / "scheduler").iterdir()):
        path.rename(folder / path.name)
    (folder / "model_index.json").unlink()
    (folder / "unet").rmdir()
    (folder / "scheduler").rmdir()
    return folder


def sd3(folder: Path) -> Path:
    """The testbed's architecture."""
    torch.manual_seed(0)
    tokenizer = flags.build_tokenizer(["a flag", ""])
    StableDiffusion3Pipeline(
        transformer=flags.build_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=flags.build_vae(),
        text_encoder=flags.build_text_encoder(len(tokenizer), 0),
        tokenizer=tokenizer,
        text_encoder_2=flags.build_text_encoder(len(tokenizer), 1),
        tokenizer_2=tokenizer,
        text_encoder_3=None,  # pyright: ignore[reportArgumentType]  # optional, annotated as if not
        tokenizer_3=None,  # pyright: ignore[reportArgumentType]
    ).save_pretrained(folder)
    return folder


def edit(path: Path, changes: Mapping[str, object], *without: str) -> None:
    """Change and remove fields of a JSON file."""
    fields = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in fields.items() if name not in without}))


def as_variant(folder: Path, variant: str = "fp16") -> Path:
    """Rename every weight file to the variant's name."""
    for path in list(folder.rglob("*.safetensors")):
        path.rename(path.with_name(f"{path.stem}.{variant}.safetensors"))
    return folder


def in_the_hubs_cache(folder: Path, cache: Path) -> Path:
    """Move a pipeline to where the hub's client looks for COMMIT of REPOSITORY."""
    snapshot = cache / f"models--{REPOSITORY.replace('/', '--')}" / "snapshots" / COMMIT
    snapshot.parent.mkdir(parents=True)
    shutil.move(folder, snapshot)
    return snapshot


def same_network(settings: ModelSettings, reference: Path) -> None:
    """Check that the model which is loaded at 8x8 has the weights of the file `reference`, in float32."""
    expected = load_file(reference)
    for name, value in load_model(settings, (8, 8)).network.state_dict().items():
        torch.testing.assert_close(value, expected[name].float(), msg=name)
