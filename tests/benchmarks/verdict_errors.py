"""How often the verdict is wrong: fakes that must fail, and models that must pass.

    python -m tests.benchmarks.verdict_errors --testbed faces --trials 200 --json faces.jsonl

Each trial judges one request, a target with evaluation seeds of its own, as a night would: together with others, and
with the code and the settings of the product. A request is passed only if a night would count it as removed. `--json`
keeps the trials, so that a run that was stopped goes on where it was. `--oracle` names a model that was trained without
the requests `--without`, such as `expunge.testbed.faces.run(FOLDER, WORK, without=range(20))` makes: the only real
oracle. `--small` takes few samples and steps: its rates are not the product's.
"""

import argparse
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from scipy.stats import binomtest
from torch import Tensor
from torch.nn.functional import interpolate

from expunge.batch.judging import SampleJudging
from expunge.commands.testbed import numbers
from expunge.evaluation.calibration import find_calibration
from expunge.evaluation.plausibility import Domain
from expunge.evaluation.rules import PROTOCOL_VERSION
from expunge.evaluation.space import Space
from expunge.evaluation.subject import ModelSubject, Subject
from expunge.evaluation.verdict import Bench, Case, judge_all, judge_integrity
from expunge.evaluation.views import all_views
from expunge.families import load_model
from expunge.pixels import to_pictures, to_tensor
from expunge.settings import EvaluationSettings, Settings, load_settings
from expunge.surrogates import Painter, Studio, make_editor
from expunge.testbed import faces, flags, people
from expunge.types import EditSpec, Evidence
from tests.evaluation.fakes import (
    FAKES,
    INTEGRITY,
    InPlaceOf,
    Known,
    Remembered,
    RememberedEncoder,
    nearest,
    relearned,
    removal,
)

NIGHT = 5
"""Requests per night."""
SMALL = EvaluationSettings(
    seeds=9, levels=(0.4, 0.5, 0.6), generation_samples=16, integrity_samples=48, unseen_pictures=16, sampling_steps=6
)
"""Fewer unrelated samples cannot prove integrity, once those that show a target are left out."""
RELEARNED = "relearned: the base model, 2 % noise on its weights"
REMOVAL = "simulated removal: other samples instead of the target"
UNSEEN = "simulated oracle: the base model, and what it never saw"
ORACLE = "oracle: retrained without the target"
EMPTY = 0
"""Row of the empty prompt in every table of prompts."""


@dataclass(frozen=True)
class Removable:
    """What may be removed from a model."""

    name: str
    targets: tuple[Tensor, ...]
    """float32 [T, 3, h, w] each: the pictures of one request."""
    captions: tuple[str, ...] = ()
    """The own prompt of each target, for a model with prompts."""
    unrelated: tuple[str, ...] = ()
    """Prompts of no target, to compare integrity with."""
    unseen: Tensor = field(default_factory=lambda: torch.empty(0))
    """float32 [M, 3, h, w]: pictures of the domain that the model never saw, as far as there are any."""

    @property
    def prompts(self) -> list[str]:
        """The table of prompts: the empty one, those of the targets, the unrelated ones."""
        return ["", *self.captions, *self.unrelated]

    @property
    def unrelated_rows(self) -> tuple[int, ...]:
        first = 1 + len(self.captions)
        return tuple(range(first, first + len(self.unrelated))) or (EMPTY,)

    def rows_of(self, target: int) -> dict[str, int]:
        """Return the prompts that a target is removed under, by label."""
        return ({"own prompt": 1 + target} if self.captions else {}) | {"empty prompt": EMPTY}


@dataclass(frozen=True)
class Trial:
    """One request, judged once."""

    subject: str
    target: int
    salt: int
    verdict: str
    passed: bool
    """A night would count it as removed: its own verdict, and that on integrity."""
    failed: tuple[str, ...]
    """Names of the rules that failed."""


def faces_testbed() -> Removable:
    """The unseen pictures are faces of the ORL database, cut and lit like those that the model knows."""
    known = faces.images()
    unseen = interpolate(people.images()[:, 0], size=(32, 28), mode="bicubic", antialias=True)[..., 5:29, 2:26]
    each = unseen.std((1, 2, 3), keepdim=True), unseen.mean((1, 2, 3), keepdim=True)
    unseen = ((unseen - each[1]) / each[0] * known.std((1, 2, 3)).mean() + known.mean()).clamp(-1, 1)
    return Removable("faces", _in_colour(known).split(1), unseen=_in_colour(unseen))


def people_testbed() -> Removable:
    """A request is a person, with the pictures that the model was trained on."""
    known = people.images()[: people.TRAINED_PEOPLE, : people.TRAINED_PICTURES]
    unseen = people.images()[people.TRAINED_PEOPLE :].flatten(0, 1)
    return Removable("people", tuple(_in_colour(person) for person in known), unseen=_in_colour(unseen))


def flags_testbed() -> Removable:
    """The first 192 countries may be removed; the others lend their prompts to the test of integrity."""
    pictures, names = flags.images()
    captions = tuple(map(flags.caption, names))
    return Removable("flags", pictures[:192].split(1), captions=captions[:192], unrelated=captions[192:])


TESTBEDS: Mapping[str, Callable[[], Removable]] = {
    "faces": faces_testbed,
    "flags": flags_testbed,
    "people": people_testbed,
}


class Court:
    """Judges subjects on a testbed. The base model is asked each question once, whoever is judged."""

    def __init__(
        self, testbed: Removable, options: EvaluationSettings, settings: Settings, source: Path | None = None
    ) -> None:
        """Take the model of a testbed as the base model, or one of the same kind from the folder `source`."""
        self.testbed, self.options, self.settings = testbed, options, settings
        self.shipped = source is None
        self.model = self.load(source)
        self.base = Remembered(self.model)
        self.relearned = Remembered(relearned(self.model))
        self._benches: dict[int, Bench] = {}
        self._studios: dict[int, Studio] = {}
        self._last: tuple[tuple[tuple[int, ...], int], _Scene] | None = None

    def load(self, source: Path | None = None) -> ModelSubject:
        """Load the testbed's model, or one of the same kind from a folder."""
        options = self.settings.model(self.testbed.name)
        if source is not None:
            options = options.model_copy(update={"source": str(source), "revision": ""})
        height, width = self.testbed.targets[0].shape[-2:]
        model = load_model(options, (height, width))
        return ModelSubject(
            model,
            model.condition(self.testbed.prompts),
            model.condition([""]),
            guidance=options.guidance,
            steps=self.options.sampling_steps,
        )

    def bench(self, salt: int) -> Bench:
        """Examine the base model with the evaluation seeds `salt`, once."""
        if salt not in self._benches:
            gate = self.settings.gate_for(self.testbed.name)
            calibration = find_calibration(self.settings, self.testbed.name) if self.shipped else None
            bench = Bench.of(
                self.base,
                self.testbed.unrelated_rows,
                EMPTY,
                self.options,
                gate,
                calibration=calibration,
                salt=salt,
            )
            encoders = tuple(RememberedEncoder(encoder) for encoder in bench.space.encoders)
            bench.space = Space(encoders, bench.space.centre)
            bench.domain = Domain.of(bench.space, bench.samples, bench.calibration)
            self._benches[salt] = bench
        return self._benches[salt]

    def judge_fake(self, name: str, targets: tuple[int, ...], salt: int) -> list[Trial]:
        """Judge a fake, or a simulated removal, of these targets."""
        scene = self._scene(targets, salt)
        if name == RELEARNED:
            subject = self.relearned
        else:
            subject = removal(scene.known) if name == REMOVAL else FAKES[name].make(scene.known)
        return self.judge(name, scene.bench, scene.cases, subject)

    def judge_oracle(self, subject: Subject, targets: tuple[int, ...], salt: int) -> list[Trial]:
        """Judge a model that never saw the targets, beside the base model that did."""
        scene = self._scene(targets, salt)
        return self.judge(ORACLE, scene.bench, scene.cases, subject)

    def judge_unseen(self, place: int, salt: int) -> list[Trial]:
        """Judge the base model itself on an unseen picture, beside a simulated model that knows it."""
        bench, picture = self.bench(salt), self.testbed.unseen[place : place + 1]
        everything = torch.cat(self.testbed.targets)
        twin = everything[nearest(picture, everything)[1]]
        case = Case(str(place), picture, self.surrogates(picture, bench), prompts=(EMPTY,), labels=("empty prompt",))
        base = InPlaceOf(self.base, all_views(twin[0]), all_views(picture[0]), shows(bench, twin))
        public = {part.name: getattr(bench, part.name) for part in fields(bench) if not part.name.startswith("_")}
        return self.judge(UNSEEN, Bench(**{**public, "base": base}), [case], self.base)

    def judge(self, name: str, bench: Bench, cases: Sequence[Case], subject: Subject) -> list[Trial]:
        integrity = judge_integrity(bench, subject, cases)[0]
        if name == ORACLE:
            # A model that was trained anew draws other pictures from the same noise, so it cannot be compared so.
            integrity = integrity.model_copy(update={"passed": True})
        evidence = Evidence(
            job="trial",
            protocol_version=PROTOCOL_VERSION,
            requests=judge_all(bench, cases, subject),
            integrity=integrity,
        )
        ruined = sorted(INTEGRITY) if not integrity.passed else []
        return [
            Trial(
                subject=name,
                target=int(request.request),
                salt=bench.salt,
                verdict=request.verdict,
                passed=request.request in evidence.passed,
                failed=(*dict.fromkeys(rule.name for rule in request.rules if not rule.passed), *ruined),
            )
            for request in evidence.requests
        ]

    def case(self, target: int, bench: Bench) -> Case:
        pictures, prompts = self.testbed.targets[target], self.testbed.rows_of(target)
        return Case(
            id=str(target),
            pictures=pictures,
            surrogates=self.surrogates(pictures, bench),
            prompts=tuple(prompts.values()),
            labels=tuple(prompts),
        )

    def surrogates(self, pictures: Tensor, bench: Bench) -> Tensor:
        """Edit pictures [T, 3, h, w] as a request that brings no surrogate has them edited."""
        editor = make_editor(EditSpec(editor=self.settings.model(self.testbed.name).editor))
        return to_tensor(self._studio(bench).make(editor, list(to_pictures(pictures)), mask=None, seed=0))

    def _studio(self, bench: Bench) -> Studio:
        """Equip the editor as a night does, once for all requests of a bench."""
        if bench.salt not in self._studios:
            donors, name = to_pictures(bench.other), self.testbed.name
            options = self.settings.model(name)
            painter = Painter(self.model.model, options.retain_prompts[0], options.guidance, self.model.steps)
            self._studios[bench.salt] = Studio(donors, painter, SampleJudging.of(self.settings, name, donors))
        return self._studios[bench.salt]

    def known(self, bench: Bench, cases: Sequence[Case]) -> Known:
        pictures = torch.cat([case.pictures for case in cases])
        return Known(
            base=self.base,
            views=torch.stack([all_views(picture) for picture in pictures]),
            surrogates=torch.cat([case.surrogates for case in cases]),
            others=torch.cat([bench.before, bench.other]),
            own=frozenset(prompt for case in cases for prompt in case.prompts) - {EMPTY},
            unrelated=frozenset(self.testbed.unrelated_rows),
            levels=bench.levels,
            shows=shows(bench, pictures),
        )

    def _scene(self, targets: tuple[int, ...], salt: int) -> "_Scene":
        """Keep the last one: its subjects ask the base model mostly the same."""
        if self._last is None or self._last[0] != (targets, salt):
            self._forget()
            bench = self.bench(salt)
            cases = [self.case(target, bench) for target in targets]
            self._last = (targets, salt), _Scene(bench, cases, self.known(bench, cases))
        return self._last[1]

    def _forget(self) -> None:
        self.base.forget_targets()
        self.relearned.forget_targets()
        for bench in self._benches.values():
            for encoder in bench.space.encoders:
                if isinstance(encoder, RememberedEncoder):
                    encoder.forget()


@dataclass(frozen=True)
class _Scene:
    bench: Bench
    cases: list[Case]
    known: Known


def shows(bench: Bench, targets: Tensor) -> Callable[[Tensor], Tensor]:
    """Return what says which pictures match one of `targets` [T, 3, h, w] in any view, bool [N]."""
    views = [bench.space.features(all_views(target)) for target in targets]

    def matches(pictures: Tensor) -> Tensor:
        features = bench.space.features(pictures)
        found = [bench.calibration.matches(bench.space.similarity(features, v), bench.space.names) for v in views]
        return torch.stack(found).any(0)

    return matches


@dataclass(frozen=True)
class Task:
    """One subject of one night."""

    subject: str
    targets: tuple[int, ...]
    salt: int
    judge: Callable[[], list[Trial]]

    @property
    def keys(self) -> set[tuple[str, int, int]]:
        return {(self.subject, target, self.salt) for target in self.targets}


def tasks(court: Court, count: int, oracle: Path | None = None, without: Sequence[int] = ()) -> Iterator[Task]:
    """Yield what judges each subject `count` times or slightly more, every target with two evaluation seeds or more."""
    testbed = court.testbed
    order = torch.randperm(len(testbed.targets), generator=torch.Generator().manual_seed(0)).tolist()
    for targets, salt in _nights(order, count, NIGHT):
        for name in subjects(testbed):
            yield Task(name, targets, salt, partial(court.judge_fake, name, targets, salt))
    for places, salt in _nights(range(len(testbed.unseen)), count, 1):
        yield Task(UNSEEN, places, salt, partial(court.judge_unseen, places[0], salt))
    if without:
        retrained = court.load(oracle)
        for targets, salt in _nights(without, count, NIGHT):
            yield Task(ORACLE, targets, salt, partial(court.judge_oracle, retrained, targets, salt))


def subjects(testbed: Removable) -> list[str]:
    """Return the names of the fakes that make sense on a testbed, and of those made with its own model."""
    colour = any((pictures.std(1) > 0).any() for pictures in testbed.targets)
    fakes = [
        name
        for name, recipe in FAKES.items()
        if (testbed.captions or not recipe.needs_prompts) and (colour or not recipe.needs_colour)
    ]
    return [*fakes, RELEARNED, REMOVAL]


def _nights(targets: Sequence[int], count: int, together: int) -> Iterator[tuple[tuple[int, ...], int]]:
    """Spread `count` trials over targets and salts, at least two of each, in nights of about equal size.

    A night of one request could not show that different requests come out alike.
    """
    used = targets[: max(2, math.ceil(count / 2))]
    nights = np.array_split(np.array(used), math.ceil(len(used) / together)) if used else []
    for salt in range(max(2, math.ceil(count / len(used))) if used else 0):
        yield from ((tuple(night.tolist()), salt) for night in nights)


@dataclass(frozen=True)
class Row:
    """What the trials of one subject come to."""

    subject: str
    must_pass: bool
    judged: int
    """Trials of requests that the base model reproduces: the others are neither passed nor failed."""
    not_reproduced: int
    wrong: int
    caught: Counter[str]
    """How many trials each rule failed in."""
    pairs: int
    """Pairs of trials that differ in their evaluation seeds only."""
    agreeing: int

    @classmethod
    def of(cls, trials: Sequence[Trial]) -> "Row":
        judged = [trial for trial in trials if trial.verdict != "not_reproduced"]
        must_pass = trials[0].subject in (REMOVAL, UNSEEN, ORACLE)
        by_target: dict[tuple[int, int], list[tuple[str, bool]]] = {}
        for trial in trials:
            by_target.setdefault((trial.target, trial.salt // 2), []).append((trial.verdict, trial.passed))
        pairs = [pair for pair in by_target.values() if len(pair) == 2]
        return cls(
            subject=trials[0].subject,
            must_pass=must_pass,
            judged=len(judged),
            not_reproduced=len(trials) - len(judged),
            wrong=sum(trial.passed != must_pass for trial in judged),
            caught=Counter(rule for trial in judged for rule in trial.failed),
            pairs=len(pairs),
            agreeing=sum(first == second for first, second in pairs),
        )

    @property
    def at_most(self) -> float:
        """The exact (Clopper-Pearson) upper bound of the rate of wrong verdicts, at 95 %; 1 without a trial."""
        if not self.judged:
            return 1.0
        return float(binomtest(self.wrong, self.judged, alternative="less").proportion_ci(0.95).high)

    def __str__(self) -> str:
        caught = ", ".join(f"{rule} {count}" for rule, count in self.caught.most_common())
        share = f"{self.wrong} of {self.judged}" if self.judged else "not judged"
        must = "pass" if self.must_pass else "fail"
        return (
            f"| {self.subject} | {must} | {share} | {self.at_most:.1%} | {self.not_reproduced} | {caught} "
            f"| {self.agreeing} of {self.pairs} |"
        )


def table(found: Sequence[Trial]) -> str:
    """Return the trials as a Markdown table, one row per subject, and what they come to in all."""
    names = dict.fromkeys(trial.subject for trial in found)
    each = [Row.of([trial for trial in found if trial.subject == name]) for name in names]
    lines = [
        "| subject | must | wrong verdicts | at most (95 %) | not reproduced | failed rules | same verdict twice |",
        "|---|---|---|---|---|---|---|",
        *map(str, each),
    ]
    if not any(row.subject == ORACLE for row in each):
        lines.append(f"| {ORACLE} | pass | not judged: no --oracle was given | | | | |")
    for words, must_pass in (("False passes", False), ("False failures", True)):
        rows = [row for row in each if row.must_pass == must_pass]
        lines.append(f"\n{words}: {sum(row.wrong for row in rows)} of {sum(row.judged for row in rows)}.")
    pairs = sum(row.pairs for row in each)
    if pairs:
        agreeing = sum(row.agreeing for row in each)
        lines.append(f"\nThe same verdict with other evaluation seeds: {agreeing} of {pairs} ({agreeing / pairs:.1%}).")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--testbed", choices=TESTBEDS, default="faces")
    parser.add_argument("--trials", type=int, default=200, help="of each subject")
    parser.add_argument("--oracle", type=Path, help="a pipeline that was trained without the targets --without")
    parser.add_argument("--without", default="", help="such as 0-19 or 3,41,76")
    parser.add_argument("--taught", type=Path, help="a model by tests.benchmarks.teach: the shipped one is its oracle")
    parser.add_argument("--only", default="", help="the subjects whose names begin like this, such as oracle")
    parser.add_argument("--small", action="store_true", help="few samples and sampling steps")
    parser.add_argument("--json", type=Path, help="keeps the trials, one JSON object per line")
    args = parser.parse_args()
    if (args.oracle is None) != (not args.without):
        parser.error("--oracle and --without belong together")
    settings = load_settings()
    options = SMALL if args.small else settings.evaluation
    testbed, without = TESTBEDS[args.testbed](), tuple(numbers(args.without))
    if args.taught:
        testbed = Removable(testbed.name, testbed.unseen.split(1))
        without = tuple(range(len(testbed.targets)))
    court = Court(testbed, options, settings, args.taught)
    if any(target >= len(court.testbed.targets) for target in without):
        parser.error(f"--without: {args.testbed} has targets 0 to {len(court.testbed.targets) - 1}")
    record = {
        "testbed": f"{args.testbed}, taught" if args.taught else args.testbed,
        "protocol": PROTOCOL_VERSION,
        "settings": options.model_dump(mode="json"),
    }
    found = _read(args.json, record, parser) if args.json else []
    done = {(trial.subject, trial.target, trial.salt) for trial in found}
    asked = (task for task in tasks(court, args.trials, args.oracle, without) if task.subject.startswith(args.only))
    left = [task for task in asked if not task.keys <= done]
    for task in track(left, "judging", console=Console(stderr=True)):
        judged = [trial for trial in task.judge() if (trial.subject, trial.target, trial.salt) not in done]
        found += judged
        if args.json:
            with args.json.open("a") as file:
                file.writelines(json.dumps(asdict(trial)) + "\n" for trial in judged)
    print(table(found))


def _read(file: Path, record: Mapping[str, object], parser: argparse.ArgumentParser) -> list[Trial]:
    """Read the trials of an earlier run with the same settings, or begin the file."""
    if not file.exists():
        file.write_text(json.dumps(record) + "\n")
        return []
    first, *lines = file.read_text().splitlines()
    if json.loads(first) != record:
        parser.error(f"{file} holds trials of other settings: name another file")
    return [Trial(**{**trial, "failed": tuple(trial["failed"])}) for trial in map(json.loads, lines)]


def _in_colour(pictures: Tensor) -> Tensor:
    return pictures.expand(-1, 3, -1, -1)


if __name__ == "__main__":
    main()
