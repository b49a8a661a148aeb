"""Where the pictures of a request lie: a path, or a URL that fsspec can read. No more is read than is allowed."""

import re
from pathlib import Path
from typing import Annotated, BinaryIO, cast

from fsspec import AbstractFileSystem, get_filesystem_class
from fsspec.implementations.arrow import ArrowFSWrapper
from pydantic import PlainValidator

from expunge.errors import InputError
from expunge.requests.imaging import read_file
from expunge.sources import OBJECT_STORES

Location = Path | str
"""A path, or the text of a URL: as a path it would lose one of its slashes."""

SCHEMES = frozenset({"file", "http", "https"}) | OBJECT_STORES
"""What can be read. fsspec knows more, but those are layers over another file system, or need a login."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_CHUNK = 1 << 20
SILENCE_S = 60.0
"""How long a web server may say nothing. It is asked twice: first for the size alone."""


def is_url(text: str) -> bool:
    return _URL.match(text) is not None


def located(value: object) -> Location:
    """Return what a person wrote as the location that it names. Raises ValueError if it is not text."""
    if isinstance(value, Path):
        return value
    if not isinstance(value, str):
        raise ValueError('give the path of a file in quotes: "a.png"')
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("it is not text: a character in it is half of a pair") from None
    return value if is_url(value) else Path(value)


Picture = Annotated[Location, PlainValidator(located)]
"""The field of a request that names a picture."""


def beside(base: Location, name: Location) -> Location:
    """Return the location that `name` means in the folder `base`; one that is absolute means itself."""
    if isinstance(name, str) or name.is_absolute():
        return name
    return base / name if isinstance(base, Path) else f"{base}/{name.as_posix()}"


def folder_of(file: Location) -> Location:
    return file.parent if isinstance(file, Path) else file.rpartition("/")[0]


def spellings(location: Location) -> tuple[str, ...]:
    """Return every form in which an error quotes the location."""
    text = str(location)
    scheme, _, path = text.partition("://")
    plain = str(Path(path)) if scheme.lower() == "file" and path else text
    return text, plain, repr(plain)


def scheme_of(url: str, *, field: str) -> str:
    """Return the URL's scheme in lower case. Raises InputError if nothing is read by it."""
    scheme = url.partition("://")[0]
    if scheme.lower() not in SCHEMES:
        known = ", ".join(sorted(SCHEMES))
        raise InputError(f"{field}: {scheme}:// cannot be read", hint=f"give a path, or a URL of {known}")
    return scheme.lower()


def read_location(location: Location, *, field: str, max_bytes: int) -> bytes:
    """Return the content of a file of at most `max_bytes`. Raises InputError naming field, location and hint."""
    if isinstance(location, Path):
        return read_file(location, field=field, max_bytes=max_bytes)
    scheme, _, rest = location.partition("://")
    if scheme.lower() == "file":
        return read_file(Path(rest), field=field, max_bytes=max_bytes)
    data = _read_url(location, scheme_of(location, field=field), field, max_bytes)
    if len(data) > max_bytes:
        hint = "send a smaller copy or raise EXPUNGE_MAX_BYTES"
        raise InputError(f"{field}: {location} is over the limit of {max_bytes:,} bytes", hint=hint)
    return data


def _read_url(url: str, scheme: str, field: str, max_bytes: int) -> bytes:
    """Return at most one byte more than `max_bytes`, whatever size the server announces."""
    try:
        system, path = _system(url, scheme)
        with system.open(path, "rb") as file:
            return _at_most(cast(BinaryIO, file), max_bytes + 1)
    except ImportError as error:
        raise InputError(f"{field}: {scheme}:// needs a driver ({error})", hint="install it on this machine") from None
    except FileNotFoundError as error:
        if _is_absent(error):
            raise InputError(f"{field}: {url} does not exist", hint="check the URL") from None
        reason = _refusal(error.__cause__)
        raise InputError(f"{field}: {url} cannot be read ({reason})", hint="check the URL and the network") from None
    except PermissionError:
        hint = "check the URL, and the credentials in this machine's environment"
        raise InputError(f"{field}: {url} cannot be read (access is refused)", hint=hint) from None
    except Exception as error:  # every driver has exceptions of its own; what they say may quote the URL in parts
        reason = (isinstance(error, OSError) and error.strerror) or type(error).__name__
        raise InputError(f"{field}: {url} cannot be read ({reason})", hint="check the URL and the network") from None


def _is_absent(error: FileNotFoundError) -> bool:
    """Whether it says so itself: fsspec raises it for whatever keeps a web server from answering."""
    return error.__cause__ is None or getattr(error.__cause__, "status", None) in (404, 410)


def _refusal(error: BaseException | None) -> str:
    status = getattr(error, "status", None)
    return f"HTTP status {status}" if status else type(error).__name__


def _system(url: str, scheme: str) -> tuple[AbstractFileSystem, str]:
    """Return the file system of a URL and the path in it.

    S3 needs no driver of its own: pyarrow reads it, which comes with Ray and also writes the checkpoints there. Not
    fsspec.open(): it would take a name that holds `::` for a chain of file systems.
    """
    if scheme in ("s3", "s3a"):
        from pyarrow.fs import FileSystem  # not above: most requests come from files

        path = url.partition("://")[2]
        storage, _ = FileSystem.from_uri(f"s3://{path.partition('/')[0]}")
        return ArrowFSWrapper(storage), path
    kind = get_filesystem_class(scheme)
    options = {}
    if scheme in ("http", "https"):
        from aiohttp import ClientTimeout

        options = {"client_kwargs": {"timeout": ClientTimeout(total=300, sock_connect=SILENCE_S, sock_read=SILENCE_S)}}
    return cast(AbstractFileSystem, kind(**options)), str(kind._strip_protocol(url))


def _at_most(file: BinaryIO, count: int) -> bytes:
    """Return up to `count` bytes: one read of a stream may give less than it was asked for."""
    parts: list[bytes] = []
    while count > 0 and (part := file.read(min(count, _CHUNK))):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
