"""The shipped models, loaded once per module."""

import pytest

from expunge.families import load_model, preflight
from expunge.families.ddpm import DDPM
from expunge.families.family import Family
from expunge.families.sd3 import SD3
from expunge.settings import ModelSettings, Settings


def shipped(name: str) -> ModelSettings:
    return Settings.model_fields["models"].get_default(call_default_factory=True)[name]


def opened(name: str) -> Family:
    """A shipped model of the test's own."""
    options = shipped(name)
    return load_model(options, preflight("test", options))


@pytest.fixture(scope="module")
def flags() -> SD3:
    model = opened("flags")
    assert isinstance(model, SD3)
    return model


@pytest.fixture(scope="module")
def faces() -> DDPM:
    model = opened("faces")
    assert isinstance(model, DDPM)
    return model
