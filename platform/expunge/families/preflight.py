"""Refuse a model that cannot be used before a night spends hours on it: at submit, at planning and by `doctor`.

The shallow preflight reads the config files, in milliseconds. The deep one also compares the weight files with the
configs and runs one forward pass at the resolution on fake tensors, which have shapes and no memory, so that a network
of 8B parameters costs seconds and no GPU. A deep success is remembered by the content of the files.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from expunge.errors import ExpungeError, InputError, StorageError, first_line
from expunge.families.checks import check
from expunge.families.layout import Layout
from expunge.families.source import complete, locate, pinned_source
from expunge.families.weights import shapes
from expunge.files import write_atomically
from expunge.settings import ModelSettings, Resolution

Shapes = Mapping[str, tuple[int, ...]]

_RULES = "1"
"""Raise this when the deep preflight checks more: a success is remembered under it."""

_RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Old names of attention weights, which diffusers translates when it loads them."""


def preflight(name: str, settings: ModelSettings) -> Resolution:
    """Return (height, width) that the model `name` is used at, from its config files alone.

    Raises InputError with a sentence that names the model, the file and the field; no other error.
    """
    label = f"model {name} ({settings.source})"
    with no_other_error(label):
        return check(locate(pinned_source(settings), label), settings.resolution)


def deep_preflight(name: str, settings: ModelSettings, cache: Path, *, fetch: bool = True) -> Resolution:
    """Do as `preflight` does, compare the weights with the configs, and run a forward pass at the resolution.

    cache: a folder that remembers what passed. fetch: download a hub id's weights, which can be many GB, where the
    hub's cache lacks them; if False, weights that are not there are not looked at. Raises InputError, and StorageError
    where the cache cannot be written.
    """
    label = f"model {name} ({settings.source})"
    with no_other_error(label):
        layout = locate(pinned_source(settings), label, weights=fetch)
        resolution = check(layout, settings.resolution)
        whole = fetch or layout.commit is None or complete(layout, weights=True)
        versions = [version(package) for package in ("diffusers", "torch")]
        seen = "\n".join([_RULES, *versions, str(resolution), str(whole), layout.digest()])
    passed = cache / hashlib.sha256(seen.encode()).hexdigest()
    if passed.is_file():
        return resolution
    with no_other_error(f"{label}: a forward pass at {resolution[0]}x{resolution[1]} fails"):
        _examine(layout, resolution, whole)
    try:
        write_atomically(passed, "")
    except OSError as error:
        hint = "check its permissions and free space"
        raise StorageError(f"{cache} cannot be written ({error})", hint=hint) from error
    return resolution


@contextmanager
def no_other_error(what: str) -> Iterator[None]:
    """Turn any exception into an InputError: an odd config refuses its own model and does not end the night."""
    try:
        yield
    except ExpungeError:
        raise
    except Exception as error:
        hint = "compare its files with a published model's"
        raise InputError(f"{what} ({type(error).__name__}: {first_line(error)})", hint=hint) from error


def _examine(layout: Layout, resolution: Resolution, weights: bool) -> None:
    # Here and not above: seconds of imports.
    from expunge.families.architectures import fake_networks

    networks = fake_networks(layout, resolution)
    for name, files in layout.weights().files.items() if weights else ():
        found = {_current_name(key): shape for path in files for key, shape in shapes(path, layout.label).items()}
        _fits(layout, f"{name}: {files[0].name}", networks.get(name, {}), found)


def _fits(layout: Layout, where: str, wanted: Shapes, found: Shapes) -> None:
    """Refuse missing and misshapen weights: diffusers would fill them with random values, and only warn."""
    for key, shape in wanted.items():
        if key in found and (found[key] == shape or _was_renamed(key)):
            continue
        why = f"{key} has shape {list(found[key])}, not {list(shape)}" if key in found else f"{key} is missing"
        raise InputError(f"{layout.label}: {where}: {why}", hint="weights and config.json must belong together")


def _was_renamed(key: str) -> bool:
    """Tell whether diffusers also reshapes this weight: the renamed ones were convolutions once."""
    return any(f".{new}." in key for new in _RENAMED.values())


def _current_name(key: str) -> str:
    words = key.split(".")
    if len(words) > 1 and words[-2] in _RENAMED:
        words[-2] = _RENAMED[words[-2]]
    return ".".join(words)
