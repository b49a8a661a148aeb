"""How much one night can take: the part of the queue that fits into its hours.

Requests are considered in the order of the queue. One that does not fit closes the night for its model, so that nothing
overtakes it; other models go on. The hours are those of the cost model, an upper estimate.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import cache

from expunge.batch.cost import Hardware, Load, night_calls
from expunge.errors import ExpungeError, InputError
from expunge.families.flops import Flops, count_flops
from expunge.requests.store import RequestStore
from expunge.settings import Settings
from expunge.types import RemovalRequest, RequestState


@dataclass
class Capacity:
    """The hours of one night. `choose` may be used for several batches; each has all of the hours."""

    budget: float
    """Hours."""
    hours: Callable[[str, Load], float]
    """Gives the hours that a job of a model takes with so many new requests."""
    load: Callable[[RemovalRequest], Load]
    models: frozenset[str]
    """Those that requests wait for."""
    too_long: dict[str, float] = field(default_factory=dict)
    """Models for which not even one request fits, with the hours that it takes."""

    def choose(self, waiting: Iterator[RemovalRequest]) -> Iterator[RemovalRequest]:
        """Yield the requests that fit; what comes after the last of them is not read."""
        taken: dict[str, tuple[Load, float]] = {}
        closed: set[str] = set()
        for request in waiting:
            if request.model in closed:
                continue
            load, own = taken.get(request.model, (Load(), 0.0))
            more = load + self.load(request)
            hours = self.hours(request.model, more)
            others = sum(each for _, each in taken.values()) - own
            if others + hours <= self.budget:
                taken[request.model] = more, hours
                yield request
                continue
            closed.add(request.model)
            if not load.requests and hours > self.budget:
                self.too_long[request.model] = hours
            if closed >= self.models:
                return


def job_hours(store: RequestStore, settings: Settings, gpus: int, cores: int) -> Callable[[str, Load], float]:
    """Return a function that gives the hours of a job: its model, and the load of its new requests.

    Earlier removals are taken as one picture each, and as a sign that what depends on the base model alone is known. A
    model that cannot be counted takes no time: planning refuses its requests, and says why.
    """
    removed = {model: found.requests for (model, _), found in store.backlog([RequestState.REMOVED]).items()}

    @cache
    def flops_of(model: str) -> Flops | None:
        try:
            return count_flops(model, {model: settings.model(model)})
        except ExpungeError:
            return None

    def hours(model: str, new: Load) -> float:
        flops = flops_of(model)
        if flops is None:
            return 0.0
        options, training = settings.model(model), settings.training_for(model)
        ledger = Load.typical(removed.get(model, 0), options, settings.evaluation)
        calls = night_calls(new, ledger, options, training, settings.evaluation, cached=ledger.requests > 0)
        hardware = Hardware.of(gpus, cores, settings.night, training.precision)
        return hardware.hours(sum(each.operations(flops) for each in calls.values()))

    return hours


def capacity_of(store: RequestStore, settings: Settings, hours: float, *, gpus: int, cores: int) -> Capacity:
    """Return what a night of `hours` takes on these GPUs, or on these cores. Raises InputError if neither is known."""
    gpus = settings.night.gpus or gpus
    if not gpus and not cores:
        raise InputError("night.hours: it cannot be told what Ray has", hint="set night.gpus to the number of its GPUs")

    def load(request: RemovalRequest) -> Load:
        options = settings.models.get(request.model)
        return Load(1) if options is None else Load.of([request], options, settings.evaluation)

    models = frozenset(model for model, _ in store.backlog([RequestState.ACCEPTED]))
    return Capacity(hours, job_hours(store, settings, gpus, cores), load, models)


def hours_on_cpus(store: RequestStore, settings: Settings, cores: int, models: Collection[str] | None) -> float:
    """Return the hours that the queue's first night takes on `cores` CPU cores, without any GPU."""
    hours = job_hours(store, settings, 0, cores)
    total, room = 0.0, settings.night_limit
    for (model, _), found in store.backlog([RequestState.ACCEPTED]).items():
        if model not in settings.models or (models is not None and model not in models):
            continue
        count = min(room, found.requests)
        total += hours(model, Load.typical(count, settings.model(model), settings.evaluation)) if count else 0
        room -= count
    return total
