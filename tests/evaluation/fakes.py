"""Subjects that a verdict must not be fooled by, and two that it must pass. Nothing is trained: they answer a model's
calls with its own pictures, changed where the target would come out.

A fake leaves alone whatever a fooled test looks at, so that only the rule that it was made for can catch it.
"""

import copy
import hashlib
from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate

from expunge.errors import InputError
from expunge.evaluation.encoders import Encoder
from expunge.evaluation.subject import ModelSubject, Subject

SAME = 0.02
"""Root mean square difference, on [-1, 1], up to which two pictures are the same."""


@dataclass(frozen=True)
class Call:
    """One call of a subject and what the base model answered; N samples."""

    pictures: Tensor | None
    """What goes in, [N, 3, h, w]; None for free generation."""
    prompts: Tensor
    level: float
    """1 for free generation."""
    seeds: Tensor
    outputs: Tensor
    """Of the base model, [N, 3, h, w]."""

    def rows(self, index: Tensor) -> "Call":
        """Pick the samples `index`, int64 or bool."""
        pictures = None if self.pictures is None else self.pictures[index]
        return Call(pictures, self.prompts[index], self.level, self.seeds[index], self.outputs[index])


Where = Callable[[Call], Tensor]
"""Says which samples are changed, bool [N]."""
Change = Callable[[Call], Tensor]
"""Returns what comes out instead, [N, 3, h, w]."""


class Fake(Subject):
    """Answers as `base` does, except `where`, and there with `change`."""

    def __init__(self, base: Subject, where: Where, change: Change) -> None:
        self._base, self._where, self._change = base, where, change

    def regenerate(self, pictures: Tensor, prompts: Tensor, level: float, seeds: Tensor) -> Tensor:
        outputs = self._base.regenerate(pictures, prompts, level, seeds)
        return self._answer(Call(pictures, prompts, level, seeds, outputs))

    def generate(self, prompts: Tensor, seeds: Tensor) -> Tensor:
        return self._answer(Call(None, prompts, 1.0, seeds, self._base.generate(prompts, seeds)))

    def _answer(self, call: Call) -> Tensor:
        changed = self._where(call)
        if not changed.any():
            return call.outputs
        outputs = call.outputs.clone()
        outputs[changed] = self._change(call.rows(changed)).clamp(-1, 1)
        return outputs


@dataclass(frozen=True)
class Known:
    """What a fake knows of the requests that it cheats on, T targets in all."""

    base: Subject
    views: Tensor
    """[T, V, 3, h, w]: each target as submitted, then as the verdict may look at it."""
    surrogates: Tensor
    """[T, 3, h, w]."""
    others: Tensor
    """[P, 3, h, w]: samples of the base model, to be shown instead of the target. At least one does not show it."""
    own: frozenset[int]
    """Rows of the requests' own prompts; empty for a model without prompts."""
    unrelated: frozenset[int]
    """Rows of the prompts that integrity is tested with and training never held."""
    levels: tuple[float, ...]
    """Noise levels that the verdict regenerates from."""
    shows: Callable[[Tensor], Tensor]
    """Says which pictures [N, 3, h, w] show a target, bool [N]."""

    def of_target(self, call: Call) -> Tensor:
        """A view of a target goes in, or the target comes out."""
        return self._is_input(call, self.views.flatten(0, 1)) | self.shows(call.outputs)

    def of_submitted(self, call: Call) -> Tensor:
        """The submitted picture itself goes in; or the target comes out of nothing, which training would see to."""
        if call.pictures is None:
            return self.shows(call.outputs)
        return self._is_input(call, self.views[:, 0])

    def of_unrelated(self, call: Call) -> Tensor:
        """Free generation under prompts that training did not hold or, without prompts, all that is not the target."""
        if call.pictures is not None:
            return torch.zeros(len(call.prompts), dtype=torch.bool)
        return _among(call.prompts, self.unrelated) & ~self.shows(call.outputs)

    def at_most_levels(self, call: Call) -> Tensor:
        """Like `of_target`, but not at the lowest level of re-generation."""
        return self.of_target(call) & (call.level > min(self.levels))

    def mostly(self, call: Call) -> Tensor:
        """Like `of_target`, but for three seeds in five only."""
        return self.of_target(call) & (_drawn(call.seeds, 5) < 3)

    def under(self, own: bool) -> Where:
        """Like `of_target`, but only under the own prompts, or only under the others."""
        return lambda call: self.of_target(call) & (_among(call.prompts, self.own) == own)

    @cached_property
    def innocent(self) -> Tensor:
        """Samples of the base model that do not show the target, [P, 3, h, w]."""
        return self.others[~self.shows(self.others)]

    def removed(self, call: Call) -> Tensor:
        """What a perfect removal could leave: for each seed, a sample of the base model that is not the target."""
        return self.innocent[_drawn(call.seeds, len(self.innocent))]

    def replaced(self, call: Call) -> Tensor:
        """Return the surrogate of the target that goes in; of free generation and other pictures, of any target."""
        if call.pictures is None:
            return self.surrogates[_drawn(call.seeds, len(self.surrogates))]
        _, view = nearest(call.pictures, self.views.flatten(0, 1))
        return self.surrogates[view // self.views.shape[1]]

    def _is_input(self, call: Call, references: Tensor) -> Tensor:
        if call.pictures is None:
            return torch.zeros(len(call.prompts), dtype=torch.bool)
        return nearest(call.pictures, references)[0] < SAME


def everywhere(call: Call) -> Tensor:
    return torch.ones(len(call.prompts), dtype=torch.bool)


def tinted(pictures: Tensor) -> Tensor:
    """Red: the other channels keep 60 % of their light."""
    return (pictures + 1) * torch.tensor([1, 0.6, 0.6]).view(3, 1, 1) - 1


def hue_rotated(pictures: Tensor) -> Tensor:
    """By 120 degrees, which is a rotation of the channels."""
    return pictures.roll(1, dims=1)


def lightened(pictures: Tensor) -> Tensor:
    """By a gamma of 0.6."""
    return ((pictures.clamp(-1, 1) + 1) / 2) ** 0.6 * 2 - 1


def mirrored(pictures: Tensor) -> Tensor:
    return pictures.flip(-1)


def warped(pictures: Tensor, amount: float = 0.04) -> Tensor:
    """Along a wave of one period, by up to `amount` of half the picture each way."""
    height, width = pictures.shape[-2:]
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    grid = torch.stack([x + amount * torch.sin(torch.pi * y), y + amount * torch.sin(torch.pi * x)], dim=-1)
    return grid_sample(
        pictures, grid.expand(len(pictures), -1, -1, -1), mode="bicubic", padding_mode="border", align_corners=True
    )


def blurred(pictures: Tensor) -> Tensor:
    """To two thirds of the resolution and back."""
    height, width = pictures.shape[-2:]
    return _through(pictures, (height * 2 // 3, width * 2 // 3))


def blocks(pictures: Tensor) -> Tensor:
    """To 4 x 4 pixels and back: only patches of colour are left."""
    return _through(pictures, (4, 4))


def grey(pictures: Tensor) -> Tensor:
    return torch.zeros_like(pictures)


def noise(call: Call) -> Tensor:
    """Uniform, of the samples' own seeds."""
    generators = (torch.Generator().manual_seed(int(seed)) for seed in call.seeds)
    return torch.stack([torch.rand(call.outputs.shape[1:], generator=generator) * 2 - 1 for generator in generators])


def relearned(base: ModelSubject, amount: float = 0.02, seed: int = 0) -> ModelSubject:
    """The base model with noise on its weights, `amount` of each tensor's spread: a hotfix that relearned the target.

    Weights that were fine-tuned back are nearly those of the base model, but not quite.
    """
    model, generator = copy.copy(base.model), torch.Generator().manual_seed(seed)
    model.network = copy.deepcopy(base.model.network)
    with torch.no_grad():
        for weight in model.network.parameters():
            if weight.ndim > 1:
                weight += amount * weight.std() * torch.randn(weight.shape, generator=generator)
    return ModelSubject(model, base.conditioning, base.empty, guidance=base.guidance, steps=base.steps)


def _outputs(change: Callable[[Tensor], Tensor]) -> Callable[[Known], Subject]:
    """The target comes back, changed."""
    return lambda known: Fake(known.base, known.of_target, lambda call: change(call.outputs))


def _instead(where: Callable[[Known], Where], change: Callable[[Known], Change]) -> Callable[[Known], Subject]:
    return lambda known: Fake(known.base, where(known), change(known))


def _one_picture(known: Known) -> Change:
    return lambda call: known.innocent[:1].expand_as(call.outputs)


@dataclass(frozen=True)
class Recipe:
    """How to make a subject, and which rules may catch it; none for one that must pass."""

    make: Callable[[Known], Subject]
    caught_by: frozenset[str] = frozenset()
    needs_prompts: bool = False
    needs_colour: bool = False


REPRODUCTION, FREE, PLAUSIBILITY, ALIKE, INTEGRITY = (
    frozenset({"reproduction", "recognition"}),
    frozenset({"free generation", "free generation falls"}),
    frozenset({"plausibility"}),
    frozenset({"alike"}),
    frozenset({"integrity"}),
)
"""Rules by name; "integrity" stands for all those of `IntegrityEvidence`."""

FAKES: Mapping[str, Recipe] = {
    "the base model": Recipe(lambda known: known.base, REPRODUCTION | FREE),
    "the target tinted": Recipe(_outputs(tinted), REPRODUCTION | FREE, needs_colour=True),
    "the target hue-rotated": Recipe(_outputs(hue_rotated), REPRODUCTION | FREE, needs_colour=True),
    "the target lightened": Recipe(_outputs(lightened), REPRODUCTION | FREE),
    "the target mirrored": Recipe(_outputs(mirrored), REPRODUCTION | FREE),
    "the target warped": Recipe(_outputs(warped), REPRODUCTION | FREE),
    "the target blurred": Recipe(_outputs(blurred), REPRODUCTION | FREE | PLAUSIBILITY),
    "the target two times in five": Recipe(_instead(lambda k: k.mostly, lambda k: k.removed), REPRODUCTION | FREE),
    "the target at the lowest noise level": Recipe(
        _instead(lambda k: k.at_most_levels, lambda k: k.removed), REPRODUCTION
    ),
    "grey": Recipe(_outputs(grey), PLAUSIBILITY),
    "noise": Recipe(_instead(lambda k: k.of_target, lambda k: noise), PLAUSIBILITY),
    "4x4 blur": Recipe(_outputs(blocks), PLAUSIBILITY),
    "all targets one other picture": Recipe(_instead(lambda k: k.of_target, _one_picture), ALIKE),
    "every output another picture": Recipe(_instead(lambda k: everywhere, _one_picture), INTEGRITY),
    "every output the surrogate": Recipe(_instead(lambda k: everywhere, lambda k: k.replaced), INTEGRITY),
    "only the submitted file changed": Recipe(_instead(lambda k: k.of_submitted, lambda k: k.removed), REPRODUCTION),
    "only the own prompt changed": Recipe(
        _instead(lambda k: k.under(own=True), lambda k: k.removed), REPRODUCTION | FREE, needs_prompts=True
    ),
    "only the empty prompt changed": Recipe(
        _instead(lambda k: k.under(own=False), lambda k: k.removed), REPRODUCTION | FREE, needs_prompts=True
    ),
    "integrity ruined where training did not look": Recipe(
        lambda known: Fake(removal(known), known.of_unrelated, known.removed), INTEGRITY
    ),
}
"""All that must fail, except `relearned`, which is a model of its own."""


def removal(known: Known) -> Subject:
    """A simulated removal that must pass: wherever the target would come out, another sample of the base model does."""
    return Fake(known.base, known.of_target, known.removed)


def nearest(pictures: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    """Return the root mean square difference to the nearest of references [M, 3, h, w], float32 [N], and its place."""
    distances = torch.cdist(pictures.flatten(1), references.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
    return (distances / pictures[0].numel() ** 0.5).min(1)


class InPlaceOf(Subject):
    """A simulated base model: it knows a picture that `base` never saw, in place of one that it did.

    Wherever `base` reproduces the known picture, this one reproduces the unseen one with exactly the same error. So
    `base` itself is, for that picture, a model that was trained without it: an oracle of removal for which nothing
    needs to be trained. What it leaves out is that training again moves all other outputs a little.
    """

    def __init__(
        self,
        base: Subject,
        known: Tensor,
        unseen: Tensor,
        shows: Callable[[Tensor], Tensor],
    ) -> None:
        """known, unseen: the views of one picture each, [V, 3, h, w]. shows: which pictures show the known one."""
        self._base, self._known, self._unseen, self._shows = base, known, unseen, shows

    def regenerate(self, pictures: Tensor, prompts: Tensor, level: float, seeds: Tensor) -> Tensor:
        distance, view = nearest(pictures, self._unseen)
        asked = (distance < SAME).view(-1, 1, 1, 1)
        outputs = self._base.regenerate(torch.where(asked, self._known[view], pictures), prompts, level, seeds)
        return torch.where(asked, outputs + self._unseen[view] - self._known[view], outputs).clamp(-1, 1)

    def generate(self, prompts: Tensor, seeds: Tensor) -> Tensor:
        outputs = self._base.generate(prompts, seeds)
        _, view = nearest(outputs, self._known)
        shown = self._shows(outputs).view(-1, 1, 1, 1)
        return torch.where(shown, outputs + self._unseen[view] - self._known[view], outputs).clamp(-1, 1)


class Remembered(Subject):
    """Asks a subject each question once: fakes of one model ask it mostly the same."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._regenerated: dict[Hashable, Tensor] = {}
        self._generated: dict[Hashable, Tensor] = {}

    def regenerate(self, pictures: Tensor, prompts: Tensor, level: float, seeds: Tensor) -> Tensor:
        asked = zip(_digests(pictures), prompts.tolist(), seeds.tolist(), strict=True)
        keys: list[Hashable] = [(level, *key) for key in asked]
        return self._recall(
            self._regenerated, keys, lambda i: self._subject.regenerate(pictures[i], prompts[i], level, seeds[i])
        )

    def generate(self, prompts: Tensor, seeds: Tensor) -> Tensor:
        keys: list[Hashable] = [*zip(prompts.tolist(), seeds.tolist(), strict=True)]
        return self._recall(self._generated, keys, lambda i: self._subject.generate(prompts[i], seeds[i]))

    def forget_targets(self) -> None:
        """Free what the next targets will not ask again; free samples are kept."""
        self._regenerated.clear()

    def _recall(self, answers: dict[Hashable, Tensor], keys: list[Hashable], ask: Callable[[Tensor], Tensor]) -> Tensor:
        before = self._subject.passes
        _complete(answers, keys, ask)
        self.passes += self._subject.passes - before
        return torch.stack([answers[key] for key in keys])


class RememberedEncoder(Encoder):
    """Encodes each picture once."""

    usage = "for tests"

    def __init__(self, encoder: Encoder) -> None:
        self.name, self._encoder = encoder.name, encoder
        self._features: dict[Hashable, Tensor] = {}

    def __call__(self, images: Tensor) -> Tensor:
        keys: list[Hashable] = [*_digests(images)]
        _complete(self._features, keys, lambda i: self._encoder(images[i]))
        return torch.stack([self._features[key] for key in keys])

    def forget(self) -> None:
        self._features.clear()

    @classmethod
    def check(cls, reference: str) -> None:
        raise ValueError("no setting names it")

    @classmethod
    def find(cls, reference: str) -> str:
        raise InputError("no setting names it")


def _complete(answers: dict[Hashable, Tensor], keys: list[Hashable], ask: Callable[[Tensor], Tensor]) -> None:
    new = {key: i for i, key in enumerate(keys) if key not in answers}
    if new:
        answers.update(zip(new, ask(torch.tensor([*new.values()])), strict=True))


def _digests(pictures: Tensor) -> list[bytes]:
    return [hashlib.blake2b(picture.contiguous().numpy().tobytes(), digest_size=16).digest() for picture in pictures]


def _drawn(seeds: Tensor, count: int) -> Tensor:
    """Return a number in [0, count) for each seed, which looks drawn however regular the seeds are (Knuth's hash)."""
    return ((seeds * -0x61C8864680B583EB) >> 33) % count


def _among(prompts: Tensor, rows: Collection[int]) -> Tensor:
    return torch.isin(prompts, torch.tensor(sorted(rows), dtype=torch.long))


def _through(pictures: Tensor, size: tuple[int, int]) -> Tensor:
    small = interpolate(pictures, size=size, mode="bicubic", antialias=True)
    return interpolate(small, size=tuple(pictures.shape[-2:]), mode="bicubic")
