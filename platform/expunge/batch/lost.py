"""Find lost removals: `removed` in the store but held by no champion, as after a version or a registry was lost."""

from collections.abc import Sequence

from expunge.registry.artifacts import ledger
from expunge.registry.tracking import Tracker
from expunge.requests.store import RequestStore
from expunge.types import RequestState

WHY = "no champion holds its removal any more"


def lost_removals(store: RequestStore, tracker: Tracker, models: Sequence[str] | None = None) -> dict[str, list[str]]:
    """Return, per model, the ids of removed requests that its champion does not hold; `models` limits the search.

    Raises UnavailableError if the registry does not answer, because then nothing is known to be lost.
    """
    lost: dict[str, list[str]] = {}
    for model, removed in store.ids(RequestState.REMOVED, models).items():
        held = set(ledger(tracker, model).requests)
        missing = [request for request in removed if request not in held]
        if missing:
            lost[model] = missing
    return lost
