"""Ask whether a server answers, and send it a message, with the standard library alone.

For a server on this host, proxies are bypassed.
"""

import ipaddress
import threading
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Mapping
from http.client import HTTPException
from queue import Empty, SimpleQueue
from urllib.parse import unquote, urlsplit


def status_of(url: str, *, timeout: float, token: str = "") -> int:
    """Return the HTTP status of a GET, with the user and password in the URL or a bearer `token`.

    Raises OSError if nothing answers. Its message quotes no part of the URL or of the answer.
    """
    parts = urlsplit(url)
    who, _, server = parts.netloc.rpartition("@")
    request = urllib.request.Request(parts._replace(netloc=server).geturl())
    if who:
        user, _, password = who.partition(":")
        token = b64encode(f"{unquote(user)}:{unquote(password)}".encode()).decode()
    if token:  # not sent on to another host after a redirect
        request.add_unredirected_header("Authorization", f"{'Basic' if who else 'Bearer'} {token}")
    return _status(request, timeout)


def post(url: str, body: bytes, headers: Mapping[str, str], *, timeout: float) -> int:
    """POST `body` and return the HTTP status, within `timeout` seconds in all; a redirect is not followed.

    Raises OSError if there is no answer by then. Its message quotes no part of the URL or of the answer.
    """
    request = urllib.request.Request(url, body, dict(headers), method="POST")
    answered: SimpleQueue[int | OSError] = SimpleQueue()

    def send() -> None:
        try:
            answered.put(_status(request, timeout, _NoRedirect()))
        except OSError as error:
            answered.put(error)

    # The library's own timeout is one per read: a server that sends a byte now and then would hold this up forever.
    threading.Thread(target=send, daemon=True).start()
    try:
        found = answered.get(timeout=timeout)
    except Empty:
        raise OSError("timed out") from None
    if isinstance(found, OSError):
        raise found
    return found


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Takes a redirect for an answer: a message is meant for the server that was named, and for no other."""

    def redirect_request(self, *arguments: object) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None


def _status(request: urllib.request.Request, timeout: float, *handlers: urllib.request.BaseHandler) -> int:
    """Send a request and return the status of the answer. Raises OSError as `status_of` does."""
    local = is_loopback(urlsplit(request.full_url).hostname or "")
    spared = [urllib.request.ProxyHandler({})] if local else []
    try:
        with urllib.request.build_opener(*spared, *handlers).open(request, timeout=timeout) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except urllib.error.URLError as error:
        raise OSError(error.reason if isinstance(error.reason, str) else _said(error.reason)) from None
    except OSError as error:
        raise OSError(_said(error)) from None
    except (HTTPException, ValueError) as error:
        raise OSError(f"no HTTP: {type(error).__name__}") from None


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _said(error: BaseException) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
