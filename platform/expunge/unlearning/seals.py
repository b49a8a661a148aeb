"""Sign and verify checkpoints. Their files are pickles, which run code when loaded, so none is loaded unverified.

Every worker writes a `part-N.json` beside its files: their digests, and the job and checkpoint that they belong to,
signed with a key that is derived from the sealing key.
"""

import hmac
import json
from dataclasses import dataclass, field
from pathlib import Path

from expunge.files import file_digest
from expunge.requests.keys import is_signed, sign


@dataclass(frozen=True)
class CheckpointSeal:
    """Signs the checkpoints of one job, and says what is wrong with one."""

    key: bytes = field(repr=False)
    job: str

    def close(self, folder: Path, *, checkpoint: str, step: int, rank: int, world: int) -> None:
        """Sign the files in `folder`, which are this worker's part of `checkpoint`. Raises OSError."""
        files = {path.relative_to(folder).as_posix(): file_digest(path) for path in folder.rglob("*") if path.is_file()}
        part = {
            "job": self.job,
            "checkpoint": checkpoint,
            "step": step,
            "rank": rank,
            "world": world,
            "files": files,
        }
        (folder / f"part-{rank}.json").write_text(json.dumps({**part, "seal": sign(self.key, _content(part))}))

    def wrong(self, folder: Path, checkpoint: str) -> str | None:
        """Return what is wrong, or None if every part is there and every file is as this job's workers wrote it."""
        try:
            return self._wrong(folder, checkpoint)
        except OSError as error:
            return f"it cannot be read ({error.strerror})"
        except (ValueError, KeyError, TypeError, AttributeError):
            return "one of its part-N.json is cut short, or of another version"

    def _wrong(self, folder: Path, checkpoint: str) -> str | None:
        there = sorted(folder.rglob("*"))
        listed = sorted(folder.glob("part-*.json"))
        if any(path.is_symlink() for path in there):
            return "it contains a link"
        parts = [json.loads(path.read_text()) for path in listed]
        for part in parts:
            seal = part.pop("seal", None)
            if seal is None:
                return "it is not signed"
            if not is_signed(self.key, _content(part), seal):
                return "its signature does not match: it is of another key, or the content was altered"
        world = parts[0]["world"] if parts else 0
        whose = {(part["job"], part["checkpoint"], part["step"], part["world"]) for part in parts}
        if sorted(part["rank"] for part in parts) != list(range(world)) or len(whose) != 1 or not parts:
            return "a worker's part is missing"
        if (parts[0]["job"], parts[0]["checkpoint"]) != (self.job, checkpoint):
            return "it is another checkpoint under this name"
        expected = [item for part in parts for item in part["files"].items()]
        found = {path.relative_to(folder).as_posix() for path in there if path.is_file()}
        if found != {name for name, _ in expected} | {path.name for path in listed}:
            return "a file is missing or was added"
        altered = [name for name, digest in expected if not hmac.compare_digest(file_digest(folder / name), digest)]
        return f"{altered[0]} was altered" if altered else None


def _content(part: dict[str, object]) -> bytes:
    return json.dumps(part, sort_keys=True).encode()
