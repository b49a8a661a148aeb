"""A file of requests for one night: for teams that keep their requests elsewhere and have no queue here.

Taking the same file in again adds nothing: a request is known by its external id, or else by its content.
"""

from dataclasses import dataclass
from pathlib import Path

from expunge.errors import InputError
from expunge.requests.blobs import BlobStore
from expunge.requests.intake import Check
from expunge.requests.lines import LineResult, accept_jsonl
from expunge.requests.locations import is_url, scheme_of
from expunge.requests.store import RequestStore
from expunge.settings import Settings

AZURE = frozenset({"abfs", "abfss", "az", "adl"})


@dataclass(frozen=True)
class BatchFile:
    """What a file has brought: the ids of its requests in the order of its lines, and the lines that were refused."""

    name: str
    ids: tuple[str, ...]
    accepted: int
    refused: tuple[LineResult, ...]

    def summary(self) -> str:
        known = len(self.ids) - self.accepted
        return f"{self.name}: {self.accepted} accepted, {known} known already, {len(self.refused)} refused"

    def check(self) -> None:
        """Raises InputError if a line was refused, for the end of a night that has run the others."""
        if self.refused:
            lines = "1 line was" if len(self.refused) == 1 else f"{len(self.refused)} lines were"
            raise InputError(
                f"requests: {lines} refused",
                hint="correct them and run the file again; what it has brought already is not repeated",
            )


def take_in(
    name: str,
    *,
    settings: Settings,
    store: RequestStore,
    blobs: BlobStore,
    check: Check | None = None,
    private: bool = False,
) -> BatchFile:
    """Accepts each line of the file or URL `name`; a bad line is left out and reported.

    With `private`, the report names no picture's file: a driver's log is open to others.

    Raises InputError where the file cannot be read, or its name holds what others must not see; StorageError and
    UnavailableError of the stores.
    """
    check_name(name)
    file = name if is_url(name) else Path(name)
    lines = accept_jsonl(file, settings=settings, store=store, blobs=blobs, check=check, private=private)
    results = list(lines)
    return BatchFile(
        name=name,
        ids=tuple(dict.fromkeys(result.id for result in results if result.id is not None)),
        accepted=sum(result.new for result in results),
        refused=tuple(result for result in results if result.id is None),
    )


def check_name(name: str) -> None:
    """Raises InputError for a URL with credentials, or with a query, which may be a signature.

    Ray shows a job's arguments to everybody who can see the job, and a machine shows those of its processes.
    """
    if not is_url(name):
        return
    scheme, rest = scheme_of(name, field="requests"), name.partition("://")[2]
    server = rest.partition("/")[0]
    # On Azure an @ stands between the container and the account.
    credentials = "@" in server and (":" in server or scheme not in AZURE)
    if scheme != "file" and (credentials or "?" in rest or "#" in rest):
        raise InputError(
            "requests: the URL contains credentials or a query, and Ray shows a job's arguments to others",
            hint="give the plain URL, and set credentials in the environment, such as AWS_ACCESS_KEY_ID",
        )
