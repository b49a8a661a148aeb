"""The choice of a backend, and the library behind the one for CPUs."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from unlearn_kernels import backends, combine_, gram, use_backend
from unlearn_kernels.backends import VARIABLE, backend_name, why_absent
from unlearn_kernels.native import library


def test_triton_asks_for_a_gpu_or_its_interpreter() -> None:
    if why_absent("triton") is not None:
        pytest.skip("triton is not installed")
    with use_backend("triton"), pytest.raises(ValueError, match="takes tensors on a GPU"):
        gram([torch.ones(2)])


def test_without_pythons_headers_triton_is_absent_and_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if why_absent("triton") is not None:
        pytest.skip("triton is not installed")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    backends._load.cache_clear()
    why_absent.cache_clear()
    try:
        assert "Python.h" in str(why_absent("triton"))
    finally:
        backends._load.cache_clear()
        why_absent.cache_clear()


def test_backends_are_chosen_by_device_and_dtype() -> None:
    with (
        pytest.raises(ValueError, match="backend: 'cuda', expected one of triton, native, reference"),
        use_backend("cuda"),
    ):
        pass
    with use_backend("reference"):
        assert backend_name([torch.ones(1)]) == "reference"
    if why_absent("native") is None:
        with use_backend("native"), pytest.raises(ValueError, match="takes float32, bfloat16 and float16 only"):
            gram([torch.ones(2, dtype=torch.float64)])


def test_without_an_override_the_cpu_runs_the_c_kernels_but_for_float64() -> None:
    if why_absent("native") is not None:
        pytest.skip("no C library")
    script = (
        "import torch; from unlearn_kernels.backends import backend_name as b;"
        "print(b([torch.ones(1)]), b([torch.ones(1).double()]))"
    )
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["native", "reference"]


def test_loading_the_library_keeps_denormals() -> None:
    """Code linked in by -ffast-math would flush them to zero, for torch and numpy too."""
    if why_absent("native") is not None:
        pytest.skip("no C library")
    assert isinstance(library(), ctypes.CDLL)
    tiny = 1e-40
    assert np.float32(tiny) * np.float32(0.5) > 0
    assert (torch.tensor(tiny) * 0.5).item() > 0
    out = torch.empty(8)
    combine_(out, [torch.full((8,), tiny)], torch.tensor([0.5], dtype=torch.float64))
    assert (out > 0).all()
