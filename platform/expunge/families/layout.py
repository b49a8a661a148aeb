"""The files of a pipeline on this machine, and typed reading of its configs."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from expunge.errors import InputError
from expunge.families.weights import COMPLETE, Weights, choose_variant, sampled_digest

INDEX, CONFIG, SCHEDULER_CONFIG = "model_index.json", "config.json", "scheduler_config.json"

_TEXT = (".json", ".model", ".txt")


@dataclass(frozen=True)
class Config:
    """A JSON file of a pipeline. Every method that reads a field raises InputError where the field has another type."""

    where: str
    """Names the model and the file in messages."""
    fields: Mapping[str, object]

    def integer(self, name: str, default: int | None = None, *, least: int = 1, most: int | None = None) -> int:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.refuse(name, f"must be a whole number of at least {least}")
        if most is not None and value > most:
            raise self.refuse(name, f"must be at most {most:,}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.refuse(name, "must be a number")
        return float(value)

    def positive(self, name: str, default: float | None = None) -> float:
        value = self.number(name, default)
        if value <= 0:
            raise self.refuse(name, "must be above 0")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self.refuse(name, "must be true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        value = self._get(name, default)
        if not isinstance(value, str):
            raise self.refuse(name, "must be a string")
        return value

    def choice(self, name: str, default: str, allowed: tuple[str, ...]) -> str:
        value = self.text(name, default)
        if value not in allowed:
            raise self.refuse(name, f"must be one of {', '.join(allowed)}")
        return value

    def items(self, name: str) -> list[object]:
        value = self._get(name, None)
        if not isinstance(value, list) or not value:
            raise self.refuse(name, "must be a list that is not empty")
        return value

    def has(self, name: str) -> bool:
        """Tell whether the field is present and not null."""
        return self.fields.get(name) is not None

    def refuse(self, name: str, why: str, hint: str = COMPLETE) -> InputError:
        """Make the error, to be raised by the caller, that names the file, the field, its value and the fault."""
        shown = json.dumps(self.fields[name])[:60] if name in self.fields else "missing"
        return InputError(f"{self.where}: {name} is {shown}: {why}", hint=hint)

    def _get(self, name: str, default: object) -> object:
        return self.fields.get(name, default)


@dataclass(frozen=True)
class Layout:
    """A pipeline's files on this machine."""

    label: str
    """Names the model in messages."""
    folder: Path
    index: Config
    """model_index.json, or what it would say where network and scheduler lie at the root of a repository."""
    commit: str | None = None
    """The pinned commit, where the source is a hub id."""

    @property
    def kind(self) -> str:
        """The pipeline's class."""
        return self.index.text("_class_name")

    def part(self, name: str) -> Path:
        """Find a component's folder; as in diffusers, the root if the component has none and the root has a config."""
        own = self.folder / name
        return own if own.is_dir() or not self._at_root() else self.folder

    def _at_root(self) -> bool:
        return (self.folder / CONFIG).is_file() or (self.folder / SCHEDULER_CONFIG).is_file()

    def class_of(self, name: str) -> str | None:
        """Return the class of a component; None where it is absent or was saved as absent."""
        value = self.index.fields.get(name)
        if value is None or value == [None, None]:
            return None
        if not isinstance(value, list) or len(value) != 2 or not all(isinstance(word, str) for word in value):
            raise self.index.refuse(name, "must be a library and a class")
        return str(value[1])

    def components(self) -> Iterator[str]:
        """Yield the names of the components that are present."""
        for name, value in self.index.fields.items():
            if not name.startswith("_") and isinstance(value, list) and self.class_of(name) is not None:
                yield name

    def library_of(self, name: str) -> str:
        """Return the package of a component's class, which is imported when the pipeline is loaded."""
        value = self.index.items(name)
        return str(value[0])

    def absent(self) -> dict[str, None]:
        """List the components that were saved as absent (an SD3 without its T5), as diffusers must be told."""
        return {name: None for name, value in self.index.fields.items() if value == [None, None]}

    def config(self, name: str) -> Config:
        """Read a component's config. Raises InputError where it cannot be read."""
        file = SCHEDULER_CONFIG if name.endswith("scheduler") else CONFIG
        return read_config(self.part(name) / file, self.folder, self.label)

    def weights(self) -> Weights:
        """Choose the weight files of every component that has any.

        Raises InputError where there are none, or only pickles.
        """
        parts = {name: self.part(name) for name in self.components() if name != "scheduler"}
        parts = {name: part for name, part in parts.items() if (part / CONFIG).is_file()}
        return choose_variant(parts, self.folder, self.label)

    def digest(self) -> str:
        """Tell this model from another, cheaply, and the same on every node.

        It is the commit of a hub id, else the SHA-256, in hexadecimal, of the configs and of samples of the weights.
        """
        if self.commit is not None:
            return self.commit
        digest = hashlib.sha256()
        folders = {self.folder, *(self.part(name) for name in self.components())}
        for path in sorted(path for folder in folders for path in folder.iterdir() if path.suffix in _TEXT):
            digest.update(str(path.relative_to(self.folder)).encode() + b"\0" + path.read_bytes() + b"\0")
        for path in self.weights().all_files():
            digest.update(str(path.relative_to(self.folder)).encode() + b"\0" + sampled_digest(path))
        return digest.hexdigest()


def read_config(path: Path, folder: Path, label: str) -> Config:
    """Read a JSON file of the pipeline in `folder`. Raises InputError where it holds no JSON object."""
    name = path.relative_to(folder)
    try:
        fields = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{label}: {name} cannot be read ({type(error).__name__})", hint=COMPLETE) from error
    if not isinstance(fields, dict):
        raise InputError(f"{label}: {name} holds no JSON object", hint=COMPLETE)
    return Config(f"{label}: {name}", fields)
