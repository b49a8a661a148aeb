"""JSON lines: one request per line, each accepted or refused on its own."""

import json
import math
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import BinaryIO, NoReturn

from expunge.errors import InputError, StorageError, UnavailableError
from expunge.requests.blobs import BlobStore
from expunge.requests.intake import Check, accept
from expunge.requests.locations import Location, beside, folder_of, read_location, spellings
from expunge.requests.store import RequestStore
from expunge.requests.submission import Submission, validated
from expunge.requests.uploads import Uploads
from expunge.settings import Settings
from expunge.text import masked, visible

MAX_LINE = 1_000_000
HEAD = 4096
_EXAMPLE = '{"model": "flags", "images": ["a.png"]}'
_HINT = f"write one JSON object per line, e.g. {_EXAMPLE}"
_BOM = b"\xef\xbb\xbf"
# UTF-16 and UTF-32: with a byte order mark, or with a first ASCII character and no mark.
_WIDE = (b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff", b"\0\0\0{", b"\0\0\0[", b"{\0", b"\0{", b"[\0", b"\0[")
_GZIP = b"\x1f\x8b"


@dataclass(frozen=True)
class LineResult:
    """The result of one line: a request id, or an error and its hint. `end` counts the bytes read up to here."""

    line: int
    end: int
    id: str | None = None
    new: bool = False
    error: str | None = None
    hint: str | None = None

    @property
    def refusal(self) -> str:
        """Why the line was refused, with its number, as one line that is safe to print."""
        hint = f": {self.hint}" if self.hint else ""
        return visible(f"line {self.line}: {self.error}{hint}").strip()


def accept_jsonl(
    file: Location,
    *,
    settings: Settings,
    store: RequestStore,
    blobs: BlobStore,
    max_line: int = MAX_LINE,
    check: Check | None = None,
    private: bool = False,
) -> Iterator[LineResult]:
    """Accept a file line by line; blank lines are skipped, relative names are looked up beside the file.

    A bad line is a result with an error, and never ends the file. Raises InputError if the file itself cannot be read
    or holds no lines of JSON, and StorageError or UnavailableError, naming the line, when the platform cannot store:
    submitting the file again is safe. With `private`, no error names a picture's file: its name may be a person's.
    """
    base = folder_of(file)
    with _open(file, settings.max_bytes) as stream:
        yield from _accept_lines(stream, settings, store, blobs, base, max_line, check, private)


def accept_uploaded(
    lines: bytes, pictures: Uploads, *, settings: Settings, store: RequestStore, blobs: BlobStore, check: Check
) -> Iterator[LineResult]:
    """Accepts lines whose pictures were uploaded with them, as `accept_jsonl` does. Raises InputError likewise."""
    _check_head(lines[:HEAD], "the upload")
    yield from _accept_lines(BytesIO(lines), settings, store, blobs, pictures, MAX_LINE, check, private=False)


def _accept_lines(
    stream: BinaryIO,
    settings: Settings,
    store: RequestStore,
    blobs: BlobStore,
    base: Location | Uploads,
    max_line: int,
    check: Check | None,
    private: bool,
) -> Iterator[LineResult]:
    for number, (text, end) in enumerate(_lines(stream, max_line), start=1):
        if text is not None and not text.strip():
            continue
        submission = None
        try:
            submission = _submission(text, max_line)
            record, new = accept(submission, settings=settings, store=store, blobs=blobs, base=base, check=check)
            yield LineResult(number, end, id=record.request.id, new=new)
        except InputError as error:
            said = _without_names(error.message, submission, base) if private else error.message
            yield LineResult(number, end, error=said, hint=error.hint)
        except (StorageError, UnavailableError) as error:
            hint = f"{error.hint or 'fix what it names'}; the lines before it are accepted, submit the file again"
            raise type(error)(f"line {number}: {error.message}", hint=hint) from None


def _open(location: Location, max_bytes: int) -> BinaryIO:
    """A file on disk is read as it is needed, one behind a URL at once, up to `max_bytes`.

    Raises InputError for a file that cannot be read, or does not hold one request per line as UTF-8.
    """
    if isinstance(location, Path):
        return _open_path(location)
    data = read_location(location, field="batch", max_bytes=max_bytes)
    _check_head(data[:HEAD], location)
    return BytesIO(data)


def _open_path(path: Path) -> BinaryIO:
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise InputError(f"batch: {path} is not a regular file", hint="write the requests to a file first")
        file = path.open("rb")
    except OSError as error:
        reason = (error.strerror or os.strerror(error.errno or 0)).lower()
        raise InputError(f"batch: {path} cannot be read ({reason})", hint="check the path") from None
    except ValueError as error:
        raise InputError(f"batch: {str(path)!r} is not a path ({error})", hint="check the path") from None
    try:
        _check_head(file.read(HEAD), path)
        file.seek(0)
    except OSError as error:
        file.close()
        raise InputError(f"batch: {path} cannot be read ({error.strerror})", hint="check the path") from None
    except InputError:
        file.close()
        raise
    return file


def _check_head(head: bytes, path: Location) -> None:
    if head.startswith(_WIDE):
        raise InputError(f"batch: {path} is UTF-16 or UTF-32 text", hint="save the file as UTF-8")
    if b"\0" in head or head.startswith(_GZIP):
        raise InputError(f"batch: {path} is not a text file", hint="name a file with one JSON object per line")
    first = next(iter(head.removeprefix(_BOM).lstrip().splitlines()), b"").strip()
    if first in (b"[", b"{"):
        what, way = ("list", ".[]") if first == b"[" else ("object", ".")
        raise InputError(
            f"batch: {path} is a JSON {what} over several lines, not one request per line",
            hint=f"write it as lines: `jq -c '{way}' FILE > requests.jsonl`",
        )


def _without_names(message: str, submission: Submission | None, base: Location | Uploads) -> str:
    """Return an error about a line without the names of its pictures' files."""
    if submission is None or isinstance(base, Uploads):  # it has not come to them, or they are no files
        return message
    mask = submission.edit.mask if submission.edit else None
    pictures = [*submission.images, *submission.surrogates, *([mask] if mask else [])]
    names = {masked(spelt) for picture in pictures for spelt in spellings(beside(base, picture))}
    # In one pass, the longest first: a name may be a part of another, or of what stands in its place.
    anyone = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    return re.sub(anyone, "its file", message)


def _submission(line: bytes | None, max_line: int) -> Submission:
    if line is None:
        raise InputError(f"longer than {max_line:,} bytes", hint=_HINT)
    try:
        text = line.rstrip().decode("utf-8")  # without a line end, an error's column is in this line
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_constant, parse_float=_finite)
    except UnicodeDecodeError as error:
        raise InputError(f"column {error.start + 1}: not UTF-8", hint="save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise InputError(f"column {error.colno}: not JSON ({error.msg})", hint=_HINT) from None
    except RecursionError:
        raise InputError("nested too deeply", hint=_HINT) from None
    except ValueError:  # int() reads no more than a few thousand digits
        raise InputError("a number has too many digits", hint="write identifiers in quotes") from None
    if isinstance(value, list):
        hint = f"{_HINT}; `jq -c '.[]' FILE` makes lines of a list"
        raise InputError("a JSON list, not an object", hint=hint)
    if not isinstance(value, dict):
        raise InputError(f"a JSON {_KINDS[type(value)]}, not an object", hint=_HINT)
    return validated(Submission, value)


_KINDS = {str: "string", int: "number", float: "number", bool: "truth value", type(None): "null"}


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Refuse a repeated key: JSON would keep the last value and silently drop the first."""
    values: dict[str, object] = {}
    for key, value in pairs:
        if key in values:
            raise InputError(f"{key[:50]!r} is given twice", hint="keep one of them; several images are one list")
        values[key] = value
    return values


def _constant(name: str) -> NoReturn:
    raise InputError(f"{name} is not JSON", hint="write a number")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise InputError("a number is too large", hint="write a smaller one")
    return number


def _lines(file: BinaryIO, max_line: int) -> Iterator[tuple[bytes | None, int]]:
    """Yield each line and the bytes read so far; None for a line over `max_line` bytes, which is never held in memory.

    A line ends with LF, CRLF, or a single CR, as on old Macs.
    """
    # Latin-1 maps each byte to one character; only text streams know all three line ends.
    text = TextIOWrapper(file, encoding="latin-1", newline="")
    most = max_line + len("\r\n")
    end = 0
    while chunk := text.readline(most):
        line: str | None = chunk if end else chunk.removeprefix(_BOM.decode("latin-1"))
        if len(chunk.rstrip("\r\n")) > max_line:
            line = None
        end += len(chunk)
        while not chunk.endswith(("\n", "\r")) and (chunk := text.readline(most)):
            end += len(chunk)
            line = None
        yield None if line is None else line.encode("latin-1"), end
