"""Runs a benchmark on Ray: a task per preparation and per result, each written whole, so that a killed run goes on.

Everything is in one folder, which all nodes of a cluster must share. Pictures and tensors are sealed in a home of the
benchmark's own: the user's queue, registry and caches stay as they are.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import ray
from pydantic import Field
from ray.exceptions import RayError, RayTaskError

from expunge.batch.judging import prepare_judged
from expunge.bench.arms import ARMS, RETRAINED
from expunge.bench.cases import POOLS, make_requests
from expunge.bench.product import check
from expunge.bench.results import ArmResult, result_file, result_of
from expunge.bench.training import Trained, retrained, train_arm
from expunge.errors import ExpungeError, InputError, UnavailableError, last_line
from expunge.evaluation.measure import examine, measure, nothing_to_do
from expunge.evaluation.rules import PROTOCOL_VERSION
from expunge.families import pinned_source, preflight, source_digest
from expunge.generation.placement import resources
from expunge.logs import configure
from expunge.requests.blobs import open_blobs
from expunge.runs.document import Document
from expunge.runs.job import JobFolder
from expunge.settings import Settings
from expunge.types import UnlearnJob, Value

STARTS = 3
"""Attempts to start Ray."""


class Record(Value):
    """What all results of a folder have in common: others would not be comparable with them."""

    testbed: str
    protocol: int = PROTOCOL_VERSION
    base: str = Field(description="digest of the base model's files")
    oracle: str | None = Field(description="digest of the retrained model's files")
    groups: tuple[tuple[int, ...], ...] = Field(description="numbers of the targets of each group")
    training: dict[str, object] = Field(description="the product's, from which the arms differ")
    evaluation: dict[str, object]
    gate: dict[str, object]


@dataclass(frozen=True)
class Run:
    """One benchmark."""

    folder: Path
    settings: Settings
    """Those of the benchmark's own home."""
    testbed: str
    groups: tuple[tuple[int, ...], ...]
    """The targets of each group, by number."""
    oracle: Path | None = None

    @classmethod
    def of(
        cls, folder: Path, settings: Settings, testbed: str, groups: list[tuple[int, ...]], oracle: Path | None = None
    ) -> "Run":
        """Open a folder for a benchmark. Raises InputError for settings that it cannot follow."""
        check(settings.training_for(testbed))
        home = folder.absolute() / "home"
        # Empty where the home is to say it: nothing of the user's stores, and no password, goes to the tasks.
        own = {"home": home, "database_url": "", "blob_url": "", "blob_key": "", "tracking_uri": "", "ray_address": ""}
        return cls(folder.absolute(), settings.model_copy(update=own), testbed, tuple(groups), oracle)

    @property
    def record(self) -> Record:
        settings, options = self.settings, self.settings.model(self.testbed)
        oracle = options.model_copy(update={"source": str(self.oracle), "revision": ""})
        return Record(
            testbed=self.testbed,
            base=source_digest(options),
            oracle=source_digest(oracle) if self.oracle else None,
            groups=self.groups,
            training=settings.training_for(self.testbed).model_dump(mode="json"),
            evaluation=settings.evaluation.model_dump(mode="json"),
            gate=settings.gate_for(self.testbed).model_dump(mode="json"),
        )

    def begin(self) -> None:
        """Write the record, or compare it with that of an earlier start, whose groups may have been fewer.

        Raises InputError if the folder holds results of something else.
        """
        file, mine = Document(self.folder / "run.json", Record.model_validate_json), self.record
        earlier = file.read()
        if earlier is not None and _differences(earlier, mine):
            raise InputError(
                f"--out: {self.folder} holds results with other {', '.join(_differences(earlier, mine))}",
                hint="name another folder, or run with the same settings",
            )
        if earlier is None or len(earlier.groups) < len(mine.groups):
            file.write(mine)
        open_blobs(self.settings)  # makes the key before several tasks would

    def prepared(self, group: int, views: int) -> JobFolder:
        """Return the folder of what all arms with so many views share of a group."""
        return JobFolder(self.folder / "groups" / f"{group}-views-{views}")

    def views(self, arm: str) -> int:
        return ARMS[arm].training(self.settings.training_for(self.testbed)).views


def _differences(earlier: Record, mine: Record) -> list[str]:
    same = min(len(earlier.groups), len(mine.groups))
    cut = [record.model_copy(update={"groups": record.groups[:same]}) for record in (earlier, mine)]
    both = [record.model_dump() for record in cut]
    return [name for name in both[0] if both[0][name] != both[1][name]]


def prepare_group(run: Run, group: int, views: int) -> None:
    """Make the surrogates and the retain set of a group, and examine the base model, unless that is done."""
    configure("error")
    folder, blobs, settings = run.prepared(group, views), open_blobs(run.settings), run.settings
    options = settings.model(run.testbed)

    def plan() -> UnlearnJob:
        training = settings.training_for(run.testbed).model_copy(update={"seed": group, "views": views})
        return UnlearnJob(
            batch=f"bench-{group}",
            model=run.testbed,
            source=pinned_source(options),
            base=source_digest(options),
            resolution=preflight(run.testbed, options),
            requests=make_requests(run.testbed, POOLS[run.testbed](), run.groups[group], blobs),
            training=training,
        )

    folder.job.once(plan)
    folder.prepared.once(lambda: prepare_judged(folder, settings, blobs))
    folder.baseline.once(lambda: examine(folder, settings, blobs))


def run_arm(run: Run, arm: str, group: int) -> ArmResult:
    """Train and judge one arm on one prepared group, unless that is done; return the result that is in its file."""
    configure("error")
    return result_file(run.folder, arm, group).once(lambda: _run_arm(run, arm, group))


def _run_arm(run: Run, arm: str, group: int) -> ArmResult:
    began, settings, blobs = time.monotonic(), run.settings, open_blobs(run.settings)
    shared = run.prepared(group, run.views(arm))
    job, prepared, baseline = shared.job.expect(), shared.prepared.expect(), shared.baseline.expect()
    # Steps, batch sizes and what is judged are the product's, also where an arm prepared fewer views.
    job = job.model_copy(
        update={"training": job.training.model_copy(update={"views": settings.training_for(run.testbed).views})}
    )
    folder = JobFolder(run.folder / "arms" / f"{arm}-{group}")
    shutil.rmtree(folder.path, ignore_errors=True)  # of a run that was killed here
    folder.job.write(job)
    folder.prepared.write(prepared)
    folder.baseline.write(baseline)
    nothing = {request.id for request in job.requests} <= {*baseline.not_reproduced, *prepared.skipped}
    if arm == RETRAINED:
        assert run.oracle is not None
        trained = Trained(retrained(run.oracle, job, settings, folder.weights), 0, diverged=False)
    else:
        trained = train_arm(ARMS[arm], job, prepared, baseline, settings, blobs, folder.weights, train=not nothing)
    folder.hotfix.write(trained.hotfix)
    evidence = nothing_to_do(folder, settings, blobs) if nothing else measure(folder, settings, blobs)
    shutil.rmtree(folder.path, ignore_errors=True)  # a night keeps weights; a benchmark keeps figures
    return result_of(arm, group, evidence, trained, time.monotonic() - began)


Done = Callable[[str, int, ExpungeError | None], None]
"""Told of each result as it is there: the arm, the group, and why there is none."""


def run_all(run: Run, arms: list[str], done: Done, workers: int | None = None) -> None:
    """Run every arm on every group; what is there already is not run again. One that fails does not stop the others."""
    left = {
        (arm, group): run.views(arm)
        for group in range(len(run.groups))
        for arm in arms
        if result_file(run.folder, arm, group).read() is None
    }
    for arm in arms:
        for group in range(len(run.groups)):
            if (arm, group) not in left:
                done(arm, group, None)
    if left:
        with _ray(workers):
            _schedule(run, left, done)


def _schedule(run: Run, left: Mapping[tuple[str, int], int], done: Done) -> None:
    """Start a task for each of `left`, which says how many views each has, behind the preparation it needs."""
    asked = resources(run.settings.training_for(run.testbed))
    preparing, running = ray.remote(_prepare_task).options(**asked), ray.remote(_arm_task).options(**asked)
    needed = sorted({(group, views) for (_, group), views in left.items()})
    prepared = {key: preparing.remote(run, *key) for key in needed}
    tasks = {running.remote(prepared[key[1], views], run, *key): key for key, views in left.items()}
    waiting = list(tasks)
    while waiting:
        ended, waiting = ray.wait(waiting)
        for task in ended:
            try:
                ray.get(task)
                done(*tasks[task], None)
            except RayError as error:
                done(*tasks[task], _explained(error))


def _prepare_task(run: Run, group: int, views: int) -> None:
    prepare_group(run, group, views)


def _arm_task(prepared: None, run: Run, arm: str, group: int) -> None:
    """prepared: only to wait for it."""
    run_arm(run, arm, group)


def _explained(error: Exception) -> ExpungeError:
    """Return what a task raised, also where it only waited for the task that did."""
    while isinstance(error, RayTaskError) and isinstance(error.cause, Exception):
        error = error.cause
    return error if isinstance(error, ExpungeError) else ExpungeError(last_line(error))


@contextmanager
def _ray(workers: int | None) -> Iterator[None]:
    """Connect to the cluster that RAY_ADDRESS names, else start a Ray of this process's own.

    Raises UnavailableError if that does not work.
    """
    try:
        _connect(workers)
        yield
    finally:
        ray.shutdown()


def _connect(workers: int | None) -> None:
    if os.environ.get("RAY_ADDRESS"):
        start = partial(ray.init, log_to_driver=False)
    else:
        cores = workers or os.cpu_count()
        start = partial(ray.init, "local", num_cpus=cores, include_dashboard=False, log_to_driver=False)
    # A node has 30 s to start, and a busy machine may need more; its files are in memory at the next attempt.
    for left in reversed(range(STARTS)):
        try:
            start()
            return
        except Exception as error:  # Ray raises plain ones
            ray.shutdown()
            if not left:
                raise UnavailableError(
                    f"Ray cannot be used: {last_line(error)}",
                    hint="run it again when the machine is less busy, or correct RAY_ADDRESS",
                ) from error
