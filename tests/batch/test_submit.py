"""Handing a night to Ray: what is refused before anything is sent."""

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
