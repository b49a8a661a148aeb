"""`helm test` runs a tiny removal, from the request to its verdict. The arguments are passed on to the trigger.

The request names a model of its own, `helm-test`, so that nobody else's request is drained.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

MODEL = "helm-test"


def main() -> int:
    request = submit()
    sys.stderr.write(f"{request}: accepted\n")
    trigger = [sys.executable, "-m", "expunge.jobs.submit_rayjob", "--model", MODEL, *sys.argv[1:]]
    triggered = subprocess.run(trigger, check=False)
    if triggered.returncode:
        return triggered.returncode
    return subprocess.run(
        ["expunge", "verdicts", json.loads(expunge("show", request))["batch"]], check=False
    ).returncode


def submit() -> str:
    """Ask for the removal of one of the testbed's faces, with another as its surrogate, and return the request's id."""
    from expunge.pixels import to_pictures
    from expunge.testbed import faces

    pictures = to_pictures(faces.images())[..., 0]
    with tempfile.TemporaryDirectory() as folder:
        target, surrogate = (Path(folder) / name for name in ("target.png", "surrogate.png"))
        Image.fromarray(pictures[3]).save(target)
        Image.fromarray(pictures[90]).save(surrogate)
        identity = ["--external-id", f"helm-test-{os.environ['NIGHT']}", "--reason", "helm test"]
        answer = expunge("submit", str(target), "--model", MODEL, "--surrogate", str(surrogate), *identity)
    return json.loads(answer)["id"]


def expunge(*arguments: str) -> str:
    done = subprocess.run(["expunge", *arguments, "--json"], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.stderr.write(done.stdout)
        sys.exit(done.returncode)
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
