"""Every failure as problem+json (RFC 9457): what was wrong and a hint, but no path of this machine.

What an operator has to mend is told to the log, and to the caller only that it failed.
"""

import re
from collections.abc import Mapping
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from expunge.errors import ExpungeError, InputError, NotFoundError, TransitionError
from expunge.logs import get_logger
from expunge.text import masked, visible

MEDIA_TYPE = "application/problem+json"
RETRY_S = "5"
_PATH = re.compile(r"(?<![\w.])(?:[a-z][a-z0-9+.-]*://|~?/)[^\s'\",;:)]+")
_LONGEST = 500


def problem(
    status: int, detail: str = "", *, hint: str | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """Returns the answer of a failure; paths and URLs in its texts are taken out."""
    content: dict[str, object] = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status}
    for name, text in (("detail", detail), ("hint", hint)):
        if text:
            content[name] = presentable(text)
    return JSONResponse(content, status, {**(headers or {}), "Cache-Control": "no-store"}, media_type=MEDIA_TYPE)


def presentable(text: str) -> str:
    """Returns a text that may leave this machine: on one line, without its paths and without passwords."""
    return _PATH.sub("[...]", visible(masked(text)))[:_LONGEST]


def of_error(error: ExpungeError) -> JSONResponse:
    """Returns the answer to an error of the platform."""
    match error:
        case InputError():
            return problem(422, error.message, hint=error.hint)
        case NotFoundError():
            return problem(404, "there is no such thing, or it is not yours")
        case TransitionError():
            return problem(409, error.message, hint=error.hint)
        case _:
            get_logger("service").error("the platform failed", kind=type(error).__name__, why=error.message)
            return problem(503, "the platform cannot do this just now", headers={"Retry-After": RETRY_S})


def install(app: FastAPI) -> None:
    """Makes the app answer every failure with a problem."""

    async def refused(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        detail = "" if error.detail == HTTPStatus(error.status_code).phrase else str(error.detail)
        return problem(error.status_code, detail, headers=error.headers)

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        """Names the parameter and what is wrong with it, never its value."""
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"][1:])
        return problem(422, f"{name}: {first['msg']}" if name else first["msg"])

    async def failed(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ExpungeError)
        return of_error(error)

    async def unforeseen(request: Request, error: Exception) -> JSONResponse:
        """Answers alone: the guard around the app notes it in the log."""
        return problem(500, "this was not foreseen, and is in the log")

    app.add_exception_handler(Exception, unforeseen)
    app.add_exception_handler(HTTPException, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(ExpungeError, failed)
