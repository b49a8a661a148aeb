"""A table's row of a config that is refused: the file, the field, what it is set to, and a decisive word of why."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from expunge.errors import InputError
from tests.families.tiny import edit

INDEX, SCHEDULER = "model_index.json", "scheduler/scheduler_config.json"


@dataclass(frozen=True)
class Refusal:
    file: str
    field: str
    value: object
    word: str
    """Of the message or its hint."""
    also: tuple[tuple[str, object], ...] = ()
    """Other fields that are set beside it."""

    def __str__(self) -> str:
        return f"{Path(self.file).parent.name or 'index'}-{self.field}-{str(self.value)[:16]}"

    @contextmanager
    def in_place(self, folder: Path) -> Iterator[None]:
        before = (folder / self.file).read_text()
        edit(folder / self.file, {self.field: self.value, **dict(self.also)})
        try:
            yield
        finally:
            (folder / self.file).write_text(before)

    def is_raised_by(self, ask: Callable[[], object], label: str) -> None:
        """The message begins with the model, and names the file, the field and the reason."""
        with pytest.raises(InputError, match=self.field) as refused:
            ask()
        message = str(refused.value)
        assert message.startswith(f"{label}: ")
        assert f"{self.file}: {self.field} is " in message
        assert self.word in message
