"""Ask whether a server answers, with the standard library alone; for a server on this host, proxies are bypassed."""

import ipaddress
import urllib.error
import urllib.request
from base64 import b64encode
from http.client import HTTPException
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
    spared = [urllib.request.ProxyHandler({})] if is_loopback(parts.hostname or "") else []
    try:
        with urllib.request.build_opener(*spared).open(request, timeout=timeout) as answer:
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
