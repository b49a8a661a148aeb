"""Check kernels, engine, sampling and training on one NVIDIA GPU: `make gpu-check`. It needs no network.

It writes `gpu-check.json` and the page `gpu-check.md` into docs/, to be committed. `--needs` lists the packages that
have to be there; what lacks one is left out and says so. Neither Ray nor MLflow is among them.

    make gpu-check ARGS=--rehearse      # the same steps on a CPU with almost no width, into a temporary folder

Exit codes: 0 all steps passed; 1 one failed; 2 one was left out; 3 there is no GPU, and nothing was measured.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

from tests.gpu_check.card import environment
from tests.gpu_check.steps import ROOT, STEPS, Outcome, run
from tests.gpu_check.table import page

FAILED, LEFT_OUT, NO_GPU = 1, 2, 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with almost no width")
    parser.add_argument("--out", type=Path, help="the folder for the results; default: docs, or for a rehearsal /tmp")
    parser.add_argument("--only", nargs="+", choices=[step.name for step in STEPS], help="some steps alone")
    parser.add_argument("--needs", action="store_true", help="list the packages beyond torch and triton, and end")
    arguments = parser.parse_args()
    if arguments.needs:
        for step in STEPS:
            print(f"{step.name}: {', '.join(step.needs)}")
        print("kernels: a C compiler, with which Triton builds its launchers, and Python's headers")
        print("kernel benchmarks, if there: torchjd")
        return 0
    if not arguments.rehearse and not torch.cuda.is_available():
        print(f"no GPU: nothing measured (torch {torch.__version__} sees no CUDA device)")
        return NO_GPU
    device = "cpu" if arguments.rehearse else "cuda"
    out = arguments.out or (Path(tempfile.mkdtemp(prefix="gpu-check-")) if arguments.rehearse else ROOT / "docs")
    outcomes = []
    for step in STEPS:
        if arguments.only is None or step.name in arguments.only:
            outcomes.append(run(step, device))
            _write(out, device, outcomes)  # after each, so that a later step cannot lose it
            print(f"{step.name}: {outcomes[-1].state}. {outcomes[-1].said}", flush=True)
    print((out / "gpu-check.md").read_text())
    print(f"written to {out}")
    states = {outcome.state for outcome in outcomes}
    return FAILED if "failed" in states else LEFT_OUT if "left out" in states else 0


def _write(out: Path, device: str, outcomes: list[Outcome]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    found = {"environment": environment(device), "steps": [asdict(outcome) for outcome in outcomes]}
    (out / "gpu-check.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "gpu-check.md").write_text(page(found))


if __name__ == "__main__":
    sys.exit(main())
