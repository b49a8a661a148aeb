"""JSON lines: one request a line, each accepted or refused on its own."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from expunge.errors import InputError, StorageError, UnavailableError
from expunge.requests.blobs import BlobStore
from expunge.requests.intake import Submission, accept, validated
from expunge.requests.store import RequestStore
from expunge.settings import Settings

MAX_LINE = 1_000_000
_EXAMPLE = '{"model": "flags", "images": ["a.png"]}'


@dataclass(frozen=True)
class LineResult:
    """What became of one line: a request id, or an error and its hint. `end` counts the bytes read up to here."""

    line: int
    end: int
    id: str | None = None
    new: bool = False
    error: str | None = None
    hint: str | None = None


def accept_jsonl(
    path: Path, *, settings: Settings, store: RequestStore, blobs: BlobStore, max_line: int = MAX_LINE
) -> Iterator[LineResult]:
    """Accepts a file line by line; blank lines are skipped, paths are relative to the file's folder.

    A bad line is a result with an error, and never ends the file. Raises InputError if the file itself cannot be read,
    and StorageError or UnavailableError, naming the line, when the platform cannot store: repeating is safe.
    """
    try:
        file = path.open("rb")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"batch: {path} cannot be read ({reason.lower()})", hint="check the path") from None
    with file:
        for number, (text, end) in enumerate(_lines(file, max_line), start=1):
            if text is not None and not text.strip():
                continue
            try:
                submission = _submission(text, max_line)
                record, new = accept(submission, settings=settings, store=store, blobs=blobs, base=path.parent)
                yield LineResult(number, end, id=record.request.id, new=new)
            except InputError as error:
                yield LineResult(number, end, error=error.message, hint=error.hint)
            except (StorageError, UnavailableError) as error:
                hint = f"{error.hint or 'fix what it names'}; the lines before it are accepted, submit the file again"
                raise type(error)(f"line {number}: {error.message}", hint=hint) from None


def _submission(line: bytes | None, max_line: int) -> Submission:
    hint = f"write one JSON object a line, e.g. {_EXAMPLE}"
    if line is None:
        raise InputError(f"longer than {max_line:,} bytes", hint=hint)
    try:
        value = json.loads(line.rstrip().decode("utf-8"))  # the column then is one of this line
    except UnicodeDecodeError as error:
        raise InputError(f"column {error.start + 1}: not UTF-8", hint="save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise InputError(f"column {error.colno}: not JSON ({error.msg})", hint=hint) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON ({type(error).__name__})", hint=hint) from None
    if not isinstance(value, dict):
        raise InputError(f"a JSON {type(value).__name__}, not an object", hint=hint)
    return validated(Submission, value)


def _lines(file: BinaryIO, max_line: int) -> Iterator[tuple[bytes | None, int]]:
    """Each line and the bytes read so far; None for a line over `max_line` bytes, which is never held in memory."""
    end = 0
    while chunk := file.readline(max_line + 1):
        end += len(chunk)
        whole: bytes | None = chunk.removeprefix(b"\xef\xbb\xbf") if end == len(chunk) else chunk
        while len(chunk) > max_line and not chunk.endswith(b"\n"):
            whole = None
            chunk = file.readline(max_line + 1)
            end += len(chunk)
        yield whole, end
