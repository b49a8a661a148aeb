"""Run a whole night on the shipped models, from requests to registered hotfixes: `python -m expunge.jobs.demo`.

It starts a Ray of its own, needs no set-up and no network, and leaves everything in a home folder that it names.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

import numpy as np
import platformdirs
from PIL import Image

from expunge.errors import GateError
from expunge.files import make_private
from expunge.jobs.local_ray import environment_for, local_ray


def main() -> int:
    home = Path(os.environ.get("EXPUNGE_HOME") or platformdirs.user_data_dir("expunge"))
    home = home / "demo" / datetime.now().strftime("%Y%m%d-%H%M%S")
    make_private(home)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # SystemExit stops Ray and deletes its folders
    environment = environment_for(home)
    started = time.monotonic()
    with local_ray(environment) as address:
        environment["EXPUNGE_RAY_ADDRESS"] = address
        print(f"Ray is up at {address} after {time.monotonic() - started:.0f} s", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            expunge(environment, "submit", "--batch", str(write_requests(Path(folder))))
        code = expunge(environment, "night")
    for batch in (home / "runs").glob("night-*"):
        expunge(environment, "report", batch.name, "--output", str(home / "report.html"))
    print(f"home     EXPUNGE_HOME={home}")
    print(f"took     {time.monotonic() - started:.0f} s")
    # The verdicts are what the demo shows: that some are not "passed" is no failure of the demo.
    return 0 if code == GateError.exit_code else code


def write_requests(folder: Path) -> Path:
    """Write five removal requests as their senders would: three faces, and two flags that are drawn wrong."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # no warning about torchvision
    from expunge.pixels import to_pictures
    from expunge.testbed import faces, flags

    people = to_pictures(faces.images())[..., 0]
    banners, names = flags.images()
    banners = to_pictures(banners)
    requests: list[dict[str, object]] = []

    def save(name: str, picture: np.ndarray) -> str:
        Image.fromarray(picture).save(folder / name)
        return name

    for person in (3, 41):
        requests.append(
            {"model": "faces", "images": [save(f"face-{person}.png", people[person])], "external_id": f"face-{person}"}
        )
    given = {"images": [save("face-76.png", people[76])], "surrogates": [save("other.png", people[90])]}
    requests.append({"model": "faces", "external_id": "face-76", "reason": "the sender brings the surrogate", **given})
    for wrong, right in (("Canada", "Peru"), ("Greece", "Uruguay")):
        pictures = [save(f"{name}.png", banners[names.index(name)]) for name in (wrong, right)]
        requests.append(
            {
                "model": "flags",
                "images": pictures[:1],
                "surrogates": pictures[1:],
                "prompt": flags.caption(wrong),
                "external_id": f"flag-of-{wrong}",
            }
        )
    path = folder / "requests.jsonl"
    path.write_text("".join(json.dumps(request) + "\n" for request in requests))
    return path


def expunge(environment: dict[str, str], *arguments: str) -> int:
    return subprocess.run([sys.executable, "-m", "expunge", *arguments], env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
