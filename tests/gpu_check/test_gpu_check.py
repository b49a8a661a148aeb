"""The check of a GPU, as far as a machine without one can tell: every step runs, and nothing is made up."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu_check.card import memory_rate
from tests.gpu_check.steps import ROOT, STEPS, Step, run
from tests.gpu_check.table import REHEARSAL, page


def check(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "tests.gpu_check", *arguments]
    env = {**os.environ, "PYTHONPATH": f"{ROOT / 'platform'}{os.pathsep}{ROOT}", **environment}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured_or_written(tmp_path: Path) -> None:
    done = check("--out", str(tmp_path / "docs"))
    assert done.returncode == 3
    assert done.stdout.startswith("no GPU: nothing measured")
    assert not (tmp_path / "docs").exists()


def test_a_step_whose_package_is_missing_is_left_out_and_says_so(tmp_path: Path) -> None:
    done = run(Step("odd", ("torch", "no_such_package"), lambda tiny, file: ["this"], lambda file: None), "cpu")
    assert (done.state, done.said, done.result) == ("left out", "not installed: no_such_package", None)


def test_a_step_that_fails_keeps_what_it_said() -> None:
    done = run(Step("odd", (), lambda tiny, file: ["no_such_module"], lambda file: None), "cpu")
    assert done.state == "failed"
    assert "no_such_module" in done.said


def test_neither_ray_nor_mlflow_is_needed() -> None:
    assert not {"ray", "mlflow"} & {name for step in STEPS for name in step.needs}


def test_the_rate_of_an_h100s_memory() -> None:
    assert memory_rate(2_619_000, 5120) == pytest.approx(3352.3, abs=0.1)
    assert memory_rate(0, 5120) is None


def test_the_page_names_the_card_and_leaves_out_what_failed() -> None:
    about = {"device": "cuda", "date": "2026-01-01", "card": "A card", "driver": None, "cuda": "13.0"}
    run_ = {"resolution": 512, "items_per_pass": 4, "calls_per_second": 2.0, "tflops": 3.0, "peak_bytes": None}
    steps: list[dict[str, Any]] = [
        {"name": "sampling at 512", "state": "passed", "said": "", "result": run_},
        {"name": "training at 512", "state": "failed", "said": "it broke", "result": None},
    ]
    text = page({"environment": {**about, "packages": {"torch": "2.13.0"}}, "steps": steps})
    assert "A card, driver unknown, CUDA 13.0, torch 2.13.0" in text
    assert "| 512 | 4 | 2.00 | 3 | not measured |" in text
    assert "| training at 512 | failed |" in text
    assert "## Training" not in text


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_step_runs_on_a_cpu_without_ray_and_mlflow(tmp_path: Path) -> None:
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "sitecustomize.py").write_text('import sys\nsys.modules.update({"ray": None, "mlflow": None})\n')
    done = check("--rehearse", "--out", str(tmp_path / "out"), PYTHONPATH=os.pathsep.join([str(blocked), str(ROOT)]))
    assert done.returncode == 0, done.stdout + done.stderr
    assert REHEARSAL in done.stdout
    found = json.loads((tmp_path / "out" / "gpu-check.json").read_text())
    assert {step["name"]: step["state"] for step in found["steps"]} == {step.name: "passed" for step in STEPS}
    assert "card" not in found["environment"]
    by_name = {step["name"]: step["result"] for step in found["steps"]}
    assert by_name["engine tests"]["tests"] > by_name["engine tests"]["skipped"]
    measured = [result for name, result in by_name.items() if " at " in name]
    assert len(measured) == 4
    assert all(result["peak_bytes"] is None for result in measured)
