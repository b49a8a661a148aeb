"""A home whose one model is the random SD3, a request for it, and settings that are as small as they may be."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from expunge.runs.job import JobFolder
from tests.gates import OPEN_GATE

BATCH, MODEL = "dry-run", "random"
PROMPT_TOKENS = 16

CONFIG = """
log_level = "debug"

[models.random]
source = "{source}"
resolution = [{pixels}, {pixels}]
prompt_tokens = {tokens}
retain_prompts = ["a photo of a bowl of fruit"]
evaluation_prompts = ["a drawing of a house by the sea"]

[training]
workers = 1
steps = 2
checkpoint_every = 1
forget_batch = 1
retain_batch = 1
micro_batch = 1
views = 2
retain_size = 4
precision = "bf16"
zero_stage = 1
activation_checkpointing = true

[evaluation]
levels = [0.2]
seeds = 8
unseen_folder = "{unseen}"
unseen_pictures = 16
generation_samples = 16
integrity_samples = 16
sampling_steps = 2
robustness = "off"
"""


def make_home(home: Path, source: Path, pixels: int) -> None:
    """Write the home's settings and its pictures, unless they are there."""
    unseen = home / "unseen"
    unseen.mkdir(parents=True, exist_ok=True)
    numbers = np.random.default_rng(0)
    for i in range(16):
        save(unseen / f"{i}.png", numbers.integers(0, 256, (pixels, pixels, 3)))
    save(home / "target.png", _disc(pixels))
    save(home / "surrogate.png", _stripes(pixels))
    config = CONFIG.format(source=source, pixels=pixels, unseen=unseen, tokens=PROMPT_TOKENS)
    (home / "config.toml").write_text(config + OPEN_GATE)  # two steps remove nothing


def submit(home: Path, environment: dict[str, str]) -> None:
    """Submit the one request, unless the night has begun."""
    if (home / "runs" / BATCH).exists():
        return
    given = ["--model", MODEL, "--surrogate", str(home / "surrogate.png"), "--external-id", "dry-run"]
    expunge(environment, "submit", str(home / "target.png"), *given)


def run(environment: dict[str, str]) -> None:
    expunge(environment, "night", "--batch", BATCH, "--yes")


def expunge(environment: dict[str, str], *arguments: str) -> None:
    """Run a command as an operator does. Raises CalledProcessError if it fails."""
    subprocess.run([sys.executable, "-m", "expunge", *arguments], env=environment, check=True)


def ended(home: Path) -> bool:
    """Tell whether the job has ended."""
    ends = [JobFolder(path.parent).end.expect() for path in home.glob(f"runs/{BATCH}/*/outcome.json")]
    return bool(ends) and all(end.error is None for end in ends)


def save(path: Path, picture: np.ndarray) -> None:
    if not path.exists():
        part = path.with_name(f".{os.getpid()}-{path.name}")
        Image.fromarray(picture.astype(np.uint8)).save(part)
        part.rename(path)


def _disc(pixels: int) -> np.ndarray:
    """A yellow disc on blue: bold enough to come back through the coarse autoencoder."""
    y, x = np.mgrid[:pixels, :pixels] / pixels
    inside = (x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.3**2
    return np.where(inside[..., None], (250, 230, 60), (20, 20, 160))


def _stripes(pixels: int) -> np.ndarray:
    columns = np.sin(np.arange(pixels) / pixels * 40) > 0
    return np.broadcast_to(columns[None, :, None] * 200 + 20, (pixels, pixels, 3))
