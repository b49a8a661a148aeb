"""Tell a webhook which version of a model is the champion: signed, in order, at least once, from the outbox.

A message that cannot be delivered stays in the outbox, and holds back those behind it; a later night, or
`expunge webhooks deliver`, tries again.
"""

import json
import time
from contextlib import suppress

from expunge.batch.settings import WebhookSettings
from expunge.errors import ExpungeError, InputError
from expunge.logs import get_logger
from expunge.registry.tracking import Tracker
from expunge.registry.versions import champion
from expunge.requests import keys
from expunge.requests.leases import HeldError, lease
from expunge.requests.outbox import Message
from expunge.requests.store import RequestStore
from expunge.runs.locks import promotion_lock
from expunge.settings import Settings
from expunge.web import post

LOCK = "webhooks"
TIMEOUT_S = 10.0
PAUSES_S = (0.0, 1.0, 3.0, 9.0)
"""Seconds to wait before each attempt of one delivery."""


def settle_unconfirmed(store: RequestStore, tracker: Tracker, model: str) -> None:
    """Decide what became of announced changes of this model's champion that were killed; under its promotion lock."""
    for message in store.unconfirmed(model):
        now = champion(tracker, model)
        if now is not None and now.version == message.version:
            store.confirm(message.number)
        else:
            store.forget(message.number)


def deliver(settings: Settings, store: RequestStore, tracker: Tracker) -> tuple[int, list[Message]]:
    """Send what waits, the oldest first, until one message fails; return how many arrived, and those that still wait.

    Takes at most len(PAUSES_S) * TIMEOUT_S and the pauses for a message that fails. Raises InputError if no webhook is
    set or its secret cannot be read, and UnavailableError if the registry does not answer.
    """
    hook = settings.webhooks
    if not hook.url:
        raise InputError("webhooks.url: no webhook is set", hint="set it and webhooks.secret_file")
    secret = secret_of(hook)
    with lease(store, LOCK, wait=True):
        for model in {message.model for message in store.unconfirmed()}:
            with suppress(HeldError), lease(store, promotion_lock(model)):  # held: a promotion is in progress
                settle_unconfirmed(store, tracker, model)
        sent = 0
        for message in store.outgoing():
            error = _send(hook.url, secret, message)
            store.record_attempt(message.number, error)
            if error:
                get_logger("batch").warning("a webhook was not delivered", message=message.number, why=error)
                break
            sent += 1
        return sent, store.outgoing()


def deliver_what_waits(settings: Settings, store: RequestStore, tracker: Tracker) -> None:
    """Deliver at the end of a night or a promotion, if a webhook is set; a failure is logged, and costs neither."""
    if not settings.webhooks.url:
        return
    try:
        deliver(settings, store, tracker)
    except ExpungeError as error:
        get_logger("batch").warning("webhooks were not delivered", why=str(error))


def secret_of(hook: WebhookSettings) -> bytes:
    """Return the secret that messages are signed with. Raises InputError if its file cannot be read or is too short."""
    if hook.secret_file is None:
        return hook.secret.encode()
    try:
        secret = hook.secret_file.expanduser().read_bytes().strip()
    except (OSError, RuntimeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise InputError(
            f"webhooks.secret_file: {hook.secret_file} cannot be read ({why})", hint="correct it"
        ) from None
    if len(secret) < WebhookSettings.SHORTEST:
        raise InputError(
            f"webhooks.secret_file: the secret has fewer than {WebhookSettings.SHORTEST} characters",
            hint="make one with `openssl rand -base64 32`",
        )
    return secret


def signature(secret: bytes, body: bytes, at: int) -> str:
    """Sign a body together with the time of this attempt, in seconds since 1970, so that a copy grows old."""
    return f"t={at},v1={keys.sign(secret, f'{at}.'.encode() + body)}"


def _send(url: str, secret: bytes, message: Message) -> str:
    """Send one message, several times if need be; return why it did not arrive, or nothing."""
    error, body = "", message.body.encode()
    for pause in PAUSES_S:
        time.sleep(pause)
        headers = {
            "Content-Type": "application/json",
            "Expunge-Delivery": json.loads(message.body)["id"],
            "Expunge-Signature": signature(secret, body, int(time.time())),
        }
        try:
            status = post(url, body, headers, timeout=TIMEOUT_S)
        except OSError as failed:
            error = str(failed)
            continue
        if 200 <= status < 300:
            return ""
        error = f"HTTP {status}"
    return error
