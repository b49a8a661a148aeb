"""`nights` and `trainings`: see integration/nights.py, which its tests share this Ray with, and trainings.py."""

import pytest

from tests.faults import trainings
from tests.integration import nights


def pytest_configure(config: pytest.Config) -> None:
    for plugin, name in ((nights, "nights"), (trainings, "trainings")):
        if not config.pluginmanager.is_registered(plugin):
            config.pluginmanager.register(plugin, name)
