"""Idempotency-Key: the same key and content get the same answer again, for a day.

Only successes are kept. What was refused has changed nothing, so its key is free again.
"""

import base64
import binascii
import hashlib
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from sqlalchemy import delete, insert, select, update
from sqlalchemy.exc import IntegrityError
from starlette.exceptions import HTTPException

from expunge.errors import StorageError
from expunge.requests.store import RequestStore
from expunge.requests.tables import idempotency
from expunge.service.forms import Form

KEPT = timedelta(days=1)
ABANDONED = timedelta(minutes=5)
"""After this long, a request without an answer counts as one whose process was killed."""

_KEY = re.compile(r"[\x21-\x7e]{1,255}")


@dataclass(frozen=True)
class Answer:
    status: int
    body: bytes


class Answers:
    """The answers of one tenant to one kind of request."""

    def __init__(self, store: RequestStore, kind: str) -> None:
        self._store, self._kind = store, kind

    def claim(self, key: str, form: Form) -> tuple[str, Answer | None]:
        """Returns what names this key from here on, and the answer that it has already.

        Raises HTTPException: 422 if it came with other content or is malformed, 409 while the first is worked on.
        """
        if not _KEY.fullmatch(key):
            raise HTTPException(422, "Idempotency-Key: use 1 to 255 visible ASCII characters")
        vault, now = self._store.vault, datetime.now(UTC)
        name = vault.idempotency("key", self._store.tenant, self._kind, key)
        content = vault.idempotency("content", *_digests(form))
        mine = idempotency.c.key == name
        try:
            with self._store.database.write() as connection:
                connection.execute(delete(idempotency).where(idempotency.c.created < now - KEPT))
                row = connection.execute(select(idempotency).where(mine).with_for_update()).one_or_none()
                if row is None:
                    connection.execute(insert(idempotency), {"key": name, "content": content, "created": now})
                    return name, None
                if row.content != content:
                    raise HTTPException(422, "Idempotency-Key: it was used for another request within a day")
                if row.answer is not None:
                    return name, Answer(row.status, self._open(name, row.answer))
                if row.created > now - ABANDONED:
                    raise _in_progress()
                connection.execute(update(idempotency).where(mine).values(created=now))
                return name, None
        except IntegrityError:  # another process claimed it in between
            raise _in_progress() from None

    def keep(self, name: str, answer: Answer) -> None:
        sealed = base64.b64encode(self._store.vault.answers.close(name, answer.body)).decode()
        with self._store.database.write() as connection:
            values = {"status": answer.status, "answer": sealed}
            connection.execute(update(idempotency).where(idempotency.c.key == name).values(values))

    def release(self, name: str) -> None:
        with self._store.database.write() as connection:
            connection.execute(delete(idempotency).where(idempotency.c.key == name))

    def _open(self, name: str, sealed: str) -> bytes:
        try:
            body = self._store.vault.answers.open(name, base64.b64decode(sealed, validate=True))
        except (binascii.Error, ValueError):
            body = None
        if body is None:
            raise StorageError("a kept answer does not open: it was altered", hint="use another Idempotency-Key")
        return body


def _digests(form: Form) -> list[str]:
    """Describes what was sent, whatever boundary its parts had and in whatever order the kinds of parts came."""
    parts = [f"{name}={value}" for name, value in form.fields]
    for upload in form.uploads:
        parts.append(f"{upload.field} {upload.name} {hashlib.sha256(upload.data).hexdigest()}")
    return parts


def _in_progress() -> HTTPException:
    return HTTPException(409, "the first request with this Idempotency-Key is worked on", {"Retry-After": "1"})
