"""Checks the services that a night uses: MLflow, with the removals that its champions hold, and Ray's job server."""

import os
from contextlib import closing
from http import HTTPStatus
from pathlib import Path
from urllib.parse import unquote

from expunge.doctor.check import NOT_YET, some
from expunge.doctor.storage import try_to_write
from expunge.errors import ExpungeError, InputError, UnavailableError
from expunge.settings import Settings
from expunge.text import masked_quote
from expunge.web import status_of

_TIMEOUT = 3.0


def tracking(settings: Settings) -> str:
    uri = settings.tracking
    if uri.startswith(("http://", "https://")):
        token = os.environ.get("MLFLOW_TRACKING_TOKEN", "")
        return _answers(f"{uri.rstrip('/')}/health", "EXPUNGE_TRACKING_URI", "MLFLOW_TRACKING_TOKEN", token)
    if uri.startswith("sqlite:///"):
        folder = file_of(uri).parent
        try_to_write(folder)
        return f"SQLite in {folder}{'' if folder.exists() else f'; {NOT_YET}'}"
    raise InputError(
        "the tracking server is neither http(s) nor SQLite", hint="set EXPUNGE_TRACKING_URI to http://HOST:PORT"
    )


def removals(settings: Settings) -> str:
    """Compares what the store calls removed with what the champions hold: a lost version loses its removals."""
    from expunge.requests.store import open_store
    from expunge.types import RequestState

    if not settings.home.exists():
        return NOT_YET
    with closing(open_store(settings)) as store:
        removed = store.ids(RequestState.REMOVED)
        if not removed:
            return "nothing has been removed yet"
        from expunge.batch.lost import lost_removals  # imports MLflow: seconds
        from expunge.registry.tracking import Tracker

        lost = lost_removals(store, Tracker(settings.tracking))
    if lost:
        what = "; ".join(f"{model}: {some(requests)}" for model, requests in lost.items())
        raise ExpungeError(
            f"{sum(map(len, lost.values()))} removed requests that no champion holds ({what})",
            hint="run `expunge night`: they are removed again; or restore the registry",
        )
    return f"{sum(map(len, removed.values())):,}, all held by their champions"


def ray(settings: Settings) -> str:
    from expunge.batch.submit import DEFAULT_ADDRESS, address_of

    if not settings.ray_address and not os.environ.get("RAY_API_SERVER_ADDRESS"):
        return f"not configured: `expunge night` tries {DEFAULT_ADDRESS}"
    url = f"{address_of(settings)}/api/version"
    return _answers(url, "EXPUNGE_RAY_ADDRESS", "RAY_AUTH_TOKEN", os.environ.get("RAY_AUTH_TOKEN", ""))


def _answers(url: str, setting: str, variable: str, token: str) -> str:
    try:
        status = status_of(url, timeout=_TIMEOUT, token=token)
    except OSError as error:
        message = f"the server does not answer ({masked_quote(str(error))})"
        raise UnavailableError(message, hint=f"check {setting} and that the server runs") from None
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        if token:
            raise UnavailableError(
                f"the server answers, but refuses the token in {variable} ({status})",
                hint=f"set {variable} to the token that the server was started with",
            )
        raise UnavailableError(
            f"the server answers, but wants a token ({status}), and {variable} is not set", hint=f"set {variable}"
        )
    if status >= HTTPStatus.BAD_REQUEST:
        raise UnavailableError(f"the server answers with {status}", hint=f"check {setting}: is it the right server?")
    return f"answers with {status}"


def file_of(url: str) -> Path:
    """The file of a SQLite URL."""
    return Path(unquote(url.removeprefix("sqlite:///").partition("?")[0]))
