"""Measure what one step does to the retain loss, by the geometry in which surgery projects. CSV rows on stdout.

    python -m tests.benchmarks.surgery_geometry [--requests 16] [--steps 60] [--seeds 0,1] [--retain data,distill]

`faces`, all weights: random persons are to become other persons, each with a gradient of its own, and the rest are the
retain set. Three arms take turns from step to step, from the same weights, with the same samples: no surgery, and
retain_normal in either geometry. A row has means over the steps after the warm-up. Changes of the retain loss are those
of the step's own batch, in 1e-6, to first order: the retain gradient times what was added to the weights.

`step`: of the whole step as AdamW makes it, momentum included. `forget`: of the step's forget part alone, as AdamW's
new preconditioner scales it: what surgery is to keep from raising the loss. `raised`: share of steps where that
is above 0 by more than rounding. `measured`: the retain loss after the step less that before it. `conflict`: share of
forget gradients against the retain gradient, in the arm's geometry. At the end: `progress` of the targets to their
surrogates, `retain` loss, and `moved`, the mean squared change of predictions, both on held-in pictures at fixed noise.
"""

import argparse
import csv
import sys
from dataclasses import dataclass, field

import torch
from torch import Tensor

from expunge.families import load_model, preflight
from expunge.preparation.dataset import ForgetSet, RetainSet
from expunge.settings import Settings, TrainingSettings
from expunge.testbed import faces
from expunge.unlearning.adapter import attach
from expunge.unlearning.engine.geometry import WARM_UP, SecondMoment, local_grams
from expunge.unlearning.engine.surgery import operate
from expunge.unlearning.losses import Losses
from expunge.unlearning.sampling import draw_probe
from expunge.unlearning.steps import Steps

ARMS = {
    "none": {"surgery": "none"},
    "euclidean": {"surgery": "retain_normal", "surgery_geometry": "euclidean"},
    "optimizer": {"surgery": "retain_normal", "surgery_geometry": "optimizer"},
}
LEVELS = (0.3, 0.5, 0.7)
SCALE = 1e6
ROUNDING = 1e-3
"""Of the change that the retain part makes: less is not counted as raised."""
FIGURES = ("step", "forget", "raised", "measured", "conflict")


@dataclass
class Arm:
    """One training in plain torch, through the losses, samples and surgery of the product."""

    training: TrainingSettings
    forget: ForgetSet
    retain: RetainSet
    figures: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in FIGURES})

    def __post_init__(self) -> None:
        torch.manual_seed(self.training.seed)
        options = Settings.model_fields["models"].get_default(call_default_factory=True)["faces"]
        self.model = load_model(options, preflight("bench", options))
        frozen = attach(self.model, self.training, None)
        conditioning = self.model.condition([""])
        self.losses = Losses(self.model, frozen, self.training, conditioning)
        distilled = self.training.model_copy(update={"retain_target": "distill"})
        self.distilled = Losses(self.model, frozen, distilled, conditioning)
        self.weights = [p for p in self.model.network.parameters() if p.requires_grad]
        self.adamw = torch.optim.AdamW(self.weights, lr=self.training.rate("full"), weight_decay=0.0)
        self.steps = Steps(self.losses, self.training, self.forget, self.retain, "request", 0, 1)

    def step(self, number: int) -> None:
        _, objectives = self.steps(number)
        losses = [torch.stack([micro() for micro in each]).mean() for each in objectives]
        shards = [[g.detach() for g in torch.autograd.grad(loss, self.weights)] for loss in losses]
        group, retain = list(range(len(self.weights))), [g.clone() for g in shards[-1]]
        moment = self._second_moment(number) if self.training.surgery_geometry == "optimizer" else None
        grams = local_grams(shards, group, moment)
        _, conflict, norm = operate(shards, [group], grams[:, None], self.training, number)
        before = [w.detach().clone() for w in self.weights]
        for weight, gradient in zip(self.weights, shards[-1], strict=True):
            weight.grad = gradient
        self.adamw.step()
        if number < WARM_UP:
            return
        clip = min(1.0, self.training.clip / norm)
        newest = self._second_moment(number + 1)
        p = [1 / ((v / newest.correction).sqrt() + newest.eps) for v in newest.pieces]
        rate = self.training.rate("full")
        whole = -rate * _dot(retain, [a * b for a, b in zip(p, shards[-1], strict=True)])
        own = -rate * clip * _dot(retain, [a * b for a, b in zip(p, retain, strict=True)])
        added = [w.detach() - b for w, b in zip(self.weights, before, strict=True)]
        with torch.no_grad():
            after = torch.stack([micro() for micro in objectives[-1]]).mean().item()
        self.figures["step"].append(SCALE * _dot(retain, added))
        self.figures["forget"].append(SCALE * (whole - own))
        self.figures["raised"].append(float(whole - own > -ROUNDING * own))
        self.figures["measured"].append(SCALE * (after - losses[-1].item()))
        self.figures["conflict"].append(conflict)

    @torch.no_grad()
    def end(self) -> dict[str, float]:
        def each(rows: int) -> tuple[Tensor, Tensor]:
            return torch.arange(rows).repeat(len(LEVELS)), torch.tensor(LEVELS).repeat_interleave(rows)

        targets = draw_probe(self.model, self.training, *each(len(self.forget.x_f)))
        others = draw_probe(self.model, self.training, *each(len(self.retain.x_0)))
        return {
            "progress": self.losses.progress(self.forget, targets).mean().item(),
            "retain": self.losses.retain(self.retain, others).item(),
            "moved": self.distilled.retain(self.retain, others).item(),
        }

    def _second_moment(self, steps: int) -> SecondMoment:
        """Return AdamW's, after as many steps."""
        pieces = [self.adamw.state[w]["exp_avg_sq"] for w in self.weights] if steps else []
        return SecondMoment(pieces, steps, self.adamw.defaults["betas"][1], self.adamw.defaults["eps"])


def _dot(a: list[Tensor], b: list[Tensor]) -> float:
    return sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))


def sets(requests: int, seed: int) -> tuple[ForgetSet, RetainSet]:
    """Choose persons and the persons that replace them; the rest are to stay."""
    people = faces.images()
    order = torch.randperm(len(people), generator=torch.Generator().manual_seed(seed))
    gone, stand_ins, rest = order.split([requests, requests, len(people) - 2 * requests])
    none = torch.zeros(requests, dtype=torch.long)
    forget = ForgetSet(people[gone], people[stand_ins], none, torch.arange(requests))
    return forget, RetainSet(people[rest], torch.zeros(len(rest), dtype=torch.long))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--retain", default="data,distill")
    parser.add_argument("--forget-weight", type=float, default=0.5)
    args = parser.parse_args()
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(["retain_target", "seed", "arm", *FIGURES, "progress", "retain", "moved"])
    for target in args.retain.split(","):
        for seed in map(int, args.seeds.split(",")):
            common = {"retain_target": target, "seed": seed, "forget_weight": args.forget_weight, "workers": 1}
            common |= {"forget_batch": args.requests}
            arms = {
                name: Arm(TrainingSettings.model_validate({**common, **arm}), *sets(args.requests, seed))
                for name, arm in ARMS.items()
            }
            for number in range(args.steps):
                for arm in arms.values():
                    arm.step(number)
            for name, arm in arms.items():
                means = [sum(values) / len(values) for values in arm.figures.values()]
                table.writerow([target, seed, name, *(f"{v:.4g}" for v in (*means, *arm.end().values()))])
            sys.stdout.flush()


if __name__ == "__main__":
    main()
