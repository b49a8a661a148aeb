"""Inpainting with an untrained Stable Diffusion 3 of the testbed's architecture: what is tested is the handling."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

from expunge.errors import InputError
from expunge.surrogates import Editor, Task, make_editor
from expunge.surrogates.inpaint import Inpaint
from expunge.testbed import flags
from expunge.types import EditSpec
from tests.families.tiny import ddpm


def _inpaint(model: Path, **options: str) -> Editor:
    return make_editor(EditSpec(editor="inpaint", options={"model": str(model), **options}))


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    tokenizer = flags.build_tokenizer(["a flag", ""])
    folder = tmp_path_factory.mktemp("inpaint")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flags, "LATENT_CHANNELS", 16)  # the only number of channels that diffusers inpaints
        transformer, vae = flags.build_transformer(), flags.build_vae()
    with torch.no_grad():  # encodes to a mean alone, as trained ones nearly do
        vae.encoder.conv_out.weight[16:] = 0
        assert vae.encoder.conv_out.bias is not None
        vae.encoder.conv_out.bias[16:] = -30
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=flags.build_text_encoder(len(tokenizer), 0),
        tokenizer=tokenizer,
        text_encoder_2=flags.build_text_encoder(len(tokenizer), 1),
        tokenizer_2=tokenizer,
        text_encoder_3=None,  # pyright: ignore[reportArgumentType]  # optional, annotated as if not
        tokenizer_3=None,  # pyright: ignore[reportArgumentType]
    ).save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(32, 48), (24, 30)], ids=str)
def test_only_the_mask_is_repainted(pipeline: Path, shape: tuple[int, int]) -> None:
    """Also where the sides are not what the model can divide."""
    target = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    mask = np.zeros(shape, bool)
    mask[4:-4, 6:-6] = True
    editor = _inpaint(pipeline, steps="2", prompt="a flag")
    donors = np.empty((0, *target.shape), np.uint8)
    first, again, other = (editor(Task(target, mask=mask, donors=donors, seed=seed)) for seed in (1, 1, 2))
    assert first.shape == target.shape
    assert first.dtype == np.uint8
    assert np.array_equal(first[~mask], target[~mask])
    assert not np.array_equal(first[mask], target[mask])
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("shift", [0.7, None])
def test_a_repainting_that_changes_nothing_returns_the_picture(
    shift: float | None, pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers' own pipeline forgets the autoencoder's shift when it decodes, and cannot have one of null."""
    config = pipeline / "vae" / "config.json"
    before = config.read_text()
    config.write_text(json.dumps({**json.loads(before), "shift_factor": shift}))
    target = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    try:
        editor = _inpaint(pipeline, steps="1000", strength="0.001")  # a single step, from the lowest level
        assert isinstance(editor, Inpaint)
        result = editor(Task(target, mask=np.ones((32, 48), bool), donors=target[None], seed=0))
        vae = AutoencoderKL.from_pretrained(pipeline / "vae")
    finally:
        config.write_text(before)
    assert isinstance(vae, AutoencoderKL)
    with torch.no_grad():
        pixels = torch.from_numpy(target).permute(2, 0, 1)[None].float() / 127.5 - 1
        latents = vae.encode(pixels)[0].mode()
        there_and_back, shifted = (vae.decoder(z) for z in (latents, latents - (shift or 0.7)))

    def far(pictures: torch.Tensor) -> float:
        expected = ((pictures[0].permute(1, 2, 0) + 1) * 127.5).clamp(0, 255).numpy()
        return float(np.abs(expected - result).mean())

    assert far(there_and_back) < 1
    assert far(shifted) > 10


def test_what_the_pipeline_cannot_do_is_said(pipeline: Path) -> None:
    editor = _inpaint(pipeline, size="256")  # beyond the positions that the transformer knows
    target = np.zeros((32, 32, 3), np.uint8)
    with pytest.raises(InputError, match=r"edit: .* cannot repaint 256x256 pixels \("):
        editor(Task(target, mask=None, donors=target[None], seed=0))


def test_a_pickle_is_refused(tmp_path: Path) -> None:
    folder = ddpm(tmp_path / "model")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    target = np.zeros((32, 32, 3), np.uint8)
    with pytest.raises(InputError, match=r"edit\.options\.model: .* a pickle, which can run code"):
        _inpaint(folder)(Task(target, mask=None, donors=target[None], seed=0))


def test_a_pipeline_that_cannot_inpaint_is_refused(tmp_path: Path) -> None:
    target = np.zeros((32, 32, 3), np.uint8)
    with pytest.raises(InputError, match=r"cannot be loaded: .*: name the folder or hub id of an inpainting pipeline"):
        _inpaint(ddpm(tmp_path / "model"))(Task(target, mask=None, donors=target[None], seed=0))


def test_the_model_has_to_be_named() -> None:
    with pytest.raises(InputError, match=r"edit\.options\.model: .*: model is an inpainting pipeline: a path, or a"):
        make_editor(EditSpec(editor="inpaint"))


def test_a_model_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    editor = _inpaint(tmp_path / "nothing")
    target = np.zeros((32, 32, 3), np.uint8)
    with pytest.raises(InputError, match=r"edit\.options\.model: '.*nothing' cannot be loaded"):
        editor(Task(target, mask=None, donors=target[None], seed=0))
