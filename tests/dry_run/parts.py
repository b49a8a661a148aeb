"""Use each part of a pipeline once, as the stages do: `python -m tests.dry_run.parts FOLDER` prints time and memory.

It takes minutes where a whole night takes an hour, and says which part needs how much.
"""

import sys
import time
from pathlib import Path

import torch

from expunge.families import load_model
from expunge.settings import ModelSettings
from tests.dry_run.night import PROMPT_TOKENS


def main(folder: str, pixels: int) -> None:
    began = time.monotonic()
    settings = ModelSettings(source=folder, prompt_tokens=PROMPT_TOKENS)
    model = load_model(settings, (pixels, pixels))
    show("opened", began)
    conditioning = model.condition(["a photo of a house", ""])
    show("conditioned, 2 prompts", began)
    x_t = torch.randn(1, *model.latent_shape)
    with torch.no_grad():
        made = model.predict(x_t, torch.tensor([500.0]), {name: table[:1] for name, table in conditioning.items()})
    assert bool(made.isfinite().all())
    show("one pass", began)
    model.release()
    show("released", began)
    model.encode(torch.rand(1, 3, pixels, pixels))
    show("encoded, 1 picture", began)
    model.decode(made)
    show("decoded, 1 picture", began)


def show(what: str, began: float) -> None:
    """Print the time, and the resident memory now and at most, in GB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    now, own, most = (int(lines[name].split()[0]) * 1024 / 1e9 for name in ("VmRSS", "RssAnon", "VmHWM"))
    print(
        f"{what:24} {time.monotonic() - began:5.0f} s  resident {now:5.2f} GB (own {own:.2f}), peak {most:.2f}",
        flush=True,
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 256)
