"""Hand a version over as files that plain diffusers loads, without Expunge and without a registry."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, get_args

from safetensors import SafetensorError

from expunge.errors import InputError, StorageError, first_line
from expunge.families.weights import LORA_FILE
from expunge.files import make_private, move_into_place
from expunge.registry.artifacts import checked_files
from expunge.registry.pipelines import network_of, pipeline_of
from expunge.registry.seals import LEDGER
from expunge.registry.tracking import Tracker
from expunge.registry.versions import resolve

Format = Literal["diffusers", "lora", "merged"]
FORMATS: tuple[Format, ...] = get_args(Format)


def export(tracker: Tracker, uri: str, form: Format, to: Path, *, base: str | None = None) -> None:
    """Write the version at `uri` to the folder `to`, whole or not at all, with its `ledger.json` beside the weights.

    form: `lora` is the adapter, for `pipeline.load_lora_weights(to)`; `diffusers` is the changed network alone, in a
    folder named after the pipeline's component, for `from_pretrained(to, subfolder=COMPONENT)`; `merged` is the whole
    pipeline with the changes in its weights, for `DiffusionPipeline.from_pretrained(to)`. In the last two the changed
    network is in float32. base: as in `load_pipeline`.

    Raises InputError if `to` is not empty or the version has no adapter, and StorageError if it cannot be written.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise InputError(f"{to} exists and is not an empty folder", hint="name a new folder as --out")
    version = resolve(tracker, uri)
    with checked_files(tracker, version) as files, _whole(to) as folder:
        if form == "lora":
            if not (files / LORA_FILE).is_file():
                raise InputError(
                    f"{version.uri} is no adapter but all weights", hint="use --format diffusers or merged"
                )
            shutil.copyfile(files / LORA_FILE, folder / LORA_FILE)
        else:
            _save(files, base, form, folder)
        shutil.copyfile(files / LEDGER, folder / LEDGER)


def _save(files: Path, base: str | None, form: Format, folder: Path) -> None:
    """Write the changed network, or the whole pipeline with it in its place.

    It is read by itself for both, because an adapter that stays beside the weights would be written with other names.
    """
    from diffusers import ModelMixin

    name, network = network_of(files, base=base)
    if form == "merged":
        pipeline = pipeline_of(files, base=base)
        pipeline.register_modules(**{name: network})
        pipeline.save_pretrained(folder)
        return
    assert isinstance(network, ModelMixin)
    network.save_pretrained(folder / name)


@contextmanager
def _whole(to: Path) -> Iterator[Path]:
    """Yield a folder beside `to` to write to, and move it there at the end; it is deleted if anything fails."""
    new = None
    try:
        make_private(to.parent)
        new = Path(tempfile.mkdtemp(prefix=f".{to.name}.", suffix=".tmp", dir=to.parent))
        yield new
        if to.exists():
            to.rmdir()  # it is empty
        move_into_place(new, to)
    except (OSError, SafetensorError) as error:
        why = error.strerror if isinstance(error, OSError) else None
        raise StorageError(
            f"{to} cannot be written ({why or first_line(error)})", hint="free space, or name another --out"
        ) from error
    finally:
        if new is not None:
            shutil.rmtree(new, ignore_errors=True)
