"""MLflow itself loads a version and generates with it, in a process that knows nothing but the registry."""

import io
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import mlflow
import numpy as np
import pandas
import pytest
import yaml
from mlflow.pyfunc import PyFuncModel
from PIL import Image

from expunge.errors import InputError, StorageError
from expunge.registry import artifacts
from expunge.registry.tracking import Tracker
from tests.registry.publishing import STEPS, generated

Publish = Callable[..., None]

SCRIPT = """
import pathlib, sys
import mlflow, pandas
uri, model, prompt, out = sys.argv[1:]
assert "expunge" not in sys.modules
mlflow.set_tracking_uri(uri)
rows = pandas.DataFrame({"seed": [0, 5], "count": [1, 2], **({"prompt": ["", ""]} if prompt else {})})
options = {"num_inference_steps": 2, **({"guidance_scale": 1.0} if prompt else {})}
made = mlflow.pyfunc.load_model(f"models:/{model}@champion").predict(rows, params=options)
assert made["seed"].tolist() == [0, 5, 6]
for seed, png in zip(made["seed"], made["png"]):
    pathlib.Path(out, f"{seed}.png").write_bytes(png)
"""


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)), dtype=np.float32) / 255


@pytest.mark.parametrize("model", ["faces", "flags"])
def test_mlflow_generates_what_the_pipeline_generates(
    empty_registry: Tracker, publish: Publish, tmp_path: Path, model: str
) -> None:
    """From a folder without the repository; the version is whole afterwards, whatever MLflow has written there."""
    publish(model)
    out = tmp_path / "elsewhere"
    out.mkdir()
    arguments = [empty_registry.uri, model, "prompt" if model == "flags" else "", str(out)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], cwd=out, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    made = pixels((out / "0.png").read_bytes())
    np.testing.assert_allclose(made, generated(model)[0].squeeze(), atol=1 / 255)
    assert np.abs(made - generated(model, hotfixed=False)[0].squeeze()).max() > 0.02, "the hotfix is not in it"
    assert np.abs(made - pixels((out / "5.png").read_bytes())).max() > 0.02, "another seed, the same picture"
    assert artifacts.download(empty_registry, f"models:/{model}@champion").is_dir()


def test_a_version_says_what_it_takes_and_what_it_was_made_with(empty_registry: Tracker, publish: Publish) -> None:
    publish("faces")
    folder = artifacts.download(empty_registry, "models:/faces@champion")
    described = yaml.safe_load((folder / "MLmodel").read_text())
    assert described["metadata"]["expunge.source"] == "testbed:faces"
    assert described["metadata"]["expunge.kind"] == "full"
    assert {"expunge.base", "expunge.release", "expunge.protocol"} <= described["metadata"].keys()
    assert "seed" in described["signature"]["inputs"]
    required = (folder / "requirements.txt").read_text().split()
    assert {line.partition("==")[0] for line in required} >= {"expunge", "diffusers", "torch"}
    assert all(line.partition("==")[2] for line in required)
    assert not [path for path in folder.rglob("*") if path.suffix in (".pkl", ".pickle", ".pt", ".bin")]
    networks = [path for path in folder.rglob("*.safetensors")]
    assert [path.parent.name for path in networks] == ["unet"], "the base model is not in it"


@pytest.fixture
def load(empty_registry: Tracker, monkeypatch: pytest.MonkeyPatch) -> Callable[..., PyFuncModel]:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", empty_registry.uri)
    return partial(mlflow.pyfunc.load_model, "models:/faces@champion")


def test_what_the_model_cannot_do_is_refused(load: Callable[..., PyFuncModel], publish: Publish) -> None:
    publish("faces")
    model, steps = load(), {"num_inference_steps": STEPS}
    with pytest.raises(InputError, match="prompt: this model takes none"):
        model.predict(pandas.DataFrame({"seed": [1], "prompt": ["a lake"]}), params=steps)
    with pytest.raises(InputError, match="takes no guidance_scale"):
        model.predict(pandas.DataFrame({"seed": [1]}), params={**steps, "guidance_scale": 2.0})
    with pytest.raises(InputError, match="count: 0 is not positive"):
        model.predict(pandas.DataFrame({"seed": [1], "count": [0]}), params=steps)
    assert len(model.predict(pandas.DataFrame({"seed": [1]}), params=steps)) == 1


def test_a_changed_file_and_another_base_are_refused(
    empty_registry: Tracker, load: Callable[..., PyFuncModel], publish: Publish, tmp_path: Path
) -> None:
    publish("faces", base="0" * 64)
    with pytest.raises(InputError, match="not those that the hotfix was trained from"):
        load()
    with pytest.raises(InputError, match=r"base model .*nowhere cannot be loaded"):
        load(model_config={"base": str(tmp_path / "nowhere")})
    folder = artifacts.download(empty_registry, "models:/faces@champion")
    [weights] = folder.rglob("*.safetensors")
    weights.write_bytes(b"other weights")
    with pytest.raises(StorageError, match=r"diffusion_pytorch_model\.safetensors does not match its digest"):
        load()
