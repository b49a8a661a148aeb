"""What every test starts from: a home of its own, no settings from outside, nothing that asks the network."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

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


RAY = ("faults", "integration")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In two processes: what shares a fixture stays in one, and so do whole nights on Ray, which wait a lot while the
    other process computes. They take longest, and so come first."""
    items.sort(key=lambda item: item.path.parent.name not in RAY)
    for item in items:
        folder = item.path.parent.name
        item.add_marker(pytest.mark.xdist_group("ray" if folder in RAY else f"{folder}/{item.path.stem}"))
