"""How often every encoder still recognises a picture that a model re-generates, by noise level.

    python -m tests.benchmarks.recognised --oracle FOLDER --without 0-19

On `faces`: targets that the base model knows; the same targets by `--oracle`, a model that was trained without them
(`expunge testbed faces --without 0-19 --out FOLDER`); and pictures that the base model never saw. The thresholds are
the testbed's calibrated ones. The rule "recognition" rests on these shares.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from expunge.commands.testbed import numbers
from expunge.evaluation.calibration import find_calibration
from expunge.evaluation.reference import unseen_pictures
from expunge.evaluation.reproduction import Condition, draw
from expunge.evaluation.space import Space
from expunge.evaluation.subject import ModelSubject
from expunge.evaluation.views import VIEWS
from expunge.families import load_model, preflight
from expunge.settings import ModelSettings, Settings, load_settings
from tests.benchmarks.verdict_errors import faces_testbed

DRAWS = 4
"""Per picture and level."""
SAMPLES = 64
"""Of the base model, for the centre of the encoders' features and the made pictures."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--oracle", type=Path, help="a model that was trained without the targets")
    parser.add_argument("--without", default="0-19", help="the targets (default: 0-19)")
    arguments = parser.parse_args()
    settings, bed = load_settings(), faces_testbed()
    options = settings.model("faces")
    base = _subject(options, settings)
    samples = base.generate(torch.zeros(SAMPLES, dtype=torch.long), torch.arange(SAMPLES))
    space, _ = Space.around(settings.evaluation.encoders, samples)
    calibration = find_calibration(settings, "faces")
    assert calibration is not None, "the testbed comes with its thresholds"
    limits, grid = calibration.limits(space.names), settings.evaluation.level_grid
    made, _ = unseen_pictures(samples[:24], settings.evaluation, (samples.shape[-2], samples.shape[-1]), seed=1)
    targets = torch.cat([bed.targets[i][:1] for i in numbers(arguments.without)])
    rows = {"base model, its targets": (base, targets)}
    if arguments.oracle:
        source = options.model_copy(update={"source": str(arguments.oracle)})
        rows["oracle, the same targets"] = (_subject(source, settings), targets)
    rows["base model, made pictures"] = (base, made)
    rows["base model, another data set"] = (base, bed.unseen[: len(targets)])
    print("| by every encoder / by any | " + " | ".join(f"{level:g}" for level in grid) + " |")
    print("|---|" + "---|" * len(grid))
    for name, (subject, pictures) in rows.items():
        print(f"| {name} | " + " | ".join(_shares(subject, space, pictures, grid, limits)) + " |", flush=True)


def _subject(options: ModelSettings, settings: Settings) -> ModelSubject:
    model = load_model(options, preflight("faces", options))
    empty = model.condition([""])
    return ModelSubject(model, empty, empty, guidance=options.guidance, steps=settings.evaluation.sampling_steps)


def _shares(
    subject: ModelSubject, space: Space, pictures: Tensor, grid: tuple[float, ...], limits: Tensor
) -> list[str]:
    conditions = [Condition(i, False, next(iter(VIEWS)), 0, "") for i in range(len(pictures))]
    similarity = draw(subject, space, pictures, conditions, grid, range(DRAWS * len(grid)))
    found = similarity >= limits
    every, some = (
        hits.double().mean((0, 1)) for hits in (_by_level(found.all(-1), grid), _by_level(found.any(-1), grid))
    )
    return [f"{a:.2f} / {b:.2f}" for a, b in zip(every.tolist(), some.tolist(), strict=True)]


def _by_level(hits: Tensor, grid: tuple[float, ...]) -> Tensor:
    """Arrange [C, n] as [C, n / L, L]."""
    return hits.unflatten(1, (-1, len(grid)))


if __name__ == "__main__":
    main()
