"""Whether a model can be used at all, asked before a night spends hours on it: at submit, at planning and by `doctor`.

Shallow: the config files are read, in milliseconds. Deep: the weight files are there and fit the configs, and one
forward pass at the resolution gives what it should, on fake tensors, which have shapes and no memory; so an 8B
transformer costs seconds and no GPU. A deep success is remembered by the content of the files.
"""

import hashlib
from importlib.metadata import version
from pathlib import Path

from expunge.errors import ExpungeError, InputError, StorageError
from expunge.families.checks import check
from expunge.families.source import Layout, locate, pinned_source
from expunge.families.weights import shapes
from expunge.files import write_atomically
from expunge.settings import ModelSettings, Resolution

_RULES = "1"
"""Part of what a success is remembered by: raise it when the deep preflight looks at more."""

_RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Old names of attention weights, which diffusers translates when it loads them."""


def preflight(name: str, settings: ModelSettings) -> Resolution:
    """(height, width) that the model `name` is used at, from its config files alone.

    Raises InputError with a sentence that names the model, the file and the field; no other error.
    """
    return _shallow(name, settings, weights=False)[1]


def deep_preflight(name: str, settings: ModelSettings, cache: Path) -> Resolution:
    """As `preflight`, and the weights fit, and a forward pass gives a picture of this resolution.

    cache: a folder of the home's, for remembering what passed. Raises InputError, and StorageError where the cache
    cannot be written.
    """
    layout, resolution = _shallow(name, settings, weights=True)
    versions = [version(package) for package in ("diffusers", "torch")]
    seen = "\n".join([_RULES, *versions, str(resolution), layout.digest()])
    passed = cache / hashlib.sha256(seen.encode()).hexdigest()
    if passed.is_file():
        return resolution
    _forward(layout, resolution)
    try:
        write_atomically(passed, "")
    except OSError as error:
        raise StorageError(
            f"{cache} cannot be written ({error})", hint="check its permissions and free space"
        ) from error
    return resolution


def _shallow(name: str, settings: ModelSettings, *, weights: bool) -> tuple[Layout, Resolution]:
    label = f"model {name} ({settings.source})"
    try:
        layout = locate(pinned_source(settings), label, weights=weights)
        return layout, check(layout, settings.resolution)
    except ExpungeError:
        raise
    except Exception as error:  # a config can be odd in ways that nobody thought of; it must cost its own model alone
        raise _odd(label, error) from error


def _forward(layout: Layout, resolution: Resolution) -> None:
    # Here and not above: seconds of imports.
    from expunge.families.architectures import fake_networks

    parts = layout.weights().files
    try:
        networks = fake_networks(layout, resolution)
    except ExpungeError:
        raise
    except Exception as error:  # whatever diffusers raises for a config that it cannot build
        height, width = resolution
        raise _odd(f"{layout.label}: a forward pass at {height}x{width} fails", error) from error
    for name, network in networks.items():
        _fits(layout, name, network, parts[name])
    for name in set(parts) - set(networks):
        for path in parts[name]:
            shapes(path, layout.label)


def _fits(layout: Layout, name: str, wanted: dict[str, tuple[int, ...]], files: tuple[Path, ...]) -> None:
    """diffusers would give a weight that is missing random values, and only warn."""
    found = {_today(key): shape for path in files for key, shape in shapes(path, layout.label).items()}
    for key, shape in wanted.items():
        if key not in found:
            why = "has no"
        elif found[key] != shape and not set(_RENAMED.values()) & {".".join(key.split(".")[i:-1]) for i in range(9)}:
            why = f"has shape {list(found[key])}, not {list(shape)}, for"
        else:
            continue
        raise InputError(
            f"{layout.label}: {name}: {files[0].name} {why} {key}", hint="weights and config.json must belong together"
        )


def _today(key: str) -> str:
    words = key.split(".")
    if len(words) > 1 and words[-2] in _RENAMED:
        words[-2] = _RENAMED[words[-2]]
    return ".".join(words)


def _odd(what: str, error: Exception) -> InputError:
    said = (str(error).strip() or "no reason given").splitlines()[0]
    return InputError(
        f"{what} ({type(error).__name__}: {said})", hint="compare its config files with a published model's"
    )
