"""A night on a Ray that counts four GPUs where torch has none: it places by them, and computes on the CPU."""

from pathlib import Path

import pytest
import torch

from expunge.jobs.local_ray import local_ray
from expunge.runs.job import JobFolder
from expunge.types import RequestState
from tests.integration.nights import (
    CONFIG,
    LEARNING_RATE,
    Nights,
    ended,
    environment_of,
    night_arguments,
    wait_during,
)
from tests.watching import left_over, processes, task_process, with_children

BATCH = "night-fake-gpus"
MODELS = {"on-gpus": "auto", "on-cpus": "cpu"}
"""The same model twice, with its `training.device`."""


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPUs would be real")
def test_gpus_that_only_ray_has_change_where_a_job_waits_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a stage that is killed while it holds one is started again."""
    home = tmp_path / "home"
    home.mkdir()
    tables = "".join(
        f'\n[models.{name}]\nsource = "testbed:faces"\n[models.{name}.training]\ndevice = "{device}"\n'
        for name, device in MODELS.items()
    )
    (home / "config.toml").write_text(CONFIG.format(learning_rate=LEARNING_RATE) + tables)
    monkeypatch.setenv("EXPUNGE_HOME", str(home))
    environment = environment_of(home)
    with local_ray(environment, gpus=4) as address:
        nights = Nights(home, {**environment, "EXPUNGE_RAY_ADDRESS": address})
        requests = {model: nights.submit(model, 3) for model in MODELS}
        command = nights.start(*night_arguments(BATCH))
        examining = wait_during(command, lambda: task_process(home, "_examine"), "a job was examined")
        assert examining is not None
        examining.kill()
        end = ended(command)
        started = with_children(processes(home))
    assert not left_over(started | with_children(processes(home)))
    assert end.code == 0, end.out + end.err
    assert {nights.store.get(request).state for request in requests.values()} == {RequestState.REMOVED}
    assert [nights.versions(model) for model in MODELS] == [["1"], ["1"]]
    planned = nights.folder(BATCH).plan
    assert planned is not None
    jobs: dict[str, JobFolder] = {job.model: nights.folder(BATCH).job(job.id) for job in planned.jobs}
    on_gpus, on_cpus = (jobs[model].hotfix.expect() for model in MODELS)
    assert on_gpus.digest == on_cpus.digest
