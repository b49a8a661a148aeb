"""One driver of a batch at a time."""

import subprocess
import sys

import pytest

from expunge.errors import UnavailableError
from expunge.requests.leases import lease
from expunge.requests.store import RequestStore, open_store
from expunge.runs.locks import batch_lock, job_lock
from expunge.settings import load_settings

HOLD = """
import sys
from expunge.requests.leases import lease
from expunge.requests.store import open_store
from expunge.runs.locks import batch_lock
from expunge.settings import load_settings
with lease(open_store(load_settings()), batch_lock("night-1")):
    sys.stdout.write("held\\n")
    sys.stdout.flush()
    sys.stdin.read()
"""


@pytest.fixture
def store() -> RequestStore:
    return open_store(load_settings())


def test_a_second_driver_is_refused_until_the_first_is_dead(store: RequestStore) -> None:
    command = [sys.executable, "-c", HOLD]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        with (
            pytest.raises(UnavailableError, match=r"batch night-1 .* held by process \d+"),
            lease(store, batch_lock("night-1")),
        ):
            pytest.fail("two drivers")
        with lease(store, batch_lock("night-2")), lease(store, job_lock("night-1")):
            pass
        first.kill()
        first.wait()
    with lease(store, batch_lock("night-1")):
        pass


def test_the_lock_ends_with_the_block(store: RequestStore) -> None:
    for _ in range(2):
        with pytest.raises(RuntimeError, match="stage failed"), lease(store, batch_lock("night-1")):
            raise RuntimeError("stage failed")
