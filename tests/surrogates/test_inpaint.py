"""Inpainting with an untrained Stable Diffusion 3 of the testbed's architecture: what is tested is the handling."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

from expunge.errors import InputError
from expunge.surrogates import Editor, make_editor
from expunge.testbed import flags
from expunge.words import EditSpec


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
    first, again, other = (editor(target, mask=mask, donors=donors, seed=seed) for seed in (1, 1, 2))
    assert first.shape == target.shape
    assert first.dtype == np.uint8
    assert np.array_equal(first[~mask], target[~mask])
    assert not np.array_equal(first[mask], target[mask])
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_the_model_has_to_be_named() -> None:
    with pytest.raises(InputError, match=r"edit\.options\.model: .*: model is an inpainting pipeline: a path or a hub"):
        make_editor(EditSpec(editor="inpaint"))


def test_a_model_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    editor = _inpaint(tmp_path / "nothing")
    target = np.zeros((32, 32, 3), np.uint8)
    with pytest.raises(InputError, match=r"edit\.options\.model: '.*nothing' cannot be loaded"):
        editor(target, mask=None, donors=target[None], seed=0)
