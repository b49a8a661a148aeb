"""How far a job has got: one small JSON file, which the waiting command reads."""

import json
from dataclasses import dataclass
from pathlib import Path

from expunge.files import write_atomically

STAGES = ("wait", "prepare", "examine", "train", "evaluate", "register", "done")
"""The stages of a job, in order."""

STAGE_ADVANCE = 100_000
"""What a stage adds to `advance`, which grows by 1 with each step inside it."""


@dataclass(frozen=True)
class Progress:
    path: Path

    def read(self) -> tuple[str, int, int]:
        """Return (stage, done, total); ("wait", 0, 0) before the job has started, or if the file is damaged."""
        try:
            at = json.loads(self.path.read_bytes())
            stage, done, total = at["stage"], int(at["done"]), int(at["total"])
            return (stage, done, total) if stage in STAGES else ("wait", 0, 0)
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return "wait", 0, 0

    def __call__(self, stage: str, done: int = 0, total: int = 0) -> None:
        """Record that the job has done `done` of the `total` steps of a stage. Raises OSError."""
        write_atomically(self.path, json.dumps({"stage": stage, "done": done, "total": total}))

    def advance(self) -> int:
        """Return a number that grows with each stage, and with each step inside it."""
        stage, done, _ = self.read()
        return STAGES.index(stage) * STAGE_ADVANCE + min(done, STAGE_ADVANCE - 1)
