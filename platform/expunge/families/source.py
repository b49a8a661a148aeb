"""Where a base model comes from: a folder, `testbed:NAME` or a pinned hub id, and the files that lie there.

Imports no torch: a plan, a submit and `doctor` ask about models, and must not wait seconds for it.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from expunge.errors import InputError
from expunge.families.weights import COMPLETE, Weights, choose_variant, sampled_digest
from expunge.settings import ModelSettings

INDEX, CONFIG, SCHEDULER_CONFIG = "model_index.json", "config.json", "scheduler_config.json"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TEXT = (".json", ".model", ".txt")
_TEXT_FILES = ("*.json", "*/*.json", "*/*.txt", "*/*.model")
"""Configs and tokenizers: what is fetched of a hub id before any weights."""


@dataclass(frozen=True)
class Config:
    """A JSON file of a pipeline. What is read from it has the type that was asked for, or InputError names it."""

    where: str
    fields: Mapping[str, object]

    def integer(self, name: str, default: int | None = None) -> int:
        """A whole number of at least 1."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.refuse(name, "must be a whole number of at least 1")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.refuse(name, "must be a number")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self.refuse(name, "must be true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        value = self._get(name, default)
        if not isinstance(value, str):
            raise self.refuse(name, "must be a text")
        return value

    def items(self, name: str) -> list[object]:
        """A list that is not empty."""
        value = self._get(name, None)
        if not isinstance(value, list) or not value:
            raise self.refuse(name, "must be a list that is not empty")
        return value

    def has(self, name: str) -> bool:
        """Whether it is there and not null."""
        return self.fields.get(name) is not None

    def refuse(self, name: str, why: str, hint: str = COMPLETE) -> InputError:
        """To be raised: the file, the field, its value and what is wrong with it."""
        shown = json.dumps(self.fields[name])[:60] if name in self.fields else "missing"
        return InputError(f"{self.where}: {name} is {shown}: {why}", hint=hint)

    def _get(self, name: str, default: object) -> object:
        return self.fields.get(name, default)


@dataclass(frozen=True)
class Layout:
    """A pipeline's files on this machine."""

    label: str
    """What messages call it."""
    folder: Path
    index: Config
    """model_index.json, or what it would say where weights and config lie at the root of a repository."""
    commit: str | None = None
    """Of a hub id."""

    @property
    def kind(self) -> str:
        """The pipeline's class."""
        return self.index.text("_class_name")

    def part(self, name: str) -> Path:
        """A component's folder; as in diffusers, the root where it has none of its own and the root has a config."""
        own = self.folder / name
        return own if own.is_dir() or not self._at_root() else self.folder

    def _at_root(self) -> bool:
        return (self.folder / CONFIG).is_file() or (self.folder / SCHEDULER_CONFIG).is_file()

    def class_of(self, name: str) -> str | None:
        """The class of a component; None where it is absent or was saved as absent."""
        value = self.index.fields.get(name)
        if value is None or value == [None, None]:
            return None
        if not isinstance(value, list) or len(value) != 2 or not all(isinstance(word, str) for word in value):
            raise self.index.refuse(name, "must be a library and a class")
        return str(value[1])

    def components(self) -> Iterator[str]:
        """Those that are there."""
        for name, value in self.index.fields.items():
            if not name.startswith("_") and isinstance(value, list) and self.class_of(name) is not None:
                yield name

    def library_of(self, name: str) -> str:
        """The package of a component's class, which is imported when the pipeline is loaded."""
        value = self.index.items(name)
        return str(value[0])

    def absent(self) -> dict[str, None]:
        """Components saved as absent, as an SD3 without its T5: diffusers must be told."""
        return {name: None for name, value in self.index.fields.items() if value == [None, None]}

    def config(self, name: str) -> Config:
        """A component's own. Raises InputError where it cannot be read."""
        file = SCHEDULER_CONFIG if name == "scheduler" else CONFIG
        return _read(self.part(name) / file, self.folder, self.label)

    def weights(self) -> Weights:
        """Of every component that has any. Raises InputError where there are none, or only pickles."""
        parts = {name: self.part(name) for name in self.components() if name != "scheduler"}
        parts = {name: part for name, part in parts.items() if (part / CONFIG).is_file()}
        return choose_variant(parts, self.folder, self.label)

    def digest(self) -> str:
        """What tells it from another model, cheaply, and the same on every node: the commit of a hub id, else the
        SHA-256, in hexadecimal, of its configs and of samples of its weights."""
        if self.commit is not None:
            return self.commit
        digest = hashlib.sha256()
        folders = {self.folder, *(self.part(name) for name in self.components())}
        for path in sorted(path for folder in folders for path in folder.iterdir() if path.suffix in _TEXT):
            digest.update(str(path.relative_to(self.folder)).encode() + b"\0" + path.read_bytes() + b"\0")
        for path in self.weights().all_files():
            digest.update(str(path.relative_to(self.folder)).encode() + b"\0" + sampled_digest(path))
        return digest.hexdigest()


def resolve_source(source: str) -> str:
    """`testbed:NAME` to the folder of the shipped model, `~` to the home; a path or a hub id stays what it is."""
    kind, _, name = source.partition(":")
    if kind != "testbed":
        try:
            return str(Path(source).expanduser()) if source.startswith("~") else source
        except RuntimeError as error:
            raise InputError(f"source: {source!r} has no such user", hint="write the whole path") from error
    models = Path(__file__).parents[1] / "testbed" / "models"
    if name not in (folder.name for folder in models.iterdir()):
        raise InputError(f"source: there is no testbed model {name!r}", hint="use testbed:faces or testbed:flags")
    return str(models / name)


def pinned_source(settings: ModelSettings) -> str:
    """The source in one string: `OWNER/NAME@COMMIT` of a hub id with a revision, else as it is set."""
    return f"{settings.source}@{settings.revision}" if settings.revision else settings.source


def locate(source: str, label: str, *, weights: bool = False) -> Layout:
    """The files of `source` on this machine; those of a hub id are fetched where the hub's cache lacks them.

    weights: fetch these, too. Raises InputError where there is no such folder, or no such commit can be fetched.
    """
    folder = Path(resolve_source(source))
    if folder.is_dir():
        return _layout(folder, label)
    repository, at, commit = source.partition("@")
    if not _HUB_ID.fullmatch(repository):
        raise InputError(
            f"{label}: there is no folder {folder}",
            hint="give the folder of a diffusers pipeline (which has no revision), a hub id with its revision, or "
            "testbed:NAME",
        )
    if not _COMMIT.fullmatch(commit):
        what = f"{commit!r} is no commit" if at else "no revision is set"
        raise InputError(
            f"{label}: there is no such folder, and as a hub id it could change: {what}",
            hint="set revision to a commit, 40 hexadecimal digits, as printed by "
            f"`git ls-remote https://huggingface.co/{repository} HEAD`",
        )
    return _from_hub(repository, commit, label, weights)


def source_digest(settings: ModelSettings) -> str:
    """What tells one base model from another: the commit of a hub id, else a digest of configs and weights.

    Raises InputError where a folder is incomplete.
    """
    return locate(pinned_source(settings), f"model {settings.source}").digest()


def _from_hub(repository: str, commit: str, label: str, weights: bool) -> Layout:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    # A commit never changes: what lies in the cache needs no look at the hub.
    try:
        layout = _layout(Path(snapshot_download(repository, revision=commit, local_files_only=True)), label, commit)
        if complete(layout, weights):
            return layout
    except (LocalEntryNotFoundError, ValueError, InputError):
        pass
    layout = _layout(_fetch(repository, commit, label, _TEXT_FILES), label, commit)
    if weights:
        parts = [name for name in layout.components() if layout.part(name) != layout.folder]
        wanted = ["diffusion_pytorch_model*.safetensors", *(f"{name}/*.safetensors" for name in parts)]
        _fetch(repository, commit, label, wanted, without=["*.*.safetensors"])
        if not complete(layout, weights):
            _fetch(repository, commit, label, wanted)
    return layout


def complete(layout: Layout, weights: bool) -> bool:
    """Whether its configs are there, and its weights."""
    try:
        for name in layout.components():
            if name in ("unet", "transformer", "vae", "scheduler"):
                layout.config(name)
        if weights:
            layout.weights()
    except InputError:
        return False
    return True


def _fetch(repository: str, commit: str, label: str, wanted: Sequence[str], *, without: Sequence[str] = ()) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(repository, revision=commit, allow_patterns=list(wanted), ignore_patterns=list(without))
        )
    except Exception as error:  # of the hub, of its HTTP client, of the disk: each has types of its own
        raise InputError(
            f"{label}: neither a folder nor a hub id that can be fetched ({type(error).__name__})",
            hint="give the folder of a diffusers pipeline, or see that the hub answers, that the commit exists, and "
            "that HF_TOKEN may read it",
        ) from error


def _layout(folder: Path, label: str, commit: str | None = None) -> Layout:
    if not (folder / INDEX).is_file() and (folder / CONFIG).is_file() and (folder / SCHEDULER_CONFIG).is_file():
        kind = _read(folder / CONFIG, folder, label).text("_class_name")
        scheduler = _read(folder / SCHEDULER_CONFIG, folder, label).text("_class_name")
        index = {
            "_class_name": "DDIMPipeline" if scheduler == "DDIMScheduler" else "DDPMPipeline",
            "scheduler": ["diffusers", scheduler],
            "unet": ["diffusers", kind],
        }
        return Layout(label, folder, Config(f"{label}: {CONFIG}", index), commit)
    return Layout(label, folder, _read(folder / INDEX, folder, label), commit)


def _read(path: Path, folder: Path, label: str) -> Config:
    name = path.relative_to(folder)
    try:
        fields = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{label}: {name} cannot be read ({type(error).__name__})", hint=COMPLETE) from error
    if not isinstance(fields, dict):
        raise InputError(f"{label}: {name} holds no JSON object", hint=COMPLETE)
    return Config(f"{label}: {name}", fields)
