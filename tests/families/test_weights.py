"""Weight files: safetensors only, in full precision or in a variant, whole or in shards; anything else is named."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from expunge.errors import InputError
from expunge.families import load_model
from expunge.settings import ModelSettings
from tests.families.tiny import Build, as_variant, at_the_root, ddpm, same_network, sd3

SIZE = (8, 8)
UNET = "unet/diffusion_pytorch_model"


@pytest.mark.parametrize("build", [ddpm, at_the_root])
@pytest.mark.parametrize("variant", ["fp16", "bf16", "ema"])
def test_a_variant_is_loaded_where_there_is_nothing_else(build: Build, variant: str, tmp_path: Path) -> None:
    folder = as_variant(build(tmp_path / "model"), variant)
    same_network(ModelSettings(source=str(folder)), next(folder.rglob("*.safetensors")))


@pytest.mark.parametrize("plain", [(), ("vae",)], ids=["all fp16", "a plain VAE"])
def test_a_variant_of_an_sd3_is_loaded(plain: Sequence[str], tmp_path: Path) -> None:
    folder = as_variant(sd3(tmp_path / "model"))
    for name in plain:
        path = folder / name / "diffusion_pytorch_model"
        path.with_suffix(".fp16.safetensors").rename(path.with_suffix(".safetensors"))
    model = load_model(ModelSettings(source=str(folder), prompt_tokens=1), (32, 48))
    expected = load_file(folder / "transformer" / "diffusion_pytorch_model.fp16.safetensors")
    torch.testing.assert_close(dict(model.network.state_dict()), expected)


def test_full_precision_is_preferred(tmp_path: Path) -> None:
    folder = ddpm(tmp_path / "model")
    plain = folder / f"{UNET}.safetensors"
    save_file({name: value + 1 for name, value in load_file(plain).items()}, folder / f"{UNET}.fp16.safetensors")
    same_network(ModelSettings(source=str(folder)), plain)


def test_different_variants_of_components_are_refused(tmp_path: Path) -> None:
    folder = as_variant(sd3(tmp_path / "model"))
    vae = folder / "vae" / "diffusion_pytorch_model.fp16.safetensors"
    vae.rename(vae.with_name("diffusion_pytorch_model.bf16.safetensors"))
    with pytest.raises(InputError, match=r"no variant .*bf16, fp16"):
        load_model(ModelSettings(source=str(folder)), (32, 48))


def shards(folder: Path) -> Path:
    """Two shards and their index; returns the second shard."""
    whole = folder / f"{UNET}.safetensors"
    weights = load_file(whole)
    whole.unlink()
    names = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    weight_map = {name: names[i % 2] for i, name in enumerate(weights)}
    for file in names:
        save_file({name: weights[name] for name in weights if weight_map[name] == file}, folder / "unet" / file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{UNET}.safetensors.index.json").write_text(json.dumps(index))
    return folder / "unet" / names[1]


def test_shards_are_loaded_by_their_index(tmp_path: Path) -> None:
    folder = ddpm(tmp_path / "model")
    reference = Path(shutil.copy(folder / f"{UNET}.safetensors", tmp_path))
    shards(folder)
    same_network(ModelSettings(source=str(folder)), reference)


@pytest.mark.parametrize(
    ("lost", "says"),
    [
        ("-00002-of-00002.safetensors", r"index\.json .*00002-of-00002\.safetensors.* missing"),
        (".safetensors.index.json", "unet has shards .* no index"),
    ],
)
def test_a_missing_shard_is_named(lost: str, says: str, tmp_path: Path) -> None:
    folder = ddpm(tmp_path / "model")
    shards(folder)
    (folder / f"{UNET}{lost}").unlink()
    with pytest.raises(InputError, match=says):
        load_model(ModelSettings(source=str(folder)), SIZE)


@pytest.mark.parametrize("build", [ddpm, at_the_root])
def test_a_pickle_is_refused_unread(build: Build, tmp_path: Path) -> None:
    folder = build(tmp_path / "model")
    weights = next(folder.rglob("*.safetensors"))
    weights.unlink()
    weights.with_suffix(".bin").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    with pytest.raises(InputError, match=r"diffusion_pytorch_model\.bin .* pickle, .* python -c"):
        load_model(ModelSettings(source=str(folder)), SIZE)


def test_a_pickle_beside_safetensors_is_left_alone(tmp_path: Path) -> None:
    folder = ddpm(tmp_path / "model")
    (folder / f"{UNET}.bin").write_bytes(b"no pickle")
    same_network(ModelSettings(source=str(folder)), folder / f"{UNET}.safetensors")


def _without_weights(folder: Path) -> None:
    (folder / f"{UNET}.safetensors").unlink()


def _truncated_weights(folder: Path) -> None:
    weights = folder / f"{UNET}.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def _without_index(folder: Path) -> None:
    (folder / "model_index.json").unlink()


@pytest.mark.parametrize("damage", [_without_weights, _truncated_weights, _without_index])
def test_an_incomplete_folder_is_refused(damage: Callable[[Path], None], tmp_path: Path) -> None:
    folder = ddpm(tmp_path / "model")
    damage(folder)
    with pytest.raises(InputError, match="complete diffusers pipeline"):
        _ = load_model(ModelSettings(source=str(folder)), SIZE).network
