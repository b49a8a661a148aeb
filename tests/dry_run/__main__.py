"""A whole night with a Stable Diffusion 3 of SD3-medium's true size and random weights: `make dry-run-sd3`.

It may be killed and started again: the model is written once, and the night continues where it stopped. Exit code 1
if a stage held a network that it does not need.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from expunge.jobs.local_ray import environment_for, local_ray
from expunge.settings import load_settings
from tests.dry_run import checkpoint, load_back, night, report
from tests.dry_run.watch import Record, Watch

SIZES = {"medium": checkpoint.MEDIUM, "tiny": checkpoint.TINY}


def main() -> int:
    options = _parser().parse_args()
    folder, pixels = options.folder.absolute(), options.pixels
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # SystemExit stops Ray and deletes its folders
    began = time.monotonic()
    source = checkpoint.write(folder / options.size, SIZES[options.size])
    print(f"model     {source} ({time.monotonic() - began:.0f} s)", flush=True)
    home = folder / f"home-{options.size}-{pixels}"
    night.make_home(home, source, pixels)
    record = run(home)
    print(report.table(record, load_settings()), flush=True)
    # The largest one that is published is planned on tensors without memory.
    night.expunge({**os.environ}, "plan", "--model", "sd3.5-large", "--gpus", "8", "--requests", "16")
    print(load_back.run(home, pixels))
    print(*(faults := report.faults(record)), sep="\n")
    return 1 if faults else 0


def run(home: Path) -> Record:
    """Run or continue the night in `home`; return what was seen of its stages, over all starts."""
    os.environ["EXPUNGE_HOME"] = str(home)
    # One stage runs at a time, so it may have every core. Niceness 0 is that of this process, to which Ray adds 15.
    own = {"RAY_worker_niceness": "0", "OMP_NUM_THREADS": str(os.cpu_count())}
    environment = {**environment_for(home), **own}
    watch = Watch(home, home / "stages.json")
    if night.ended(home):
        return watch.record
    with local_ray(environment) as address:
        environment["EXPUNGE_RAY_ADDRESS"] = address
        with watch.watching():
            night.submit(home, environment)
            night.run(environment)
    return watch.record


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/sd3"), help="16 GB of disk (default: /tmp/sd3)")
    parser.add_argument("--size", choices=SIZES, default="medium")
    parser.add_argument("--pixels", type=int, default=256, help="the side of a picture (default: 256)")
    return parser


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
