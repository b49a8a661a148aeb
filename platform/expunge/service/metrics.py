"""What Prometheus reads: counts and durations by route, and the queue. No label names a tenant or a request."""

from collections.abc import Iterable
from datetime import UTC, datetime

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from expunge.requests.store import RequestStore
from expunge.types import RequestState

WAITING = (RequestState.ACCEPTED, RequestState.BATCHED, RequestState.FAILED)


class Metrics:
    """The metrics of one app, in a registry of its own."""

    def __init__(self, store: RequestStore) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Queue(store))
        labels = ("method", "route", "status")
        self._requests = Counter("expunge_http_requests", "HTTP requests answered", labels, registry=self._registry)
        self._seconds = Histogram(
            "expunge_http_seconds", "Seconds until an HTTP request was answered", ("route",), registry=self._registry
        )

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        """Returns them in Prometheus's text format. Raises UnavailableError, StorageError."""
        return generate_latest(self._registry)


class _Queue(Collector):
    """Asks the database at each scrape, so that every process says the same."""

    def __init__(self, store: RequestStore) -> None:
        self._store = store

    def describe(self) -> Iterable[GaugeMetricFamily]:
        return ()  # without this, the registry would ask the database when it is made

    def collect(self) -> Iterable[GaugeMetricFamily]:
        depth = GaugeMetricFamily("expunge_requests", "Requests not decided yet", labels=("model", "state"))
        oldest = GaugeMetricFamily("expunge_oldest_seconds", "Age of the oldest of them", labels=("model", "state"))
        now = datetime.now(UTC)
        for (model, state), waiting in sorted(self._store.backlog(WAITING).items()):
            depth.add_metric((model, state.value), waiting.requests)
            oldest.add_metric((model, state.value), (now - waiting.oldest).total_seconds())
        return depth, oldest
