"""Makes `home/` beside it: `python make.py HOME`, with the code of release 0.1.0 (commit ad03ff1) on PYTHONPATH.

HOME is a folder that does not exist yet: the release writes its path into `hotfix.json`. See README.md.
"""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

from torch import Tensor

CONFIG = """
[training]
steps = 24
checkpoint_every = 1000
retain_size = 8
lora_rank = 1

[evaluation]
levels = [0.5]
seeds = 1
generation_samples = 16
integrity_samples = 8
sampling_steps = 4

[gate]
min_shift = -10.0
min_psnr = 0.0
min_ssim = -1.0
max_kid_ratio = 1e9

[models.banners]
source = "testbed:flags"
resolution = [32, 48]
retain_prompts = ["a flag"]
prompt_tokens = 1
"""


def main(home: Path) -> None:
    home.mkdir(mode=0o700)
    (home / "config.toml").write_text(CONFIG)
    os.environ["EXPUNGE_HOME"] = str(home)
    for batch in ("finished", "open"):
        night = subprocess.Popen([sys.executable, __file__, str(home), batch], start_new_session=True)
        if batch == "finished":
            night.wait()
        else:  # killed between its evaluation and its registration
            while not list((home / "runs" / batch).glob("*/evidence.json")):
                assert night.poll() is None
                time.sleep(0.01)
            _kill(home)
            night.wait()
    assert not list((home / "runs" / "open").glob("*/version.json")), "the kill came too late: again"
    _keep(home, Path(__file__).parent / "home")


def _kill(home: Path) -> None:
    """Every process that was started with this home, but this one."""
    import psutil

    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get("EXPUNGE_HOME") == str(home):
                process.send_signal(signal.SIGKILL)
        except psutil.Error:
            pass


def _run(batch: str) -> None:
    import ray

    from expunge.batch.driver import run_night
    from expunge.requests.blobs import open_blobs
    from expunge.requests.store import open_store
    from expunge.settings import load_settings
    from expunge.testbed import flags
    from expunge.words import RemovalRequest

    settings = load_settings()
    store, blobs = open_store(settings), open_blobs(settings)
    images, names = flags.images()
    asked = {
        "finished": [("flag", "flags", 5, 60), ("bird", "birds", 5, 60)],
        "open": [("banner", "banners", 0, 20)],
    }
    for name, model, target, surrogate in asked[batch]:
        image, other = (blobs.put(_png(images[i])) for i in (target, surrogate))
        store.add(
            RemovalRequest(
                id=f"req-{name}",
                model=model,
                images=(image,),
                surrogates=(other,),
                prompt=flags.caption(names[target]),
                external_id=f"ticket-{name}",
            )
        )
    ray.init(
        "local", num_cpus=2, include_dashboard=False, runtime_env={"env_vars": {"EXPUNGE_HOME": str(settings.home)}}
    )
    night = run_night(settings, batch)
    assert night is not None
    assert [outcome.promoted for outcome in night.outcomes] == [True]


def _png(image: Tensor) -> bytes:
    from expunge.batch.prepare import to_pictures, to_png

    return to_png(to_pictures(image[None])[0])


def _keep(home: Path, target: Path) -> None:
    """Copy what the tests read: no registry, no tensors, no weights of the night that is over, no traces of Ray."""
    with sqlite3.connect(home / "expunge.db") as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        database.execute("PRAGMA journal_mode=DELETE")
    shutil.rmtree(target, ignore_errors=True)
    left_out = shutil.ignore_patterns("mlflow", "cache", ".lock", ".*.lock", "*.db-*", "train", "warm_start", "*.tmp")
    shutil.copytree(home, target, ignore=left_out)
    for weights in (target / "runs" / "finished").glob("*/hotfix"):
        shutil.rmtree(weights)
    for path in (target / "runs").rglob("prepared.json"):
        prepared = json.loads(path.read_bytes())
        for name in ("forget", "retain", "conditioning"):
            (target / "blobs" / prepared[name][:2] / prepared[name]).unlink(missing_ok=True)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        _run(sys.argv[2])
    else:
        main(Path(sys.argv[1]))
