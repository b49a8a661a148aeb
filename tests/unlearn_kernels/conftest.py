"""Every test of an operation runs on every backend; Triton's needs its interpreter, see `test_triton.py`."""

import os
from collections.abc import Iterator

import pytest
import torch

from unlearn_kernels.backends import use_backend, why_absent

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NATIVE = pytest.param("native", marks=pytest.mark.skipif(why_absent("native") is not None, reason="no C library"))


@pytest.fixture(params=["triton"] if INTERPRETED else ["reference", NATIVE])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with use_backend(request.param):
        yield request.param


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """float64 is for the reference alone."""
    items[:] = [
        item
        for item in items
        if not isinstance(item, pytest.Function)
        or not hasattr(item, "callspec")
        or item.callspec.params.get("dtype") != torch.float64
        or item.callspec.params.get("backend") in (None, "reference")
    ]
