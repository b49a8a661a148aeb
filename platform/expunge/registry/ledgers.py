"""What a version has had removed, as it was judged, and how two versions differ."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from expunge.registry.artifacts import DamagedVersionError, damaged, is_signed, parsed_ledger, read_ledger, read_sealed
from expunge.registry.seals import EVIDENCE, LEDGER
from expunge.registry.tracking import Tracker
from expunge.registry.versions import all_versions, batch_of
from expunge.types import Evidence, Ledger, ModelVersion

Verdict = Literal["passed", "failed", "skipped", "not_reproduced", "not verified"]


@dataclass(frozen=True)
class Contents:
    """A version with what it removes and the evidence for it."""

    version: ModelVersion
    ledger: Ledger
    evidence: Evidence
    batch: str
    """The batch that trained it."""
    signed: bool
    """False for a version of release 0.1.0, whose ledger cannot be checked."""

    def verdict(self, request: str) -> Verdict:
        """Return how the request was judged on this very version; most earlier removals had no turn."""
        for each in self.evidence.requests:
            if each.request == request:
                return each.verdict
        return "not verified"


@dataclass(frozen=True)
class Removal:
    """One request that a version removes."""

    request: str
    verdict: Verdict
    since: str
    """The first version that removed it. It may have been missing from some in between."""
    verified: int | None
    """The number of the promotion at which it was last verified; None if that is not known."""


def contents(tracker: Tracker, version: ModelVersion, key: bytes) -> Contents:
    """Return what `version` removes, from files that carry our signature. Raises DamagedVersionError."""
    stored = read_sealed(tracker, version, (LEDGER, EVIDENCE), key)
    ledger = parsed_ledger(version, stored[LEDGER])
    try:
        evidence = _evidence(stored[EVIDENCE])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise damaged(version, f"{EVIDENCE} is damaged") from None
    return Contents(version, ledger, evidence, batch_of(tracker, version), is_signed(tracker, version))


def removals(tracker: Tracker, found: Contents) -> list[Removal]:
    """Return the removals of a version in the order of its ledger. Reads every earlier version's ledger."""
    since = _first_versions(tracker, found)
    return [
        Removal(request, found.verdict(request), since[request], found.ledger.verified.get(request))
        for request in found.ledger.requests
    ]


def only_in(these: Iterable[str], others: Iterable[str]) -> tuple[str, ...]:
    """Return those of `these` that are not among `others`, in their order."""
    there = {*others}
    return tuple(one for one in these if one not in there)


def _first_versions(tracker: Tracker, found: Contents) -> dict[str, str]:
    """Return for each request of the ledger the first version that removes it; a damaged ledger says nothing."""
    since: dict[str, str] = {}
    left = {*found.ledger.requests}
    for version in all_versions(tracker, found.version.name):
        number = str(version.version)
        if not left or number == found.version.version:
            break
        try:
            earlier = read_ledger(tracker, ModelVersion(name=version.name, version=number, run_id=version.run_id or ""))
        except DamagedVersionError:
            continue
        since |= {request: number for request in earlier.requests if request in left}
        left -= {*earlier.requests}
    return {**dict.fromkeys(left, found.version.version), **since}


def _evidence(data: bytes) -> Evidence:
    """Read evidence as the registry has it: sentences may quote a request, so they were left out."""
    raw = json.loads(data)
    for request in raw["requests"]:
        request.setdefault("why", "")
        for rule in request.get("rules", ()):
            rule.setdefault("why", "")
    return Evidence.model_validate(raw)
