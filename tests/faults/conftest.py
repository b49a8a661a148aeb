"""`nights`: see integration/nights.py. Registered once, so that these tests and those share one Ray."""

import pytest

from tests.integration import nights


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.is_registered(nights):
        config.pluginmanager.register(nights, "nights")
