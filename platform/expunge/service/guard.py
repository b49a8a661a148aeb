"""What stands around the app: one line in the log per request, a count, and an answer even to what nobody foresaw.

The log names the route, never the path, which may hold ids; no query, no header, no client.
"""

import time

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from expunge.logs import get_logger
from expunge.service.metrics import Metrics
from expunge.service.problems import RETRY_S, problem
from expunge.service.settings import ServiceSettings

PROBES = frozenset({"/healthz", "/readyz"})
_HEADERS = ((b"cache-control", b"no-store"), (b"x-content-type-options", b"nosniff"))


class Guard:
    """Wraps the whole app."""

    def __init__(self, app: ASGIApp, settings: ServiceSettings, metrics: Metrics) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, unread = time.monotonic(), 0, scope["method"] not in ("GET", "HEAD")

        async def read() -> Message:
            nonlocal unread
            message = await receive()
            unread = unread and message.get("more_body", False)
            return message

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                kept = [(name, value) for name, value in message["headers"] if name.lower() != b"cache-control"]
                # Otherwise the server would read the rest of a refused body, only to drop it.
                hang_up = [(b"connection", b"close")] if unread and status >= 400 else []
                message = {**message, "headers": [*kept, *_HEADERS, *hang_up]}
            await send(message)

        self._running += 1
        try:
            refusal = self._refusal(scope)
            await (refusal or self._app)(scope, read, answer)
        except Exception as error:  # the last line of defence; its text may quote what was sent
            at = error.__traceback__
            while at is not None and at.tb_next is not None:
                at = at.tb_next
            place = "" if at is None else f"{at.tb_frame.f_globals.get('__name__')}:{at.tb_lineno}"
            get_logger("service").error("unexpected failure", kind=type(error).__name__, place=place)
            if not status:
                await problem(500, "this was not foreseen, and is in the log")(scope, receive, answer)
        finally:
            self._running -= 1
            self._note(scope, status, time.monotonic() - began)

    def _refusal(self, scope: Scope) -> ASGIApp | None:
        """Refuses what is known to be too much before any of it is read."""
        length = Request(scope).headers.get("content-length", "")
        if length.isascii() and length.isdigit() and int(length[:20]) > self._settings.max_body:
            return problem(413, f"a body may have {self._settings.max_body:,} bytes")
        if self._running > self._settings.concurrent and scope["path"] not in PROBES:
            return problem(503, "too many requests at a time", headers={"Retry-After": RETRY_S})
        return None

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        route = scope.get("route")
        path = str(route.path) if route is not None else "none"
        known = scope["method"] in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
        method = scope["method"] if known else "other"
        self._metrics.answered(method, path, status, seconds)
        if path not in PROBES:
            get_logger("service").info("answered", method=method, route=path, status=status, ms=round(seconds * 1000))
