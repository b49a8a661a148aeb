"""The lifecycle of a request: which state may follow which. A trigger in the database enforces the same table."""

from expunge.errors import TransitionError
from expunge.types import RequestState

ALLOWED: dict[RequestState, frozenset[RequestState]] = {
    RequestState.ACCEPTED: frozenset({RequestState.BATCHED, RequestState.WITHDRAWN}),
    RequestState.BATCHED: frozenset(
        {RequestState.REMOVED, RequestState.ACCEPTED, RequestState.FAILED, RequestState.NOT_REPRODUCED}
    ),
    # Accepted again: it resurfaced in a later evaluation.
    RequestState.REMOVED: frozenset({RequestState.ACCEPTED, RequestState.PURGED}),
    RequestState.FAILED: frozenset({RequestState.ACCEPTED, RequestState.WITHDRAWN, RequestState.PURGED}),
    # Another night would find the same, so only a person tries again: with another base model, or other pictures of it.
    RequestState.NOT_REPRODUCED: frozenset({RequestState.ACCEPTED, RequestState.WITHDRAWN, RequestState.PURGED}),
    RequestState.WITHDRAWN: frozenset({RequestState.PURGED}),
    RequestState.PURGED: frozenset(),
}


def check(request: str, here: RequestState, to: RequestState) -> None:
    """Raises TransitionError naming both states and what is allowed."""
    if to in ALLOWED[here]:
        return
    allowed = ", ".join(sorted(ALLOWED[here]))
    hint = (
        f"from {here} it may become {allowed}"
        if allowed
        else f"{here} is final: submit it again with a new external_id"
    )
    raise TransitionError(f"request {request} is {here} and cannot become {to}", hint=hint)


def is_attempt(here: RequestState, to: RequestState) -> bool:
    """True if a night ended without removing the request, although there was something to remove."""
    return here is RequestState.BATCHED and to in (RequestState.ACCEPTED, RequestState.FAILED)
