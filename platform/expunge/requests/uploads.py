"""Pictures that came with the request itself: nothing that it names is looked up on this machine or in the network."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from expunge.errors import InputError
from expunge.requests.locations import Location


@dataclass(frozen=True)
class Uploads:
    """The pictures of an upload, by the names that the request gives them."""

    files: Mapping[str, bytes]

    def read(self, picture: Location, *, field: str, max_bytes: int) -> bytes:
        """Returns the picture. Raises InputError if none of this name was sent, or one that is too large."""
        data = self.files.get(picture.as_posix()) if isinstance(picture, Path) else None
        if data is None:
            raise InputError(
                f"{field}: no picture of this name was uploaded", hint="send it, and name it as it is sent"
            )
        if len(data) > max_bytes:
            raise InputError(
                f"{field}: {len(data):,} bytes, over the limit of {max_bytes:,}", hint="send a smaller copy"
            )
        return data
