"""Reads multipart bodies in memory: starlette's default would write pictures to temporary files in the clear."""

import asyncio
import logging
from dataclasses import dataclass
from typing import ClassVar

from fastapi import Request
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from expunge.service.settings import ServiceSettings

# It warns of malformed bodies, and quotes from them.
logging.getLogger("python_multipart").setLevel(logging.CRITICAL)

_MOST_FIELDS = 200
_LARGEST_FIELD = 20_000


@dataclass(frozen=True)
class Upload:
    field: str
    name: str
    data: bytes


@dataclass(frozen=True)
class Form:
    """What a multipart body holds: texts, and uploaded files."""

    fields: tuple[tuple[str, str], ...]
    uploads: tuple[Upload, ...]


class _InMemory(MultiPartParser):
    spool_max_size: ClassVar[int] = 0  # no limit: never a file. The size of the whole body is limited.


async def read_form(request: Request, settings: ServiceSettings) -> Form:
    """Raises HTTPException: 415 for anything but multipart/form-data, 400 if it is malformed, 408 if it is slow, and
    413 as soon as more than `max_body` bytes have arrived."""
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    # Another charset could make text that is none: half a pair.
    if kind != b"multipart/form-data" or options.get(b"charset", b"utf-8").lower() != b"utf-8":
        raise HTTPException(415, "send multipart/form-data: pictures as files, everything else as fields")
    parser = _InMemory(
        request.headers,
        request.stream(),
        max_files=settings.max_files,
        max_fields=_MOST_FIELDS,
        max_part_size=_LARGEST_FIELD,
    )
    try:
        async with asyncio.timeout(settings.body_seconds):
            form = await parser.parse()
    except MultiPartException:
        raise HTTPException(400, "the body is not well-formed multipart/form-data, or has too many parts") from None
    except ClientDisconnect:
        raise HTTPException(400, "the body ended before its end") from None
    except TimeoutError:
        raise HTTPException(408, "the body took too long to arrive") from None
    fields, uploads = [], []
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            uploads.append(Upload(name, value.filename or "", await value.read()))
        else:
            fields.append((name, value))
    await form.close()
    return Form(tuple(fields), tuple(uploads))
