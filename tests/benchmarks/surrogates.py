"""How good the surrogates of each editor are: whether they are still the target, how far they are, how plausible.

    python -m tests.benchmarks.surrogates --testbed faces [--sheet faces.png] [--targets 20]

The editors make surrogates of the same random targets (`people`: one picture each of the people 0 to 19, on whom one
may tune) from the same donors. They are judged with other samples of the base model than those that reject and retry:

- match: surrogates that an encoder takes for the target, by the match threshold of the model's calibration.
- near: surrogates more like the target than 95 % of unrelated samples are, in any encoder.
- similarity: mean centred similarity to the nearest view of the target, by encoder.
- implausible: surrogates that are no picture of the model's domain; `samples`: the model's own, for comparison.
- same person (`people` only): surrogates on which the identifier finds the target's person.
- attempts: pictures made per surrogate, mean and largest.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from expunge.batch.judging import SampleJudging
from expunge.errors import InputError
from expunge.evaluation.pictures import grid
from expunge.evaluation.plausibility import Domain
from expunge.evaluation.space import Space
from expunge.evaluation.subject import ModelSubject
from expunge.evaluation.views import all_views
from expunge.families import load_model
from expunge.pixels import to_pictures, to_tensor
from expunge.settings import Settings, load_settings
from expunge.surrogates import Editor, Painter, Studio, Task, make_editor
from expunge.testbed import faces, flags, people
from expunge.types import EditSpec

DONORS, JUDGES, SEED = 64, 48, 7_000_000
"""Samples that an editor and its judge know, and others that the table is judged with."""


@dataclass(frozen=True)
class Arm:
    """An editor, with or without rejection."""

    editor: str
    options: dict[str, str] = field(default_factory=dict)
    rejects: bool = True


ARMS = {
    "blend": Arm("blend", rejects=False),
    "blend aligned": Arm("blend", {"align": "true"}, rejects=False),
    "blend, retried": Arm("blend"),
    "regenerate 0.6": Arm("regenerate", {"level": "0.6"}, rejects=False),
    "regenerate 0.8": Arm("regenerate", {"level": "0.8"}, rejects=False),
    "regenerate, retried": Arm("regenerate"),
    "the same in an ellipse": Arm("regenerate", {"ellipse": "0.5/0.52/0.42/0.46"}),
}
"""`retried` rejects and retries as a night does; the others take the first picture."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--testbed", choices=["faces", "flags", "people"], required=True)
    parser.add_argument("--targets", type=int, default=20)
    parser.add_argument("--arms", nargs="+", choices=[*ARMS], default=[*ARMS], metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--sheet", type=Path, help="write a PNG there: each target, and its surrogate by each editor")
    args = parser.parse_args()
    targets = _targets(args.testbed, args.targets)
    bench = _Bench.of(load_settings(), args.testbed, targets)
    columns = [targets]
    print(bench.heading)
    for name in args.arms:
        made = bench.run(name, ARMS[name])
        columns.append(made)
    print(bench.samples_row)
    if args.sheet:
        sheet = torch.stack(columns, dim=1).flatten(0, 1)
        args.sheet.write_bytes(grid(sheet, len(columns), column_labels=["target", *args.arms]))


def _targets(testbed: str, count: int) -> Tensor:
    """Return random targets, float32 [T, 3, h, w] in [-1, 1]."""
    generator = torch.Generator().manual_seed(0)
    if testbed == "people":
        chosen = people.images()[:20, : people.TRAINED_PICTURES]
        which = torch.randint(people.TRAINED_PICTURES, (len(chosen),), generator=generator)
        return chosen[torch.arange(len(chosen)), which][:count].expand(-1, 3, -1, -1)
    pictures = faces.images().expand(-1, 3, -1, -1) if testbed == "faces" else flags.images()[0]
    return pictures[torch.randperm(len(pictures), generator=generator)[:count]]


class _Counting:
    """An editor that counts what it makes."""

    def __init__(self, editor: Editor) -> None:
        self._editor, self.made = editor, 0

    def __call__(self, task: Task) -> np.ndarray:
        self.made += 1
        return self._editor(task)


@dataclass(frozen=True)
class _Bench:
    testbed: str
    targets: Tensor
    studio: Studio
    plain: Studio
    """Takes the first picture."""
    judging: SampleJudging
    """Of other samples than the studio's."""
    own: Tensor
    """Samples that none of the two knows."""

    @classmethod
    def of(cls, settings: Settings, testbed: str, targets: Tensor) -> "_Bench":
        options = settings.model(testbed)
        height, width = targets.shape[-2:]
        model, steps = load_model(options, (height, width)), settings.evaluation.sampling_steps
        prompts = options.retain_prompts
        subject = ModelSubject(
            model, model.condition(prompts), model.condition([""]), guidance=options.guidance, steps=steps
        )
        parts = [DONORS, JUDGES, len(targets)]
        rows = torch.arange(sum(parts)) % len(prompts)
        mine, judges, own = subject.generate(rows, SEED + torch.arange(len(rows))).split(parts)
        donors = to_pictures(mine)
        painter = Painter(model, prompts[0], options.guidance, steps)
        return cls(
            testbed=testbed,
            targets=targets,
            studio=Studio(donors, painter, SampleJudging.of(settings, testbed, donors)),
            plain=Studio(donors, painter),
            judging=SampleJudging.of(settings, testbed, to_pictures(judges)),
            own=own,
        )

    @property
    def _space(self) -> Space:
        return self.judging.space

    @property
    def heading(self) -> str:
        person = " same person |" if self.testbed == "people" else ""
        count = len(self.targets)
        by_encoder = " | ".join(f"match {name} | similarity" for name in self._space.names)
        head = f"| {self.testbed}, {count} targets | near | {by_encoder} | implausible |{person} attempts | s each |"
        return f"{head}\n|{'---|' * (head.count('|') - 1)}"

    @property
    def samples_row(self) -> str:
        return self._row("the model's samples", self.own, "- | - |")

    def run(self, name: str, arm: Arm) -> Tensor:
        """Print an arm's row; return its surrogates, float32 [T, 3, h, w]; grey where there is none."""
        editor = make_editor(EditSpec(editor=arm.editor, options=arm.options))
        studio = self.studio if arm.rejects else self.plain
        made, attempts, start = [], [], time.perf_counter()
        for target in to_pictures(self.targets):
            counting = _Counting(editor)
            try:
                made += studio.make(counting, [target], mask=None, seed=0)
            except InputError as error:
                print(f"{name}: {error}")
                made.append(np.full_like(target, 128))
            attempts.append(counting.made)
        seconds = (time.perf_counter() - start) / len(made)
        surrogates = to_tensor(made)
        last = f"{np.mean(attempts):.1f}, {max(attempts)} | {seconds:.1f} |"
        print(self._row(name, surrogates, last), flush=True)
        return surrogates

    def _row(self, name: str, surrogates: Tensor, last: str) -> str:
        judges = [self.judging.against(target[None]) for target in to_pictures(self.targets)]
        near = sum(judge(picture).likeness > 0 for judge, picture in zip(judges, to_pictures(surrogates), strict=True))
        similarity = self._similarity(surrogates)
        calibration = self.judging.calibration
        assert calibration is not None
        thresholds = calibration.limits(self._space.names).tolist()
        parts = [
            f"{int((column >= threshold).sum())} | {column.mean():.2f}"
            for column, threshold in zip(similarity.T, thresholds, strict=True)
        ]
        domain = self.judging.domain
        assert isinstance(domain, Domain)
        implausible = int(domain.implausible(surrogates).sum())
        person = f" {_same_person(surrogates)} |" if self.testbed == "people" else ""
        return f"| {name} | {near} | {' | '.join(parts)} | {implausible} |{person} {last}"

    def _similarity(self, surrogates: Tensor) -> Tensor:
        """Return each surrogate's similarity to the nearest view of its target, float64 [T, E]."""
        features = self._space.features(surrogates)
        pairs: Sequence[Tensor] = [
            self._space.similarity(tuple(z[place, None] for z in features), self._space.features(all_views(target)))
            for place, target in enumerate(self.targets)
        ]
        return torch.cat(list(pairs))


def _same_person(surrogates: Tensor) -> int:
    from expunge.testbed.identity import classifier

    return int((classifier().identify(surrogates) == torch.arange(len(surrogates))).sum())


if __name__ == "__main__":
    main()
