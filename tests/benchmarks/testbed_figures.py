"""The figures of the model cards: `python -m tests.benchmarks.testbed_figures [NAME ...]` (a few minutes each).

`--source FOLDER` measures another model of the one NAME, such as an oracle of `expunge testbed NAME --without`.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from expunge.evaluation.pictures import grid
from expunge.families import load_model
from expunge.families.path import PathPoint
from expunge.families.sampler import denoise
from expunge.preparation.retain import generate_latents
from expunge.settings import ModelSettings, load_settings
from expunge.testbed import faces, flags, people
from expunge.testbed.identity import UNKNOWN, Identifier, classifier
from tests.benchmarks.person import Share, free_samples, people_model

COUNTRIES = slice(0, 256, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cards = {"faces": _faces, "flags": _flags, "people": _people}
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(cards)} (default: all)")
    parser.add_argument("--source", help="another folder than the shipped model's")
    parser.add_argument("--grids", type=Path, help="also write PNG grids of samples there")
    args = parser.parse_args()
    if unknown := set(args.names) - set(cards):
        parser.error(f"there is no {', '.join(sorted(unknown))}")
    if args.source and len(args.names) != 1:
        parser.error("--source needs one NAME")
    for card in args.names or cards:
        for name, samples in cards[card](args.source or f"testbed:{card}"):
            if args.grids:
                args.grids.mkdir(parents=True, exist_ok=True)
                (args.grids / f"{name}.png").write_bytes(grid(samples, 16))


def _faces(source: str) -> list[tuple[str, Tensor]]:
    return [("faces", _ddpm("faces", source, faces.images()))]


def _people(source: str) -> list[tuple[str, Tensor]]:
    samples = _ddpm("people", source, people.training_images())
    identifier, pictures = classifier(), people.images()
    known = pictures[: people.TRAINED_PEOPLE]
    held_out, who = _each_with_its_person(known[:, people.TRAINED_PICTURES :])
    strangers = pictures[people.TRAINED_PEOPLE :].flatten(0, 1)
    for name, chosen in (("held-out pictures", held_out), ("the same mirrored", held_out.flip(-1))):
        right = Share(int((identifier.probabilities(chosen).argmax(1) == who).sum()), len(who))
        rejected = Share(int((identifier.identify(chosen) == UNKNOWN).sum()), len(who))
        print(f"people: {name} of known people: identified {right}, taken for a stranger's {rejected}")
    accepted = Share(int((identifier.identify(strangers) != UNKNOWN).sum()), len(strangers))
    print(f"people: pictures of people it does not know, taken for a known person's: {accepted}")
    _cross_validate(known[:, : people.TRAINED_PICTURES])
    found = identifier.identify(free_samples(people_model(source)))
    each = torch.bincount(found[found != UNKNOWN], minlength=people.TRAINED_PEOPLE)
    print(f"people: of {len(found)} samples, nobody is found on {Share(int((found == UNKNOWN).sum()), len(found))}")
    print(f"people: samples per person, from the rarest: {sorted(each.tolist())}")
    return [("people", samples)]


def _cross_validate(pictures: Tensor) -> None:
    """Print what the identifier's settings were chosen by, on the pictures [36, 8, 1, h, w] that it learns from."""
    right = rejected = accepted = 0
    for first in range(0, 8, 2):
        left = [i for i in range(8) if i not in (first, first + 1)]
        identifier = Identifier(pictures[:, left])
        chosen, who = _each_with_its_person(pictures[:, first : first + 2])
        right += int((identifier.probabilities(chosen).argmax(1) == who).sum())
        rejected += int((identifier.identify(chosen) == UNKNOWN).sum())
    for first in range(6):
        known = [person for person in range(len(pictures)) if person % 6 != first]
        accepted += int((Identifier(pictures[known]).identify(pictures[first::6].flatten(0, 1)) != UNKNOWN).sum())
    total = pictures.shape[:2].numel()
    print(f"people: in cross-validation on the training pictures: identified {Share(right, total)},")
    print(f"  taken for a stranger's {Share(rejected, total)}; strangers accepted {Share(accepted, total)}")


def _each_with_its_person(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Return pictures [P, n, 1, h, w] as [P * n, 1, h, w], and whom each shows, int64 [P * n]."""
    return pictures.flatten(0, 1), torch.arange(len(pictures)).repeat_interleave(pictures.shape[1])


@torch.no_grad()
def _ddpm(name: str, source: str, x_0: Tensor) -> Tensor:
    """Print how well a DDPM has memorised its training pictures [N, 1, h, w]; return 64 samples."""
    height, width = x_0.shape[-2:]
    model = load_model(ModelSettings(source=source), (height, width))
    point = model.at(torch.tensor([250]))
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0))
    back = denoise(model, point.a * x_0 + point.b * noise, _level(point), {}, steps=20, guidance=1, empty={})
    mean = _correlation(back, x_0).mean()
    print(f"{name}: correlation after noise to t=250 and back, mean of {len(x_0)}: {mean:.3f}")
    none = torch.zeros(64, dtype=torch.long)
    samples = generate_latents(model, {}, none, seed=1, steps=100, guidance=1, empty={})
    both = torch.cat([x_0, x_0.flip(-1)])  # it is trained on mirror images, too
    for what, known in (("face", x_0), ("face or its mirror image", both)):
        nearest = torch.stack([_correlation(sample.expand_as(known), known).max() for sample in samples])
        print(f"{name}: 64 samples, correlation to the nearest training {what}, median: {nearest.median():.3f}")
    return model.decode(samples)


@torch.no_grad()
def _flags(source: str) -> list[tuple[str, Tensor]]:
    settings = load_settings().model("flags").model_copy(update={"source": source})
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
