"""What every test starts from: a home of its own, no settings from outside, nothing that asks the network.

And how the suite is run: in which processes, in which order, and what it says that it has left out.
"""

import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import settings
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import WorkerController

# Read once, when the packages are imported: hence here, before any of them is.
for name, value in {
    "DO_NOT_TRACK": "true",
    "DS_BUILD_OPS": "0",
    "HF_HUB_OFFLINE": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "OMP_NUM_THREADS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}.items():
    os.environ.setdefault(name, value)

# The same examples every time; and no deadline, since a busy machine is no fault of the code.
settings.register_profile("expunge", deadline=None, derandomize=True, database=None)
settings.load_profile("expunge")


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's data."""
    for name in os.environ:
        if name.startswith("EXPUNGE_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("EXPUNGE_HOME", str(tmp_path / "home"))


# What takes longest, first: what is left for the end, when a process may have nothing to do, is then short.
SHARED_RAY = "shared Ray"
LONGEST = (
    SHARED_RAY,
    "tests/faults/test_training_faults.py",
    "tests/unlearn_kernels/test_triton.py",
    "tests/faults/test_head_loss.py",
    "tests/faults/test_raylet_kill.py",
    "tests/faults/test_partition.py",
    "tests/unlearning/test_budget.py",
    "tests/unlearning/test_training.py",
    "tests/unlearning/test_engine.py",
)


class Together(LoadScopeScheduling):
    """In several processes, the tests of a file stay in one, and so do those that share a Ray."""

    def _split_scope(self, nodeid: str) -> str:
        return _unit(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Together:
    config.option.loadscopereorder = False  # the order is ours, not by the number of tests
    return Together(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {unit: place for place, unit in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(_unit(item.nodeid), len(places)))


def _unit(nodeid: str) -> str:
    """The file of a test, or the Ray that it shares: see integration/nights.py."""
    file = nodeid.split("::")[0]
    shared = file.startswith(("tests/faults/", "tests/integration/")) and file not in LONGEST
    return SHARED_RAY if shared else file


LEFT_OUT = pytest.StashKey[Counter[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[LEFT_OUT] = Counter()


def pytest_deselected(items: list[pytest.Item]) -> None:
    for item in items:
        item.config.stash[LEFT_OUT][item.path.parent.name] += 1


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Tells the process that prints; each of several has collected the same."""
    if hasattr(session.config, "workeroutput"):  # which xdist gives to the processes that it starts
        told: dict[str, object] = session.config.workeroutput  # pyright: ignore[reportAttributeAccessIssue]
        told["left out"] = dict(session.config.stash[LEFT_OUT])


def pytest_testnodedown(node: WorkerController) -> None:
    node.config.stash[LEFT_OUT] |= Counter(getattr(node, "workeroutput", {}).get("left out", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    left_out = config.stash[LEFT_OUT]
    if left_out and config.option.markexpr == "not slow":
        where = ", ".join(f"{count} in {folder}" for folder, count in sorted(left_out.items()))
        terminalreporter.write_line(f"Left out: {left_out.total()} slow tests ({where}).")
        terminalreporter.write_line("`make test-slow` runs them, and `make test-all` runs everything.")
