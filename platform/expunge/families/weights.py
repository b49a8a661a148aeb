"""The weight files of a pipeline: safetensors only, whole or in shards, in full precision or in a variant."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from expunge.errors import InputError

COMPLETE = "source must be a complete diffusers pipeline: model_index.json and every component's weights and config"

LORA_FILE = "pytorch_lora_weights.safetensors"
"""How diffusers names an adapter."""

FULL_FILE = "diffusion_pytorch_model.safetensors"
"""How diffusers names a network's weights."""

STEMS = ("diffusion_pytorch_model", "model")
"""How diffusers and transformers name them."""

PREFERRED = ("fp16", "bf16")

_SAFE = re.compile(rf"(?:{'|'.join(STEMS)})(?:-\d+-of-\d+)?(?:\.(?P<variant>[\w-]+?)(?:-\d+-of-\d+)?)?\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

_BLOCK, _BLOCKS = 4096, 64


@dataclass(frozen=True)
class Weights:
    """The files to load by component, and their variant where some component has no full precision."""

    variant: str | None
    files: Mapping[str, tuple[Path, ...]]

    def all_files(self) -> list[Path]:
        return sorted({path for paths in self.files.values() for path in paths})


def choose_variant(parts: Mapping[str, Path], folder: Path, label: str) -> Weights:
    """Choose full precision if every one of the component folders `parts` has it, else a variant that can be loaded.

    Raises InputError where a component has no safetensors, a shard is missing, or no variant covers all components.
    """
    found = {name: _variants(part) for name, part in parts.items()}
    for name, variants in found.items():
        if not variants:
            raise _nothing(parts[name], folder, label)
    every = {variant for variants in found.values() for variant in variants if variant}
    order = [None, *(v for v in PREFERRED if v in every), *sorted(every - set(PREFERRED))]
    for variant in order:
        if all(variant in variants or None in variants for variants in found.values()):
            files = {
                name: _files(parts[name], variant if variant in variants else None, folder, label)
                for name, variants in found.items()
            }
            return Weights(variant, files)
    raise InputError(
        f"{label}: no variant of the weights covers all of {', '.join(found)}",
        hint=f"the variants are {', '.join(sorted(every))}: add the missing files of one",
    )


def shapes(path: Path, label: str) -> dict[str, tuple[int, ...]]:
    """Read the shapes of a safetensors file by name from its header. Raises InputError where it is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{label}: {path.parent.name}/{path.name} is damaged ({error})", hint="download or copy it again"
        ) from error


def sampled_digest(path: Path) -> bytes:
    """Hash (SHA-256) a file's size and 64 blocks spread over it: another training changes every one of them."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for i in range(_BLOCKS):
            file.seek(max(0, size - _BLOCK) * i // (_BLOCKS - 1))
            digest.update(file.read(_BLOCK))
    return digest.digest()


def _variants(part: Path) -> set[str | None]:
    matches = (_SAFE.fullmatch(path.name) for path in part.glob("*.safetensors"))
    return {match["variant"] for match in matches if match}


def _files(part: Path, variant: str | None, folder: Path, label: str) -> tuple[Path, ...]:
    """Return the whole file, else the shards that the index names."""
    dotted = f".{variant}" if variant else ""
    for stem in STEMS:
        whole = part / f"{stem}{dotted}.safetensors"
        if whole.is_file():
            return (whole,)
        index = part / f"{stem}.safetensors.index{dotted}.json"
        if index.is_file():
            return _shards(index, folder, label)
    raise InputError(
        f"{label}: {part.relative_to(folder)} has shards of weights but no index of them",
        hint="download or copy the component again",
    )


def _shards(index: Path, folder: Path, label: str) -> tuple[Path, ...]:
    where = index.relative_to(folder)
    try:
        named = {Path(name).name for name in json.loads(index.read_text())["weight_map"].values()}
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{label}: {where} cannot be read ({type(error).__name__})", hint="download or copy it again"
        ) from error
    for name in sorted(named):
        if not (index.parent / name).is_file():
            raise InputError(f"{label}: {where} names {name}, which is missing", hint="download or copy it again")
    return tuple(index.parent / name for name in sorted(named))


def _nothing(part: Path, folder: Path, label: str) -> InputError:
    where = "the folder" if part == folder else str(part.relative_to(folder))
    pickles = sorted(path.name for path in part.iterdir() if path.suffix in _PICKLES)
    if pickles:
        code = f"from diffusers import DiffusionPipeline as P; P.from_pretrained('{folder}').save_pretrained('NEW')"
        return InputError(
            f"{label}: {where} has its weights as {pickles[0]} only, a pickle, which can run code when it is read",
            hint=f'convert it on a machine without keys, and use NEW: python -c "{code}"',
        )
    return InputError(f"{label}: {where} has no weights", hint=COMPLETE)
