"""What every test starts from: a home of its own, no settings from outside, nothing that asks the network."""

import os
from pathlib import Path

import pytest
from hypothesis import settings
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

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


# Fault tests with Rays of their own, the longest first; the others, and the integration tests, share one.
OWN_RAY = ("test_training_faults.py", "test_head_loss.py", "test_raylet_kill.py", "test_partition.py")


class Together(LoadScopeScheduling):
    """In several processes, the tests of a file stay in one, and those that share a Ray."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::")[0]
        return "shared Ray" if _shares_ray(Path(file)) else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Together:
    return Together(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What shares a Ray waits a lot, and so is first, beside what computes; what has a Ray of its own is last."""

    def place(item: pytest.Item) -> int:
        name = item.path.name
        return -1 if _shares_ray(item.path) else OWN_RAY.index(name) + 1 if name in OWN_RAY else 0

    items.sort(key=place)


def _shares_ray(file: Path) -> bool:
    return file.parent.name in ("faults", "integration") and file.name not in OWN_RAY
