"""Every test of an operation runs on every backend; Triton needs its interpreter, see `test_triton.py`."""

import os
from collections.abc import Callable, Iterator

import pytest
import torch

from unlearn_kernels.backends import use_backend, why_absent

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NATIVE = pytest.param("native", marks=pytest.mark.skipif(why_absent("native") is not None, reason="no C library"))


@pytest.fixture(params=["triton"] if INTERPRETED else ["reference", NATIVE])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def rounding(backend: str) -> Callable[[torch.dtype, float], float]:
    """Return the relative tolerance of numbers rounded to a dtype: Triton's interpreter truncates bfloat16 instead."""
    return lambda dtype, rtol: 2 * rtol if (backend, dtype) == ("triton", torch.bfloat16) else rtol


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = [item for item in items if not isinstance(item, pytest.Function) or _makes_sense(item)]


def _makes_sense(item: pytest.Function) -> bool:
    """Only the reference takes float64; the interpreter has no threads, and keeps copies."""
    if INTERPRETED and ("threads" in item.name or "memory" in item.name):
        return False
    params = item.callspec.params if hasattr(item, "callspec") else {}
    return params.get("dtype") != torch.float64 or params.get("backend") in (None, "reference")
