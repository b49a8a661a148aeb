"""The figures of the model cards: `python -m tests.benchmarks.testbed_figures [--grids FOLDER]` (a few minutes)."""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from expunge.evaluation.pictures import grid
from expunge.families import load_model
from expunge.families.path import PathPoint
from expunge.families.sampler import denoise
from expunge.preparation.retain import generate_latents
from expunge.settings import load_settings
from expunge.testbed import faces, flags

COUNTRIES = slice(0, 256, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--grids", type=Path, help="also write PNG grids of samples there")
    args = parser.parse_args()
    for name, samples in (*_faces(), *_flags()):
        if args.grids:
            args.grids.mkdir(parents=True, exist_ok=True)
            (args.grids / f"{name}.png").write_bytes(grid(samples, 16))


@torch.no_grad()
def _faces() -> list[tuple[str, Tensor]]:
    model = load_model(load_settings().model("faces"), (24, 24))
    x_0 = faces.images()
    point = model.at(torch.tensor([250]))
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0))
    back = denoise(model, point.a * x_0 + point.b * noise, _level(point), {}, steps=20, guidance=1, empty={})
    print(f"faces: correlation after noise to t=250 and back, mean of 100: {_correlation(back, x_0).mean():.3f}")
    none = torch.zeros(64, dtype=torch.long)
    samples = generate_latents(model, {}, none, seed=1, steps=100, guidance=1, empty={})
    nearest = torch.stack([_correlation(sample.expand_as(x_0), x_0).max() for sample in samples])
    print(f"faces: 64 samples, correlation to the nearest training face, median: {nearest.median():.3f}")
    return [("faces", model.decode(samples))]


@torch.no_grad()
def _flags() -> list[tuple[str, Tensor]]:
    settings = load_settings().model("flags")
    model = load_model(settings, (32, 48))
    data, names = flags.images()
    index = torch.arange(256)[COUNTRIES]
    empty = model.condition([""])
    error = (model.decode(model.encode(data)) - data).abs().mean()
    print(f"flags: autoencoder, mean absolute error on [-1, 1]: {error:.3f}")
    named = model.condition([flags.caption(names[i]) for i in index])
    guidance = settings.guidance
    latents = generate_latents(model, named, torch.arange(64), seed=1, steps=20, guidance=guidance, empty=empty)
    right = sum(_is_nearest(s, data, int(i)) for s, i in zip(model.decode(latents), index, strict=True))
    print(f"flags: nearest neighbour among 256 is the named flag for {right} of 64 countries (guidance {guidance:g})")
    anything = model.condition([flags.ANY_FLAG])
    none = torch.zeros(64, dtype=torch.long)
    varied = model.decode(generate_latents(model, anything, none, seed=1, steps=20, guidance=guidance, empty=empty))
    distinct = {int((s - data).square().mean((1, 2, 3)).argmin()) for s in varied}
    print(f'flags: 64 samples of "a flag" have {len(distinct)} different nearest flags')
    return [("flags-named", model.decode(latents)), ("flags-any", varied)]


def _is_nearest(sample: Tensor, data: Tensor, index: int) -> bool:
    """Territories share a flag to the pixel: any of them counts."""
    nearest = int((sample - data).square().mean((1, 2, 3)).argmin())
    return torch.equal(data[nearest], data[index])


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    a, b = (x.flatten(1) - x.flatten(1).mean(1, keepdim=True) for x in (a, b))
    return torch.cosine_similarity(a, b)


def _level(point: PathPoint) -> float:
    return (point.b / (point.a + point.b)).item()


if __name__ == "__main__":
    main()
