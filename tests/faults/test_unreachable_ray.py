"""Nothing listens where Ray should be: the night says so in one line, before it takes anything from the queue."""

import socket

from expunge.words import RequestState
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
