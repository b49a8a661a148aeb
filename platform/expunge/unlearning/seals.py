"""Who wrote a checkpoint. Its files are pickles, which run what they hold: nothing is loaded before this is known.

Every worker leaves a `part-N.json` beside its files: their digests and whose they are, signed with a key that comes
from the sealing key.
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
        """Sign what this worker's part of the checkpoint of this name consists of. Raises OSError."""
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
        """Say what is wrong; None where every part is there and every file is as this job's workers wrote it."""
        try:
            return self._wrong(folder, checkpoint)
        except OSError as error:
            return f"it cannot be read ({error.strerror})"
        except (ValueError, KeyError, TypeError, AttributeError):
            return "a part-N.json of it is cut short, or not of this version"

    def _wrong(self, folder: Path, checkpoint: str) -> str | None:
        there = sorted(folder.rglob("*"))
        listed = sorted(folder.glob("part-*.json"))
        if any(path.is_symlink() for path in there):
            return "it holds a link"
        parts = [json.loads(path.read_text()) for path in listed]
        for part in parts:
            seal = part.pop("seal", None)
            if seal is None:
                return "it is not signed"
            if not is_signed(self.key, _content(part), seal):
                return "its signature is of another key, or of something else"
        world = parts[0]["world"] if parts else 0
        whose = {(part["job"], part["checkpoint"], part["step"], part["world"]) for part in parts}
        if sorted(part["rank"] for part in parts) != list(range(world)) or len(whose) != 1 or not parts:
            return "a worker's part is missing"
        if (parts[0]["job"], parts[0]["checkpoint"]) != (self.job, checkpoint):
            return "it is another checkpoint under this name"
        expected = [item for part in parts for item in part["files"].items()]
        found = {path.relative_to(folder).as_posix() for path in there if path.is_file()}
        if found != {name for name, _ in expected} | {path.name for path in listed}:
            return "a file is missing, or one too many"
        altered = [name for name, digest in expected if not hmac.compare_digest(file_digest(folder / name), digest)]
        return f"{altered[0]} was altered" if altered else None


def _content(part: dict[str, object]) -> bytes:
    return json.dumps(part, sort_keys=True).encode()
