"""From a night's requests to one job a model."""

from collections.abc import Callable, Sequence

from expunge.errors import ExpungeError, UnavailableError
from expunge.families import native_resolution
from expunge.settings import Settings
from expunge.words import ModelVersion, RemovalBatch, RemovalRequest, UnlearnJob, Word


class Plan(Word):
    """Written down before anything runs: a resumed night must not see the registry it has itself changed."""

    batch: str
    jobs: tuple[UnlearnJob, ...]
    refused: dict[str, str]
    """Request id: why no job can take it."""


LedgerOf = Callable[[str], tuple[ModelVersion | None, Sequence[RemovalRequest]]]
"""A model's champion, and the requests that it has had removed."""


def plan(batch: RemovalBatch, settings: Settings, ledger: LedgerOf) -> Plan:
    """One job a model: it removes tonight's requests and all of the model's ledger."""
    jobs: list[UnlearnJob] = []
    refused: dict[str, str] = {}
    for name in dict.fromkeys(request.model for request in batch.requests):
        requests = tuple(request for request in batch.requests if request.model == name)
        try:
            model = settings.model(name)
            resolution = model.resolution or native_resolution(model)
            champion, removed = ledger(name)
        except UnavailableError:  # of no model's making: the whole night waits for the registry
            raise
        except ExpungeError as error:
            refused |= {request.id: str(error) for request in requests}
            continue
        tonight = {request.id for request in requests}
        jobs.append(
            UnlearnJob(
                batch=batch.id,
                model=name,
                source=model.source,
                resolution=resolution,
                requests=requests,
                ledger=tuple(request for request in removed if request.id not in tonight),
                warm_start=champion.uri if champion else None,
                training=settings.training_for(name),
            )
        )
    return Plan(batch=batch.id, jobs=tuple(jobs), refused=refused)
