"""Each part of a pipeline is read alone, kept only as long as it is needed, and computes what the whole one does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from expunge.families import autoencoder, components, load_model
from expunge.families.components import Components
from expunge.families.family import Family
from expunge.families.loading import load_base
from expunge.families.sampler import generate
from expunge.settings import ModelSettings
from tests.families.tiny import ddpm, sd3

SIZE = (32, 48)
TOKENS = 12
ENCODERS = ["text_encoder", "text_encoder_2", "text_encoder_3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SD3 of random weights with all three text encoders."""
    made = sd3(tmp_path_factory.mktemp("sd3"))
    pipeline: Any = load_base(str(made))
    words = [(word, -1.0) for word in ("<pad>", "</s>", "<unk>", "▁a", "▁flag", "▁of", "▁the", "▁Peru")]
    torch.manual_seed(1)
    width = pipeline.transformer.config.joint_attention_dim
    config = T5Config(vocab_size=len(words), d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    tokenizer = T5Tokenizer(vocab=words, extra_ids=0)
    pipeline.register_modules(text_encoder_3=T5EncoderModel(config).eval(), tokenizer_3=tokenizer)
    pipeline.save_pretrained(made)
    return made


def load(folder: Path) -> Family:
    return load_model(ModelSettings(source=str(folder), prompt_tokens=TOKENS), SIZE)


def noise(model: Family, count: int) -> Tensor:
    return torch.randn(count, *model.latent_shape, generator=torch.Generator().manual_seed(0))


def test_opening_a_model_reads_no_network(folder: Path) -> None:
    assert load(folder).parts.read == []


def test_text_encoders_come_one_after_the_other_and_go(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(folder)
    beside: list[frozenset[str]] = []
    network = Components.network

    def watched(parts: Components, name: str) -> torch.nn.Module:
        beside.append(parts.held)
        return network(parts, name)

    monkeypatch.setattr(Components, "network", watched)
    model.condition(["a flag", ""])
    assert model.parts.read == ENCODERS
    assert beside == [frozenset()] * 3
    assert model.parts.held == frozenset()


def test_the_denoiser_is_read_alone(folder: Path) -> None:
    model = load(folder)
    width = model.parts.layout.config("transformer").integer("joint_attention_dim")
    cond = {"encoder_hidden_states": torch.zeros(1, 5, width), "pooled_projections": torch.zeros(1, 128)}
    model.predict(noise(model, 1), torch.tensor([500.0]), cond)
    assert model.parts.held == {"transformer"}
    model.release()
    assert model.parts.held == frozenset()
    model.encode(torch.zeros(1, 3, *SIZE))
    assert model.parts.held == {"vae"}


def test_prompts_are_encoded_as_the_pipeline_does(folder: Path) -> None:
    texts = ["a flag", "", "the flag of Peru " * 8]
    pipeline: Any = load_base(str(folder))
    with torch.no_grad():
        embeds, _, pooled, _ = pipeline.encode_prompt(
            texts, texts, texts, do_classifier_free_guidance=False, max_sequence_length=TOKENS
        )
    made = load(folder).condition(texts)
    torch.testing.assert_close(made["encoder_hidden_states"], embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(made["pooled_projections"], pooled, rtol=0, atol=1e-5)


def test_a_prompt_that_is_cut_is_counted_and_not_quoted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load(folder).condition(["a flag", "the flag of Peru " * 30])
    said = capsys.readouterr().err + capsys.readouterr().out
    assert "1 of 2 prompts are cut" in said
    assert "Peru" not in said


def half(folder: Path, dtype: torch.dtype) -> None:
    for path in folder.rglob("*.safetensors"):
        save_file({name: value.to(dtype) for name, value in load_file(path).items()}, path, {"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_large_network_keeps_the_precision_of_its_files(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half(ddpm(tmp_path / "model"), dtype)
    settings = ModelSettings(source=str(tmp_path / "model"))
    assert next(load_model(settings, (8, 8)).network.parameters()).dtype == torch.float32, "a small one does not"
    monkeypatch.setattr(components, "SMALL", 0)
    model = load_model(settings, (8, 8))
    assert next(model.network.parameters()).dtype == dtype
    assert next(load_model(settings, (8, 8), exact=True).network.parameters()).dtype == torch.float32


def test_in_bf16_all_but_the_network_stays_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = sd3(tmp_path / "model")
    half(folder, torch.bfloat16)
    settings = ModelSettings(source=str(folder), prompt_tokens=1)
    made = []
    for small in (components.SMALL, 0):
        monkeypatch.setattr(components, "SMALL", small)
        model = load_model(settings, SIZE)
        cond, empty = model.condition(["a flag"]), model.condition([""])
        made.append(generate(model, noise(model, 1), cond, steps=4, guidance=2.0, empty=empty))
        made.append(model.decode(made[-1]))
    assert all(part.dtype == torch.float32 for part in made)
    for mine, exact in zip(made[2:], made[:2], strict=True):
        assert 0 < (mine - exact).norm() / exact.norm() < 0.05


def test_pictures_pass_the_autoencoder_a_few_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(folder)
    latents = noise(model, 5)
    together = model.decode(latents)
    sizes: list[int] = []
    vae: Any = model.parts.network("vae")
    decode = vae.decode
    monkeypatch.setattr(vae, "decode", lambda part: sizes.append(len(part)) or decode(part))
    monkeypatch.setattr(autoencoder, "PIXELS", 2 * SIZE[0] * SIZE[1])
    torch.testing.assert_close(model.decode(latents), together, rtol=0, atol=1e-5)
    assert sizes == [2, 2, 1]


def test_a_component_is_not_looked_for_in_another_ones_variant(tmp_path: Path) -> None:
    """The VAE alone has full precision; the others have fp16."""
    folder = sd3(tmp_path / "model")
    for path in list(folder.rglob("*.safetensors")):
        if path.parent.name != "vae":
            path.rename(path.with_name(f"{path.stem}.fp16.safetensors"))
    model = load_model(ModelSettings(source=str(folder), prompt_tokens=1), SIZE)
    model.encode(torch.zeros(1, 3, *SIZE))
    model.condition([""])
    assert isinstance(model.network, torch.nn.Module)
    assert model.parts.read == ["vae", "text_encoder", "text_encoder_2", "transformer"]
