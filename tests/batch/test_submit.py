"""Handing a night to Ray: what is refused before anything is sent, and how light the driver is that it starts."""

import subprocess
import sys
from pathlib import Path

import pytest

from expunge.batch.submit import check_reachable, submit_night
from expunge.errors import InputError, UnavailableError
from expunge.settings import Settings


def test_a_folder_without_the_job_is_refused(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nightly\.py does not exist"):
        submit_night("night-1", settings, tmp_path)


def test_a_home_that_ray_would_upload_is_refused(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "nightly.py").touch()
    inside = settings.model_copy(update={"home": tmp_path / "home"})
    with pytest.raises(InputError, match="which Ray uploads: move it"):
        submit_night("night-1", inside, tmp_path)


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "nonsense", "http://"])
def test_an_address_where_nothing_answers_is_one_line(address: str) -> None:
    with pytest.raises(UnavailableError, match="does not answer") as caught:
        check_reachable(address)
    assert "\n" not in str(caught.value)


def test_a_driver_waits_for_no_import_of_its_workers() -> None:
    """They took 7 s of CPU, in every driver and in every task that only walks a job through its stages."""
    script = "import sys, expunge.batch.driver; print(sorted({'torch', 'diffusers', 'peft'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
