"""Find the files of a base model: in a folder, under `testbed:NAME`, or under a pinned hub id.

Imports no torch, as `family` explains.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from expunge.errors import InputError
from expunge.families import supported
from expunge.families.layout import CONFIG, INDEX, SCHEDULER_CONFIG, Config, Layout, read_config
from expunge.settings import ModelSettings

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TEXT_FILES = ("*.json", "*/*.json", "*/*.txt", "*/*.model")
"""Configs and tokenizers, which are fetched from the hub before any weights."""


def resolve_source(source: str) -> str:
    """Turn `testbed:NAME` into the folder of the shipped model and expand `~`; a path or a hub id stays as it is."""
    kind, _, name = source.partition(":")
    if kind != "testbed":
        try:
            return str(Path(source).expanduser()) if source.startswith("~") else source
        except RuntimeError as error:
            raise InputError(f"source: {source!r} has no such user", hint="write the whole path") from error
    models = Path(__file__).parents[1] / "testbed" / "models"
    if name not in (folder.name for folder in models.iterdir()):
        raise InputError(
            f"source: there is no testbed model {name!r}", hint="use testbed:faces, testbed:flags or testbed:people"
        )
    return str(models / name)


def pinned_source(settings: ModelSettings) -> str:
    """Return the source as one string: `OWNER/NAME@COMMIT` for a hub id with a revision, else as it is set."""
    return f"{settings.source}@{settings.revision}" if settings.revision else settings.source


def locate(source: str, label: str, *, weights: bool = False) -> Layout:
    """Find the files of `source` on this machine; fetch those of a hub id where the hub's cache lacks them.

    weights: fetch the weights, too. Raises InputError where there is no such folder, or no such commit can be fetched.
    """
    found = folder_or_commit(
        source,
        label,
        "give the folder of a diffusers pipeline (which has no revision), a hub id with its revision, or testbed:NAME",
    )
    return _layout(found, label) if isinstance(found, Path) else _from_hub(*found, label, weights)


def folder_or_commit(source: str, label: str, hint: str) -> Path | tuple[str, str]:
    """Find the folder that `source` names, or return the hub id and the commit that it names.

    hint: says what to give instead. Raises InputError where it is neither, or a hub id without a commit.
    """
    path = resolve_source(source)
    if Path(path).is_dir():
        return Path(path)
    if Path(path).is_file():
        loaded = "from_single_file('FILE').save_pretrained('FOLDER')"
        raise InputError(
            f"{label}: {path} is a single file", hint=f"save it as a folder with diffusers, {loaded}, and give that"
        )
    repository, at, commit = source.partition("@")
    if not _HUB_ID.fullmatch(repository):
        # Not as a Path, which makes one slash of two: a URL must still be known as one, so that it can be masked.
        raise InputError(f"{label}: there is no folder {path}", hint=hint)
    if not _COMMIT.fullmatch(commit):
        what = f"{commit!r} is no commit" if at else "no revision is set"
        raise InputError(
            f"{label}: there is no such folder, and as a hub id it could change: {what}",
            hint="set revision (or what follows the @) to a commit, 40 hexadecimal digits, as printed by "
            f"`git ls-remote https://huggingface.co/{repository} HEAD`",
        )
    return repository, commit


def is_unpinned(source: str) -> bool:
    """Tell whether `source` is a hub id without a commit, so that what it names could change."""
    repository, _, commit = source.partition("@")
    is_hub_id = _HUB_ID.fullmatch(repository) is not None and not Path(source).is_dir()
    return is_hub_id and not _COMMIT.fullmatch(commit)


def source_digest(settings: ModelSettings) -> str:
    """Tell one base model from another, by the commit of a hub id, else by a digest of configs and weights.

    Raises InputError where a folder is incomplete.
    """
    return locate(pinned_source(settings), f"model {settings.source}").digest()


def _from_hub(repository: str, commit: str, label: str, weights: bool) -> Layout:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    # A commit never changes: if it is in the cache, the hub need not be asked.
    try:
        layout = _layout(Path(snapshot_download(repository, revision=commit, local_files_only=True)), label, commit)
        if complete(layout, weights):
            return layout
    except (LocalEntryNotFoundError, ValueError, InputError):
        pass
    layout = _layout(fetch(repository, commit, label, _TEXT_FILES), label, commit)
    if weights:
        parts = [name for name in layout.components() if layout.part(name) != layout.folder]
        wanted = ["diffusion_pytorch_model*.safetensors", *(f"{name}/*.safetensors" for name in parts)]
        fetch(repository, commit, label, wanted, without=["*.*.safetensors"])
        if not complete(layout, weights):
            fetch(repository, commit, label, wanted)
    return layout


def complete(layout: Layout, weights: bool) -> bool:
    """Tell whether the configs of its networks are there and, where `weights` asks for them, all weights."""
    try:
        for name in layout.components():
            if layout.library_of(name) == "diffusers":
                layout.config(name)
            elif not layout.part(name).is_dir():
                return False
        if weights:
            layout.weights()
    except InputError:
        return False
    return True


def fetch(repository: str, commit: str, label: str, wanted: Sequence[str], *, without: Sequence[str] = ()) -> Path:
    """Fetch the files of a hub id that match one of `wanted` and none of `without`; return their folder in the cache.

    Raises InputError where the hub does not give them.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(repository, revision=commit, allow_patterns=list(wanted), ignore_patterns=list(without))
        )
    except Exception as error:  # the hub, its HTTP client and the disk each raise types of their own
        raise _not_fetched(repository, commit, label, error) from error


def _not_fetched(repository: str, commit: str, label: str, error: Exception) -> InputError:
    """Say why the hub does not give a file, and how to get it."""
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    causes: list[BaseException] = [error]
    while causes[-1].__cause__ is not None:  # the hub's client wraps what went wrong in "not in the cache"
        causes.append(causes[-1].__cause__)
    by_hand = f"fetch it where there is a network, `hf download {repository} --revision {commit}`, and copy the folder"

    def is_among_them(*kinds: type[Exception]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if is_among_them(GatedRepoError):
        why = f"access to {repository} is gated"
        hint = f"accept its terms at https://huggingface.co/{repository}, and set HF_TOKEN to a token of that account"
    elif is_among_them(RepositoryNotFoundError):
        why = f"the hub has no {repository}, or HF_TOKEN may not read it"
        hint = "give a folder, or correct the id, or set HF_TOKEN to a token that may read it"
    elif is_among_them(RevisionNotFoundError):
        why = f"{repository} has no commit {commit}"
        hint = f"set revision to one of its commits, as printed by `git ls-remote https://huggingface.co/{repository}`"
    elif HF_HUB_OFFLINE:
        why = f"{repository} is not in the cache, and HF_HUB_OFFLINE forbids to ask the hub"
        hint = f"unset it, or {by_hand}"
    elif is_among_them(LocalEntryNotFoundError, ConnectionError, TimeoutError):
        why = f"{repository} is not in the cache, and the hub does not answer"
        hint = f"check the network and HF_ENDPOINT, or {by_hand}"
    else:
        why = f"neither a folder nor a hub id that can be fetched ({type(error).__name__})"
        hint = "give a folder, or check that the hub answers, and that the disk has room for the model"
    return InputError(f"{label}: {why}", hint=hint)


def _layout(folder: Path, label: str, commit: str | None = None) -> Layout:
    if not (folder / INDEX).is_file() and (folder / CONFIG).is_file() and (folder / SCHEDULER_CONFIG).is_file():
        return Layout(label, folder, _index_at_root(folder, label), commit)
    return Layout(label, folder, read_config(folder / INDEX, folder, label), commit)


def _index_at_root(folder: Path, label: str) -> Config:
    network = read_config(folder / CONFIG, folder, label).text("_class_name")
    scheduler = read_config(folder / SCHEDULER_CONFIG, folder, label).text("_class_name")
    for family in supported.FAMILIES:
        if (index := family.index_at_root(network, scheduler)) is not None:
            return Config(f"{label}: {CONFIG}", index)
    raise InputError(f"{label}: {CONFIG}: {network} is not supported without a {INDEX}", hint="use a pipeline with one")
