"""Every test of an operation runs on every backend; Triton needs a GPU, or its interpreter: see `test_triton.py`."""

import os
from collections.abc import Callable, Iterator

import pytest
import torch

from tests.device import DEVICE
from unlearn_kernels.backends import use_backend, why_absent

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NATIVE = pytest.param("native", marks=pytest.mark.skipif(why_absent("native") is not None, reason="no C library"))


BACKENDS = ["triton"] if INTERPRETED else ["reference", NATIVE] if DEVICE == "cpu" else ["reference", "triton"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def rounding(backend: str) -> Callable[[torch.dtype, float], float]:
    """Return the relative tolerance of numbers rounded to a dtype: Triton's interpreter truncates bfloat16 instead."""
    return lambda dtype, rtol: 2 * rtol if INTERPRETED and dtype == torch.bfloat16 else rtol


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = [item for item in items if not isinstance(item, pytest.Function) or _makes_sense(item)]


def _makes_sense(item: pytest.Function) -> bool:
    """Only the reference takes float64; threads and the host's memory are a CPU's, and the interpreter keeps copies."""
    if (INTERPRETED or DEVICE != "cpu") and ("threads" in item.name or "memory" in item.name):
        return False
    if DEVICE != "cuda" and "on_a_gpu" in item.name:
        return False
    params = item.callspec.params if hasattr(item, "callspec") else {}
    return params.get("dtype") != torch.float64 or params.get("backend") in (None, "reference")
