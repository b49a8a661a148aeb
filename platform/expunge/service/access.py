"""Who may do what: a token is checked before anything of the body is read."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException

from expunge.errors import NotFoundError
from expunge.requests.blobs import BlobStore
from expunge.requests.records import RequestRecord
from expunge.requests.store import RequestStore
from expunge.section import IDENTIFIER
from expunge.service import tokens
from expunge.service.limits import RateLimit
from expunge.service.metrics import Metrics
from expunge.service.tokens import Caller, Scope
from expunge.settings import Settings


@dataclass(frozen=True)
class Platform:
    """What the routes work with, in `app.state.platform`."""

    settings: Settings
    store: RequestStore
    blobs: BlobStore
    rate: RateLimit
    metrics: Metrics


@dataclass(frozen=True)
class Visit:
    """One request of a caller: the platform, with a store that acts in the caller's name."""

    caller: Caller
    platform: Platform
    store: RequestStore

    def own(self, request_id: str) -> RequestRecord:
        """Returns a request of the caller's tenant. Raises NotFoundError, the same for what is another's."""
        if re.fullmatch(IDENTIFIER, request_id):
            record = self.store.get(request_id)
            if record.tenant == self.caller.tenant:
                return record
        raise NotFoundError("no such request")


def visit(*scopes: Scope) -> Callable[..., Visit]:
    """Makes the dependency of a route that one of these scopes opens."""

    def enter(
        request: Request, given: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]
    ) -> Visit:
        platform: Platform = request.app.state.platform
        caller = None if given is None else tokens.verify(platform.store, given.credentials)
        if caller is None:
            raise HTTPException(401, "a valid token is needed", {"WWW-Authenticate": "Bearer"})
        wait = platform.rate.wait(caller.token)
        if wait:
            raise HTTPException(429, "this token comes too often", {"Retry-After": str(wait)})
        if not caller.may(scopes):
            raise HTTPException(403, f"the token lacks the scope {' or '.join(scopes)}")
        return Visit(caller, platform, platform.store.acting(caller.actor, caller.tenant))

    return enter
