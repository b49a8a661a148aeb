"""Bearer tokens: who comes, for which tenant, and what they may do.

A token is `expunge_ID_SECRET` and is shown once. The database keeps an HMAC over the secret together with the tenant,
the scopes and the expiry, so that whoever can only write to the database can neither make a token nor widen one.
"""

import json
import re
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, get_args

from sqlalchemy import Row, insert, select, update

from expunge.errors import InputError, NotFoundError
from expunge.requests import keys
from expunge.requests.store import RequestStore
from expunge.requests.tables import tokens
from expunge.section import IDENTIFIER, IDENTIFIER_RULE

Scope = Literal["submit", "review", "admin"]
"""submit: send, list, see and withdraw requests. review: list and see requests, evidence and batches. admin: all that,
and the metrics."""

SCOPES: tuple[Scope, ...] = get_args(Scope)
_FORM = re.compile(r"expunge_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")


@dataclass(frozen=True)
class Caller:
    """Whom a token has let in."""

    token: str
    """The token's id, which is no secret."""
    tenant: str
    scopes: frozenset[str]

    @property
    def actor(self) -> str:
        """The name in the audit log."""
        return f"{self.tenant}/token-{self.token}"

    def may(self, wanted: Collection[Scope]) -> bool:
        return "admin" in self.scopes or not self.scopes.isdisjoint(wanted)


@dataclass(frozen=True)
class Token:
    """A token as it is listed: without its secret, which nobody can read again."""

    id: str
    tenant: str
    scopes: tuple[str, ...]
    created: datetime
    created_by: str
    expires: datetime | None
    revoked: datetime | None


def create(store: RequestStore, tenant: str, scopes: Collection[str], expires: datetime | None) -> str:
    """Makes a token and returns its text. Raises InputError for a tenant that is no identifier and unknown scopes."""
    if not re.fullmatch(IDENTIFIER, tenant):
        raise InputError("tenant: it cannot be a name", hint=IDENTIFIER_RULE)
    if not scopes or not {*SCOPES}.issuperset(scopes):
        raise InputError("scope: unknown, or none given", hint=f"use {', '.join(SCOPES)}")
    at = datetime.now(UTC)
    if expires is not None and expires <= at:
        raise InputError("expires: it is in the past", hint="give a later date, or leave it out")
    id, secret, written = secrets.token_hex(6), secrets.token_urlsafe(32), " ".join(sorted({*scopes}))
    row = {"id": id, "tenant": tenant, "scopes": written, "created": at, "created_by": store.actor, "expires": expires}
    mac = keys.sign(store.vault.tokens, _content(id, secret, tenant, written, expires))
    with store.database.write() as connection:
        connection.execute(insert(tokens), {**row, "mac": mac})
    return f"expunge_{id}_{secret}"


def verify(store: RequestStore, text: str) -> Caller | None:
    """Returns whom the token lets in; None if it is unknown, altered, revoked or past its time."""
    found = _FORM.fullmatch(text)
    if found is None:
        return None
    id, secret = found.groups()
    with store.database.read() as connection:
        row = connection.execute(select(tokens).where(tokens.c.id == id)).one_or_none()
    if row is None or not _is_valid(row):
        return None
    content = _content(id, secret, row.tenant, row.scopes, row.expires)
    if not keys.is_signed(store.vault.tokens, content, row.mac):
        return None
    return Caller(id, row.tenant, frozenset(row.scopes.split()))


def revoke(store: RequestStore, id: str) -> None:
    """Revokes a token for good: what verified it is destroyed. Twice is no error. Raises NotFoundError."""
    with store.database.write() as connection:
        there = connection.execute(select(tokens.c.revoked).where(tokens.c.id == id)).one_or_none()
        if there is None:
            raise NotFoundError(f"token {id!r} does not exist", hint="`expunge tokens list` shows those that do")
        at = there.revoked or datetime.now(UTC)
        connection.execute(update(tokens).where(tokens.c.id == id).values(revoked=at, mac=""))


def listed(store: RequestStore) -> list[Token]:
    """Returns every token, oldest first, those that are revoked included."""
    with store.database.read() as connection:
        rows = connection.execute(select(tokens).order_by(tokens.c.created, tokens.c.id)).all()
    names = ("id", "tenant", "created", "created_by", "expires", "revoked")
    return [Token(scopes=tuple(row.scopes.split()), **{name: getattr(row, name) for name in names}) for row in rows]


def any_valid(store: RequestStore) -> bool:
    """True if at least one token would let somebody in."""
    with store.database.read() as connection:
        return any(map(_is_valid, connection.execute(select(tokens)).all()))


def _is_valid(row: Row) -> bool:
    return row.revoked is None and (row.expires is None or row.expires > datetime.now(UTC))


def _content(id: str, secret: str, tenant: str, scopes: str, expires: datetime | None) -> bytes:
    until = None if expires is None else expires.astimezone(UTC).isoformat()
    return json.dumps([id, secret, tenant, scopes, until]).encode()
