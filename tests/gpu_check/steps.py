"""The steps of the check: a process each, so that none finds another's memory, process group or compiled kernels."""

import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTING = ("pytest", "pytest_timeout", "xdist", "hypothesis", "numpy")
"""What the suite's conftest imports, with what the kernels' tests need."""
PLATFORM = ("pydantic", "pydantic_settings", "structlog", "cryptography", "diffusers", "transformers", "peft")
TIMEOUT_S = 3600


@dataclass(frozen=True)
class Step:
    """A part of the check, and the packages beyond torch and triton without which it is left out."""

    name: str
    needs: tuple[str, ...]
    command: Callable[[bool, Path], list[str]]
    """Makes a Python command line; given whether it is a rehearsal, and the file for its result."""
    reads: Callable[[Path], object]


@dataclass(frozen=True)
class Outcome:
    name: str
    state: str
    """`passed`, `failed` or `left out`."""
    said: str
    """Why, where it did not pass."""
    result: object = None


def run(step: Step, device: str) -> Outcome:
    """Run a step on a device, and read what it found, if it ended well or not."""
    missing = [name for name in step.needs if find_spec(name) is None]
    if missing:
        return Outcome(step.name, "left out", f"not installed: {', '.join(missing)}")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result"
        command = [sys.executable, "-m", *step.command(device == "cpu", file)]
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=_environment(device), capture_output=True, text=True, timeout=TIMEOUT_S
            )
        except subprocess.TimeoutExpired:
            return Outcome(step.name, "failed", f"did not end in {TIMEOUT_S} s")
        result = step.reads(file) if file.exists() else None
    if done.returncode or result is None:
        return Outcome(step.name, "failed", (done.stdout + done.stderr)[-4000:], result)
    return Outcome(step.name, "passed", "", result)


def _environment(device: str) -> dict[str, str]:
    """One rank, as `torchrun` would start it, and DeepSpeed on this device."""
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("EXPUNGE_")},
        **{"TEST_DEVICE": device, "DS_ACCELERATOR": device, "TOKENIZERS_PARALLELISM": "false"},
        **{"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"},
        # DeepSpeed looks for them; with one rank nobody listens there.
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
        "PYTHONPATH": os.pathsep.join([str(ROOT / "platform"), str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }


def _tests(*arguments: str, rehearsal: tuple[str, ...]) -> Callable[[bool, Path], list[str]]:
    """A selection of tests: with `rehearsal` instead of all, on a CPU, where `make test-all` runs them anyway."""

    def command(rehearsing: bool, file: Path) -> list[str]:
        chosen = rehearsal if rehearsing else arguments
        return ["pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={file}", *chosen]

    return command


def _measurement(module: str, *options: str) -> Callable[[bool, Path], list[str]]:
    return lambda rehearsing, file: [module, str(file), *(["--tiny"] if rehearsing else options)]


def _counts(file: Path) -> dict[str, int]:
    """Read from a JUnit report how many tests there were."""
    suites = ElementTree.parse(file).getroot().iter("testsuite")
    total = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    for suite in suites:
        for name in total:
            total[name] += int(suite.get(name, 0))
    return total


def _json(file: Path) -> object:
    return json.loads(file.read_text())


SIDES = (512, 1024)
"""Of square pictures, in pixels. A process each, so that a peak of memory is that of one resolution."""

KERNELS, ENGINE = "tests/unlearn_kernels", "tests/unlearning/test_engine.py"
STEPS = (
    Step(
        "kernel tests",
        TESTING,
        _tests(
            *(f"{KERNELS}/test_{name}.py" for name in ("samples", "gradients", "preconditioned", "operators")),
            rehearsal=(f"{KERNELS}/test_preconditioned.py", "-k", "checked or scales or without_parameters"),
        ),
        _counts,
    ),
    Step("kernel benchmarks", ("numpy",), _measurement("tests.gpu_check.kernels"), _json),
    Step(
        "engine tests",
        (*TESTING, *PLATFORM, "deepspeed"),
        _tests(ENGINE, rehearsal=(ENGINE, "-k", "conflict-stage1-fp32-1x-1")),
        _counts,
    ),
    *(
        Step(f"sampling at {side}", PLATFORM, _measurement("tests.gpu_check.sampling", f"--side={side}"), _json)
        for side in SIDES
    ),
    *(
        Step(
            f"training at {side}",
            (*PLATFORM, "deepspeed"),
            _measurement("tests.gpu_check.training", f"--side={side}"),
            _json,
        )
        for side in SIDES
    ),
)
