"""All the checks, in the order in which one would fix them."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial

from expunge.doctor.check import Check, failed, guarded
from expunge.doctor.installation import devices, encoders, kernels, packages, python
from expunge.doctor.pictures import pictures
from expunge.doctor.privacy import privacy
from expunge.doctor.services import ray, removals, tracking
from expunge.doctor.storage import blobs, checkpoints, home, models, store
from expunge.errors import ExpungeError
from expunge.settings import Settings, load_settings
from expunge.text import masked

INSTALLATION: dict[str, Callable[[], list[Check]]] = {
    "python": python,
    "packages": packages,
    "kernels": kernels,
    "devices": devices,
}
"""Checks that need no settings."""

LOOKS: dict[str, Callable[[Settings], str | Check]] = {
    "home": home,
    "models": models,
    "encoder weights": encoders,
    "store": store,
    "blobs": blobs,
    "checkpoints": checkpoints,
    "tracking": tracking,
    "removals": removals,
    "ray job server": ray,
    "privacy": privacy,
}
"""Checks of what the settings name. Each returns its row or just what it found, or raises ExpungeError."""


def examine() -> list[Check]:
    """Runs every check. Nothing raises: a failure is a row. No row shows a password."""
    return _shown(_checks())


def examine_deeply() -> list[Check]:
    """Opens every request and every blob, which may take long; one row where the store or the blobs do not open."""
    return _shown(guarded("pictures", lambda: pictures(load_settings())))


def _checks() -> Iterator[Check]:
    for name, rows in INSTALLATION.items():
        yield from guarded(name, rows)
    try:
        settings = load_settings()
    except ExpungeError as error:
        yield failed("settings", error)
        return
    for name, look in LOOKS.items():
        yield from guarded(name, partial(_looked, name, look, settings))


def _looked(name: str, look: Callable[[Settings], str | Check], settings: Settings) -> list[Check]:
    found = look(settings)
    return [found if isinstance(found, Check) else Check(name, True, found)]


def _shown(checks: Iterable[Check]) -> list[Check]:
    return [replace(check, found=masked(check.found), hint=masked(check.hint)) for check in checks]
