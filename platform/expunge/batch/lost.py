"""Removals that are gone: `removed` in the store and held by no champion, as after a version or a registry was lost."""

from collections.abc import Sequence

from expunge.registry.tracking import Tracker
from expunge.registry.versions import ledger
from expunge.requests.store import RequestStore
from expunge.words import RequestState

WHY = "no champion holds its removal any more"


def lost_removals(store: RequestStore, tracker: Tracker, models: Sequence[str] | None = None) -> dict[str, list[str]]:
    """By model, the ids of removed requests that its champion does not hold; of all models unless some are named.

    Raises UnavailableError where the registry does not answer: nothing is known to be lost then.
    """
    lost: dict[str, list[str]] = {}
    for model, removed in store.ids(RequestState.REMOVED, models).items():
        held = set(ledger(tracker, model).requests)
        missing = [request for request in removed if request not in held]
        if missing:
            lost[model] = missing
    return lost
