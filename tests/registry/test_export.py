"""What is exported is loaded by plain diffusers, and generates what the registered version generates."""

import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from diffusers import UNet2DModel

from expunge.errors import StorageError
from expunge.families import resolve_source
from expunge.registry.export import export
from expunge.registry.tracking import Tracker
from tests.cli.conftest import Command
from tests.registry.publishing import generated

Publish = Callable[..., None]

SCRIPT = """
import sys
import numpy as np, torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline, UNet2DModel
form, folder, base, out = sys.argv[1:]
options = {"torch_dtype": torch.float32}
if "flags" in base:
    options |= {"text_encoder_3": None, "tokenizer_3": None}
if form == "diffusers" and "faces" in base:
    options["unet"] = UNet2DModel.from_pretrained(folder, subfolder="unet")
pipeline = DiffusionPipeline.from_pretrained(folder if form == "merged" else base, **options)
if form == "lora":
    pipeline.load_lora_weights(folder)
draw = {"generator": torch.Generator().manual_seed(0), "num_inference_steps": 2, "output_type": "np"}
if "flags" in base:
    draw |= {"prompt": "", "height": 32, "width": 48, "guidance_scale": 1.0}
np.save(out, pipeline(**draw).images)
assert "expunge" not in sys.modules
"""


@pytest.mark.parametrize(
    ("model", "form"), [("faces", "diffusers"), ("faces", "merged"), ("flags", "lora"), ("flags", "merged")]
)
def test_plain_diffusers_generates_the_same(
    command: Command, publish: Publish, tmp_path: Path, model: str, form: str
) -> None:
    publish(model)
    folder, picture = tmp_path / "handed" / "over", tmp_path / "picture.npy"
    ended = command("export", model, "--format", form, "--out", folder, "--json")
    assert ended.code == 0, ended.err
    assert "ledger.json" in ended.json["files"]
    assert [path.name for path in folder.parent.iterdir()] == ["over"]
    arguments = [form, str(folder), resolve_source(f"testbed:{model}"), str(picture)]
    done = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    plain = np.load(picture)
    np.testing.assert_allclose(plain, generated(model), atol=2e-3)
    assert np.abs(plain - generated(model, hotfixed=False)).max() > 0.02, "the hotfix is not in it"


def test_what_cannot_be_exported_is_refused(command: Command, publish: Publish, tmp_path: Path) -> None:
    publish("faces")
    ended = command("export", "faces", "--format", "lora", "--out", tmp_path / "out")
    assert (ended.code, (tmp_path / "out").exists()) == (2, False)
    assert "no adapter" in ended.err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    ended = command("export", "faces", "--format", "merged", "--out", tmp_path / "full")
    assert ended.code == 2
    assert "not an empty folder" in ended.err
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]
    assert command("export", "faces@7", "--format", "merged", "--out", tmp_path / "out").code == 4
    assert command("export", "faces", "--format", "onnx", "--out", tmp_path / "out").code == 2


@pytest.mark.parametrize("form", ["diffusers", "merged"])
def test_a_full_disk_leaves_nothing_behind(
    empty_registry: Tracker, publish: Publish, tmp_path: Path, form: str
) -> None:
    publish("faces")
    assert UNet2DModel.from_pretrained(resolve_source("testbed:faces"), subfolder="unet").num_parameters() > 500_000
    out = tmp_path / "out" / "faces"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, hard))  # bytes per file: what a full disk looks like here
    try:
        with pytest.raises(StorageError, match="cannot be written"):
            export(empty_registry, "models:/faces@champion", form, out)  # pyright: ignore[reportArgumentType]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(out.parent.iterdir()) == []
