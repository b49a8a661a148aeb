"""Plan a night: one job per model."""

from collections.abc import Callable, Sequence

from expunge.batch.faults import is_platforms, reason
from expunge.errors import NotFoundError
from expunge.families import deep_preflight, pinned_source, source_digest
from expunge.runs.outcomes import NightPlan
from expunge.settings import Settings
from expunge.types import ModelVersion, RemovalBatch, RemovalRequest, UnlearnJob

LedgerOf = Callable[[str], tuple[ModelVersion | None, Sequence[RemovalRequest]]]
"""Returns a model's champion and the requests that it removes."""


DueOf = Callable[[str, Sequence[str]], tuple[str, ...]]
"""Returns, of the ids in a model's ledger, those whose turn it is to be verified."""


def _all_due(model: str, ledger: Sequence[str]) -> tuple[str, ...]:
    return tuple(ledger)


def plan_night(
    batch: RemovalBatch, settings: Settings, ledger: LedgerOf, due: DueOf = _all_due, *, replay: bool = False
) -> NightPlan:
    """Plan one job per model: it removes tonight's requests and all of the model's ledger.

    replay: tonight's requests are removals of the champion, to be repeated on the base model in `settings`.

    An error with one model refuses only that model's requests. Raises UnavailableError and StorageError, because then
    the whole night has to wait for the platform.
    """
    jobs: list[UnlearnJob] = []
    refused: dict[str, str] = {}
    held: dict[str, str] = {}
    for name in dict.fromkeys(request.model for request in batch.requests):
        requests = tuple(request for request in batch.requests if request.model == name)
        try:
            champion, removed = ledger(name)
        except NotFoundError as error:  # the store is older than the registry, which is not the model's fault
            held |= {request.id: str(error) for request in requests}
            continue
        try:
            jobs.append(_job(name, batch, requests, settings, champion, removed, due, replay))
        except Exception as error:  # a model's files come from others, so anything may be raised
            if is_platforms(error):
                raise
            refused |= {request.id: reason(error) for request in requests}
    return NightPlan(batch=batch.id, jobs=tuple(jobs), refused=refused, held=held)


def _job(
    name: str,
    batch: RemovalBatch,
    requests: tuple[RemovalRequest, ...],
    settings: Settings,
    champion: ModelVersion | None,
    removed: Sequence[RemovalRequest],
    due: DueOf,
    replay: bool,
) -> UnlearnJob:
    model = settings.model(name)
    tonight = {request.id for request in requests}
    # Weights from the hub are fetched by the nodes that use them, not by the driver's.
    resolution = deep_preflight(name, model, settings.model_cache, fetch=False)
    earlier = tuple(request for request in removed if request.id not in tonight)
    return UnlearnJob(
        batch=batch.id,
        model=name,
        source=pinned_source(model),
        base=source_digest(model),
        resolution=resolution,
        requests=requests,
        ledger=earlier,
        verify=due(name, [request.id for request in earlier]),
        warm_start=champion.uri if champion else None,
        training=settings.training_for(name),
        replay=replay,
    )
