"""Runs the app on uvicorn until it is told to stop; requests that have begun are answered first."""

import signal

import uvicorn

from expunge.errors import InputError
from expunge.requests.blobs import BlobStore
from expunge.requests.store import RequestStore
from expunge.service import tokens
from expunge.service.app import create_service
from expunge.settings import Settings
from expunge.web import is_loopback

GRACE_S = 30
"""Seconds that requests have to end after SIGTERM."""


def serve(
    settings: Settings, store: RequestStore, blobs: BlobStore, *, host: str, port: int, docs: bool = False
) -> None:
    """Serves until SIGTERM or SIGINT. Raises InputError for an address beyond this machine while there is no token."""
    if not is_loopback(host) and not tokens.any_valid(store):
        raise InputError(
            f"host: {host} can be reached from other machines, and no token is valid",
            hint="make one with `expunge tokens create`, or serve on 127.0.0.1",
        )
    config = uvicorn.Config(
        create_service(settings, store, blobs, docs=docs),
        host=host,
        port=port,
        access_log=False,  # it would print paths and queries
        log_config=None,
        server_header=False,
        proxy_headers=False,
        ws="none",
        timeout_graceful_shutdown=GRACE_S,
    )
    # uvicorn stops gracefully, then raises the signal again: to be told to stop is no failure.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    uvicorn.Server(config).run()
