"""A model as the evaluation sees it: its samples depend on their own seeds."""

import torch

from expunge.evaluation.subject import ModelSubject
from expunge.families import load_model
from expunge.settings import load_settings


def test_seeds_give_the_same_sample_again_and_another_one_wherever_they_differ() -> None:
    model = load_model(load_settings().model("faces"), (24, 24))
    subject = ModelSubject(model, {}, {}, guidance=1, steps=2)
    seeds = torch.tensor([1, 1, 2, 1 + (1 << 31), 1 + (1 << 32), 1 + (1 << 40), 1 + (1 << 60)])
    samples = subject.generate(torch.zeros(len(seeds), dtype=torch.long), seeds)
    assert torch.equal(samples[0], samples[1])
    assert len(samples.unique(dim=0)) == len(seeds) - 1, "high bits of a seed count, too"
