"""The shipped models, loaded once per module."""

import pytest

from expunge.families import load_model, preflight
from expunge.families.ddpm import DDPM
from expunge.families.sd3 import SD3
from expunge.settings import ModelSettings, Settings


def shipped(name: str) -> ModelSettings:
    return Settings.model_fields["models"].get_default(call_default_factory=True)[name]


@pytest.fixture(scope="module")
def flags() -> SD3:
    options = shipped("flags")
    model = load_model(options, preflight("test", options))
    assert isinstance(model, SD3)
    return model


@pytest.fixture(scope="module")
def faces() -> DDPM:
    options = shipped("faces")
    model = load_model(options, preflight("test", options))
    assert isinstance(model, DDPM)
    return model
