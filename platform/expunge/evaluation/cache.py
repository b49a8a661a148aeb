"""What depends on the base model alone is measured once, and kept sealed for the nights to come."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors.torch import load, save
from torch import Tensor

from expunge.evaluation.rules import PROTOCOL_VERSION
from expunge.files import write_atomically
from expunge.requests.keys import sign
from expunge.requests.sealing import Seal


class Cache:
    """Tensors by what they were computed from, one sealed file each. A file that does not open is computed again."""

    def __init__(self, folder: Path, key: bytes) -> None:
        """Take the folder, which need not exist, and a 32-byte key."""
        self._folder, self._key, self._seal = folder, key, Seal(key)

    def tensors(self, key: Mapping[str, object], compute: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Return the tensors under `key`, computed at most once. key: JSON values that decide every bit of them."""
        text = json.dumps({"protocol": PROTOCOL_VERSION, **key}, sort_keys=True)
        name = sign(self._key, text.encode())  # a plain hash of a name or prompt could be guessed
        path = self._folder / name
        data = self._seal.open(name, path.read_bytes()) if path.exists() else None
        if data is None:
            data = save({part: tensor.contiguous() for part, tensor in compute().items()})
            write_atomically(path, self._seal.close(name, data))
        return load(data)
