"""The app: its routes, each a few lines over what the command line calls as well."""

from collections.abc import Callable
from datetime import date
from typing import Annotated

from fastapi import Depends, FastAPI, Header, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel
from starlette.types import ASGIApp

from expunge.batch.purging import drop_pictures
from expunge.errors import InputError, NotFoundError
from expunge.requests.audit import release
from expunge.requests.blobs import BlobStore
from expunge.requests.store import RequestStore
from expunge.service import intake, schemas
from expunge.service.access import Platform, Visit, visit
from expunge.service.batches import batch_of
from expunge.service.bodies import BATCH, SUBMISSION
from expunge.service.forms import Form, read_form
from expunge.service.guard import Guard
from expunge.service.idempotency import Answer, Answers
from expunge.service.limits import RateLimit
from expunge.service.metrics import Metrics
from expunge.service.problems import MEDIA_TYPE, install
from expunge.settings import Settings
from expunge.types import RequestState

LARGEST_PAGE = 200
Submitter = Annotated[Visit, Depends(visit("submit"))]
Reader = Annotated[Visit, Depends(visit("submit", "review"))]
Reviewer = Annotated[Visit, Depends(visit("review"))]
Operator = Annotated[Visit, Depends(visit("admin"))]
Key = Annotated[str | None, Header(alias="Idempotency-Key", description="The same key gets the same answer for a day.")]
PROBLEM = {
    "content": {MEDIA_TYPE: {"schema": schemas.Problem.model_json_schema()}},
    "description": "A problem, as RFC 9457 has it",
}
KNOWN = {"model": schemas.Accepted, "description": "It was known already"}


def create_app(settings: Settings, store: RequestStore, blobs: BlobStore, *, docs: bool = False) -> FastAPI:
    """Makes the routes over opened stores. docs: also serves the OpenAPI document and its pages."""
    app = FastAPI(
        title="Expunge",
        version=release(),
        openapi_url="/openapi.json" if docs else None,
        telemetry={"tracing": False, "metrics": False, "logs": False},  # it would export paths, and so ids
        max_body_size=settings.service.max_body,
        responses={"4XX": PROBLEM, "5XX": PROBLEM},
    )
    rate = RateLimit(settings.service.rate, settings.service.burst)
    app.state.platform = Platform(settings, store, blobs, rate, Metrics(store))
    install(app)
    _removals(app)
    _operations(app)
    return app


def create_service(settings: Settings, store: RequestStore, blobs: BlobStore, *, docs: bool = False) -> ASGIApp:
    """Makes the app with its guard, which has to stand outside of FastAPI's own limit on bodies."""
    app = create_app(settings, store, blobs, docs=docs)
    platform: Platform = app.state.platform
    return Guard(app, settings.service, platform.metrics)


def _removals(app: FastAPI) -> None:
    @app.post(
        "/v1/removals",
        status_code=201,
        response_model=schemas.Accepted,
        responses={200: KNOWN},
        openapi_extra=SUBMISSION,
    )
    async def submit(request: Request, visit: Submitter, key: Key = None) -> Response:
        """Submit one request: 201 if it is new, 200 if it was known."""

        def accept(form: Form) -> tuple[BaseModel, int]:
            accepted, new = intake.accept_one(form, visit.platform.settings, visit.store, visit.platform.blobs)
            return accepted, 201 if new else 200

        return await _once(request, visit, "removals", key, accept)

    @app.post("/v1/removals/batch", response_model=schemas.AcceptedLines, openapi_extra=BATCH)
    async def submit_batch(request: Request, visit: Submitter, key: Key = None) -> Response:
        """Submit many requests, one per line; each line is accepted or refused on its own."""

        def accept(form: Form) -> tuple[BaseModel, int]:
            return intake.accept_many(form, visit.platform.settings, visit.store, visit.platform.blobs), 200

        return await _once(request, visit, "batch", key, accept)

    @app.get("/v1/removals")
    def list_removals(
        visit: Reader,
        limit: Annotated[int, Query(ge=1, le=LARGEST_PAGE)] = 50,
        cursor: Annotated[str | None, Query(pattern=r"^[A-Za-z0-9._-]{1,63}$", description="`next` of a page")] = None,
        state: RequestState | None = None,
        model: Annotated[str | None, Query(max_length=63)] = None,
        due_by: Annotated[date | None, Query(description="Due on this day or earlier.")] = None,
        by_due: Annotated[bool, Query(description="What is due soonest comes first.")] = False,
    ) -> schemas.Page:
        """List the tenant's requests, oldest first."""
        wanted = {"by_due": by_due, "tenant": visit.caller.tenant, "due_by": due_by, "history": False}
        try:
            found = visit.store.list(model, state, None, limit + 1, cursor, **wanted)
        except NotFoundError:
            raise InputError("cursor: it does not belong to this list", hint="begin without one") from None
        after = found[limit - 1].request.id if len(found) > limit else None
        return schemas.Page(items=[schemas.Summary.of(record) for record in found[:limit]], next=after)

    @app.get("/v1/removals/{id}")
    def show(id: str, visit: Reader) -> schemas.Removal:
        """Show one request with its evidence and history."""
        return schemas.Removal.of(visit.own(id))

    @app.post("/v1/removals/{id}/withdraw")
    def withdraw(id: str, visit: Submitter) -> schemas.Moved:
        """Withdraw a request that is not in a batch, and delete its pictures. Twice is no error."""
        visit.own(id)
        record = visit.store.transition(id, RequestState.WITHDRAWN, reason="withdrawn")
        drop_pictures(visit.store, visit.platform.blobs, record)
        return schemas.Moved(id=id, state=record.state)

    @app.get("/v1/batches/{id}")
    def batch(id: str, visit: Reviewer) -> schemas.Batch:
        """Show a night: which of the tenant's requests it took, and its verdicts about them."""
        return batch_of(id, visit)


def _operations(app: FastAPI) -> None:
    @app.get("/healthz")
    async def health() -> schemas.Health:
        """Say that the process answers."""
        return schemas.Health(status="ok")

    @app.get("/readyz")
    def ready(request: Request) -> schemas.Health:
        """Say that the stores answer, too; 503 if one does not."""
        platform: Platform = request.app.state.platform
        platform.store.check_key()
        platform.blobs.has("0" * 64)
        return schemas.Health(status="ready")

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    def metrics(visit: Operator) -> Response:
        """Return Prometheus's text format; needs the scope admin."""
        return Response(visit.platform.metrics.text(), media_type="text/plain; version=0.0.4")


async def _once(
    request: Request, visit: Visit, kind: str, key: str | None, accept: Callable[[Form], tuple[BaseModel, int]]
) -> Response:
    """Reads the form, and accepts it unless its Idempotency-Key has an answer already."""
    form = await read_form(request, visit.platform.settings.service)

    def answer() -> Answer:
        if key is None:
            made, status = accept(form)
            return Answer(status, made.model_dump_json().encode())
        answers = Answers(visit.store, kind)
        name, known = answers.claim(key, form)
        if known is not None:
            return known
        try:
            made, status = accept(form)
            fresh = Answer(status, made.model_dump_json().encode())
            answers.keep(name, fresh)
        except BaseException:
            answers.release(name)
            raise
        return fresh

    done = await run_in_threadpool(answer)
    return Response(done.body, done.status, media_type="application/json")
