"""How near the pictures that the platform makes come to pictures that a model truly never saw.

`python -m tests.benchmarks.unseen_reference faces|people [--strengths S ...] [--levels L ...]`, about a minute of one
core. Prints the similarity with which the base model reproduces pictures that it was trained on, truly unseen ones and
made ones, each with the deviation between pictures; and how far the made ones lie above (+) or below (-) the truth,
with the standard error of that. Below makes the verdict stricter, above makes it laxer.

- `people`: truly unseen are people 37 to 40, and new pictures of known people.
- `faces`: there are no unseen pictures of the same set. Instead: the faces of `people`, cut and lit as its own are.
  They come from another camera and room, so they may lie below what unseen pictures of the same set would give.
- `flags`: it was trained on every flag, so there is nothing to compare with.
"""

import argparse

import torch
from torch import Tensor

from expunge.evaluation.reference import STRENGTH, warped
from expunge.evaluation.reproduction import Condition, draw
from expunge.evaluation.space import Space
from expunge.evaluation.subject import ModelSubject
from expunge.evaluation.views import VIEWS
from expunge.families import load_model
from expunge.settings import EvaluationSettings, load_settings
from expunge.testbed import faces, people

LIKE_FACES = (slice(5, 32), slice(1, 28))
"""The square in which the mean of all pictures of `people` is most like the mean of `faces`: correlation 0.88."""
SAMPLES, SAMPLE_SEED, WARP_SEED = 64, 5_000_000, 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("testbed", choices=["faces", "people"])
    parser.add_argument("--pictures", type=int, default=24, help="of each kind")
    parser.add_argument("--draws", type=int, default=2, help="per picture and level")
    parser.add_argument("--strengths", type=float, nargs="+", default=[STRENGTH], help="of the warp")
    parser.add_argument("--levels", type=float, nargs="+", default=[0.3, 0.4, 0.5, 0.6])
    args = parser.parse_args()
    known, unseen = {"faces": _faces, "people": _people}[args.testbed]()
    size = (known.shape[-2], known.shape[-1])
    options = EvaluationSettings()
    model = load_model(load_settings().model(args.testbed), size)
    none = model.condition([""])
    subject = ModelSubject(model, none, none, guidance=1.0, steps=options.sampling_steps)
    samples = subject.generate(torch.zeros(SAMPLES, dtype=torch.long), torch.arange(SAMPLES) + SAMPLE_SEED)
    space, _ = Space.around(options.encoders, samples)
    sources = samples[: args.pictures]
    made = {f"warped by {strength:g}": warped(sources, WARP_SEED, strength) for strength in args.strengths}
    for level in args.levels:
        found = {
            name: _similarity(subject, space, _spread_out(pictures, args.pictures), level, args.draws)
            for name, pictures in {"seen": known, **unseen, **made}.items()
        }
        for e, encoder in enumerate(space.names):
            print(f"level {level:g}, {encoder}")
            for name, values in found.items():
                differences = [_difference(values[:, e], found[one][:, e], one) for one in unseen if name in made]
                print(f"  {name:14} {values[:, e].mean():.2f} ± {values[:, e].std():.2f}", *differences, flush=True)


def _similarity(subject: ModelSubject, space: Space, pictures: Tensor, level: float, draws: int) -> Tensor:
    """Return float64 [N, E]."""
    views = list(VIEWS)
    conditions = [Condition(i, False, views[i % len(views)], 0, "empty prompt") for i in range(len(pictures))]
    return draw(subject, space, pictures, conditions, [level], range(draws)).mean(1)


def _difference(made: Tensor, unseen: Tensor, name: str) -> str:
    error = (unseen.var() / len(unseen) + made.var() / len(made)).sqrt()
    return f"  {made.mean() - unseen.mean():+.2f} ± {error:.2f} to {name}"


def _faces() -> tuple[Tensor, dict[str, Tensor]]:
    own = faces.images()
    others = people.images().flatten(0, 1)[..., *LIKE_FACES]
    others = torch.nn.functional.interpolate(others, size=own.shape[-2:], mode="bicubic", antialias=True)
    deviation, mean = torch.std_mean(others, dim=(2, 3), keepdim=True)
    lit = ((others - mean) / deviation * own.std((2, 3)).mean() + own.mean()).clamp(-1, 1)
    return own.expand(-1, 3, -1, -1), {"people's": lit.expand(-1, 3, -1, -1)}


def _people() -> tuple[Tensor, dict[str, Tensor]]:
    everyone = people.images().expand(-1, -1, 3, -1, -1)
    strangers = everyone[people.TRAINED_PEOPLE :].flatten(0, 1)
    new = everyone[: people.TRAINED_PEOPLE, people.TRAINED_PICTURES :].flatten(0, 1)
    return people.training_images().expand(-1, 3, -1, -1), {"unseen people": strangers, "new pictures": new}


def _spread_out(pictures: Tensor, count: int) -> Tensor:
    return pictures[torch.linspace(0, len(pictures) - 1, count).long()]


if __name__ == "__main__":
    main()
