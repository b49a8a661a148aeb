"""Nothing listens where Ray should be, or one that knows nothing of the night: the night says so in one line."""

import socket
import subprocess
import sys

from expunge.types import RequestState
from tests.integration.nights import Nights, night_arguments

MODEL, BATCH = "unreachable", "night-unreachable"


def test_a_night_without_ray_drains_nothing(nights: Nights) -> None:
    request = nights.submit(MODEL, 3)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    end = nights.expunge(*night_arguments(BATCH, MODEL), EXPUNGE_RAY_ADDRESS=f"http://127.0.0.1:{port}")
    assert end.code == 5
    [line] = end.err.strip().splitlines()
    assert line.startswith(f"error: Ray at http://127.0.0.1:{port} does not answer (")
    assert line.endswith("): start it, or set EXPUNGE_RAY_ADDRESS")
    assert end.out == ""
    assert nights.store.get(request).state is RequestState.ACCEPTED
    assert BATCH not in [batch.id for batch in nights.store.batches()]


def test_a_ray_that_was_started_anew_does_not_know_the_night(nights: Nights) -> None:
    """As where the head node comes back while the command still asks."""
    ask = """
from expunge.batch.submit import night_status
from expunge.errors import UnavailableError
from expunge.settings import load_settings
try:
    night_status("night-x", "night-x-0000", load_settings())
except UnavailableError as error:
    print(error)
"""
    asked = subprocess.run([sys.executable, "-c", ask], env=nights.environment, capture_output=True, text=True)
    assert asked.returncode == 0, asked.stderr
    [line] = asked.stdout.splitlines()
    assert line.startswith(
        f"Ray at {nights.environment['EXPUNGE_RAY_ADDRESS']} does not know the night's job night-x-0000 ("
    )
    assert line.endswith("run `expunge night --batch night-x` to continue")
