"""The GPU kernels without a GPU: the tests of the operations again, in Triton's interpreter.

It has to be switched on before triton is imported, so it needs a separate process.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

# Catches a hang and nothing else, and lies below pytest's own limit for this test.
TIMEOUT_S = 1500


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S + 100)
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("module", ["test_samples.py", "test_gradients.py", "test_preconditioned.py"])
def test_the_kernels_pass_the_tests_of_the_operations(module: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / module)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    assert run.returncode == 0, run.stdout[-4000:]
    assert " passed" in run.stdout
    assert "skipped" not in run.stdout
