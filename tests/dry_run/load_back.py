"""Load the registered version as its owner would, in a process of its own, and generate a picture with it."""

import resource
import subprocess
import sys
import time
from pathlib import Path

from tests.dry_run.night import MODEL, PROMPT_TOKENS


def run(home: Path, pixels: int) -> str:
    """Do it in another process, whose memory is measured. Raises CalledProcessError if it fails."""
    command = [sys.executable, "-m", "tests.dry_run.load_back", str(pixels)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def main(pixels: int) -> None:
    import torch

    from expunge.registry import load_pipeline

    began = time.monotonic()
    pipeline = load_pipeline(f"models:/{MODEL}@champion")
    loaded = time.monotonic()
    made = pipeline(  # pyright: ignore[reportCallIssue]
        "a photo of a bowl of fruit",
        height=pixels,
        width=pixels,
        num_inference_steps=2,
        guidance_scale=1.0,
        max_sequence_length=PROMPT_TOKENS,
        output_type="pt",
        generator=torch.Generator().manual_seed(0),
    ).images
    assert made.shape == (1, 3, pixels, pixels)
    assert bool(made.isfinite().all())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    ended = time.monotonic()
    dtype = next(pipeline.components["transformer"].parameters()).dtype
    print(f"load back: {loaded - began:.0f} s, a picture {ended - loaded:.0f} s, peak {peak:.1f} GB, in {dtype}")


if __name__ == "__main__":
    main(int(sys.argv[1]))
