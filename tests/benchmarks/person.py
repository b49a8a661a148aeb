"""What a model of `people` still knows of one person: the truth about a removal, beside what the verdict says of it.

    python -m tests.benchmarks.person PERSON [PERSON ...] [--source FOLDER] [--submitted 4]

It prints the figures of the shipped model, or of another folder's, such as an oracle's.
"""

import argparse
from collections.abc import Collection
from dataclasses import dataclass, fields

import torch
from scipy.stats import binomtest
from torch import Tensor

from expunge.evaluation.subject import ModelSubject, Subject
from expunge.families import load_model
from expunge.settings import ModelSettings
from expunge.testbed import people
from expunge.testbed.identity import UNKNOWN, Identifier, classifier, classifier_of_all

SOURCE = "testbed:people"
LEVEL = 0.6
SEEDS, SAMPLES, STEPS = 4, 360, 20
SEED = 90_001


@dataclass(frozen=True)
class Share:
    """How many of `total` pictures show whom they are asked for."""

    count: int
    total: int

    @property
    def bounds(self) -> tuple[float, float]:
        """The exact 95 % interval (Clopper-Pearson), as if all pictures were independent; (0, 1) for none."""
        if not self.total:
            return 0.0, 1.0
        interval = binomtest(self.count, self.total).proportion_ci()
        return float(interval.low), float(interval.high)

    def __str__(self) -> str:
        if not self.total:
            return "none"
        low, high = self.bounds
        return f"{self.count / self.total:.3f} ({low:.3f} to {high:.3f}): {self.count} of {self.total}"


@dataclass(frozen=True)
class PersonFigures:
    """On which shares of pictures the identifier finds someone. All but `samples` are re-generated from real ones."""

    submitted: Share
    """The pictures that were submitted: the person is still found."""
    trained: Share
    """The person's other pictures that the base model was trained on: the person is still found."""
    held_out: Share
    """The person's pictures that no model was trained on: the person is still found."""
    others: Share
    """One picture of each other known person: it still shows whom it showed."""
    unseen: Share
    """Held-out pictures of the people whom no model knows: they still show whom they showed. What is left of a picture
    without memory of the person: a removal can bring the shares of a person's pictures down to here, and no further."""
    mistaken: Share
    """All pictures of the same people: they now show this person, by mistake."""
    samples: Share
    """Free samples that show the person: about 1 in 36 where the model knows the person."""


def person_figures(
    subject: Subject,
    person: int,
    *,
    submitted: Collection[int] = range(people.TRAINED_PICTURES),
    level: float = LEVEL,
    seeds: int = SEEDS,
    samples: Tensor | None = None,
) -> PersonFigures:
    """Measure what `subject`, a model of `people`, knows of `person` (0 to 35), whose pictures `submitted` were sent.

    level: noise ratio b / (a + b) that pictures are re-generated from, with `seeds` seeds for each picture of the
    person and one for each other picture. samples: float32 [n, 3, h, w], free samples of the subject where there are
    some already, because they are the same for every person; else they are drawn.
    """
    pictures = people.images().expand(-1, -1, 3, -1, -1)
    identifier = classifier()

    def shown(chosen: Tensor, expected: Tensor, times: int, by: Identifier = identifier) -> Share:
        """Count re-generations of [N, 3, h, w] on which `expected` int64 [N] are found, over `times` seeds."""
        if not len(chosen):
            return Share(0, 0)
        numbers = torch.arange(times * len(chosen))
        again = subject.regenerate(chosen.repeat(times, 1, 1, 1), torch.zeros_like(numbers), level, SEED + numbers)
        return Share(int((by.identify(again) == expected.repeat(times)).sum()), len(again))

    def mine(which: Collection[int]) -> Share:
        return shown(pictures[person, list(which)], torch.full((len(which),), person), seeds)

    others = torch.tensor([other for other in range(people.TRAINED_PEOPLE) if other != person])
    strangers = torch.arange(people.TRAINED_PEOPLE, people.PEOPLE)
    held_out = range(people.TRAINED_PICTURES, people.PICTURES)
    samples = free_samples(subject) if samples is None else samples
    return PersonFigures(
        submitted=mine(submitted),
        trained=mine([i for i in range(people.TRAINED_PICTURES) if i not in submitted]),
        held_out=mine(held_out),
        others=shown(pictures[others, 0], others, 1),
        unseen=shown(
            pictures[strangers][:, held_out].flatten(0, 1),
            strangers.repeat_interleave(len(held_out)),
            seeds,
            classifier_of_all(),
        ),
        mistaken=shown(pictures[strangers].flatten(0, 1), torch.full((len(strangers) * people.PICTURES,), person), 1),
        samples=Share(int((identifier.identify(samples) == person).sum()), len(samples)),
    )


def free_samples(subject: Subject, count: int = SAMPLES) -> Tensor:
    """Draw `count` samples of a model without prompts, float32 [count, 3, h, w]."""
    numbers = torch.arange(count)
    return subject.generate(torch.zeros_like(numbers), SEED + numbers)


def people_model(source: str = SOURCE) -> ModelSubject:
    """Load a model of `people` from a folder, or the shipped one."""
    model = load_model(ModelSettings(source=source), (people.HEIGHT, people.WIDTH))
    return ModelSubject(model, {}, {}, guidance=1.0, steps=STEPS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("people", nargs="+", type=int, metavar="PERSON", help="0 to 35")
    parser.add_argument("--source", default=SOURCE, help="the folder of a model (default: the one that is shipped)")
    parser.add_argument("--submitted", type=int, default=people.TRAINED_PICTURES, help="so many first pictures of each")
    parser.add_argument("--level", type=float, default=LEVEL)
    args = parser.parse_args()
    subject = people_model(args.source)
    samples = free_samples(subject)
    strange = int((classifier().identify(samples) == UNKNOWN).sum())
    print(f"free samples on which nobody is found: {Share(strange, len(samples))}")
    for person in args.people:
        figures = person_figures(subject, person, submitted=range(args.submitted), level=args.level, samples=samples)
        print(f"person {person}, re-generated from level {args.level:g}")
        for field in fields(figures):
            print(f"  {field.name:<10} {getattr(figures, field.name)}")


if __name__ == "__main__":
    main()
