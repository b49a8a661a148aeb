"""The geometry in which surgery projects, without an engine: what one AdamW step does to the retain loss."""

from collections.abc import Sequence

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from expunge.settings import MethodSettings, TrainingSettings
from expunge.unlearning.engine.geometry import WARM_UP, SecondMoment, local_grams
from expunge.unlearning.engine.surgery import operate

GEOMETRIES = ("euclidean", "optimizer")
BETA2, EPS = 0.999, 1e-8


def combined(gradients: Sequence[Tensor], v: Tensor, geometry: str, steps: int = 100, weight: float = 1.0) -> Tensor:
    """Run a surgery on whole gradients [N] with the retain gradient last; nothing is clipped."""
    method = MethodSettings.model_validate({"clip": 1e30, "forget_weight": weight, "surgery_geometry": geometry})
    shards = [[gradient.clone()] for gradient in gradients]
    moment = SecondMoment([v], steps, BETA2, EPS) if geometry == "optimizer" else None
    operate(shards, [[0]], local_grams(shards, [0], moment)[:, None], method, 0)
    return shards[-1][0]


def preconditioner(v: Tensor, steps: int = 100) -> Tensor:
    return 1 / ((v.double() / (1 - BETA2**steps)).sqrt() + EPS)


def along(u: Tensor, retain: Tensor, v: Tensor) -> float:
    """Cosine, under the preconditioner, of an update's gradient and the retain gradient: below 0 the loss rises."""
    p = preconditioner(v)
    dot = (p * u.double() * retain.double()).sum()
    return float(dot / ((p * u.double() ** 2).sum() * (p * retain.double() ** 2).sum()).sqrt())


# Without a plain conflict, AdamW's step along the forget gradient goes against the retain gradient all the same.
FORGET, RETAIN = torch.tensor([2.0, -1.0]), torch.tensor([1.0, 1.0])
MOMENT = torch.tensor([100.0**2, 1.0]) * (1 - BETA2**100)


def test_a_plain_projection_leaves_a_step_that_raises_the_retain_loss() -> None:
    assert torch.dot(FORGET, RETAIN) > 0
    for geometry in GEOMETRIES:
        forget = combined([FORGET, RETAIN], MOMENT, geometry) - RETAIN
        assert (along(forget, RETAIN, MOMENT) >= -1e-6) == (geometry == "optimizer")


@pytest.mark.parametrize(("geometry", "falls"), [("euclidean", False), ("optimizer", True)])
def test_the_optimizer_itself_lowers_the_retain_loss_only_in_its_own_geometry(geometry: str, falls: bool) -> None:
    """The same case through torch's AdamW, without momentum; v is its state."""
    weights = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([weights], lr=1e-3, betas=(0.0, BETA2), weight_decay=0.0)
    optimizer.state[weights] = {"step": torch.tensor(100.0), "exp_avg": torch.zeros(2), "exp_avg_sq": MOMENT.clone()}
    weights.grad = combined([FORGET, RETAIN], MOMENT, geometry, weight=10.0)
    optimizer.step()
    change = torch.dot(weights.detach(), RETAIN).item()  # of the loss whose gradient is RETAIN, to first order
    assert (change <= 1e-9) == falls


@pytest.mark.parametrize("count", [2, 3, 9, 33])
def test_no_forget_gradient_is_left_against_the_retain_gradient(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    rows = list(torch.randn(count, 5000, generator=generator))
    v = torch.rand(5000, generator=generator) ** 8
    # Each opposes the retain gradient most where the optimizer moves far.
    gradients = [row - rows[-1] * (v < 1e-3) for row in rows[:-1]] + [rows[-1]]
    forget = combined(gradients, v, "optimizer") - gradients[-1]
    assert along(forget, gradients[-1], v) >= -1e-5
    assert along(combined(gradients, v, "euclidean") - gradients[-1], gradients[-1], v) < -1e-3


def test_the_plain_geometry_is_used_until_the_moment_has_warmed_up() -> None:
    fresh = combined([FORGET, RETAIN], torch.zeros(2), "optimizer", steps=0)
    assert torch.equal(fresh, combined([FORGET, RETAIN], MOMENT, "euclidean"))
    early, late = (combined([FORGET, RETAIN], MOMENT, "optimizer", steps=n) for n in (WARM_UP - 1, WARM_UP))
    assert torch.equal(early, fresh)
    assert not torch.equal(late, fresh)


def test_the_clip_is_by_the_plain_norm_in_both_geometries() -> None:
    for geometry in GEOMETRIES:
        method = MethodSettings.model_validate({"clip": 0.5, "surgery_geometry": geometry})
        shards = [[FORGET.clone()], [RETAIN.clone()]]
        moment = SecondMoment([MOMENT], 100, BETA2, EPS) if geometry == "optimizer" else None
        _, _, norm = operate(shards, [[0]], local_grams(shards, [0], moment)[:, None], method, 0)
        assert norm > 0.5
        assert shards[-1][0].norm().item() == pytest.approx(0.5, rel=1e-6)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("stage", [1, 3])
def test_offload_is_refused_where_the_moment_is_not_beside_the_gradients(geometry: str, stage: int) -> None:
    values = {"surgery_geometry": geometry, "zero_stage": stage, "offload_optimizer": True}
    if (geometry, stage) != ("optimizer", 1):
        assert TrainingSettings.model_validate(values).zero_stage == stage
        return
    with pytest.raises(ValidationError, match=r"surgery_geometry: .* zero_stage = 3"):
        TrainingSettings.model_validate(values)
