"""Which samples share a gradient: every request comes as often as every other, whatever the number of workers."""

from collections import Counter

import pytest
import torch
from torch import Tensor

from expunge.settings import TrainingSettings
from expunge.unlearning.objectives import Mode, allot, forget_step, micro_batches

# Five requests with 1, 3, 2, 1 and 4 rows; request 2 of the job could not be prepared.
REQUEST = torch.tensor([0, 1, 1, 1, 3, 3, 4, 5, 5, 5, 5])
EVERYONE = {0, 1, 3, 4, 5}


def settings(**changes: object) -> TrainingSettings:
    return TrainingSettings.model_validate({"forget_batch": 8, "objectives": "request", **changes})


def test_a_batch_is_one_objective_of_all_its_requests() -> None:
    step = forget_step(settings(), "batch", REQUEST, 3)
    [objective] = step.objectives
    assert objective.samples.tolist() == list(range(8))
    assert set(objective.requests) == set(REQUEST[step.rows].tolist())


@pytest.mark.parametrize("most", [1, 2, 3, 5, 32])
def test_an_objective_holds_the_samples_of_its_request_alone(most: int) -> None:
    for number in range(6):
        step = forget_step(settings(objectives_per_step=most), "request", REQUEST, number)
        assert 1 <= len(step.objectives) <= most
        for objective in step.objectives:
            assert set(REQUEST[step.rows[objective.samples]].tolist()) == set(objective.requests)
        covered = torch.cat([objective.samples for objective in step.objectives])
        assert covered.tolist() == list(range(len(step.rows)))


@pytest.mark.parametrize("most", [1, 2, 3, 5, 32])
def test_every_request_comes_once_per_round(most: int) -> None:
    parts = -(-len(EVERYONE) // most)
    for round_ in range(4):
        steps = [
            forget_step(settings(objectives_per_step=most), "request", REQUEST, round_ * parts + p)
            for p in range(parts)
        ]
        met = [request for step in steps for objective in step.objectives for request in objective.requests]
        assert sorted(met) == sorted(EVERYONE)


def test_the_rounds_have_orders_of_their_own() -> None:
    orders = {
        tuple(o.requests[0] for o in forget_step(settings(), "request", REQUEST, step).objectives) for step in range(8)
    }
    assert len(orders) > 1


def test_the_rows_of_a_request_come_equally_often() -> None:
    training = settings(forget_batch=10)
    seen: Counter[int] = Counter()
    for step in range(12):
        seen.update(forget_step(training, "request", REQUEST, step).rows.tolist())
    for request in EVERYONE:
        counts = [seen[row] for row in torch.nonzero(torch.eq(REQUEST, request)).flatten().tolist()]
        assert max(counts) - min(counts) <= 1
        assert sum(counts) == 12 * 2


@pytest.mark.parametrize(("batch", "workers", "each"), [(8, 2, 2), (40, 2, 8), (10, 2, 2), (8, 4, 4)])
def test_requests_cost_no_more_samples_than_a_batch_if_every_worker_has_one(
    batch: int, workers: int, each: int
) -> None:
    training = settings(forget_batch=batch, retain_batch=8, workers=workers)
    step = forget_step(training, "request", REQUEST, 0)
    assert [len(objective.samples) for objective in step.objectives] == [each] * len(EVERYONE)


def test_repeatable_and_dependent_on_the_seed() -> None:
    def rows(seed: int, number: int) -> Tensor:
        torch.manual_seed(99)  # the global generator has no say
        return forget_step(settings(seed=seed), "request", REQUEST, number).rows

    assert torch.equal(rows(0, 4), rows(0, 4))
    assert not torch.equal(rows(0, 4), rows(1, 4))


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("micro", [0, 1, 2, 3])
@pytest.mark.parametrize("count", [4, 5, 8])
def test_scaled_micro_batches_give_the_mean_over_all_samples(count: int, micro: int, world: int) -> None:
    samples, value = torch.arange(count), torch.randn(count, dtype=torch.float64)
    training = settings(micro_batch=micro)
    ranks = [micro_batches(training, samples, rank, world) for rank in range(world)]
    assert len({len(rank) for rank in ranks}) == 1, "every worker takes part in every reduction"
    assert sorted(torch.cat([part for rank in ranks for part, _ in rank]).tolist()) == samples.tolist()
    means = [torch.stack([scale * value[part].mean() for part, scale in rank]).mean() for rank in ranks]
    torch.testing.assert_close(torch.stack(means).mean(), value.mean())
    if micro and count % world == 0:
        assert max(len(part) for rank in ranks for part, _ in rank) <= micro


def test_equal_parts_are_not_scaled() -> None:
    assert [scale for _, scale in micro_batches(settings(micro_batch=2), torch.arange(8), 0, 2)] == [1, 1]


# How far requests 0 to 5 of the job have to go: 1 and 4 are forgotten, and 2 has no row.
MISSING = torch.tensor([0.1, 0.0, 0.0, 0.4, 0.0, 1.0], dtype=torch.float64)


@pytest.mark.parametrize("most", [1, 2, 32])
@pytest.mark.parametrize("mode", ["request", "batch"])
def test_only_forgotten_requests_are_left_out(mode: Mode, most: int) -> None:
    met: Counter[int] = Counter()
    for number in range(12):
        step = forget_step(settings(objectives_per_step=most), mode, REQUEST, number, MISSING)
        assert len(step.rows) == 8
        assert torch.cat([objective.samples for objective in step.objectives]).tolist() == list(range(8))
        for objective in step.objectives:
            assert set(REQUEST[step.rows[objective.samples]].tolist()) == set(objective.requests)
            met.update(REQUEST[step.rows[objective.samples]].tolist())
    assert set(met) == {0, 3, 5}


@pytest.mark.parametrize("mode", ["request", "batch"])
def test_a_request_with_further_to_go_gets_more_samples(mode: Mode) -> None:
    met: Counter[int] = Counter()
    for number in range(50):
        step = forget_step(settings(forget_batch=16), mode, REQUEST, number, MISSING)
        met.update(REQUEST[step.rows].tolist())
    assert met[0] < met[3] < met[5]
    # As without a budget, "batch" counts the rows of a request too: 1, 2 and 4.
    due = {0: 0.1, 3: 2 * 0.4, 5: 4 * 1.0} if mode == "batch" else {0: 2 + 10 / 15, 3: 2 + 40 / 15, 5: 2 + 100 / 15}
    for request, share in due.items():
        assert met[request] / met.total() == pytest.approx(share / sum(due.values()), abs=0.01)


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("batch", [8, 16, 64])
def test_all_samples_of_a_step_are_allotted_and_every_worker_has_one(batch: int, workers: int) -> None:
    training = settings(forget_batch=batch, retain_batch=8, workers=workers)
    missing = torch.tensor([1e-9, 0.2, 0.2, 0.9, 1.0], dtype=torch.float64)
    for step in range(20):
        each = allot(training, missing, step)
        assert each.min().item() >= workers
        assert each.sum().item() == max(batch, len(missing) * workers)
    total = torch.stack([allot(training, missing, step) for step in range(200)]).sum(0)
    assert total.tolist() == sorted(total.tolist())


def test_equal_needs_are_a_batch_as_without_a_budget() -> None:
    """In mode "batch" every row of the remaining requests comes equally often."""
    seen: Counter[int] = Counter()
    for number in range(55):
        seen.update(forget_step(settings(), "batch", REQUEST, number, torch.ones(6, dtype=torch.float64)).rows.tolist())
    assert max(seen.values()) - min(seen.values()) <= 3
    assert len(seen) == len(REQUEST)
