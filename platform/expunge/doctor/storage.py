"""Checks what a night reads and writes: the home, the models, the request store, the blobs and the checkpoints."""

import os
import secrets
import shutil
import tempfile
from pathlib import Path

from expunge.doctor.check import NOT_YET
from expunge.errors import ExpungeError, StorageError
from expunge.settings import Settings

_FREE = 5 * 10**9


def home(settings: Settings) -> str:
    home = settings.home
    where = try_to_write(home)
    free = shutil.disk_usage(where).free
    if free < _FREE:
        message = f"{home} has {free / 1e9:.1f} GB free"
        raise ExpungeError(message, hint=f"a night writes checkpoints: free {_FREE / 1e9:.0f} GB or move EXPUNGE_HOME")
    return f"{home}, {free / 1e9:.0f} GB free{'' if home.exists() else f'; {NOT_YET}'}"


def models(settings: Settings) -> str:
    # transformers says on import that it does without torchvision, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from expunge.families import deep_preflight

    refused: list[ExpungeError] = []
    with tempfile.TemporaryDirectory() as scratch:
        cache = settings.model_cache if settings.home.exists() else Path(scratch)
        for name, model in settings.models.items():
            try:
                deep_preflight(name, model, cache, fetch=False)
            except ExpungeError as error:
                refused.append(error)
    if refused:
        raise ExpungeError("; ".join(error.message for error in refused), hint=refused[0].hint)
    return f"{', '.join(settings.models)} can be used"


def store(settings: Settings) -> str:
    from expunge.requests.database import Database
    from expunge.requests.store import open_store

    if not settings.home.exists():
        if settings.database_url:
            with Database(settings.database).read():
                return f"answers; its tables: {NOT_YET}"
        return NOT_YET
    store = open_store(settings)
    try:
        return f"{len(store.batches())} batches so far"
    finally:
        store.close()


def blobs(settings: Settings) -> str:
    from expunge.requests.blobs import open_blobs

    if not settings.home.exists():
        return NOT_YET
    blobs = open_blobs(settings)
    data = secrets.token_bytes(32)
    blob = blobs.put(data)
    try:
        if blobs.get(blob) != data:
            raise ExpungeError("a blob came back changed", hint="check the disk")
    finally:
        blobs.delete(blob)
    return "sealed, opened, deleted"


def checkpoints(settings: Settings) -> str:
    urls = {settings.training_for(model).checkpoint_url for model in settings.models} - {""}
    if not urls:
        return "in each job's folder"
    # Here and not above: a second of imports.
    from expunge.unlearning.checkpoints import open_storage

    for url in urls:
        storage, folder = open_storage(url, f"doctor-{secrets.token_hex(8)}")
        storage.delete_dir(folder)
    return f"{', '.join(sorted(urls))} can be written"


def try_to_write(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists. Raises StorageError where nothing can be made in it."""
    there = next((path for path in (folder, *folder.absolute().parents) if path.exists()), folder)
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"x")
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        hint = f"check the permissions of {there}, and what it is mounted with, or set EXPUNGE_HOME"
        raise StorageError(
            f"{folder} cannot be {'written' if there == folder else 'made'} ({reason})", hint=hint
        ) from None
    return there
