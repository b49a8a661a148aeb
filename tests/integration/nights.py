"""One real Ray for the whole session, and nights on it that are small enough for a test.

A pytest plugin, registered by the conftests beside the tests that use it. Ray's workers inherit the home from
`ray start`, hence one home for all of these tests; each test has a model of its own there, and so a registry, a ledger
and requests of its own.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from expunge.jobs.local_ray import environment_for, local_ray
from expunge.registry.tracking import Tracker
from expunge.registry.versions import champion
from expunge.requests.blobs import BlobStore, open_blobs
from expunge.requests.leases import lease
from expunge.requests.store import RequestStore, open_store
from expunge.runs.locks import promotion_lock
from expunge.runs.night import NightFolder
from expunge.runs.outcomes import JobOutcome, NightOutcome
from expunge.settings import Settings, load_settings
from expunge.unlearning.checkpoints import SNAPSHOT
from tests.gates import OPEN_GATE
from tests.watching import HANGS_S, T, left_over, processes, training_workers, wait_until, with_children, words

BIN = Path(sys.executable).parent
ENTRY_POINT = ["-m", "expunge.jobs.nightly"]
# Ray Train looks after its workers more often than every 2 s; and they get their share of a busy machine: Ray's own
# niceness of 15 leaves them next to nothing beside the other tests.
TEST_RAY = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5", "RAY_worker_niceness": "0"}

CONFIG = (
    """
[training]
steps = 12
checkpoint_every = 4
retain_size = 8
retain_batch = 8
learning_rate = {learning_rate}

[evaluation]
levels = [0.4]
seeds = 8
unseen_pictures = 16
generation_samples = 16
integrity_samples = 16
sampling_steps = 4
robustness = "off"
"""
    + OPEN_GATE
)
LEARNING_RATE = 5e-5
MODELS = ("faces", "driver-kill", "worker-kill", "unreachable", "markers", "replayed")
LONG = {"steps": 40, "keep_checkpoints": 10}
"""The training of `worker-kill`: a busy machine must not be at its end before the test has seen that it began."""
WEIGHTLESS, ODD = "weightless", "odd"
STAGES = ("plan", "prepare", "examine", "train", "evaluate", "register", "gate")
SURROGATES = {3: 90, 10: 60}
FIRST = "night-first"
REASON, PROMPT = "a letter from her lawyer", "jane doe at the lake"


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Night:
    """What one night on the model `faces` has left."""

    end: Ended
    job: JobOutcome
    request: str
    champion: str


@dataclass(frozen=True)
class Nights:
    """The platform as its operator has it: commands, and the folders that they leave."""

    home: Path
    environment: dict[str, str]

    @property
    def settings(self) -> Settings:
        return load_settings()

    @property
    def store(self) -> RequestStore:
        return open_store(self.settings)

    @property
    def blobs(self) -> BlobStore:
        return open_blobs(self.settings)

    @property
    def tracker(self) -> Tracker:
        return Tracker(self.settings.tracking)

    def expunge(self, *arguments: str, **environment: str) -> Ended:
        return ended(self.start(*arguments, **environment))

    def start(self, *arguments: str, **environment: str) -> "subprocess.Popen[str]":
        command = [str(BIN / "expunge"), *arguments]
        return subprocess.Popen(
            command, env={**self.environment, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def submit(self, model: str, person: int, *options: str) -> str:
        """Asks to have a face removed; returns the request's id."""
        given = [] if "--edit" in options else ["--surrogate", str(self.face(SURROGATES[person]))]
        arguments = [str(self.face(person)), "--model", model, "--external-id", external_id(person), *given, *options]
        done = self.expunge("submit", *arguments, "--json")
        assert done.code == 0, done.out + done.err
        return json.loads(done.out)["id"]

    def face(self, person: int) -> Path:
        from expunge.testbed import faces

        path = self.home.parent / f"{person}.png"
        if not path.exists():
            picture = ((faces.images()[person, 0].numpy() + 1) * 127.5).round().astype(np.uint8)
            Image.fromarray(picture).save(path)
        return path

    def night(self, batch: str, model: str | None = None) -> Ended:
        """Run or continue a batch until it ends."""
        return self.expunge(*night_arguments(batch, model))

    def outcome(self, batch: str) -> NightOutcome:
        outcome = self.folder(batch).outcome
        assert outcome is not None
        return outcome

    def folder(self, batch: str) -> NightFolder:
        return NightFolder(self.settings.runs / batch)

    def stage(self, batch: str) -> str:
        """Where the only job of a batch is; "plan" before it has a folder."""
        planned = self.folder(batch).plan
        return self.folder(batch).job(planned.jobs[0].id).progress.read()[0] if planned else "plan"

    def checkpoints(self, batch: str) -> set[str]:
        """Those that Ray Train knows: it writes its snapshot when every rank has reported."""
        for snapshot in (self.settings.runs / batch).glob(f"*/train/{SNAPSHOT}"):
            return {path.name for path in snapshot.parent.glob("checkpoint_*/") if path.name in snapshot.read_text()}
        return set()

    def driver(self, batch: str) -> psutil.Process | None:
        """The process that runs a batch's night on Ray."""
        started = ((process, words(process)) for process in processes(self.home))
        shells = ("sh", "bash", "ray")
        drivers = (p for p, w in started if w[1:3] == ENTRY_POINT and batch in w and Path(w[0]).name not in shells)
        return next(drivers, None)

    def training_workers(self) -> list[psutil.Process]:
        return training_workers(self.home)

    def versions(self, model: str) -> list[str]:
        """Every registered version, oldest first."""
        found = self.tracker.client.search_model_versions(f"name = '{model}'")
        return sorted((str(version.version) for version in found), key=int)

    def runs(self, model: str) -> list[str]:
        """The id of every MLflow run of a model."""
        client = self.tracker.client
        experiment = client.get_experiment_by_name(f"expunge/{model}")
        assert experiment is not None
        return [run.info.run_id for run in client.search_runs([experiment.experiment_id])]


def night_arguments(batch: str, model: str | None = None) -> list[str]:
    only = ["--model", model] if model else []
    return ["night", "--batch", batch, *only]


def ended(process: "subprocess.Popen[str]") -> Ended:
    try:
        out, err = process.communicate(timeout=HANGS_S)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        pytest.fail(f"the command did not end in {HANGS_S:.0f} s:\n{out}\n{err}")
    return Ended(process.returncode, out, err)


def wait_during(night: "subprocess.Popen[str]", condition: Callable[[], T], what: str) -> T:
    """What the condition returns once that is true, while the night runs: it may not end before that."""

    def reached() -> T:
        assert night.poll() is None, f"the night ended before {what}: {ended(night)}"
        return condition()

    return wait_until(reached, what)


@contextmanager
def night_in(stage: str, nights: Nights, batch: str, model: str) -> Iterator["subprocess.Popen[str]"]:
    """A waiting command whose night has come to a stage, in a batch whose attempts so far ended in earlier ones.

    The gate comes after the registration and is passed at once, unless another night holds it, as this one does; from
    the registration on, as on a busy machine a night would else be over before it is met there.
    """
    runs = nights.settings.runs
    moments: dict[str, Callable[[], object]] = {
        "plan": (runs / batch).exists,
        "train": lambda: nights.stage(batch) == stage and nights.checkpoints(batch),
        "gate": lambda: list((runs / batch).glob("*/version.json")),
    }
    # What the attempt before has left never names this stage.
    reached = moments.get(stage, lambda: nights.stage(batch) == stage)
    with lease(nights.store, promotion_lock(model), wait=True) if stage in ("register", "gate") else nullcontext():
        command = nights.start(*night_arguments(batch, model))
        wait_during(command, lambda: nights.driver(batch), "its driver started")
        wait_during(command, reached, f"it was in {stage}")
        yield command


def external_id(person: int) -> str:
    """Something personal, to look for where it must not be."""
    return f"jane.doe+{person}@example.org"


@pytest.fixture(scope="session")
def ray_of_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nights]:
    """A head node as `make demo` starts it. At the end none of its processes may be left."""
    home = tmp_path_factory.mktemp("nights") / "home"
    home.mkdir()
    (home / "config.toml").write_text(_config(home))
    environment = environment_of(home)
    with local_ray(environment) as address:
        yield Nights(home, {**environment, "EXPUNGE_RAY_ADDRESS": address})
        before = with_children(processes(home))
    left = left_over(before | with_children(processes(home)))
    assert not left, f"still alive after Ray was stopped: {left}"


@pytest.fixture(scope="session")
def first_night(ray_of_session: Nights) -> Night:
    """One whole night, from a request to a champion, that every test which needs one reads."""
    nights = ray_of_session
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EXPUNGE_HOME", str(nights.home))
        request = nights.submit("faces", 3, "--reason", REASON, "--prompt", PROMPT)
        end = nights.night(FIRST, "faces")
        assert end.code == 0, end.out + end.err
        [job] = nights.outcome(FIRST).outcomes
        version = champion(nights.tracker, "faces")
        assert version is not None
        return Night(end, job, request, version.version)


@pytest.fixture
def nights(ray_of_session: Nights, monkeypatch: pytest.MonkeyPatch) -> Nights:
    """The session's home instead of the test's own."""
    monkeypatch.setenv("EXPUNGE_HOME", str(ray_of_session.home))
    return ray_of_session


def home_with(folder: Path, model: str) -> Path:
    """A home of a test's own, with the faces model under a name."""
    home = folder / "home"
    home.mkdir()
    models = f'\n[models.{model}]\nsource = "testbed:faces"\n'
    (home / "config.toml").write_text(CONFIG.format(learning_rate=LEARNING_RATE) + models)
    return home


def environment_of(home: Path) -> dict[str, str]:
    """What Ray and the commands of a home are started with."""
    made = environment_for(home)
    kept = {k: v for k, v in made.items() if k == "EXPUNGE_HOME" or not k.startswith(("EXPUNGE_", "RAY_ADDRESS"))}
    return {**kept, **TEST_RAY, "COLUMNS": "200"}


def _config(home: Path) -> str:
    """The settings, a copy of the faces model under a name for each test, and two models without weights."""
    from expunge.families import resolve_source

    folders = {WEIGHTLESS: home / WEIGHTLESS, ODD: home / ODD}
    for folder in folders.values():
        for config in Path(resolve_source("testbed:faces")).rglob("*.json"):
            copy = folder / config.relative_to(resolve_source("testbed:faces"))
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(config.read_bytes())
    sources = {**dict.fromkeys(MODELS, "testbed:faces"), **folders}
    tables = "".join(f'\n[models.{name}]\nsource = "{source}"\n' for name, source in sources.items())
    longer = "\n[models.worker-kill.training]\n" + "".join(f"{name} = {value}\n" for name, value in LONG.items())
    return CONFIG.format(learning_rate=LEARNING_RATE) + tables + longer
